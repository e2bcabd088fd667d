"""Programs: phases, slots, and that no action reads anything but its own data."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.actions import Action, Kind, ScheduleError
from shardlab.pipeline.buffers import Program, forward_program, program
from shardlab.pipeline.check import check
from shardlab.pipeline.cost import peak_in_flight
from shardlab.pipeline.iterations import is_uniform
from shardlab.pipeline.schedules import SCHEDULES, Schedule, from_table, make_schedule
from shardlab.pipeline.simulate import simulate

Table = list[list[str | None]]
GRID = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 13)]
F_TABLES = ("f_microbatch", "f_virtual", "f_mail_slot", "f_residual_slot")
B_TABLES = ("b_microbatch", "b_virtual", "b_mail_slot", "b_residual_slot", "b_cut_slot")
W_TABLES = ("w_microbatch", "w_virtual", "w_residual_slot", "w_cut_slot")
ARRIVALS = ("onward_slot", "back_slot", "local_slot")
COLUMNS = ("before_microbatch", "head_microbatch", "head_slot", "finish_microbatch")


def of_all_sizes(name: str) -> Iterator[Schedule]:
    for stages, microbatches in GRID:
        for virtual in (1, 2, 3) if SCHEDULES[name].any_virtual else (None,):
            yield make_schedule(name, stages=stages, microbatches=microbatches, virtual=virtual)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_reads_its_own_data(name: str) -> None:
    for schedule in of_all_sizes(name):
        p = program(schedule)
        assert simulate(p) == tuple(schedule.row(device) for device in range(schedule.num_devices))
        assert p.num_residual_slots == max(peak_in_flight(schedule))
        assert p.split == (name not in ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_forwards_alone_keep_the_order_and_hold_nothing(name: str) -> None:
    for schedule in of_all_sizes(name):
        p = forward_program(schedule)
        rows = tuple(schedule.row(device) for device in range(schedule.num_devices))
        assert (p.num_residual_slots, p.num_cut_slots) == (0, 0)
        assert ran_forwards(p) == tuple(tuple(a for a in row if a.kind == "F") for row in rows)


def ran_forwards(p: Program) -> tuple[tuple[Action, ...], ...]:
    """A program without residuals or head on symbols: one slot of garbage stands for them."""
    phases = tuple(
        dataclasses.replace(
            phase,
            f_residual_slot=tuple((0,) * len(row) for row in phase.f_residual_slot),
            head_microbatch=(-1,) * phase.length,
        )
        for phase in p.phases
    )
    return simulate(dataclasses.replace(p, phases=phases, num_residual_slots=1))


@pytest.mark.parametrize(("stages", "microbatches"), GRID)
def test_slots(stages: int, microbatches: int) -> None:
    one = program(make_schedule("1f1b", stages=stages, microbatches=microbatches))
    assert one.num_mail_slots == min(2, stages, microbatches)
    assert one.num_residual_slots == min(microbatches, 2 * stages - 1)
    gpipe = program(make_schedule("gpipe", stages=stages, microbatches=microbatches))
    assert gpipe.num_mail_slots == gpipe.num_residual_slots == microbatches
    split = program(make_schedule("1f1b_split", stages=stages, microbatches=microbatches))
    assert split.num_cut_slots == min(microbatches, stages)


@pytest.mark.parametrize(("stages", "microbatches"), GRID)
def test_phases(stages: int, microbatches: int) -> None:
    """1F1B: F, then F and B, then B. GPipe: F without and with the head, then B."""

    def phases(name: str) -> list[tuple[tuple[str, ...], bool, int]]:
        p = program(make_schedule(name, stages=stages, microbatches=microbatches))
        return [(phase.cell, phase.head == "always", phase.length) for phase in p.phases]

    warm = stages - 1
    one: list[tuple[tuple[str, ...], bool, int]]
    all_forwards: list[tuple[tuple[str, ...], bool, int]]
    one = [(("F",), False, warm), (("F", "B"), True, microbatches), (("B",), False, warm)]
    all_forwards = [(("F",), False, warm), (("F",), True, microbatches), (("B",), False, microbatches + warm)]
    # Of one microbatch both make the same table, on one device the same cells.
    if microbatches == 1:
        one = all_forwards = one if stages == 1 else all_forwards
    assert phases("1f1b") == [phase for phase in one if phase[-1]]
    assert phases("gpipe") == [phase for phase in all_forwards if phase[-1]]


def test_the_number_of_phases_does_not_grow_with_microbatches() -> None:
    for name in SCHEDULES:
        few, many = (len(program(make_schedule(name, stages=4, microbatches=m)).phases) for m in (12, 64))
        assert few == many <= 4


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 4), (3, 2), (4, 8)])
def test_shapes_and_what_happens_once(name: str, stages: int, microbatches: int) -> None:
    p = program(make_schedule(name, stages=stages, microbatches=microbatches))
    for phase in p.phases:
        for field in (*F_TABLES, *B_TABLES, *W_TABLES, *ARRIVALS, "kind"):
            assert [len(row) for row in getattr(phase, field)] == [stages] * phase.length
        for field in COLUMNS:
            assert len(getattr(phase, field)) == phase.length
        idle = [
            field
            for kinds, tables in (("F", F_TABLES), ("BI", B_TABLES), ("W", W_TABLES))
            for field in tables
            if not set(kinds) & set(phase.cell)
        ]
        assert {value for field in idle for row in getattr(phase, field) for value in row} <= {-1}
        assert [slot >= 0 for slot in phase.head_slot] == [mb >= 0 for mb in phase.head_microbatch]
        for when, column in (("before", "before"), ("head", "head"), ("finish", "finish")):
            there = [microbatch >= 0 for microbatch in getattr(phase, f"{column}_microbatch")]
            expected = "always" if all(there) else "sometimes" if any(there) else "never"
            assert getattr(phase, when) == expected
        if phase.divergent:
            columns = (phase.kind, phase.f_microbatch, phase.b_microbatch, phase.w_microbatch)
            for kinds, *microbatches_of in zip(*columns, strict=True):
                for device, kind in enumerate(kinds):
                    assert sum(row[device] >= 0 for row in microbatches_of) == (kind >= 0)
    for field in ("before_microbatch", "head_microbatch", "finish_microbatch"):
        values = [value for phase in p.phases for value in getattr(phase, field) if value >= 0]
        assert values == list(range(microbatches))


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_stage_0_takes_from_before_and_its_ring_neighbour_sends_it_nothing(name: str) -> None:
    p = program(make_schedule(name, stages=4, microbatches=6))
    for phase in p.phases:
        assert {row[0] for row in phase.f_mail_slot} == {-1}
        assert {row[0] for row in phase.onward_slot} == {-1}
        assert {row[-1] for row in phase.back_slot} == {-1}


def test_only_a_v_keeps_what_it_makes() -> None:
    for name in SCHEDULES:
        p = program(make_schedule(name, stages=3, microbatches=6))
        local = {
            device for phase in p.phases for row in phase.local_slot for device, slot in enumerate(row) if slot >= 0
        }
        # The turn at the far end, where x goes from stage 2 to stage 3, and the cotangent back.
        assert local == ({2} if name in ("zb_v", "dualpipe_v") else set())


def long_way_round(devices: int, virtual: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards, through stages that go round the ring `virtual` times; M <= P."""
    stages = devices * virtual
    length = stages + microbatches - 1

    def tick(kind: Kind, index: int) -> tuple[Action | None, ...]:
        row: list[Action | None] = [None] * devices
        for microbatch in range(microbatches):
            stage = index - microbatch if kind == "F" else stages - 1 - index + microbatch
            if 0 <= stage < stages:
                row[stage % devices] = Action(stage, kind, microbatch)
        return tuple(row)

    kinds: tuple[Kind, ...] = ("F", "B")
    ticks = tuple(tick(kind, index) for kind in kinds for index in range(length))
    return Schedule("long way round", devices, virtual, microbatches, ticks)


