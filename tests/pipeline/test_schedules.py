"""The tables of the schedules, against pictures and what must hold of each; their texts; what is refused."""

import json
from collections.abc import Callable, Iterator

import pytest

from shardlab.pipeline.actions import Action, ScheduleError
from shardlab.pipeline.iterations import is_uniform
from shardlab.pipeline.schedules import SCHEDULES, Schedule, from_table, make_schedule
from shardlab.pipeline.uniform import rounds

GRID = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 13)]


def picture(text: str) -> list[list[str | None]]:
    """A table (ticks x devices) from rows of devices; actions without their stage are of the device's only one."""
    rows = [line.split() for line in text.strip().splitlines()]

    def action(cell: str, device: int) -> str | None:
        return None if cell == "." else cell if cell[0].isdigit() else f"{device}{cell}"

    return [[action(row[tick], device) for device, row in enumerate(rows)] for tick in range(len(rows[0]))]


PICTURES = {
    ("gpipe", 3, 3): """
        F0 F1 F2 .  .  .  .  B0 B1 B2
        .  F0 F1 F2 .  .  B0 B1 B2 .
        .  .  F0 F1 F2 B0 B1 B2 .  .
    """,
    ("gpipe", 1, 3): "F0 F1 F2 B0 B1 B2",
    ("1f1b", 3, 3): """
        F0 F1 F2 .  .  .  .  B0 B1 B2
        .  F0 F1 .  F2 B0 .  B1 B2 .
        .  .  F0 B0 F1 B1 F2 B2 .  .
    """,
    ("1f1b", 1, 3): "F0 B0 F1 B1 F2 B2",
    ("1f1b", 3, 1): """
        F0 .  .  .  .  B0
        .  F0 .  .  B0 .
        .  .  F0 B0 .  .
    """,
    ("1f1b", 2, 5): """
        F0 F1 .  F2 B0 F3 B1 F4 B2 .  B3 B4
        .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 .
    """,
    ("interleaved_1f1b", 2, 2): """
        0F0 0F1 2F0 2F1 .   .   2B0 2B1 0B0 0B1
        .   1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 .
    """,
    ("looped_bfs", 2, 2): """
        0F0 0F1 2F0 2F1 .   .   2B0 2B1 0B0 0B1
        .   1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1 .
    """,
    # W stands where both devices have one: two ticks after the last stage's I.
    ("1f1b_split", 2, 3): """
        F0 F1 .  F2 I0 W0 .  I1 W1 I2 W2
        .  F0 I0 F1 I1 W0 F2 I2 W1 .  W2
    """,
    # Figure 3 of arXiv 2401.10241 in unit times, for three devices and four microbatches.
    ("zb_h1", 3, 4): """
        F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """,
    ("zb_h2", 2, 3): """
        F0 F1 F2 I0 W0 I1 W1 I2 W2 .
        .  F0 I0 F1 I1 F2 I2 W0 W1 W2
    """,
    ("zb_v", 2, 3): """
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
        .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """,
}


@pytest.mark.parametrize(("name", "stages", "microbatches"), PICTURES)
def test_table_is_the_picture(name: str, stages: int, microbatches: int) -> None:
    schedule = make_schedule(name, stages=stages, microbatches=microbatches)
    assert schedule.table() == picture(PICTURES[name, stages, microbatches])


def cells(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for index, tick in enumerate(schedule.ticks):
        for device, action in enumerate(tick):
            if action is not None:
                yield index, device, action


UNIFORM = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "1f1b_split")


def of_all_sizes(name: str) -> Iterator[Schedule]:
    """A schedule for every number of devices, microbatches (non-multiples too) and virtual stages."""
    for stages, microbatches in GRID:
        for virtual in (1, 2, 3) if SCHEDULES[name].any_virtual else (None,):
            yield make_schedule(name, stages=stages, microbatches=microbatches, virtual=virtual)


