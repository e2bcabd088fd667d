"""Schedules as CSV, in the format that PyTorch's pipelining calls `compute_only`.

A row per device, a column per tick, in each cell an action such as ``2F0``, ``0I3`` or ``1W3``, or nothing:

    0F0,0F1,,0B0,0B1
    ,1F0,1B0,1F1,1B1

Tables move between the two: `torch.distributed.pipelining` reads and writes them with `_load_csv` and `_dump_csv`.
Its devices wait for their data wherever they stand, so that the rows it writes are orders and its columns no ticks;
`in_order` reads them so. Its cell ``(0F3;3B1)OVERLAP_F_B`` is a forward and a backward that overlap: here one, then
the other.
Source: torch/distributed/pipelining/schedules.py, 2.14.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path

from shardlab.pipeline.actions import Action, ScheduleError, Tick, parse_action
from shardlab.pipeline.check import check, find_faults
from shardlab.pipeline.schedules import Placement, Schedule
from shardlab.pipeline.zero_bubble import in_ticks

_OVERLAPPED = re.compile(r"\(([^;()]+);([^;()]+)\)OVERLAP_F_B")


def to_csv(schedule: Schedule) -> str:
    """The schedule as CSV text; `from_csv` gives its table back.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> print(to_csv(make_schedule("gpipe", stages=2, microbatches=1)), end="")
    0F0,,,0B0
    ,1F0,1B0,
    """
    text = io.StringIO()
    rows = zip(*schedule.ticks, strict=True)
    csv.writer(text, lineterminator="\n").writerows(
        ["" if action is None else str(action) for action in row] for row in rows
    )
    return text.getvalue()


def from_csv(text: str, name: str = "table", *, in_order: bool = False, delayed: bool = False) -> Schedule:
    """The schedule that a CSV text describes, checked.

    How many stages, microbatches and virtual stages there are is read from its actions, and so is where the stages
    sit: round and round the devices, or back and forth (a V). Rows may differ in length. The format knows no delayed
    sends: that they are is said by `delayed`, and a column without actions is then a tick in which only sends go on.

    Args:
        in_order: whether the rows are orders, each action to be put in the earliest tick that its data allows, and
            not a table of ticks.

    Raises:
        ScheduleError: a cell that is no action, with its row and column; stages that sit in neither way; a table that
            computes no train step, printed with the bad cells marked.

    >>> from_csv("0F0,0B0\\n").num_stages
    1
    >>> print(to_csv(from_csv("0F0,0B0\\n1F0,1B0\\n", in_order=True)), end="")
    0F0,,,0B0
    ,1F0,1B0,
    """
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if not rows:
        raise ScheduleError(f"schedule '{name}': the CSV has no rows; write one for each device")
    cells: list[list[Action | None]] = []
    for device, row in enumerate(rows):
        cells.append([])
        for tick, cell in enumerate(row):
            try:
                cells[-1] += _actions(cell.strip(), in_order=in_order) or [None]
            except ScheduleError as error:
                raise ScheduleError(f"schedule '{name}': row {device + 1}, column {tick + 1}: {error}") from None
    actions = [action for row in cells for action in row if action is not None]
    if not actions:
        raise ScheduleError(f"schedule '{name}': the CSV has no actions; give it at least an F and a B")
    devices = len(rows)
    virtual, short = divmod(1 + max(action.stage for action in actions), devices)
    if short:
        raise ScheduleError(
            f"schedule '{name}': {virtual * devices + short} stages on {devices} devices; every device holds the same "
            f"number of stages, so use {virtual * devices or devices} or {(virtual + 1) * devices}"
        )
    microbatches = 1 + max(action.microbatch for action in actions)
    if virtual * devices * microbatches > max(1000, 10 * len(actions)):
        # The checker names every action that is missing.
        raise ScheduleError(
            f"schedule '{name}': has {len(actions)} actions, and they speak of {virtual * devices} stages and "
            f"{microbatches} microbatches; every stage has an F and a B of every microbatch: write them all, counting "
            "from 0"
        )
    length = max(map(len, cells))
    ticks: tuple[Tick, ...] = tuple(zip(*([*row, *[None] * (length - len(row))] for row in cells), strict=True))
    schedule = Schedule(name, devices, virtual, microbatches, ticks, _placement(ticks, devices, name), delayed)
    if in_order:
        schedule = _in_order(schedule) or schedule
    try:
        check(schedule)
    except ScheduleError as error:
        waiting = _in_order(schedule)
        if waiting is None or find_faults(waiting):
            raise
        raise ScheduleError(
            f"{error}\nas orders, each device waiting for its data, the rows do compute one: read them with "
            "in_order=True (--in-order)"
        ) from None
    return schedule


def _actions(cell: str, *, in_order: bool) -> Sequence[Action]:
    """What a cell says: an action, nothing, or two that overlap."""
    overlapped = _OVERLAPPED.fullmatch(cell)
    if overlapped is None:
        return [parse_action(cell)] if cell else []
    if not in_order:
        raise ScheduleError(f"{cell!r} is two actions in one tick; read the rows with in_order=True (--in-order)")
    return [parse_action(action.strip()) for action in overlapped.groups()]


def _in_order(schedule: Schedule) -> Schedule | None:
    """Each device's actions in the earliest ticks; None where devices wait for one another for ever."""
    rows = [schedule.row(device) for device in range(schedule.num_devices)]
    try:
        ticks = in_ticks(rows, num_stages=schedule.num_stages, delayed=schedule.delayed)
    except ScheduleError:
        return None
    return dataclasses.replace(schedule, ticks=ticks)


def read_csv(path: str | Path, *, in_order: bool = False, delayed: bool = False) -> Schedule:
    """The schedule in a CSV file, named after it; `in_order` and `delayed` as in `from_csv`.

    Raises:
        ScheduleError: no such file, or one that `from_csv` refuses.
    """
    file = Path(path)
    if not file.is_file():
        raise ScheduleError(f"schedule {str(path)!r}: there is no such file; give a CSV with a row for each device")
    try:
        return from_csv(file.read_text(encoding="utf-8"), file.stem, in_order=in_order, delayed=delayed)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(
            f"schedule {str(path)!r}: cannot be read ({error}); give a CSV with a row for each device"
        ) from None


def _placement(ticks: tuple[Tick, ...], devices: int, name: str) -> Placement:
    """The placement on which the most actions stand; actions on other devices are the checker's to mark."""

    def fitting(placement: Placement) -> int:
        probe = Schedule(name, devices, 1, 1, (), placement)
        return sum(
            probe.device_of(action.stage) == device
            for tick in ticks
            for device, action in enumerate(tick)
            if action is not None
        )

    ways: tuple[Placement, ...] = ("loop", "v")
    return max(ways, key=fitting)