@pytest.mark.parametrize(("devices", "virtual", "microbatches"), [(1, 3, 1), (2, 2, 2), (3, 2, 3), (4, 3, 2)])
def test_virtual_stages(devices: int, virtual: int, microbatches: int) -> None:
    schedule = long_way_round(devices, virtual, microbatches)
    check(schedule)
    p = program(schedule)
    assert simulate(p) == tuple(schedule.row(device) for device in range(devices))
    assert p.num_residual_slots == max(peak_in_flight(schedule)) == virtual * microbatches


def replace_field(p: Program, phase: int, field: str, value: object) -> Program:
    changes: dict[str, Any] = {field: value}
    changed = dataclasses.replace(p.phases[phase], **changes)
    return dataclasses.replace(p, phases=(*p.phases[:phase], changed, *p.phases[phase + 1 :]))


def replace_cell(p: Program, phase: int, field: str, row: int, device: int, value: int) -> Program:
    table = [list(cells) for cells in getattr(p.phases[phase], field)]
    table[row][device] = value
    return replace_field(p, phase, field, tuple(map(tuple, table)))


SLOT_FIELDS = {
    "f_residual_slot": "num_residual_slots",
    "b_residual_slot": "num_residual_slots",
    "w_residual_slot": "num_residual_slots",
    "b_cut_slot": "num_cut_slots",
    "w_cut_slot": "num_cut_slots",
    "f_mail_slot": "num_mail_slots",
    "b_mail_slot": "num_mail_slots",
    **dict.fromkeys(ARRIVALS, "num_mail_slots"),
}


