"""The tables of gpipe and 1f1b, against pictures and closed forms; their texts; what is refused."""

import json
from collections.abc import Callable, Iterator

import pytest

from shardlab.pipeline.actions import Action, ScheduleError
from shardlab.pipeline.buffers import is_uniform
from shardlab.pipeline.schedules import SCHEDULES, Schedule, from_table, make_schedule

GRID = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 13)]


def picture(text: str) -> list[list[str | None]]:
    """A table (ticks x devices) from rows of devices, actions without their stage."""
    rows = [line.split() for line in text.strip().splitlines()]
    return [
        [None if row[tick] == "." else f"{device}{row[tick]}" for device, row in enumerate(rows)]
        for tick in range(len(rows[0]))
    ]


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


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), GRID)
def test_one_kind_a_tick_and_no_idle_tick(name: str, stages: int, microbatches: int) -> None:
    schedule = make_schedule(name, stages=stages, microbatches=microbatches)
    assert is_uniform(schedule)
    assert all(any(tick) for tick in schedule.ticks)
    assert len(schedule.ticks) == 2 * (microbatches + stages - 1)
    assert sorted((a.stage, a.kind, a.microbatch) for _, _, a in cells(schedule)) == sorted(
        (stage, kind, microbatch) for stage in range(stages) for kind in "FB" for microbatch in range(microbatches)
    )
    assert all(device == action.stage for _, device, action in cells(schedule))


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
    assert from_table(table, microbatches=microbatches, name=name) == schedule
    assert hash(from_table(table, microbatches=microbatches, name=name)) == hash(schedule)


def test_stages_and_devices_with_virtual_stages() -> None:
    schedule = from_table([["2F0", None]], microbatches=1, virtual=2)
    assert (schedule.num_devices, schedule.num_virtual, schedule.num_stages) == (2, 2, 4)
    assert [schedule.device_of(stage) for stage in range(4)] == [0, 1, 0, 1]
    assert schedule.row(0) == (Action(2, "F", 0),)
    assert schedule.row(1) == ()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "typo": (
        lambda: make_schedule("1f1", stages=4, microbatches=8),
        "schedule '1f1': unknown, there are gpipe, 1f1b; did you mean '1f1b'?",
    ),
    "capitals": (
        lambda: make_schedule("GPipe", stages=4, microbatches=8),
        "schedule 'GPipe': unknown, there are gpipe, 1f1b; did you mean 'gpipe'?",
    ),
    "nothing near": (
        lambda: make_schedule("zzz", stages=4, microbatches=8),
        "schedule 'zzz': unknown, there are gpipe, 1f1b; choose one of these",
    ),
    "counts, all at once": (
        lambda: make_schedule("1f1b", stages=0, microbatches=-2, virtual=0),
        "stages is 0, microbatches is -2, virtual is 0; a schedule needs at least 1 of each",
    ),
    "virtual stages": (
        lambda: make_schedule("gpipe", stages=4, microbatches=8, virtual=2),
        "schedule 'gpipe': holds 1 stage per device, not 2 (8 stages on 4 devices); write virtual=1, so that "
        "each device holds its layers as one stage",
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
