"""The checker: passes what we make, agrees with a simulator on any table, and prints the bad cell."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.actions import Action, Kind, ScheduleError
from shardlab.pipeline.check import check, find_faults
from shardlab.pipeline.schedules import SCHEDULES, Schedule, from_table, make_schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules"

Table = list[list[str | None]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_passes_what_we_make(name: str) -> None:
    for stages in range(1, 9):
        for microbatches in (1, 2, 3, 5, 8, 12):
            for virtual in (1, 2, 3) if SCHEDULES[name].any_virtual else (None,):
                schedule = make_schedule(name, stages=stages, microbatches=microbatches, virtual=virtual)
                check(schedule)
                check(split(schedule))
                assert runs(schedule)


def split(schedule: Schedule) -> Schedule:
    """The same with every B as an I, and its W in a tick right after."""
    ticks: list[tuple[Action | None, ...]] = []
    for tick in schedule.ticks:
        if any(action is not None and action.kind == "B" for action in tick):
            for kind in ("I", "W"):
                ticks.append(tuple(a and Action(a.stage, kind, a.microbatch) for a in tick))
        else:
            ticks.append(tick)
    return Schedule(
        schedule.name,
        schedule.num_devices,
        schedule.num_virtual,
        schedule.num_microbatches,
        tuple(ticks),
        schedule.placement,
    )


def runs(schedule: Schedule) -> bool:
    """Whether a lock-step machine that passes messages computes the step: the oracle, written apart.

    Messages are sets of (stage they are for, microbatch); what is sent in a tick can be read from the next, from the
    one after where sends are delayed and another device reads it.
    """
    last = schedule.num_stages - 1
    work = [(stage, mb) for stage in range(last + 1) for mb in range(schedule.num_microbatches)]
    activations = {(0, mb) for mb in range(schedule.num_microbatches)}
    cotangents: set[tuple[int, int]] = set()
    residuals: set[tuple[int, int]] = set()
    cuts: set[tuple[int, int]] = set()
    forwards: list[tuple[int, int]] = []
    gradients: list[tuple[int, int]] = []
    on_their_way: list[tuple[set[tuple[int, int]], tuple[int, int]]] = []
    for tick in schedule.ticks:
        arriving, on_their_way = on_their_way, []
        sent: list[tuple[set[tuple[int, int]], int, tuple[int, int]]] = []
        for device, action in enumerate(tick):
            if action is None:
                continue
            key = (action.stage, action.microbatch)
            place, turn = action.stage % schedule.num_devices, action.stage // schedule.num_devices
            if schedule.placement == "v" and turn % 2:
                place = schedule.num_devices - 1 - place
            if place != device or key not in work:
                return False
            if action.kind == "F":
                if key not in activations:
                    return False
                activations.remove(key)
                residuals.add(key)
                forwards.append(key)
                if action.stage == last:
                    cotangents.add(key)
                else:
                    sent.append((activations, device, (action.stage + 1, action.microbatch)))
            elif action.kind == "W":
                if key not in cuts:
                    return False
                cuts.remove(key)
                gradients.append(key)
            else:
                if key not in residuals or key not in cotangents:
                    return False
                residuals.remove(key)
                cotangents.remove(key)
                if action.kind == "I":
                    cuts.add(key)
                else:
                    gradients.append(key)
                if action.stage > 0:
                    sent.append((cotangents, device, (action.stage - 1, action.microbatch)))
        for box, message in arriving:
            box.add(message)
        for box, device, message in sent:
            turn, place = divmod(message[0], schedule.num_devices)
            if schedule.placement == "v" and turn % 2:
                place = schedule.num_devices - 1 - place
            if schedule.delayed and place != device:
                on_their_way.append((box, message))
            else:
                box.add(message)
    return sorted(forwards) == work and sorted(gradients) == work


def drop(ticks: Table, rng: random.Random) -> None:
    tick, device = rng.choice(busy(ticks))
    ticks[tick][device] = None


def swap(ticks: Table, rng: random.Random) -> None:
    """Two cells of one row, idle ones too."""
    device = rng.randrange(len(ticks[0]))
    a, b = rng.randrange(len(ticks)), rng.randrange(len(ticks))
    ticks[a][device], ticks[b][device] = ticks[b][device], ticks[a][device]


def swap_ticks(ticks: Table, rng: random.Random) -> None:
    a, b = rng.randrange(len(ticks)), rng.randrange(len(ticks))
    ticks[a], ticks[b] = ticks[b], ticks[a]


def repeat(ticks: Table, rng: random.Random) -> None:
    """One action once more, in a tick of its own."""
    tick, device = rng.choice(busy(ticks))
    row: list[str | None] = [None] * len(ticks[0])
    row[device] = ticks[tick][device]
    ticks.insert(rng.randrange(len(ticks) + 1), row)


def other_device(ticks: Table, rng: random.Random) -> None:
    for row in ticks:
        row.append(None)
    tick, device = rng.choice(busy(ticks))
    ticks[tick][-1], ticks[tick][device] = ticks[tick][device], None
    for row in ticks:
        row.reverse()


def relabel(ticks: Table, rng: random.Random) -> None:
    tick, device = rng.choice(busy(ticks))
    stage, kind, microbatch = rng.randrange(5), rng.choice("FBIW"), rng.randrange(5)
    ticks[tick][device] = f"{stage}{kind}{microbatch}"


def whole_and_split(ticks: Table, rng: random.Random) -> None:
    """An I or a W beside a B, or in its place."""
    at = [(t, d) for t, d in busy(ticks) if "B" in str(ticks[t][d])]
    if at:
        tick, device = rng.choice(at)
        part = str(ticks[tick][device]).replace("B", rng.choice("IW"))
        if rng.random() < 0.5:
            ticks[tick][device] = part
        else:
            row: list[str | None] = [None] * len(ticks[0])
            row[device] = part
            ticks.insert(tick + rng.randrange(2), row)


def busy(ticks: Table) -> list[tuple[int, int]]:
    return [(t, d) for t, row in enumerate(ticks) for d, text in enumerate(row) if text is not None]


MUTATIONS = [drop, swap, swap_ticks, repeat, other_device, relabel, whole_and_split]


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    stages=st.integers(1, 4),
    microbatches=st.integers(1, 4),
    halves=st.booleans(),
    mutations=st.lists(st.sampled_from(MUTATIONS), max_size=3),
    rng=st.randoms(use_true_random=False),
)
def test_agrees_with_the_oracle_on_mutated_tables(
    name: str,
    stages: int,
    microbatches: int,
    halves: bool,
    mutations: list[Callable[[Table, random.Random], None]],
    rng: random.Random,
) -> None:
    schedule = make_schedule(name, stages=stages, microbatches=microbatches)
    table = (split(schedule) if halves else schedule).table()
    for mutate in mutations:
        if busy(table):
            mutate(table, rng)
    mutated = from_table(table, microbatches=microbatches, virtual=schedule.num_virtual, placement=schedule.placement)
    assert (find_faults(mutated) == ()) == runs(mutated)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["drop", "repeat", "other stage", "other microbatch"])
def test_no_single_action_can_change(name: str, kind: str) -> None:
    """Every action in turn, with the fault found in its own cell (or named as missing)."""
    schedule = make_schedule(name, stages=3, microbatches=4)
    count = schedule.num_stages
    for tick, device in busy(schedule.table()):
        action = schedule.ticks[tick][device]
        assert action is not None
        table = schedule.table()
        if kind == "drop":
            table[tick][device] = None
            expected: tuple[int | None, int | None] = (None, None)
        elif kind == "repeat":
            row: list[str | None] = [None] * 3
            row[device] = str(action)
            table.append(row)
            expected = (len(table) - 1, device)
        elif kind == "other stage":
            others = ((action.stage + step) % count for step in (1, 2))
            other = next(stage for stage in others if schedule.device_of(stage) != device)
            table[tick][device] = str(Action(other, action.kind, action.microbatch))
            expected = (tick, device)
        else:
            table[tick][device] = str(Action(action.stage, action.kind, 4))
            expected = (tick, device)
        changed = from_table(table, microbatches=4, virtual=schedule.num_virtual, placement=schedule.placement)
        faults = find_faults(changed)
        assert expected in {(fault.tick, fault.device) for fault in faults}


def at(schedule: Schedule, **changes: str | None) -> Schedule:
    """A schedule with cells changed: t4d2="2F0" puts that action in tick 4 of device 2."""
    table = schedule.table()
    for place, text in changes.items():
        tick, device = place[1:].split("d")
        table[int(tick)][int(device)] = text
    return from_table(table, microbatches=schedule.num_microbatches, name=schedule.name)


ONE = make_schedule("1f1b", stages=3, microbatches=4)
DEADLOCK: Table = [["0F0", "1B0"], ["0B0", "1F0"]]

PRINTED: dict[str, Schedule] = {
    # Of the kinds that PyTorch's _validate_schedule lets pass (test_torch asks it).
    "same_forward_twice": at(ONE, t4d2="2F0"),
    "same_backward_twice": at(ONE, t9d2="2B2"),
    "deadlock": from_table(DEADLOCK, microbatches=1, name="mine"),
    "part_of_a_backward": from_table([["0F0"], ["0F1"], ["0B0"], ["0W0"], ["0I1"]], microbatches=2),
    # Others.
    "read_in_the_tick_it_is_sent": at(ONE, t0d1="1F0", t1d1=None),
    "wrong_device": from_table([["0F0", None], [None, "0B0"], ["1F0", "1B0"]], microbatches=1),
    "no_such_stage_or_microbatch": from_table([["0F0"], ["0B0"], ["1F0"], ["0F7"]], microbatches=1),
    "empty": from_table([[None] * 8], microbatches=64),
}


@pytest.mark.parametrize("case", PRINTED)
def test_printed(case: str) -> None:
    with pytest.raises(ScheduleError) as error:
        check(PRINTED[case])
    assert f"{error.value}\n" == (GOLDEN / f"fault_{case}.txt").read_text()


def test_a_deadlock_is_told_from_data_that_is_late() -> None:
    late = at(make_schedule("gpipe", stages=2, microbatches=1), t0d1="1F0", t1d1=None)
    assert [fault.problem for fault in find_faults(late)] == ["1F0 needs 0F0, which runs in the same tick on device 0"]
    stuck = [fault.problem for fault in find_faults(PRINTED["deadlock"])]
    assert stuck == ["1B0 needs 1F0, which runs in tick 1; device 1 waits here for ever"]


def test_every_kind_there_is() -> None:
    kind: Kind = "Q"  # type: ignore[assignment]
    schedule = Schedule("mine", 1, 1, 1, ((Action(0, "F", 0),), (Action(0, "B", 0),), (Action(0, kind, 0),)))
    assert [fault.problem for fault in find_faults(schedule)] == ["0Q0: there is no kind 'Q', only F, B, I, W"]
