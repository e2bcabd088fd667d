"""Pictures, against tests/golden/schedules."""

from pathlib import Path

import pytest

from shardlab.pipeline.draw import draw
from shardlab.pipeline.schedules import Schedule, from_table, make_schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules"

PICTURES: dict[str, Schedule] = {
    f"{name}_{stages}x{microbatches}": make_schedule(name, stages=stages, microbatches=microbatches)
    for name, stages, microbatches in [
        ("gpipe", 1, 4),
        ("gpipe", 4, 8),
        ("1f1b", 1, 4),
        ("1f1b", 4, 2),
        ("1f1b", 4, 8),
        ("1f1b", 12, 16),
    ]
}
PICTURES["split_and_virtual"] = from_table(
    [["0F0"], ["1F0"], ["1I0"], ["0B0"], [None], ["1W0"]], microbatches=1, virtual=2, name="mine"
)


@pytest.mark.parametrize("case", PICTURES)
def test_picture(case: str) -> None:
    assert draw(PICTURES[case]) + "\n" == (GOLDEN / f"{case}.txt").read_text()


@pytest.mark.parametrize("width", [1, 40, 80, 100])
def test_lines_fit_and_hold_every_tick_once(width: int) -> None:
    schedule = make_schedule("1f1b", stages=12, microbatches=110)
    lines = draw(schedule, width=width).splitlines()[2:]
    ticks = [int(tick) for line in lines if line.startswith("tick") for tick in line.split()[1:]]
    assert ticks == list(range(len(schedule.ticks)))
    if width > 1:  # one tick needs its room
        assert max(map(len, lines)) <= width
    last = [text for line in lines if line.startswith("device 11") for text in line.split()[2:]]
    assert [text for text in last if text != "."] == [f"{a.kind}{a.microbatch}" for a in schedule.row(11)]
