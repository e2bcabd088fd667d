"""How often a device runs each part of a step, from the program of a schedule; what it keeps meanwhile."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shardlab.pipeline.actions import Kind
from shardlab.pipeline.buffers import phase_iterations, slot_counts
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
    mail, residuals, cuts = slot_counts(table)
    lasts: Counter[tuple[Kind, ...]] = Counter()
    cells: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    sends = 0
    last = table.num_stages - 1
    for phase in phase_iterations(table):
        cell, divergent, length = phase[0].cell, phase[0].divergent, len(phase)
        if divergent:
            rows = [[action.kind for action in iteration.actions] for iteration in phase]
            for row in rows:
                lasts[tuple(sorted(set(row)))] += 1
            for kind in cell:
                by_device = Counter(
                    table.device_of(action.stage)
                    for iteration in phase
                    for action in iteration.actions
                    if action.kind == kind
                )
                cells[kind] += max(by_device.values(), default=0)
            sends += 2 * length
        else:
            for kind in cell:
                lasts[kind,] += length
                cells[kind] += length
            sends += sum(kind in "FBI" for kind in cell) * length
        for name, kinds, stage in (("before", "F", 0), ("after", "F", last), ("finish", "BI", 0)):
            due = sum(
                any(action.kind in kinds and action.stage == stage for action in iteration.actions)
                for iteration in phase
            )
            # In all iterations, masked, where one stage a device makes nearly all of them due: `Cells.where_due`.
            ends[name] += length if due and table.num_virtual == 1 and not divergent else due
    work: Counter[str] = Counter(action.kind for action in table.row(0))
    return Ticks(
        lasts=tuple(lasts.items()),
        cells=cells,
        before=ends["before"],
        after=ends["after"],
        finish=ends["finish"],
        residuals=residuals,
        cuts=cuts,
        mail=mail,
        work=work,
        sends=sends if stages > 1 else 0,
    )
