"""Against PyTorch's own schedules, where PyTorch is installed: the same tables by name, read both ways.

`torch.distributed.pipelining.schedules` makes its tables from stages that need no process group to be counted, so
stand-ins do. What it calls a table is an order for each device: ours are compared in asynchronous time, where only
order counts. Written against PyTorch 2.14; the names with an underscore are its own.
"""

import types
from pathlib import Path
from typing import Any

import pytest

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.cost import Costs, cost
from shardlab.pipeline.schedules import SCHEDULES, Schedule, make_schedule
from shardlab.pipeline.table_csv import from_csv, read_csv, to_csv

torch = pytest.importorskip("torch")
theirs: Any = pytest.importorskip("torch.distributed.pipelining.schedules")

GRID = [(stages, microbatches) for stages in (1, 2, 3, 4, 5, 8) for microbatches in (1, 2, 3, 4, 5, 8, 12, 16)]
ROUNDS = [(p, m) for p, m in GRID if m % max(1, m // p) == 0]  # what their interleaved schedules ask for
V = [(p, m) for p, m in GRID if m >= 2 * p]  # what their DualPipeV asks for
ENOUGH = [(p, m) for p, m in ROUNDS if m >= p]
Times = tuple[float, float, float]
TIMES: list[Times] = [(1, 1, 1), (2, 2, 1), (4, 1, 2), (1, 0.5, 0.25)]  # F, I, W: sums of powers of two are exact
EQUAL_OR_LONG_W = TIMES[:3]

NAMES: dict[str, tuple[str, int, list[tuple[int, int]], list[Times]]] = {
    # Their name: ours, virtual stages, the sizes at which the two take the same time, and for which costs.
    "GPipe": ("gpipe", 1, GRID, TIMES),
    "Interleaved1F1B": ("interleaved_1f1b", 2, ROUNDS, TIMES),
    "Interleaved1F1B, 3": ("interleaved_1f1b", 3, ROUNDS, TIMES),
    "LoopedBFS": ("looped_bfs", 2, GRID, TIMES),
    "LoopedBFS, 3": ("looped_bfs", 3, GRID, TIMES),
    "InterleavedZeroBubble, 1": ("zb_h1", 1, ROUNDS, TIMES),
    # Theirs keeps 1F1B's interleaved order and puts W as early as `1f1b_split` does, in time if not in ticks.
    "InterleavedZeroBubble": ("1f1b_split", 2, ENOUGH, TIMES),
    "ZBVZeroBubble": ("zb_v", 2, GRID, TIMES),
    "DualPipeV": ("dualpipe_v", 2, V, EQUAL_OR_LONG_W),
}


def stages_of(device: int, devices: int, virtual: int, placement: str) -> list[Any]:
    """Stand-ins for the stages that one of their devices holds."""
    probe = Schedule("stages", devices, virtual, 1, (), "v" if placement == "v" else "loop")
    return [
        types.SimpleNamespace(
            stage_index=(index := probe.stage_of(device, turn)),
            num_stages=probe.num_stages,
            group_rank=device,
            group_size=devices,
            is_first=index == 0,
            is_last=index == probe.num_stages - 1,
            submod=torch.nn.Identity(),
        )
        for turn in range(virtual)
    ]


def their_csv(name: str, devices: int, microbatches: int, virtual: int, file: Path) -> str:
    """A table of theirs as they write it."""
    kind = theirs.get_schedule_class(name)
    placement = "v" if "V" in name else "loop"
    stages = stages_of(0, devices, virtual, placement)
    if not issubclass(kind, theirs.PipelineScheduleSingle):
        kind(stages, microbatches)._dump_csv(file, format="compute_only")
        return file.read_text()
    order = kind(stages[0], microbatches)._get_pipeline_order()
    # These come with the reductions of gradients, which are no part of compute_only.
    rows = ([str(action) for action in order[device] if action and action.is_compute_op] for device in range(devices))
    return "".join(f"{','.join(row)}\n" for row in rows)


@pytest.mark.parametrize("case", NAMES)
def test_their_tables_are_read_pass_the_checker_and_take_as_long_as_ours(case: str, tmp_path: Path) -> None:
    name, virtual, sizes, times = NAMES[case]
    for devices, microbatches in sizes:
        text = their_csv(case.partition(",")[0], devices, microbatches, virtual, tmp_path / "theirs.csv")
        read = from_csv(text, case, in_order=True)
        ours = make_schedule(name, stages=devices, microbatches=microbatches, virtual=virtual)
        assert (read.num_devices, read.num_virtual, read.num_microbatches) == (devices, virtual, microbatches)
        assert [read.device_of(s) for s in range(read.num_stages)] == [
            ours.device_of(s) for s in range(ours.num_stages)
        ]
        for time in times:
            found, expected = (cost(one, Costs(*time), "async") for one in (read, ours))
            assert (found.makespan, found.ideal) == (expected.makespan, expected.ideal), (devices, microbatches, time)
            assert found.bubble_fraction == expected.bubble_fraction


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 4), (3, 8), (4, 8), (8, 16)])
def test_a_whole_backward_where_ours_is_split_costs_dualpipe_v_one_w(
    devices: int, microbatches: int, tmp_path: Path
) -> None:
    """With W half of I, a stage waits for a whole B of theirs, of ours for the I alone: W, once a step."""
    text = their_csv("DualPipeV", devices, microbatches, 2, tmp_path / "theirs.csv")
    ours = make_schedule("dualpipe_v", stages=devices, microbatches=microbatches)
    costs = Costs(F=1, I=0.5, W=0.25)
    found = cost(from_csv(text, in_order=True), costs, "async").makespan
    assert found == cost(ours, costs, "async").makespan + 0.25


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (1, 4), (2, 3), (3, 4), (4, 8), (8, 12)])
def test_their_1f1b_counts_the_last_devices_microbatches_from_1(
    devices: int, microbatches: int, tmp_path: Path
) -> None:
    """Which the checker sees; from 0 it is ours, and takes as long."""
    text = their_csv("1F1B", devices, microbatches, 1, tmp_path / "theirs.csv")
    *rows, last = text.splitlines()
    if f"{devices - 1}F0" not in last.split(","):
        with pytest.raises(ScheduleError, match=rf", {microbatches + 1} microbatches: \d+ fault"):
            from_csv(text, in_order=True)
        for index in range(microbatches):
            last = last.replace(f"F{index + 1},", f"F{index},")
    read = from_csv("\n".join([*rows, last]), in_order=True)
    ours = make_schedule("1f1b", stages=devices, microbatches=microbatches)
    for time in TIMES:
        found, expected = (cost(one, Costs(*time), "async") for one in (read, ours))
        assert (found.makespan, found.ideal) == (expected.makespan, expected.ideal)


