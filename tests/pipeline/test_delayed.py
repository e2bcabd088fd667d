"""Delayed sends: what a tick makes travels during the next one. Tables, checker, cost, programs."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.automatic import automatic
from shardlab.pipeline.buffers import breadth_first, forward_program, program
from shardlab.pipeline.check import check, find_faults
from shardlab.pipeline.cost import Costs, cost, peak_in_flight
from shardlab.pipeline.draw import draw
from shardlab.pipeline.iterations import is_uniform
from shardlab.pipeline.schedules import SCHEDULES, Schedule, from_table, make_schedule
from shardlab.pipeline.simulate import simulate
from shardlab.pipeline.table_csv import from_csv, to_csv
from tests.pipeline.test_check import MUTATIONS, Table, busy, runs
from tests.pipeline.test_schedules import picture

GRID = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 13)]
UNIFORM = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "1f1b_split")


def made(name: str, stages: int, microbatches: int, virtual: int | None = None, *, delayed: bool = True) -> Schedule:
    return make_schedule(name, stages=stages, microbatches=microbatches, virtual=virtual, delayed=delayed)


def of_all_sizes(name: str) -> Iterator[Schedule]:
    for stages, microbatches in [*GRID, (3, 40), (8, 64)]:
        for virtual in (1, 2, 3) if SCHEDULES[name].any_virtual else (None,):
            yield made(name, stages, microbatches, virtual)


PICTURES = {
    # A tick in between while there are only forwards or only backwards; between them the B travels beside the F.
    ("1f1b", 3, 3): """
        F0 .  F1 .  F2 .  .  .  .  B0 .  B1 .  B2
        .  .  F0 .  F1 .  F2 B0 .  B1 .  B2 .  .
        .  .  .  .  F0 B0 F1 B1 F2 B2 .  .  .  .
    """,
    ("gpipe", 2, 2): """
        F0 .  F1 .  .  .  .  B0 .  B1
        .  .  F0 .  F1 B0 .  B1 .  .
    """,
    # Of enough microbatches, two ticks later on every device instead.
    ("gpipe", 2, 6): """
        F0 F1 F2 F3 F4 F5 .  .  .  .  B0 B1 B2 B3 B4 B5
        .  .  F0 F1 F2 F3 F4 F5 B0 B1 B2 B3 B4 B5 .  .
    """,
    ("1f1b_split", 2, 3): """
        F0 .  F1 .  F2 I0 W0 .  I1 W1 I2 W2
        .  .  F0 I0 F1 I1 W0 F2 I2 W1 .  W2
    """,
    ("zb_h2", 2, 3): """
        F0 F1 F2 .  .  I0 W0 I1 W1 I2 W2
        .  .  F0 I0 F1 I1 F2 I2 W0 W1 W2
    """,
}


@pytest.mark.parametrize(("name", "stages", "microbatches"), PICTURES)
def test_table_is_the_picture(name: str, stages: int, microbatches: int) -> None:
    assert made(name, stages, microbatches).table() == picture(PICTURES[name, stages, microbatches])


def test_one_device_sends_nothing() -> None:
    for name in SCHEDULES:
        late, direct = made(name, 1, 5), made(name, 1, 5, delayed=False)
        assert late.ticks == direct.ticks
        assert dataclasses.replace(program(late), schedule=direct) == program(direct)


@pytest.mark.parametrize("name", SCHEDULES)
def test_checked_uniform_and_with_the_actions_of_direct_sends(name: str) -> None:
    for schedule in of_all_sizes(name):
        check(schedule)
        assert runs(schedule)
        direct = made(name, schedule.num_devices, schedule.num_microbatches, schedule.num_virtual, delayed=False)
        assert is_uniform(schedule) == is_uniform(direct) or name not in UNIFORM
        # The same order on every device, hence the same activations held.
        assert [schedule.row(r) for r in range(schedule.num_devices)] == [
            direct.row(r) for r in range(direct.num_devices)
        ]
        # No tick without actions beside another, at the start or at the end.
        idle = [not any(tick) for tick in schedule.ticks]
        assert not idle[0]
        assert not idle[-1]
        assert not any(a and b for a, b in itertools.pairwise(idle))


# --- checker


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    stages=st.integers(1, 4),
    microbatches=st.integers(1, 4),
    late=st.booleans(),
    mutations=st.lists(st.sampled_from(MUTATIONS), max_size=3),
    rng=st.randoms(use_true_random=False),
)
def test_the_checker_agrees_with_the_oracle(
    name: str,
    stages: int,
    microbatches: int,
    late: bool,
    mutations: list[Callable[[Table, random.Random], None]],
    rng: random.Random,
) -> None:
    """On tables made for delayed sends and for direct ones, and mutated ones, run with delayed sends."""
    schedule = made(name, stages, microbatches, delayed=late)
    table = schedule.table()
    for mutate in mutations:
        if busy(table):
            mutate(table, rng)
    virtual, placement = schedule.num_virtual, schedule.placement
    mutated = from_table(table, microbatches=microbatches, virtual=virtual, placement=placement, delayed=True)
    assert (find_faults(mutated) == ()) == runs(mutated)


def test_what_has_not_arrived_is_marked() -> None:
    early = dataclasses.replace(made("gpipe", 2, 1, delayed=False), delayed=True)
    with pytest.raises(ScheduleError) as error:
        check(early)
    assert str(error.value) == (
        "schedule 'gpipe': 2 stages on 2 devices, 1 microbatch: 2 faults\n"
        "tick  device 0 device 1\n"
        "   0  0F0      .\n"
        "   1  .        [1F0]     <-- 1F0 needs 0F0, which runs in tick 0 on device 0 and, sent a tick later, arrives "
        "for tick 2\n"
        "   2  .        1B0\n"
        "   3  [0B0]    .         <-- 0B0 needs 1B0, which runs in tick 2 on device 1 and, sent a tick later, arrives "
        "for tick 4"
    )


def test_the_turn_of_a_v_waits_for_nothing() -> None:
    """On device 1 stage 2 follows stage 1 in the next tick, and so do the backwards."""
    table: Table = [
        ["0F0", None],
        [None, None],
        [None, "1F0"],
        [None, "2F0"],
        [None, None],
        ["3F0", None],
        ["3B0", None],
    ]
    table += [[None, None], [None, "2B0"], [None, "1B0"], [None, None], ["0B0", None]]
    schedule = from_table(table, microbatches=1, virtual=2, placement="v", delayed=True)
    check(schedule)
    assert simulate(program(schedule)) == (schedule.row(0), schedule.row(1))


# --- cost

TIMES = [(1.0, 1.0, 1.0, 0.25), (2, 1, 1, 1), (1, 0.5, 0.5, 0.5), (4, 2, 2, 0)]  # F, I, W, send; a send fits in each


@pytest.mark.parametrize(("f", "i", "w", "send"), TIMES)
def test_makespan_in_step(f: float, i: float, w: float, send: float) -> None:
    """The closed forms of the docstrings."""
    costs, b = Costs(f, i, w, send), i + w
    for p, m in GRID[12:]:

        def makespan(name: str, virtual: int | None = None, p: int = p, m: int = m) -> float:
            return cost(made(name, p, m, virtual), costs).makespan

        assert makespan("1f1b") == (m + p - 1) * (f + b) + 2 * (p - 1) * send
        apart = (m + p - 1) * (f + b) + 2 * (m + p - 2) * send
        skewed = (m + 2 * (p - 1)) * (f + b)
        assert makespan("gpipe") == (skewed if 6 * (p - 1) <= m + p - 2 else apart)
        if m >= p:
            assert makespan("1f1b_split") == (m + p - 1) * (f + i) + m * w + (p - 1) * send
        if m % p == 0:
            for v in (1, 2, 3):
                expected = (m * v + p - 1) * (f + b) + 2 * (p * v - 1) * send
                assert makespan("interleaved_1f1b", v) == expected


@pytest.mark.parametrize("stages", range(2, 9))
def test_zero_bubble_schedules_in_ticks(stages: int) -> None:
    """The ticks of their docstrings, which no send that fits in a tick makes longer."""
    p = stages
    for m in (2 * p, 3 * p, 6 * p):
        ticks = {name: len(made(name, p, m).ticks) for name in ("zb_h1", "zb_h2", "zb_v", "dualpipe_v")}
        assert ticks == {
            "zb_h1": 4 * m - m // p + 4 * p - 5,
            "zb_h2": 3 * m + 2 * (p - 1),
            "zb_v": 6 * m + 6 * p - 7,
            "dualpipe_v": 6 * m + 6 * p - 8,
        }
        for name, count in ticks.items():
            assert cost(made(name, p, m), Costs(1, 1, 1, send=1)).makespan == count


def test_a_tick_lasts_as_long_as_the_longer_of_work_and_send() -> None:
    table: Table = [
        ["0F0", None],
        [None, None],
        ["0F1", "1F0"],
        [None, "1B0"],
        [None, "1F1"],
        ["0B0", "1B1"],
        [None, None],
    ]
    schedule = from_table([*table, ["0B1", None]], microbatches=2, delayed=True)
    check(schedule)
    # F alone; the send; F and nothing under way; B beside F's send; F beside B's; B; the send; B.
    assert cost(schedule, Costs(F=1, I=1, W=1, send=0.5)).makespan == 1 + 0.5 + 1 + 2 + 1 + 2 + 0.5 + 2
    assert cost(schedule, Costs(F=1, I=1, W=1, send=3)).makespan == 1 + 3 + 1 + 3 + 3 + 2 + 3 + 2
    # On the async clock it is an order of actions like any other.
    direct = dataclasses.replace(schedule, delayed=False)
    assert cost(schedule, Costs(send=0.5), "async") == cost(direct, Costs(send=0.5), "async")


def test_steadily_a_send_that_fits_in_a_tick_costs_nothing() -> None:
    """P=4: from 40 to 80 microbatches 1F1B takes 40 (F+B) longer, and with direct sends 80 sends more."""
    for name, longer in (("1f1b", 120.0), ("1f1b_split", 120.0), ("zb_h2", 120.0)):
        few, many = (cost(made(name, 4, m), Costs(send=0.75)).makespan for m in (40, 80))
        assert many - few == longer
    few, many = (cost(made("1f1b", 4, m, delayed=False), Costs(send=0.75)).makespan for m in (40, 80))
    assert many - few == 120 + 80 * 0.75


@settings(max_examples=25, deadline=None)
@given(
    stages=st.integers(1, 4),
    microbatches=st.integers(1, 7),
    f=st.floats(0.1, 4),
    i=st.floats(0.1, 4),
    w=st.floats(0, 4),
    send=st.floats(0, 3),
    limit=st.one_of(st.none(), st.integers(1, 6)),
)
def test_the_automatic_one_is_as_good_as_every_named_one_that_fits(
    stages: int, microbatches: int, f: float, i: float, w: float, send: float, limit: int | None
) -> None:
    costs = Costs(f, i, w, send)
    found = automatic(stages=stages, microbatches=microbatches, costs=costs, limit=limit, delayed=True)
    check(found.schedule)
    assert simulate(program(found.schedule)) == tuple(found.schedule.row(device) for device in range(stages))
    for name in SCHEDULES:
        for delayed in (False, True):
            schedule = made(name, stages, microbatches, delayed=delayed)
            at = cost(schedule, costs.shared(schedule))
            if max(at.peak_in_flight) <= (limit or microbatches) * schedule.num_virtual:
                assert found.cost.makespan <= at.makespan * (1 + 1e-9)
    assert (
        found.cost.makespan
        <= automatic(stages=stages, microbatches=microbatches, costs=costs, limit=limit).cost.makespan
    )


def test_the_automatic_one_says_which_are_delayed() -> None:
    found = automatic(stages=4, microbatches=8, costs=Costs(send=0.5), delayed=True)
    assert found.schedule.delayed
    assert {"1f1b", "1f1b (delayed)", "1f1b_split (virtual 2, delayed)"} < set(dict(found.beats))
    assert not automatic(stages=4, microbatches=8, costs=Costs(send=0.5)).schedule.delayed


# --- programs


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_reads_its_own_data(name: str) -> None:
    for schedule in of_all_sizes(name):
        p = program(schedule)
        assert simulate(p) == tuple(schedule.row(device) for device in range(schedule.num_devices))
        assert p.num_residual_slots == max(peak_in_flight(schedule))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_number_of_phases_does_not_grow_with_microbatches(name: str) -> None:
    few, many = (len(program(made(name, 4, m)).phases) for m in (24, 64))
    assert few == many <= 4


def test_phases() -> None:
    """Of 1F1B a tick for sends alone while there are only forwards or backwards; then they travel beside the others."""

    def phases(name: str) -> list[tuple[tuple[str | None, ...], int, int]]:
        return [(phase.parts, phase.length, phase.first_step) for phase in program(made(name, 4, 32)).phases]

    assert phases("1f1b") == [(("F", None), 3, 0), (("F", "B"), 32, 0), ((None, "B"), 3, 0)]
    assert phases("gpipe") == [(("F",), 6, 0), (("F",), 32, 0), (("B",), 38, 0)]
    # The last dx before the first W travels in no F tick of the iterations that follow: it is sent before them.
    assert phases("1f1b_split") == [
        (("F", None), 3, 0),
        (("F", "I"), 3, 0),
        (("F", "I", "W"), 29, -1),
        (("I", "W"), 3, 0),
    ]
    assert phases("zb_v") == [(("F", "I", "W"), 6 * 32 + 6 * 4 - 7, 0)]


def test_mail_is_held_from_its_arrival() -> None:
    """What is under way is in the outbox and in no slot: 1F1B needs one slot with delayed sends, two with direct."""
    assert program(made("1f1b", 4, 32)).num_mail_slots == 1
    assert program(made("1f1b", 4, 32, delayed=False)).num_mail_slots == 2


def test_direct_sends_leave_nothing_for_later() -> None:
    for name in SCHEDULES:
        p = program(made(name, 4, 8, delayed=False))
        assert not p.delayed
        assert all(phase.parts == phase.cell and phase.first_step == 0 for phase in p.phases)


def test_forwards_alone_are_sent_direct() -> None:
    for name in SCHEDULES:
        late, direct = (made(name, 3, 5, delayed=delayed) for delayed in (True, False))
        assert forward_program(late).phases == forward_program(direct).phases
        assert not forward_program(late).delayed
        assert breadth_first(late, microbatches=4) == breadth_first(direct, microbatches=4)


def test_what_is_sent_before_a_scan_is_read() -> None:
    p = program(made("1f1b_split", 3, 6))
    (index,) = (index for index, phase in enumerate(p.phases) if phase.first_step)
    assert [slot >= 0 for slot in p.phases[index].first_slot] == [True, True, False]
    lost = dataclasses.replace(p.phases[index], first_step=0)
    with pytest.raises(ScheduleError, match=r"reads (garbage|cotangent)"):
        simulate(dataclasses.replace(p, phases=(*p.phases[:index], lost, *p.phases[index + 1 :])))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    stages=st.integers(2, 4),
    microbatches=st.integers(1, 5),
    late=st.booleans(),
    waits=st.lists(st.integers(0, 2), min_size=80, max_size=80),
)
def test_tables_of_ones_own(name: str, stages: int, microbatches: int, late: bool, waits: list[int]) -> None:
    """Ticks without actions anywhere, as many as there have to be and more."""
    schedule = made(name, stages, microbatches, delayed=late)
    idle = (None,) * stages
    ticks = []
    for index, tick in enumerate(schedule.ticks):
        ticks += [tick, *[idle] * max(waits[index % len(waits)], 0 if late else 1)]
    schedule = dataclasses.replace(schedule, ticks=tuple(ticks), delayed=True)
    check(schedule)
    assert simulate(program(schedule)) == tuple(schedule.row(device) for device in range(stages))


def test_a_program_of_what_has_not_arrived_is_refused() -> None:
    with pytest.raises(ScheduleError, match="stage 0 reads what it needs of microbatch 1 before it is there"):
        program(dataclasses.replace(made("1f1b", 2, 2, delayed=False), delayed=True))


# --- texts


@pytest.mark.parametrize("name", SCHEDULES)
def test_through_csv_and_json_and_back(name: str) -> None:
    schedule = made(name, 3, 4)
    read = from_csv(to_csv(schedule), name, delayed=True)
    assert (read.ticks, read.delayed) == (schedule.ticks, True)
    again = from_table(
        schedule.table(),
        microbatches=4,
        virtual=schedule.num_virtual,
        placement=schedule.placement,
        name=name,
        delayed=True,
    )
    assert again == schedule
    assert not from_csv(to_csv(schedule), name).delayed


def test_drawn() -> None:
    assert draw(made("1f1b", 2, 2)).splitlines() == [
        "1f1b: 2 devices, 2 microbatches, 8 ticks, sends delayed",
        "F0 forward of microbatch 0, B0 backward, . idle",
        "tick       0  1  2  3  4  5  6  7",
        "device 0  F0  . F1  .  . B0  . B1",
        "device 1   .  . F0 B0 F1 B1  .  .",
    ]
