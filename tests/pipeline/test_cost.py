"""Makespan, bubble and peaks against closed forms; the facts for programs."""

import json

import pytest

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.cost import Costs, Mode, cost, idle_fraction, peak_in_flight, schedule_facts
from shardlab.pipeline.schedules import SCHEDULES, from_table, make_schedule

Table = list[list[str | None]]
GRID = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 13)]
# Powers of two sum without rounding, so that times are compared with ==.
TIMES = [(1.0, 1.0, 1.0), (1, 0.5, 0.25), (4, 1, 2), (0, 1, 0)]  # F, I, W


@pytest.mark.parametrize("mode", ["lockstep", "async"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_makespan_and_bubble(name: str, mode: Mode) -> None:
    """(M+P-1)(F+B), a bubble of (P-1)/(M+P-1), on both clocks and for both schedules."""
    for stages, microbatches in GRID:
        schedule = make_schedule(name, stages=stages, microbatches=microbatches)
        for f, i, w in TIMES:
            got = cost(schedule, Costs(f, i, w), mode)
            assert got.makespan == (microbatches + stages - 1) * (f + i + w)
            assert got.ideal == microbatches * (f + i + w)
            assert got.bubble_fraction == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-15)
            assert got.idle == ((stages - 1) * (f + i + w),) * stages


MANY = [(stages, rounds * stages + more) for stages in range(1, 9) for rounds in (2, 3) for more in (0, 1)]
"""Devices, and at least twice as many microbatches: what the formulas of the zero-bubble schedules ask for."""
VIRTUAL = (1, 2, 3)
UNEQUAL = [(1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (2.0, 3.0, 2.0), (1.0, 2.0, 1.0), (4.0, 4.0, 4.0), (1.0, 1.0, 0.5)]


@pytest.mark.parametrize("virtual", VIRTUAL)
@pytest.mark.parametrize("mode", ["lockstep", "async"])
@pytest.mark.parametrize("name", ["interleaved_1f1b", "looped_bfs"])
def test_virtual_stages_divide_the_bubble(name: str, mode: Mode, virtual: int) -> None:
    """(M V + P - 1)(F + B) of one virtual stage, on both clocks, whether or not P divides M."""
    for stages, microbatches in MANY:
        schedule = make_schedule(name, stages=stages, microbatches=microbatches, virtual=virtual)
        for f, i, w in UNEQUAL:
            expected = (microbatches * virtual + stages - 1) * (f + i + w)
            assert cost(schedule, Costs(f, i, w), mode).makespan == expected


@pytest.mark.parametrize("virtual", VIRTUAL)
def test_aligned_w_leaves_the_bubble_of_f_and_i(virtual: int) -> None:
    """(M V + P - 1)(F + I) + M V W in step."""
    for stages, microbatches in MANY:
        schedule = make_schedule("1f1b_split", stages=stages, microbatches=microbatches, virtual=virtual)
        for f, i, w in UNEQUAL:
            expected = (microbatches * virtual + stages - 1) * (f + i) + microbatches * virtual * w
            assert cost(schedule, Costs(f, i, w)).makespan == expected


def test_zero_bubble_schedules_wait_as_published() -> None:
    """ZB-H1: the makespan's bubble. ZB-H2, ZB-V: what a device waits between its first and last action."""
    for stages, microbatches in MANY:
        made = {
            name: make_schedule(name, stages=stages, microbatches=microbatches) for name in ("zb_h1", "zb_h2", "zb_v")
        }
        for f, i, w in UNEQUAL:
            found = {name: cost(schedule, Costs(f, i, w), "async") for name, schedule in made.items()}
            assert found["zb_h1"].makespan - found["zb_h1"].ideal == (stages - 1) * (f + i - w)
            assert max(found["zb_h2"].waiting) == (stages - 1) * max(0, f + i - 2 * w)
            assert max(found["zb_v"].waiting) == (stages - 1) * max(0, 2 * (i - w), i - f)


def test_overheads_in_step() -> None:
    """P=8, M=32, B=2F, over the ideal: 7 ticks of F+B, F+I or F of 96 or, with two stages a device, of 192."""

    def over(name: str) -> float:
        at = cost(make_schedule(name, stages=8, microbatches=32), Costs(1, 1, 1))
        return at.makespan - at.ideal

    assert {name: over(name) for name in SCHEDULES} == {
        "gpipe": 21,
        "1f1b": 21,
        "interleaved_1f1b": 21,
        "looped_bfs": 21,
        "1f1b_split": 14,
        "zb_h1": 7,
        "zb_h2": 7,
        "zb_v": 7,
        "dualpipe_v": 7,
    }


def test_peaks() -> None:
    """What each schedule holds on device r, where P divides M: the formulas of its docstring."""
    for stages, microbatches in GRID:
        devices = range(stages)

        def peaks(
            name: str, virtual: int | None = None, stages: int = stages, microbatches: int = microbatches
        ) -> tuple[int, ...]:
            return peak_in_flight(make_schedule(name, stages=stages, microbatches=microbatches, virtual=virtual))

        assert peaks("gpipe") == (microbatches,) * stages
        one = tuple(min(microbatches, 2 * (stages - 1 - r) + 1) for r in devices)
        assert peaks("1f1b") == one
        schedule = make_schedule("1f1b", stages=stages, microbatches=microbatches)
        assert cost(schedule, mode="async").peak_in_flight == cost(schedule).peak_in_flight == one
        assert max(peaks("zb_h1")) <= stages
        assert max(peaks("zb_h2")) <= 2 * stages - 1
        assert max(peaks("zb_v")) <= 2 * stages
        assert max(peaks("dualpipe_v")) <= 2 * stages + 1
        for virtual in VIRTUAL:
            most = microbatches * virtual
            assert peaks("looped_bfs", virtual) == (most,) * stages
            if microbatches % stages == 0:
                held = stages * (virtual - 1)
                assert peaks("interleaved_1f1b", virtual) == tuple(
                    min(most, held + 2 * (stages - 1 - r) + 1) for r in devices
                )
                assert peaks("1f1b_split", virtual) == tuple(min(most, held + 2 * stages - 1 - r) for r in devices)


def test_costs_by_stage() -> None:
    """The tick lasts as long as the longest stage; the busiest device's work is the ideal."""
    schedule = make_schedule("gpipe", stages=2, microbatches=3)
    costs = Costs(F=(1, 4), I=(1, 4), W=1)
    at = cost(schedule, costs)
    assert at.makespan == (1 + 3 * 4) + (3 * 5 + 2)
    assert at.ideal == 3 * 4 + 3 * 5
    assert at.idle == (30 - 3 * 3, 3)
    assert costs.B == (2, 5)
    with pytest.raises(ScheduleError) as error:
        cost(schedule, Costs(F=(1, 2, 3)))
    assert str(error.value) == "costs: F has 3 times for 2 stages; give one for each, or one for all"


def test_what_a_device_sends() -> None:
    """Every x but the last stage's and every cotangent but the first's; on a V the turns stay on their devices."""
    assert cost(make_schedule("1f1b", stages=3, microbatches=4)).sends == (4, 8, 4)
    assert cost(make_schedule("interleaved_1f1b", stages=2, microbatches=4)).sends == (12, 12)
    assert cost(make_schedule("zb_v", stages=3, microbatches=4)).sends == (8, 16, 8)


def test_one_action_a_tick_is_dearer_in_step() -> None:
    """Two stages, 1F1B one action a tick: in step a tick with an F and a B lasts as long as the B."""
    table: Table = [
        ["0F0", None],
        ["0F1", "1F0"],
        [None, "1B0"],
        ["0B0", "1F1"],
        [None, "1B1"],
        ["0B1", None],
    ]
    schedule = from_table(table, microbatches=2)
    costs = Costs(F=1, I=1, W=1)
    assert cost(schedule, costs, "lockstep").makespan == 1 + 1 + 2 + 2 + 2 + 2
    assert cost(schedule, costs, "async").makespan == 9
    assert cost(schedule, costs, "lockstep").idle == (4, 4)


def test_a_split_backward_holds_until_its_w() -> None:
    """W off the critical path: the previous stage starts when the I is done."""
    table: Table = [["0F0", None], [None, "1F0"], [None, "1I0"], ["0I0", "1W0"], ["0W0", None]]
    schedule = from_table(table, microbatches=1)
    assert cost(schedule, Costs(F=1, I=2, W=4), "async").makespan == 1 + 1 + 2 + 2 + 4
    assert cost(schedule, Costs(F=1, I=2, W=4), "lockstep").makespan == 1 + 1 + 2 + 4 + 4
    late = from_table([["0F0"], ["0I0"], ["0F1"], ["0I1"], ["0W0"], ["0W1"]], microbatches=2)
    assert peak_in_flight(late) == (2,)


def test_sends() -> None:
    """Async, a send is paid where an arrival is waited for; in step, in every tick that sends."""
    schedule = make_schedule("gpipe", stages=3, microbatches=1)
    assert cost(schedule, Costs(F=1, I=1, W=0, send=10), "async").makespan == 6 + 4 * 10
    # Six ticks: the last stage's F and the first stage's B send nothing.
    assert cost(schedule, Costs(F=1, I=1, W=0, send=10), "lockstep").makespan == 6 + 4 * 10
    # Two virtual stages on one device send nothing, W sends nothing.
    alone = from_table([["0F0"], ["1F0"], ["1I0"], ["1W0"], ["0B0"]], microbatches=1, virtual=2)
    for mode in ("lockstep", "async"):
        assert cost(alone, Costs(F=1, I=1, W=1, send=10), mode).makespan == 6
    split = from_table([["0F0", None], [None, "1F0"], [None, "1I0"], ["0B0", "1W0"]], microbatches=1)
    assert cost(split, Costs(F=1, I=1, W=1, send=10), "lockstep").makespan == 1 + 10 + 1 + 1 + 10 + 2


def test_ideal_counts_virtual_stages() -> None:
    table = [["0F0"], ["1F0"], ["1B0"], ["0B0"]]
    got = cost(from_table(table, microbatches=1, virtual=2), Costs(F=1, I=1, W=1))
    assert (got.makespan, got.ideal, got.bubble_fraction, got.idle) == (6, 6, 0, (0,))


def test_facts_are_json() -> None:
    schedule = make_schedule("1f1b", stages=2, microbatches=3)
    facts = json.loads(json.dumps(schedule_facts(schedule, Costs(F=1, I=2, W=1))))
    assert facts == {
        "name": "1f1b",
        "stages": 2,
        "virtual": 1,
        "microbatches": 3,
        "sends": "direct",
        "costs": {"F": 1, "I": 2, "W": 1, "send": 0},
        "table": [
            ["0F0", None],
            ["0F1", "1F0"],
            [None, "1B0"],
            ["0F2", "1F1"],
            ["0B0", "1B1"],
            [None, "1F2"],
            ["0B1", "1B2"],
            ["0B2", None],
        ],
        "lockstep": {"makespan": 16, "bubble_fraction": 0.25},
        "async": {"makespan": 16, "bubble_fraction": 0.25},
        "peak_in_flight": [3, 1],
    }


def test_costs_that_are_none() -> None:
    with pytest.raises(ScheduleError) as error:
        Costs(F=-1, I=float("nan"), send=float("inf"))
    assert str(error.value) == ("costs: F is -1, I is nan, send is inf; give every cost as a finite time of at least 0")
    with pytest.raises(ScheduleError) as error:
        Costs(F=0, I=0, W=0)
    assert str(error.value) == "costs: F, I and W are all 0; give at least one of them a time"


@pytest.mark.parametrize("name", SCHEDULES)
def test_idle_is_the_bubble_where_stages_are_even(name: str) -> None:
    made = make_schedule(name, stages=3, microbatches=6)
    assert idle_fraction(made, (2,) * made.num_stages) == pytest.approx(cost(made).bubble_fraction)


def test_slots_that_fill_a_shorter_stage_are_idle() -> None:
    """GPipe, 2 stages, 3 microbatches: 4 F ticks and 4 B ticks, of which a stage works in 3, B twice as long as F."""
    made = make_schedule("gpipe", stages=2, microbatches=3)
    assert idle_fraction(made, (3, 1)) == pytest.approx(1 - (3 + 1) * 3 * 3 / (2 * 3 * 12))
    assert idle_fraction(made, (3, 0), Costs(F=1, I=0, W=0)) == pytest.approx(1 - 3 * 3 / (2 * 3 * 4))


def test_a_deadlock_ends() -> None:
    with pytest.raises(ScheduleError, match=r"^schedule 'table': deadlock; run the checker to see where$"):
        cost(from_table([["0B0"], ["0F0"]], microbatches=1), mode="async")


def test_virtual_stages_of_one_device_are_counted_together() -> None:
    """zb_v, whose four stages go down two devices and back: eight blocks in three slots each."""
    schedule = make_schedule("zb_v", stages=2, microbatches=4)
    ticks = cost(schedule).makespan
    assert ticks == len(schedule.ticks)
    assert idle_fraction(schedule, (3, 2, 2, 1)) == pytest.approx(1 - 4 * 3 * 8 / (2 * 3 * ticks), abs=1e-15)