@pytest.mark.parametrize("name", SCHEDULES)
def test_our_tables_are_read_by_theirs_and_end_in_their_simulator(name: str, tmp_path: Path) -> None:
    file = tmp_path / "ours.csv"
    for devices, microbatches in ((1, 1), (2, 3), (3, 2), (4, 8), (5, 12)):
        ours = make_schedule(name, stages=devices, microbatches=microbatches)
        file.write_text(to_csv(ours))
        runtime = theirs._PipelineScheduleRuntime(stages_of(0, devices, ours.num_virtual, ours.placement), microbatches)
        runtime._load_csv(file)
        for device in range(devices):
            row = [str(action) for action in runtime.pipeline_order[device] if action is not None]
            assert row == list(map(str, ours.row(device)))
        assert runtime.stage_index_to_group_rank == {s: ours.device_of(s) for s in range(ours.num_stages)}
        order = {device: [action for action in row if action] for device, row in runtime.pipeline_order.items()}
        with_sends = theirs._add_send_recv(order, ours.device_of, ours.num_stages)
        assert len(theirs._simulate_comms_compute(with_sends, ours.device_of, ours.num_stages)) == devices
        runtime._dump_csv(file, format="compute_only")
        assert read_csv(file).ticks == ours.ticks


PASS_THEIRS: dict[str, tuple[list[str], str]] = {
    # Rows, and what ours says.
    "a forward twice": (
        ["0F0,0F1,,,0F1,0B0,0B1", ",1F0,1F1,1B0,1B1"],
        "0F1 runs a second time; it has run in tick 1",
    ),
    "a backward twice": (
        ["0F0,0F1,,,,0B0,0B1", ",1F0,1F1,1B0,1B1,1B1"],
        "1B1 runs a second time; it has run in tick 4",
    ),
    "devices that wait for one another": (
        ["0F0,,0B0,0F1,0B1", ",1F0,1F1,1B0,1B1"],
        "1F1 needs 0F1, which runs in tick 3 on device 0; device 1 waits here for ever",
    ),
    "a microbatch without a backward": (
        ["0F0,0F1,0B0,0I0,0W0"],
        "0B1 is missing (or 0I1 and 0W1)",
    ),
}


@pytest.mark.parametrize("case", PASS_THEIRS)
def test_tables_that_we_refuse_pass_theirs(case: str) -> None:
    rows, message = PASS_THEIRS[case]
    with pytest.raises(ScheduleError) as error:
        from_csv("\n".join(rows))
    assert message in str(error.value)
    actions = {device: [theirs._Action.from_str(cell) for cell in row.split(",")] for device, row in enumerate(rows)}
    microbatches = 2
    found = theirs._validate_schedule(actions, len(rows), len(rows), microbatches)
    assert found == {stage: stage for stage in range(len(rows))}
