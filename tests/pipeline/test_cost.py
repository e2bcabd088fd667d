"""Makespan, bubble and peaks against closed forms; the facts for programs."""

import json

import pytest

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.cost import Costs, Mode, cost, peak_in_flight, schedule_facts
from shardlab.pipeline.schedules import SCHEDULES, from_table, make_schedule

Table = list[list[str | None]]
GRID = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 13)]
# Powers of two sum without rounding, so that times are compared with ==.
COSTS = [Costs(), Costs(F=1, I=0.5, W=0.25), Costs(F=4, I=1, W=2), Costs(F=0, I=1, W=0)]


@pytest.mark.parametrize("mode", ["lockstep", "async"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), GRID)
def test_makespan_and_bubble(name: str, stages: int, microbatches: int, mode: Mode) -> None:
    """(M+P-1)(F+B), a bubble of (P-1)/(M+P-1), on both clocks and for both schedules."""
    schedule = make_schedule(name, stages=stages, microbatches=microbatches)
    for costs in COSTS:
        got = cost(schedule, costs, mode)
        assert got.makespan == (microbatches + stages - 1) * (costs.F + costs.I + costs.W)
        assert got.ideal == microbatches * (costs.F + costs.I + costs.W)
        assert got.bubble_fraction == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-15)
        assert got.idle == ((stages - 1) * (costs.F + costs.I + costs.W),) * stages


@pytest.mark.parametrize(("stages", "microbatches"), GRID)
def test_peaks(stages: int, microbatches: int) -> None:
    """GPipe holds M microbatches, 1F1B in step min(M, 2(P-1-s)+1)."""
    gpipe = make_schedule("gpipe", stages=stages, microbatches=microbatches)
    one = make_schedule("1f1b", stages=stages, microbatches=microbatches)
    expected = tuple(min(microbatches, 2 * (stages - 1 - stage) + 1) for stage in range(stages))
    assert peak_in_flight(gpipe) == (microbatches,) * stages
    assert peak_in_flight(one) == expected
    assert cost(one, mode="async").peak_in_flight == cost(one).peak_in_flight == expected


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


def test_a_deadlock_ends() -> None:
    with pytest.raises(ScheduleError, match=r"^schedule 'table': deadlock; run the checker to see where$"):
        cost(from_table([["0B0"], ["0F0"]], microbatches=1), mode="async")
