"""The contract of `shardlab compile`: what other programs read of it, the files it writes, its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIG = "tests/run/tiny.py"
PIPELINE = "configs/pipeline_1f1b.py"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


@dataclass(frozen=True)
class Done:
    """A `shardlab compile` in a process of its own."""

    status: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        """The one JSON object on standard output; anything beside it is an error here."""
        return json.loads(self.out)


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shardlab", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=600)
    return Done(process.returncode, out, err)


def shardlab(*arguments: object) -> Done:
    return finished(started(*arguments))
