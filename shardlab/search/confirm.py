"""The best plans compiled for their target, one after another, each by a `shardlab compile` of its own.

A compiler may end the process that it runs in; and what is confirmed is what that verb reports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shardlab.run.config import Config
from shardlab.search.choice import Choice, changed
from shardlab.search.estimate import Estimate
from shardlab.search.plan_file import PlanFile, write_plan

_TOLD = ("hbm_bytes", "fits", "wire_bytes", "estimate_seconds", "mfu", "bound_by", "compile_seconds", "versions")


def confirm(
    path: str, config: Config, given: Mapping[str, Any], best: Iterable[Estimate], target: str
) -> dict[Choice, dict[str, Any]]:
    """Of each plan what its compiled step takes, or under ``error`` what compiling it said.

    Args:
      path: of the config's file.
      config: with what was given anew.
      given: scalars of the config that were given anew, by name.
      best: the plans.
      target: what to compile for.
    """
    return {one.choice: compiled(path, config, given, one.choice, target) for one in best}


def compiled(path: str, config: Config, given: Mapping[str, Any], choice: Choice, target: str) -> dict[str, Any]:
    """What `shardlab compile` reports of one plan."""
    overrides = choice.overrides(target)
    with tempfile.TemporaryDirectory(prefix="shardlab-") as folder:
        file = Path(folder, "plan.json")
        write_plan(file, PlanFile(path, given, overrides, changed(config, overrides).plan()))
        done = subprocess.run(
            [sys.executable, "-m", "shardlab", "compile", path, "--plan", str(file), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode not in (0, 1) or not done.stdout.strip():
        said = [line for line in done.stderr.splitlines() if line.startswith("shardlab: ")] or [done.stderr.strip()]
        return {"error": said[-1].removeprefix("shardlab: "), "fits": False}
    told = json.loads(done.stdout)
    return {name: told.get(name) for name in _TOLD}
