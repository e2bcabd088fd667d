"""The memory of a pipelined step as the TPU compiler reports it: the schedule's own, not the microbatch count's.

`benchmarks/pipeline_memory.py` compiles offline for v5e-16, 4 stages x 4 tensor, 16 layers of 2048/8192 in bfloat16,
every residual kept; each schedule here in a process of its own. Residuals and cuts of a microbatch take what makes two
schedules differ that differ in the number of those alone. Needs libtpu, and no TPU:

    pip install 'shardlab[tpu]' && python -m pytest -m tpu
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Found:
    """MiB of temporaries a device: as the compiler sums them, the most alive at once, and the plan's working copy and
    gradients."""

    reported: int
    live: int
    planned: int


@functools.cache
def temporaries(schedule: str, microbatches: int) -> Found:
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
    found = re.search(rf"^{schedule} +{microbatches} .*?(\d+) MiB +(\d+) MiB +(\d+) MiB", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return Found(*map(int, found.groups()))


def slots(schedule: str, microbatches: int) -> tuple[float, float]:
    """Of residuals and of cuts, in whole stages: as many as the table needs on the device that holds the most."""
    made = program(make_schedule(schedule, stages=4, microbatches=microbatches))
    return made.num_residual_slots / made.schedule.num_virtual, made.num_cut_slots / made.schedule.num_virtual


def residual_slot(of: str) -> float:
    """MiB of a microbatch's residuals in one stage, from two schedules that differ in their slots alone."""
    more, fewer = (getattr(temporaries(name, 16), of) for name in ("gpipe", "1f1b"))
    return float(more - fewer) / (slots("gpipe", 16)[0] - slots("1f1b", 16)[0])


def cut_slot(of: str) -> float:
    """MiB of what I hands to W for a microbatch in one stage."""
    assert slots("1f1b_split", 16)[0] == slots("1f1b", 16)[0]
    more, fewer = (getattr(temporaries(name, 16), of) for name in ("1f1b_split", "1f1b"))
    return float(more - fewer) / slots("1f1b_split", 16)[1]


def test_1f1b_does_not_grow_with_the_microbatches() -> None:
    """From 7 on, 2 (P - 1) + 1, it holds as many; of 4 it holds 4, which is less, by three slots."""
    assert [slots("1f1b", count)[0] for count in (4, 16, 64)] == [4, 7, 7]
    few, some, many = (temporaries("1f1b", count).reported for count in (4, 16, 64))
    assert many == pytest.approx(some, rel=0.02)
    assert few == pytest.approx(some - 3 * residual_slot("reported"), rel=0.02)


def test_interleaved_1f1b_holds_fewer_slots_than_1f1b() -> None:
    assert slots("interleaved_1f1b", 16) == (5.5, 0)
    predicted = temporaries("1f1b", 16).reported - 1.5 * residual_slot("reported")
    assert temporaries("interleaved_1f1b", 16).reported == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize(("schedule", "microbatches"), [("zb_h1", 16), ("zb_v", 8)])
def test_divergent_schedules_hold_what_plan_and_table_say(schedule: str, microbatches: int) -> None:
    """Weights, gradients and slots, and nothing twice: with their cells in conditionals they reported 70 % more."""
    residuals, cuts = slots(schedule, microbatches)
    found = temporaries(schedule, microbatches)
    predicted = found.planned + residuals * residual_slot("live") + cuts * cut_slot("live")
    assert found.reported == pytest.approx(predicted, rel=0.15)
