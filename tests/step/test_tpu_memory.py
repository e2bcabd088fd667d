"""The memory of a pipelined step as the TPU compiler reports it: the schedule's own, not the microbatch count's.

`benchmarks/pipeline_memory.py` compiles offline for v5e-16, 4 stages x 4 tensor, 16 layers of 2048/8192 in bfloat16,
every residual kept; each schedule here in a process of its own. Needs libtpu, and no TPU:

    pip install 'shardlab[tpu]' && python -m pytest -m tpu
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardlab.pipeline.buffers import program
from shardlab.pipeline.schedules import make_schedule

pytestmark = pytest.mark.tpu
ROOT = Path(__file__).parents[2]


@functools.cache
def temporaries(schedule: str, microbatches: int) -> int:
    """MiB a device."""
    done = subprocess.run(
        [sys.executable, "benchmarks/pipeline_memory.py", f"{schedule}:{microbatches}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(rf"^{schedule} +{microbatches} .*?(\d+) MiB", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return int(found[1])


def slots(schedule: str, microbatches: int) -> tuple[float, float]:
    """Of residuals and of cuts, in whole stages: as many as the table needs on the device that holds the most."""
    made = program(make_schedule(schedule, stages=4, microbatches=microbatches))
    return made.num_residual_slots / made.schedule.num_virtual, made.num_cut_slots / made.schedule.num_virtual


def residual_slot() -> float:
    """MiB of a microbatch's residuals in one stage, from two schedules that differ in their slots alone."""
    more, fewer = slots("gpipe", 16)[0], slots("1f1b", 16)[0]
    return (temporaries("gpipe", 16) - temporaries("1f1b", 16)) / (more - fewer)


def cut_slot() -> float:
    """MiB of what I hands to W for a microbatch in one stage."""
    assert slots("1f1b_split", 16)[0] == slots("1f1b", 16)[0]
    return (temporaries("1f1b_split", 16) - temporaries("1f1b", 16)) / slots("1f1b_split", 16)[1]


def predicted(schedule: str, microbatches: int) -> float:
    """MiB, from the table: those of 1F1B, with other numbers of slots."""
    residuals, cuts = slots(schedule, microbatches)
    of_residuals = (residuals - slots("1f1b", 16)[0]) * residual_slot()
    return temporaries("1f1b", 16) + of_residuals + (cuts * cut_slot() if cuts else 0)


def test_1f1b_does_not_grow_with_the_microbatches() -> None:
    """From 7 on, 2 (P - 1) + 1, it holds as many; of 4 it holds 4, which is less, by three slots."""
    assert [slots("1f1b", count)[0] for count in (4, 16, 64)] == [4, 7, 7]
    assert temporaries("1f1b", 64) == pytest.approx(temporaries("1f1b", 16), rel=0.02)
    assert temporaries("1f1b", 4) == pytest.approx(predicted("1f1b", 4), rel=0.02)


@pytest.mark.parametrize(("schedule", "microbatches"), [("interleaved_1f1b", 16), ("zb_h1", 16), ("zb_v", 8)])
def test_schedules_hold_what_their_tables_predict(schedule: str, microbatches: int) -> None:
    assert temporaries(schedule, microbatches) == pytest.approx(predicted(schedule, microbatches), rel=0.15)
