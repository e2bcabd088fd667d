"""How often a device runs each part of a step, from the program of a schedule; what it keeps meanwhile."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shardlab.pipeline.actions import Kind
from shardlab.pipeline.buffers import Phase, program
from shardlab.pipeline.schedules import make_schedule


@dataclass(frozen=True)
class Ticks:
    """A schedule, counted.

    Attributes:
      lasts: of the ticks, in which some device does one of these kinds: how many there are; a tick lasts as long as
        the longest of its kinds, on every device.
      cells: how often a device runs each kind, masked runs included; of divergent ones the busiest device.
      before, after, finish: how often it runs what comes before the blocks, what comes after them (with its backward),
        and the backward of what comes before.
      residuals, cuts, mail: slots of each buffer.
      work: how often a device runs each kind for a microbatch: the rest is bubble.
      sends: how often it hands something on.
    """

    lasts: tuple[tuple[tuple[Kind, ...], int], ...]
    cells: Mapping[str, int]
    before: int
    after: int
    finish: int
    residuals: int
    cuts: int
    mail: int
    work: Mapping[str, int]
    sends: int


@functools.cache
def ticks(schedule: str, stages: int, microbatches: int, virtual: int, delayed: bool = False) -> Ticks:
    """The counts of a schedule by name.

    >>> found = ticks("1f1b", 4, 8, 1)
    >>> found.cells["F"], found.work["F"], found.residuals
    (11, 8, 7)
    """
    table = make_schedule(schedule, stages=stages, microbatches=microbatches, virtual=virtual or None, delayed=delayed)
    made = program(table)
    lasts: Counter[tuple[Kind, ...]] = Counter()
    cells: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    sends = 0
    for phase in made.phases:
        if phase.divergent:
            for row in phase.kind:
                lasts[tuple(sorted({phase.cell[index] for index in row if index >= 0}))] += 1
            for index, kind in enumerate(phase.cell):
                cells[kind] += max(column.count(index) for column in zip(*phase.kind, strict=True))
            sends += 2 * phase.length
        else:
            for kind in phase.cell:
                lasts[kind,] += phase.length
                cells[kind] += phase.length
            sends += sum(kind in "FBI" for kind in phase.cell) * phase.length
        for name in ("before", "head", "finish"):
            ends[name] += _due(phase, name, table.num_virtual)
    work: Counter[str] = Counter(action.kind for action in table.row(0))
    return Ticks(
        lasts=tuple(lasts.items()),
        cells=cells,
        before=ends["before"],
        after=ends["head"],
        finish=ends["finish"],
        residuals=made.num_residual_slots,
        cuts=made.num_cut_slots,
        mail=made.num_mail_slots,
        work=work,
        sends=sends if stages > 1 else 0,
    )


def _due(phase: Phase, name: str, virtual: int) -> int:
    """In how many iterations of a phase every device runs a part: see `shardlab.step.cells.Cells.where_due`."""
    when = getattr(phase, name)
    if when == "never":
        return 0
    due = getattr(phase, f"{name}_microbatch")
    every = when == "always" or not (virtual > 1 or phase.divergent)
    return phase.length if every else sum(microbatch >= 0 for microbatch in due)
