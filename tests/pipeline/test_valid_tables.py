"""Whatever table the checker passes runs: its program reads only what is its own, and every reading of it agrees."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.buffers import forward_program, program
from shardlab.pipeline.check import find_faults
from shardlab.pipeline.cost import Costs, cost, peak_in_flight
from shardlab.pipeline.iterations import is_uniform
from shardlab.pipeline.schedules import Schedule
from shardlab.pipeline.simulate import simulate
from shardlab.pipeline.table_csv import from_csv, to_csv
from tests.pipeline.tables import valid_table
from tests.pipeline.test_buffers import ran_forwards
from tests.pipeline.test_check import runs

TABLES = st.builds(
    valid_table, st.randoms(use_true_random=True), devices=st.integers(1, 8), microbatches=st.integers(1, 7)
)


def rows(schedule: Schedule) -> tuple[object, ...]:
    return tuple(schedule.row(device) for device in range(schedule.num_devices))


@settings(max_examples=300, deadline=None)
@given(schedule=TABLES)
def test_the_checker_and_the_oracle_pass_it(schedule: Schedule) -> None:
    assert find_faults(schedule) == ()
    assert runs(schedule)


@settings(max_examples=300, deadline=None)
@given(schedule=TABLES)
def test_its_program_reads_its_own_data_in_as_few_slots_as_it_holds(schedule: Schedule) -> None:
    p = program(schedule)
    assert simulate(p) == rows(schedule)
    assert p.num_residual_slots == max(peak_in_flight(schedule))
    assert p.split == any(action.kind == "W" for tick in schedule.ticks for action in tick if action)
    assert all(phase.divergent for phase in p.phases) or is_uniform(schedule)
    for what in ("before", "head", "finish"):
        column = [index for phase in p.phases for index in getattr(phase, f"{what}_microbatch") if index >= 0]
        assert sorted(column) == list(range(schedule.num_microbatches))


@settings(max_examples=150, deadline=None)
@given(schedule=TABLES)
def test_its_forwards_alone_keep_their_order(schedule: Schedule) -> None:
    forwards = tuple(tuple(a for a in schedule.row(d) if a.kind == "F") for d in range(schedule.num_devices))
    assert ran_forwards(forward_program(schedule)) == forwards


@settings(max_examples=150, deadline=None)
@given(schedule=TABLES)
def test_it_comes_back_from_csv_and_in_order_is_no_later(schedule: Schedule) -> None:
    again = from_csv(to_csv(schedule))
    assert again.ticks == schedule.ticks
    assert (again.num_virtual, again.num_microbatches) == (schedule.num_virtual, schedule.num_microbatches)
    ordered = from_csv(to_csv(schedule), in_order=True)
    assert rows(ordered) == rows(schedule)
    assert len(ordered.ticks) <= len(schedule.ticks)
    # Where its cells stood makes no difference then.
    closed_up = "\n".join(",".join(map(str, schedule.row(device))) for device in range(schedule.num_devices))
    assert from_csv(closed_up, in_order=True) == ordered


@settings(max_examples=150, deadline=None)
@given(schedule=TABLES, times=st.tuples(*[st.sampled_from([0.25, 1.0, 2.0])] * 3), send=st.sampled_from([0.0, 0.5]))
def test_waiting_for_ones_own_data_takes_no_longer_than_for_all_devices(
    schedule: Schedule, times: tuple[float, float, float], send: float
) -> None:
    """And neither less than the busiest device works, nor than one microbatch takes through all stages and back."""
    costs = Costs(*times, send=send)
    alone, together = cost(schedule, costs, "async"), cost(schedule, costs, "lockstep")
    assert alone.makespan <= together.makespan
    assert alone.ideal == together.ideal <= alone.makespan
    forward, inputs, _ = times
    assert alone.makespan >= schedule.num_stages * (forward + inputs)
