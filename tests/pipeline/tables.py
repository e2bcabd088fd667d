"""Tables at random that compute a train step, for Hypothesis: nobody's schedules, valid all the same."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from shardlab.pipeline.actions import Action, Kind, Tick, needs
from shardlab.pipeline.check import find_faults
from shardlab.pipeline.schedules import SCHEDULES, Placement, Schedule, make_schedule

PLACEMENTS: tuple[Placement, ...] = ("loop", "v")


@st.composite
def placed(draw: Any, devices: st.SearchStrategy[int], microbatches: st.SearchStrategy[int]) -> Schedule:
    """Actions put down tick by tick in any order that their data allows.

    Backwards are whole, split, or now one and now the other; in a uniform one all devices do the same kind in a tick;
    a device may idle although it has something to do.
    """
    count, num = draw(devices), draw(microbatches)
    virtual, placement = draw(st.integers(1, 3)), draw(st.sampled_from(PLACEMENTS))
    backwards = draw(st.sampled_from(["whole", "split", "either"]))
    uniform, idle = draw(st.booleans()), draw(st.sampled_from([0.0, 0.3]))
    rng = draw(st.randoms(use_true_random=False))
    schedule = Schedule("placed", count, virtual, num, (), placement)
    left = {
        Action(stage, kind, microbatch)
        for stage in range(schedule.num_stages)
        for microbatch in range(num)
        for kind in ("F", *_backward(backwards, rng))
    }
    done: set[Action] = set()
    ticks: list[Tick] = []
    while left:
        ready = sorted(
            (a for a in left if all(done & set(group) for group in needs(a, schedule.num_stages))), key=lambda a: str(a)
        )
        if uniform:
            kind = rng.choice(sorted({action.kind for action in ready}))
            ready = [action for action in ready if action.kind == kind]
        tick: list[Action | None] = [None] * count
        for action in rng.sample(ready, len(ready)):
            device = schedule.device_of(action.stage)
            if tick[device] is None and rng.random() >= idle:
                tick[device] = action
        ticks.append(tuple(tick))
        ran = {action for action in tick if action}
        done |= ran
        left -= ran
    return Schedule("placed", count, virtual, num, tuple(ticks), placement)


def _backward(backwards: str, rng: random.Random) -> tuple[Kind, ...]:
    split = backwards == "split" or (backwards == "either" and rng.random() < 0.5)
    return ("I", "W") if split else ("B",)


@st.composite
def shuffled(draw: Any, devices: st.SearchStrategy[int], microbatches: st.SearchStrategy[int]) -> Schedule:
    """A published schedule, with two cells of a device changing places wherever the checker lets them."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    virtual = draw(st.integers(1, 3)) if SCHEDULES[name].any_virtual else None
    schedule = make_schedule(name, stages=draw(devices), microbatches=draw(microbatches), virtual=virtual)
    rng = draw(st.randoms(use_true_random=False))
    for _ in range(draw(st.integers(0, 12))):
        ticks = [list(tick) for tick in schedule.ticks]
        device, first = rng.randrange(schedule.num_devices), rng.randrange(len(ticks))
        second = min(first + rng.randint(1, 4), len(ticks) - 1)
        ticks[first][device], ticks[second][device] = ticks[second][device], ticks[first][device]
        other = Schedule(
            "shuffled",
            schedule.num_devices,
            schedule.num_virtual,
            schedule.num_microbatches,
            tuple(map(tuple, ticks)),
            schedule.placement,
        )
        if not find_faults(other):
            schedule = other
    return schedule


def valid_tables(
    *, devices: st.SearchStrategy[int], microbatches: st.SearchStrategy[int]
) -> st.SearchStrategy[Schedule]:
    """Either kind."""
    return placed(devices, microbatches) | shuffled(devices, microbatches)