@pytest.mark.parametrize("name", SCHEDULES)
def test_everything_once_on_its_device_and_no_idle_tick(name: str) -> None:
    for schedule in of_all_sizes(name):
        assert all(any(tick) for tick in schedule.ticks)
        assert name not in UNIFORM or is_uniform(schedule)
        kinds = sorted({action.kind for _, _, action in cells(schedule)})
        assert kinds == (["B", "F"] if name in ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs") else ["F", "I", "W"])
        assert sorted((a.stage, a.kind, a.microbatch) for _, _, a in cells(schedule)) == sorted(
            (stage, kind, microbatch)
            for stage in range(schedule.num_stages)
            for kind in kinds
            for microbatch in range(schedule.num_microbatches)
        )
        assert all(device == schedule.device_of(action.stage) for _, device, action in cells(schedule))


def test_schedules_that_branch() -> None:
    for name in set(SCHEDULES) - set(UNIFORM):
        assert not is_uniform(make_schedule(name, stages=4, microbatches=8))


@pytest.mark.parametrize("name", ["zb_v", "dualpipe_v"])
def test_a_v_turns_at_its_ends(name: str) -> None:
    schedule = make_schedule(name, stages=4, microbatches=8)
    assert [schedule.device_of(stage) for stage in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [[schedule.stage_of(device, virtual) for virtual in (0, 1)] for device in range(4)] == [
        [0, 7],
        [1, 6],
        [2, 5],
        [3, 4],
    ]


def test_rounds_hold_every_microbatch_and_at_least_one_for_each_device() -> None:
    for stages, microbatches in GRID:
        sizes = rounds(stages, microbatches)
        assert sum(sizes) == microbatches
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        assert microbatches < stages or sizes[-1] >= stages


@pytest.mark.parametrize(("stages", "microbatches"), GRID)
def test_1f1b_places_actions_by_cell(stages: int, microbatches: int) -> None:
    """F of microbatch f on stage s in cell f+s, B of j in cell (P-1)+j+(P-1-s); F first in a cell."""
    schedule = make_schedule("1f1b", stages=stages, microbatches=microbatches)
    order = [next(action.kind for action in tick if action) for tick in schedule.ticks]
    warm = stages - 1
    assert order == ["F"] * warm + ["F", "B"] * microbatches + ["B"] * warm
    ticks_of = {kind: [tick for tick, k in enumerate(order) if k == kind] for kind in "FB"}
    for tick, _, action in cells(schedule):
        cell = ticks_of[action.kind].index(tick) + (warm if action.kind == "B" else 0)
        lag = action.stage if action.kind == "F" else 2 * warm - action.stage
        assert cell == action.microbatch + lag


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (3, 2), (4, 8)])
def test_table_through_json_and_back(name: str, stages: int, microbatches: int) -> None:
    schedule = make_schedule(name, stages=stages, microbatches=microbatches)
    table = json.loads(json.dumps(schedule.table()))
    again = from_table(
        table, microbatches=microbatches, virtual=schedule.num_virtual, placement=schedule.placement, name=name
    )
    assert again == schedule
    assert hash(again) == hash(schedule)


def test_stages_and_devices_with_virtual_stages() -> None:
    schedule = from_table([["2F0", None]], microbatches=1, virtual=2)
    assert (schedule.num_devices, schedule.num_virtual, schedule.num_stages) == (2, 2, 4)
    assert [schedule.device_of(stage) for stage in range(4)] == [0, 1, 0, 1]
    assert schedule.row(0) == (Action(2, "F", 0),)
    assert schedule.row(1) == ()


NAMES = "gpipe, 1f1b, interleaved_1f1b, looped_bfs, 1f1b_split, zb_h1, zb_h2, zb_v, dualpipe_v"
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "typo": (
        lambda: make_schedule("1f1", stages=4, microbatches=8),
        f"schedule '1f1': unknown, there are {NAMES}; did you mean '1f1b'?",
    ),
    "capitals": (
        lambda: make_schedule("GPipe", stages=4, microbatches=8),
        f"schedule 'GPipe': unknown, there are {NAMES}; did you mean 'gpipe'?",
    ),
    "nothing near": (
        lambda: make_schedule("qqq", stages=4, microbatches=8),
        f"schedule 'qqq': unknown, there are {NAMES}; choose one of these",
    ),
    "counts, all at once": (
        lambda: make_schedule("1f1b", stages=0, microbatches=-2, virtual=0),
        "stages is 0, microbatches is -2, virtual is 0; a schedule needs at least 1 of each",
    ),
    "virtual stages": (
        lambda: make_schedule("gpipe", stages=4, microbatches=8, virtual=2),
        "schedule 'gpipe': a device holds 1 of its stages, not 2 (8 stages on 4 devices); write virtual=1, or take one "
        "that holds any number: interleaved_1f1b, looped_bfs, 1f1b_split",
    ),
    "one virtual stage on a V": (
        lambda: make_schedule("zb_v", stages=4, microbatches=8, virtual=1),
        "schedule 'zb_v': a device holds 2 of its stages, not 1 (4 stages on 4 devices); write virtual=2, or take one "
        "that holds any number: interleaved_1f1b, looped_bfs, 1f1b_split",
    ),
    "placement": (
        lambda: from_table([["0F0"], ["0B0"]], microbatches=1, placement="w"),  # type: ignore[arg-type]
        "schedule 'table': placement 'w' is not 'loop' or 'v'",
    ),
    "ragged table": (
        lambda: from_table([["0F0", None], ["0B0"]], microbatches=1),
        "schedule 'table': tick 1 has 1 cells for 2 devices; give every tick one action or None per device",
    ),
    "no ticks": (
        lambda: from_table([], microbatches=1, name="mine"),
        "schedule 'mine': the table has no ticks; give it at least an F and a B",
    ),
    "no cells": (
        lambda: from_table([[]], microbatches=1),
        "devices is 0; a schedule needs at least 1 of each",
    ),
    "a text that is no action": (
        lambda: from_table([["0G0"]], microbatches=1),
        "action '0G0': not a stage, a kind (F, B, I, W) and a microbatch; write it as '2F0'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with(case: str) -> None:
    ask, message = REFUSED[case]
    with pytest.raises(ScheduleError) as error:
        ask()
    assert str(error.value) == message
