"""The automatic scheduler: never worse than a named schedule that fits, within its limit, and a train step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.automatic import automatic
from shardlab.pipeline.buffers import program
from shardlab.pipeline.check import check
from shardlab.pipeline.cost import Costs, cost, peak_in_flight
from shardlab.pipeline.schedules import SCHEDULES, make_schedule
from shardlab.pipeline.simulate import simulate


@settings(max_examples=40, deadline=None)
@given(
    stages=st.integers(1, 5),
    microbatches=st.integers(1, 8),
    f=st.floats(0.1, 4),
    i=st.floats(0.1, 4),
    w=st.floats(0, 4),
    send=st.floats(0, 1),
    limit=st.one_of(st.none(), st.integers(1, 8)),
)
def test_at_least_as_good_as_every_named_schedule_that_fits(
    stages: int, microbatches: int, f: float, i: float, w: float, send: float, limit: int | None
) -> None:
    found = automatic(stages=stages, microbatches=microbatches, costs=Costs(f, i, w, send), limit=limit)
    check(found.schedule)
    assert simulate(program(found.schedule)) == tuple(found.schedule.row(device) for device in range(stages))
    count = found.schedule.num_virtual
    assert max(peak_in_flight(found.schedule)) <= (limit or microbatches) * count
    shared = Costs(f / count, i / count, w / count, send)
    assert found.cost.makespan == pytest.approx(cost(found.schedule, shared).makespan)
    for name, published in SCHEDULES.items():
        schedule = make_schedule(name, stages=stages, microbatches=microbatches)
        each = published.virtual
        at = cost(schedule, Costs(f / each, i / each, w / each, send))
        if max(at.peak_in_flight) <= (limit or microbatches) * each:
            assert found.cost.makespan <= at.makespan * (1 + 1e-9)


def test_it_says_which_named_schedules_it_beats_or_equals_and_which_are_too_large() -> None:
    found = automatic(stages=4, microbatches=8, limit=4)
    assert found.schedule == make_schedule("zb_v", stages=4, microbatches=8)
    assert dict(found.beats) == {"zb_h1": 27}
    assert found.equals == ()
    assert dict(found.too_large)["dualpipe_v"] == 4.5
    assert {"gpipe", "1f1b", "zb_h2"} < set(dict(found.too_large))
    assert "dualpipe_v" in automatic(stages=4, microbatches=8).equals


def test_it_builds_a_better_one_where_there_is() -> None:
    """Unequal halves of the backward: no named schedule is made for them."""
    found = automatic(stages=4, microbatches=16, costs=Costs(1, 1, 0.5))
    assert found.schedule.name == "automatic"
    assert found.cost.makespan < min(makespan for _, makespan in found.beats)


def test_one_microbatch_at_a_time_fits_every_limit() -> None:
    found = automatic(stages=3, microbatches=4, limit=1)
    assert max(found.cost.peak_in_flight) == 1
    assert found.beats == ()


def test_a_slower_stage_counts() -> None:
    """The last stage is longer by its head: a tick in which it works lasts as long."""
    even = automatic(stages=4, microbatches=8, costs=Costs(1, 1, 1))
    slower = automatic(stages=4, microbatches=8, costs=Costs((1, 1, 1, 1.5), 1, 1))
    assert even.cost.makespan < slower.cost.makespan <= even.cost.makespan + 8 * 0.5


def test_refused() -> None:
    with pytest.raises(ScheduleError) as error:
        automatic(stages=2, microbatches=2, limit=0.5)
    assert str(error.value) == "limit is 0.5; a device holds at least the microbatch that it computes: give 1 or more"
    with pytest.raises(ScheduleError) as error:
        automatic(stages=2, microbatches=2, costs=Costs(F=(1, 2, 3)))
    assert str(error.value) == "costs: F has 3 times for 2 stages; give one for each, or one for all"
