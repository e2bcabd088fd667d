"""Schedules side by side: for given times, what each costs, holds and sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardlab.pipeline.automatic import automatic
from shardlab.pipeline.cost import EQUAL, Costs, cost
from shardlab.pipeline.iterations import is_uniform
from shardlab.pipeline.schedules import SCHEDULES, Schedule, make_schedule
from shardlab.plan.text import columns


def comparison_rows(
    *, stages: int, microbatches: int, costs: Costs = EQUAL, limit: float | None = None, delayed: bool = False
) -> list[dict[str, Any]]:
    """A row of plain data for every named schedule and for the automatic one, the shortest step first.

    Args:
      stages: devices on the stage axis.
      microbatches: of a step.
      costs: of all that a device holds; a virtual stage takes its share.
      limit: for the automatic schedule, how many microbatches' activations a device may hold; None: any number.
      delayed: a row with delayed sends beside each with direct ones.

    >>> rows = comparison_rows(stages=4, microbatches=8)
    >>> [(row["name"], row["makespan"], row["held"]) for row in rows][:2]
    [('zb_v', 25.5, 4.0), ('dualpipe_v', 25.5, 4.5)]
    """
    found = automatic(stages=stages, microbatches=microbatches, costs=costs, limit=limit, delayed=delayed)
    schedules = [
        make_schedule(name, stages=stages, microbatches=microbatches, delayed=late)
        for late in ((False, True) if delayed and stages > 1 else (False,))
        for name in SCHEDULES
    ]
    if found.schedule.name == "automatic":
        schedules.append(found.schedule)
    rows = [_row(schedule, costs.shared(schedule)) for schedule in schedules]
    return sorted(rows, key=lambda row: (row["makespan"], row["held"]))


def _row(schedule: Schedule, costs: Costs) -> dict[str, Any]:
    at, alone = cost(schedule, costs), cost(schedule, costs, "async")
    return {
        "name": schedule.name,
        "virtual": schedule.num_virtual,
        "delayed": schedule.delayed,
        "makespan": at.makespan,
        "bubble_fraction": at.bubble_fraction,
        "async_makespan": alone.makespan,
        "async_bubble_fraction": alone.bubble_fraction,
        "held": max(at.peak_in_flight) / schedule.num_virtual,
        "sends": max(at.sends),
        "branches": not is_uniform(schedule),
    }


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table.

    >>> print(comparison_table(comparison_rows(stages=4, microbatches=8)[:1]))
    schedule  virtual  makespan  bubble  each for itself  microbatches held  sends  branches
    --------  -------  --------  ------  ---------------  -----------------  -----  --------
    zb_v            2      25.5    5.9%             5.9%                  4     32       yes
    """
    header = ("schedule", "virtual", "makespan", "bubble", "each for itself", "microbatches held", "sends", "branches")
    lines = [
        (
            f"{row['name']}, delayed" if row["delayed"] else row["name"],
            str(row["virtual"]),
            f"{row['makespan']:g}",
            f"{row['bubble_fraction']:.1%}",
            f"{row['async_bubble_fraction']:.1%}",
            f"{row['held']:g}",
            str(row["sends"]),
            "yes" if row["branches"] else "no",
        )
        for row in rows
    ]
    return "\n".join(columns(header, lines, right=range(1, len(header))))
