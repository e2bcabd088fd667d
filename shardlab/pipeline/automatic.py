"""A schedule for given times and a memory limit: the best of those that have a name and of those built here.

What is built here is a list schedule: tick by tick every device takes one of the actions whose data is there, by a
priority, as long as it holds no more than the limit. Priorities, limits and placements are varied, each table is costed
in step, as the program will run, and the cheapest is kept; so the result is at least as good as every named schedule
that fits the limit. Legend as in `shardlab.pipeline.schedules`.

Source of the idea: the automatic scheduler of zero-bubble pipelines (Qi et al., 2023, arXiv 2401.10241, section 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shardlab.pipeline.actions import Action, Kind, ScheduleError, Tick
from shardlab.pipeline.cost import EQUAL, Cost, Costs, cost
from shardlab.pipeline.schedules import SCHEDULES, Placement, Schedule, make_schedule
from shardlab.pipeline.zero_bubble import is_there


@dataclass(frozen=True)
class Automatic:
    """The schedule found, and how it stands to those with a name.

    Attributes:
      schedule: named ``automatic``, or by its own name where none is better.
      cost: of it, in step.
      limit: microbatches' activations that a device may hold.
      beats: the named schedules that fit the limit and take longer, with their makespans.
      equals: those that take as long.
      too_large: those that do not fit the limit, with what they hold.
    """

    schedule: Schedule
    cost: Cost
    limit: float
    beats: tuple[tuple[str, float], ...]
    equals: tuple[str, ...]
    too_large: tuple[tuple[str, float], ...]


def automatic(
    *,
    stages: int,
    microbatches: int,
    costs: Costs = EQUAL,
    limit: float | None = None,
    virtual: int = 2,
    delayed: bool = False,
) -> Automatic:
    """The schedule of the least makespan in step that holds at most `limit` microbatches' activations on a device.

    Args:
        stages: P.
        microbatches: M.
        costs: of all that a device holds, by device where they are tuples; a virtual stage takes its share.
        limit: in activations of all that a device holds; None: M, which every schedule fits.
        virtual: most virtual stages of a device.
        delayed: whether sends may be delayed; each schedule is then looked at with direct and with delayed ones.

    Raises:
        ScheduleError: a limit below 1, in which nothing fits; costs of another number of devices.

    >>> found = automatic(stages=4, microbatches=8, limit=4)
    >>> found.schedule.name, found.cost.makespan, max(found.cost.peak_in_flight) <= 2 * 4
    ('zb_v', 25.5, True)
    """
    costs.fit(stages)
    limit = microbatches if limit is None else limit
    if limit < 1:
        raise ScheduleError(
            f"limit is {limit}; a device holds at least the microbatch that it computes: give 1 or more"
        )
    ways = (False, True) if delayed and stages > 1 else (False,)
    named: dict[str, tuple[Schedule, Cost]] = {}
    for late, (name, made) in itertools.product(ways, SCHEDULES.items()):
        for count in range(made.virtual, virtual + 1):
            if count == made.virtual or made.any_virtual:
                schedule = make_schedule(name, stages=stages, microbatches=microbatches, virtual=count, delayed=late)
                about = [f"virtual {count}"] * (count != made.virtual) + ["delayed"] * late
                label = f"{name} ({', '.join(about)})" if about else name
                named[label] = schedule, cost(schedule, costs.shared(schedule))
    held = {name: max(at.peak_in_flight) / schedule.num_virtual for name, (schedule, at) in named.items()}
    fitting = {name: pair for name, pair in named.items() if held[name] <= limit}
    built = (
        (schedule, cost(schedule, costs.shared(schedule)))
        for late in ways
        for schedule in _built(stages, microbatches, limit, virtual, late)
    )
    best: tuple[Schedule, Cost] | None = None
    # Named ones first: of equals the one with a name is taken, and of those the one that holds the least.
    for schedule, at in itertools.chain(sorted(fitting.values(), key=lambda pair: _holds(*pair)), built):
        if best is None or at.makespan < best[1].makespan * (1 - 1e-12):
            best = schedule, at
    assert best is not None, "one forward and its backward at a time fit every limit"
    makespan = best[1].makespan
    slower = {name: at.makespan for name, (_, at) in fitting.items() if at.makespan > makespan * (1 + 1e-12)}
    return Automatic(
        schedule=best[0],
        cost=best[1],
        limit=limit,
        beats=tuple(slower.items()),
        equals=tuple(name for name in fitting if name not in slower and named[name][0] != best[0]),
        too_large=tuple((name, held[name]) for name in named if name not in fitting),
    )


def _holds(schedule: Schedule, at: Cost) -> float:
    return max(at.peak_in_flight) / schedule.num_virtual


_PRIORITIES: tuple[tuple[Kind, ...], ...] = (("I", "F", "W"), ("F", "I", "W"), ("I", "W", "F"))


def _built(stages: int, microbatches: int, limit: float, virtual: int, delayed: bool) -> Iterator[Schedule]:
    """List schedules of every priority, placement and way to share the limit."""
    placements: list[tuple[int, Placement]] = [(1, "loop")]
    placements += [(count, "loop") for count in range(2, virtual + 1)] + ([(2, "v")] if virtual > 1 else [])
    for (count, placement), priority in itertools.product(placements, _PRIORITIES):
        most = int(min(limit, microbatches) * count)
        shares = (
            [most] * stages,
            [max(min(most, stages * count - device), 1) for device in range(stages)],
            [max(min(most, 2 * (stages - device) * count - 1), 1) for device in range(stages)],
        )
        for limits in shares:
            where = Schedule("automatic", stages, count, microbatches, (), placement, delayed)
            ticks = _list_schedule(where, priority, limits)
            if ticks is not None:
                yield replace(where, ticks=ticks)


def _list_schedule(where: Schedule, priority: Sequence[Kind], limits: Sequence[int]) -> tuple[Tick, ...] | None:
    """Every device takes, tick by tick, the first ready action by kind, the deepest stage first; None if all stick."""
    stages, microbatches = where.num_devices, where.num_microbatches
    mine = [[where.stage_of(device, index) for index in reversed(range(where.num_virtual))] for device in range(stages)]
    following = {(stage, kind): 0 for stage in range(where.num_stages) for kind in priority}
    held = [0] * stages
    done: dict[Action, tuple[int, int]] = {}
    ticks: list[Tick] = []

    def ready(device: int) -> Action | None:
        for kind in priority:
            for stage in mine[device]:
                action = Action(stage, kind, following[stage, kind])
                if action.microbatch == microbatches or (kind == "F" and held[device] >= limits[device]):
                    continue
                if is_there(action, device, len(ticks), done, where.num_stages, delayed=where.delayed):
                    return action
        return None

    while len(done) < 3 * where.num_stages * microbatches:
        tick = tuple(ready(device) for device in range(stages))
        if not any(tick) and not (where.delayed and ticks and any(ticks[-1])):
            return None
        for device, action in enumerate(tick):
            if action is not None:
                done[action] = len(ticks), device
                following[action.stage, action.kind] += 1
                held[device] += {"F": 1, "W": -1}.get(action.kind, 0)
        ticks.append(tick)
    return tuple(ticks)
