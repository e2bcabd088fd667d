"""Tables at random that compute a train step: nobody's schedules, valid all the same."""

from __future__ import annotations

import dataclasses
import random

from shardlab.pipeline.actions import Action, Tick, needs
from shardlab.pipeline.check import find_faults
from shardlab.pipeline.schedules import SCHEDULES, Placement, Schedule, make_schedule

PLACEMENTS: tuple[Placement, ...] = ("loop", "v")


def valid_table(rng: random.Random, *, devices: int, microbatches: int) -> Schedule:
    """A table that the checker passes, of up to three virtual stages a device."""
    return rng.choice([placed, shuffled])(rng, devices=devices, microbatches=microbatches)


def placed(rng: random.Random, *, devices: int, microbatches: int) -> Schedule:
    """Actions put down tick by tick in any order that their data allows.

    Backwards are whole, split, or now one and now the other; in a uniform one all devices do the same kind in a tick;
    a device may idle although it has something to do.
    """
    schedule = Schedule("placed", devices, rng.randint(1, 3), microbatches, (), rng.choice(PLACEMENTS))
    split, uniform, idle = rng.choice([0.0, 0.5, 1.0]), rng.random() < 0.5, rng.choice([0.0, 0.3])
    left = {
        Action(stage, kind, microbatch)
        for stage in range(schedule.num_stages)
        for microbatch in range(microbatches)
        for kind in ("F", *(("I", "W") if rng.random() < split else ("B",)))
    }
    done: set[Action] = set()
    ticks: list[Tick] = []
    while left:
        ready = [a for a in left if all(done & set(group) for group in needs(a, schedule.num_stages))]
        ready.sort(key=str)  # a set has another order in another process
        if uniform:
            kind = rng.choice(sorted({action.kind for action in ready}))
            ready = [action for action in ready if action.kind == kind]
        tick: list[Action | None] = [None] * devices
        for action in rng.sample(ready, len(ready)):
            device = schedule.device_of(action.stage)
            if tick[device] is None and rng.random() >= idle:
                tick[device] = action
        ticks.append(tuple(tick))
        ran = {action for action in tick if action}
        done |= ran
        left -= ran
    return dataclasses.replace(schedule, ticks=tuple(ticks))


def shuffled(rng: random.Random, *, devices: int, microbatches: int) -> Schedule:
    """A published schedule, with two cells of a device changing places wherever the checker lets them."""
    name = rng.choice(sorted(SCHEDULES))
    virtual = rng.randint(1, 3) if SCHEDULES[name].any_virtual else None
    made = make_schedule(name, stages=devices, microbatches=microbatches, virtual=virtual)
    schedule = dataclasses.replace(made, name=f"shuffled {name}")
    for _ in range(rng.randint(1, 20)):
        ticks = [list(tick) for tick in schedule.ticks]
        device, first = rng.randrange(devices), rng.randrange(len(ticks))
        second = min(first + rng.randint(1, 4), len(ticks) - 1)
        ticks[first][device], ticks[second][device] = ticks[second][device], ticks[first][device]
        other = dataclasses.replace(schedule, ticks=tuple(map(tuple, ticks)))
        if not find_faults(other):
            schedule = other
    return schedule
