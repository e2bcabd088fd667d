"""The best plans compiled for their target: what the compiler makes of them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from shardlab.run.config import Config
from shardlab.search.choice import Choice, changed
from shardlab.search.estimate import Estimate


def confirm(config: Config, best: Iterable[Estimate], target: str) -> dict[Choice, dict[str, Any]]:
    """Of each plan what its compiled step takes, or the error that compiling it gave."""
    return {one.choice: compiled(changed(config, one.choice.overrides(target)), one.choice) for one in best}


def compiled(config: Config, choice: Choice) -> dict[str, Any]:
    """HBM and wire bytes of the compiled step of a config."""
    from shardlab.mesh.chips import chip_of
    from shardlab.mesh.offline import compile_devices, compile_options
    from shardlab.report.collectives import collective_rows
    from shardlab.report.memory import memory
    from shardlab.step.compile import compile_train_step

    start = time.perf_counter()
    plan = config.plan()
    try:
        step = compile_train_step(
            config.model,
            config.loss,
            config.make_optimizer(),
            plan,
            config.abstract_batch(),
            devices=compile_devices(plan.mesh.machine),
            compiler_options=compile_options(plan.mesh.machine),
        )
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": "does not fit: " + str(error).partition("\n")[0], "fits": False}
    rows = collective_rows(step.compiled.as_text(), plan.mesh.sizes)
    size = memory(step.compiled).total_bytes
    return {
        "hbm_bytes": size,
        "fits": size <= chip_of(plan.mesh.machine).usable_hbm_bytes,
        "wire_bytes": sum(row["wire_bytes"] for row in rows),
        "compile_seconds": time.perf_counter() - start,
    }
