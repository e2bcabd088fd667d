"""The ticks of a schedule as the iterations of scans: where all devices do the same kinds, several ticks are one.

ticks        F  B  F  B  F  W      an F tick, a B or I tick and a W tick in this order make one iteration
iterations   FB    FB    FW
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from shardlab.pipeline.actions import KINDS, Action, Kind, Tick
from shardlab.pipeline.schedules import Schedule

Cell = tuple[Kind, ...]


def is_delayed(schedule: Schedule) -> bool:
    """Whether what a tick makes travels during the next one: on one device nothing does."""
    return schedule.delayed and schedule.num_devices > 1


@dataclass(frozen=True)
class Iteration:
    """Ticks that a scan goes through together."""

    f: Tick
    """The actions of its F part; of a divergent one all of them, as in `b` and `w`."""
    b: Tick
    w: Tick
    ticks: tuple[tuple[int, Tick], ...]
    """Of which it is made, and the place of each: 0 the F part, 1 the B or I part, 2 the W part."""
    cell: Cell
    """Kinds of the actions, in order; of a divergent one, those of the schedule."""
    parts: tuple[Kind | None, ...]
    """The kind of each tick; None for one in which only sends go on."""
    divergent: bool
    """Whether devices do different kinds of action in it."""

    @functools.cached_property
    def actions(self) -> tuple[Action, ...]:
        """All of them, on all devices."""
        return tuple(action for tick in dict.fromkeys((self.f, self.b, self.w)) for action in tick if action)


def is_uniform(schedule: Schedule) -> bool:
    """Whether in every tick all devices that work do the same kind of action."""
    return all(len({action.kind for action in tick if action}) <= 1 for tick in schedule.ticks)


def iterations_of(schedule: Schedule) -> list[Iteration]:
    """The ticks as iterations: of a uniform schedule an F tick, a B or I tick and a W tick in this order are one.

    A tick in which only delayed sends go on follows an F in its iteration, or else begins one.
    """
    ticks = [tick for tick in schedule.ticks if any(tick) or is_delayed(schedule)]
    if schedule.placement == "v" or not is_uniform(schedule):
        kinds = {action.kind for tick in ticks for action in tick if action}
        cell: Cell = tuple(kind for kind in KINDS if kind in kinds)
        return [Iteration(tick, tick, tick, ((0, tick),), cell, cell, divergent=True) for tick in ticks]
    merged: list[_Parts] = []
    for tick in ticks:
        kind = next((action.kind for action in tick if action), None)
        before = merged[-1][-1] if merged else None
        place = _place(kind) if kind else 1 if before and before[1] == "F" else 0
        if before and place > before[0]:
            merged[-1].append((place, kind, tick))
        else:
            merged.append([(place, kind, tick)])
    # Where all forwards precede all backwards, an F tick and a B tick meet at the turn: merged, they would be a scan
    # of their own, compiled apart. They stay apart wherever that makes fewer scans.
    for at in range(len(merged) - 1, -1, -1):
        apart = [[part] for part in merged[at]]
        left, right = merged[max(at - 1, 0) : at], merged[at + 1 : at + 2]
        if _num_groups([*left, *apart, *right]) < _num_groups([*left, merged[at], *right]):
            merged[at : at + 1] = apart
    return [_uniform(parts, schedule.num_devices) for parts in merged]


_Parts = list[tuple[int, Kind | None, Tick]]
"""Ticks of an iteration: of each its place, its kind, its actions."""


def _uniform(parts: _Parts, num_devices: int) -> Iteration:
    idle: Tick = (None,) * num_devices
    by_place = {place: tick for place, _, tick in parts}
    f, b, w = (by_place.get(place, idle) for place in range(3))
    kinds = tuple(kind for _, kind, _ in parts)
    return Iteration(f, b, w, tuple(by_place.items()), tuple(filter(None, kinds)), kinds, divergent=False)


def _place(kind: Kind) -> int:
    return {"F": 0, "B": 1, "I": 1, "W": 2}[kind]


def _num_groups(merged: Sequence[_Parts]) -> int:
    return sum(1 for _ in itertools.groupby(merged, key=lambda parts: [kind for _, kind, _ in parts]))
