"""Schedules as CSV, in the format that PyTorch's pipelining calls `compute_only`.

A row per device, a column per tick, in each cell an action such as ``2F0``, ``0I3`` or ``1W3``, or nothing:

    0F0,0F1,,0B0,0B1
    ,1F0,1B0,1F1,1B1

Tables move between the two: `torch.distributed.pipelining` reads and writes them with `_load_csv` and `_dump_csv`.
Source: torch/distributed/pipelining/schedules.py, 2.13.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from shardlab.pipeline.actions import Action, ScheduleError, Tick, parse_action
from shardlab.pipeline.check import check
from shardlab.pipeline.schedules import Placement, Schedule


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


def from_csv(text: str, name: str = "table", *, delayed: bool = False) -> Schedule:
    """The schedule that a CSV text describes, checked.

    How many stages, microbatches and virtual stages there are is read from its actions, and so is where the stages
    sit: round and round the devices, or back and forth (a V). Rows may differ in length. The format knows no delayed
    sends: that they are is said by `delayed`, and a column without actions is then a tick in which only sends go on.

    Raises:
        ScheduleError: a cell that is no action, with its row and column; stages that sit in neither way; a table that
            computes no train step, printed with the bad cells marked.

    >>> from_csv("0F0,0B0\\n").num_stages
    1
    """
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if not rows:
        raise ScheduleError(f"schedule '{name}': the CSV has no rows; write one for each device")
    cells: list[list[Action | None]] = []
    for device, row in enumerate(rows):
        cells.append([])
        for tick, cell in enumerate(row):
            try:
                cells[-1].append(parse_action(cell.strip()) if cell.strip() else None)
            except ScheduleError as error:
                raise ScheduleError(f"schedule '{name}': row {device + 1}, column {tick + 1}: {error}") from None
    length = max(map(len, cells))
    ticks: tuple[Tick, ...] = tuple(zip(*([*row, *[None] * (length - len(row))] for row in cells), strict=True))
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
    schedule = Schedule(name, devices, virtual, microbatches, ticks, _placement(ticks, devices, name), delayed)
    check(schedule)
    return schedule


def read_csv(path: str | Path, *, delayed: bool = False) -> Schedule:
    """The schedule in a CSV file, named after it; `delayed` says whether its sends are.

    Raises:
        ScheduleError: no such file, or one that `from_csv` refuses.
    """
    file = Path(path)
    if not file.is_file():
        raise ScheduleError(f"schedule {str(path)!r}: there is no such file; give a CSV with a row for each device")
    return from_csv(file.read_text(), file.stem, delayed=delayed)


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