@settings(max_examples=600, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    stages=st.integers(2, 5),
    microbatches=st.integers(2, 6),
    delayed=st.booleans(),
    data=st.data(),
)
def test_another_slot_is_garbage_or_a_neighbours(
    name: str, stages: int, microbatches: int, delayed: bool, data: st.DataObject
) -> None:
    """A slot moved, or an arrival not stored: some action reads what is not its own."""
    p = program(make_schedule(name, stages=stages, microbatches=microbatches, delayed=delayed))
    cells = [
        (index, field, row, device, slot)
        for index, phase in enumerate(p.phases)
        for field in SLOT_FIELDS
        for row, slots in enumerate(getattr(phase, field))
        for device, slot in enumerate(slots)
        if slot >= 0
    ]
    index, field, row, device, slot = data.draw(st.sampled_from(cells))
    # One more slot than the program has: garbage stands there.
    wider = dataclasses.replace(p, **{(count := SLOT_FIELDS[field]): getattr(p, count) + 1})
    others = [other for other in range(getattr(wider, count)) if other != slot]
    if field in (*ARRIVALS, "f_mail_slot"):
        others.append(-1)
    broken = replace_cell(wider, index, field, row, device, data.draw(st.sampled_from(others)))
    with pytest.raises(ScheduleError, match=r"reads (garbage|x|residuals|cotangent|cut)"):
        simulate(broken)


def test_before_head_and_finish_of_another_microbatch() -> None:
    p = program(make_schedule("1f1b", stages=2, microbatches=2))
    simulate(p)
    with pytest.raises(ScheduleError, match=r"^0F0 reads x of microbatch 1 for stage 0, not x of microbatch 0"):
        simulate(replace_field(p, 0, "before_microbatch", (1,)))
    with pytest.raises(ScheduleError, match=r"^the head of microbatch 1 runs in an iteration without 1F1$"):
        simulate(replace_field(p, 1, "head_microbatch", (1, 0)))
    with pytest.raises(ScheduleError, match=r"^0B1 finishes microbatch 0$"):
        simulate(replace_field(p, 2, "finish_microbatch", (0,)))


def test_a_value_is_not_overwritten_while_live() -> None:
    """Microbatch 1 arrives before stage 1 has read microbatch 0: two input slots, not one."""
    table = [["0F0", None], ["0F1", None], [None, "1F0"], [None, "1F1"]]
    backwards = [[None, "1B0"], ["0B0", None], [None, "1B1"], ["0B1", None]]
    schedule = from_table([*table, *backwards], microbatches=2)
    check(schedule)
    p = program(schedule)
    assert (p.num_mail_slots, p.num_residual_slots) == (2, 2)
    assert simulate(p) == (schedule.row(0), schedule.row(1))


def test_idle_ticks_cost_no_iteration() -> None:
    table = make_schedule("1f1b", stages=2, microbatches=3).table()
    gaps = [row for tick in table for row in ([None, None], tick)]
    assert program(from_table(gaps, microbatches=3)).phases == program(from_table(table, microbatches=3)).phases


REFUSED: dict[str, tuple[Table, str]] = {
    "missing action": (
        [["0F0"], ["0F1"], ["0B0"]],
        "schedule 'table': 0B1 is missing; run the checker to see every fault",
    ),
    "read before it is there": (
        [["0F0", "1F0"], ["0F1", None], [None, "1F1"], [None, "1B0"], ["0B0", "1B1"], ["0B1", None]],
        "schedule 'table': stage 1 reads what it needs of microbatch 0 before it is there; run the checker "
        "to see every fault",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with(case: str) -> None:
    table, message = REFUSED[case]
    with pytest.raises(ScheduleError) as error:
        program(from_table(table, microbatches=2))
    assert str(error.value) == message


def test_is_uniform() -> None:
    assert is_uniform(make_schedule("1f1b", stages=3, microbatches=4))
    assert not is_uniform(make_schedule("zb_h1", stages=3, microbatches=4))
