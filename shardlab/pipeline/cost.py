"""What a schedule costs: makespan, bubble, and how much is in flight.

Two clocks for the same table:

    lockstep    all devices start a tick together, so a tick lasts as long as its longest action, and then as
                long as a send if anything is sent in it. So runs a scan with a ppermute a tick.
    async       every device runs its row in order and waits only for its own data. So count published
                formulas.

With P devices, M microbatches and B = I + W, both schedules of one stage a device have makespan (M+P-1)(F+B)
on both clocks (sends free), and the bubble fraction (P-1)/(M+P-1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from shardlab.pipeline.actions import Action, ScheduleError, needs
from shardlab.pipeline.schedules import Schedule

Mode = Literal["lockstep", "async"]


@dataclass(frozen=True)
class Costs:
    """How long each kind of action takes on one virtual stage, and a send between devices, in one unit.

    Raises:
        ScheduleError: a cost that is negative or not finite, or nothing but zeros.

    >>> Costs(F=1, I=1, W=1).B
    2
    """

    F: float = 1.0
    I: float = 1.0  # noqa: E741 - the kind's name
    W: float = 1.0
    send: float = 0.0

    def __post_init__(self) -> None:
        given = {"F": self.F, "I": self.I, "W": self.W, "send": self.send}
        bad = [f"{name} is {value}" for name, value in given.items() if not (math.isfinite(value) and value >= 0)]
        if bad:
            raise ScheduleError(f"costs: {', '.join(bad)}; give every cost as a finite time of at least 0")
        if self.F + self.I + self.W == 0:
            raise ScheduleError("costs: F, I and W are all 0; give at least one of them a time")

    @property
    def B(self) -> float:
        """A whole backward, I + W."""
        return self.I + self.W

    def of(self, action: Action) -> float:
        """How long an action takes."""
        return {"F": self.F, "B": self.B, "I": self.I, "W": self.W}[action.kind]


@dataclass(frozen=True)
class Cost:
    """What a schedule costs on one clock, in the unit of the `Costs`."""

    makespan: float
    ideal: float
    """The work of one device: the makespan without a bubble."""
    idle: tuple[float, ...]
    """Per device, the time in which it computes nothing."""
    peak_in_flight: tuple[int, ...]
    """Per device, the most forwards that wait for their backward (see `peak_in_flight`)."""

    @property
    def bubble_fraction(self) -> float:
        """The part of the makespan that is not work, 1 - ideal / makespan."""
        return 1 - self.ideal / self.makespan


def cost(schedule: Schedule, costs: Costs = Costs(), mode: Mode = "lockstep") -> Cost:
    """The cost of a schedule that the checker passes.

    Raises:
        ScheduleError: on the async clock, a table that deadlocks.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> c = cost(make_schedule("1f1b", stages=4, microbatches=8), Costs(F=1, I=1, W=1))
    >>> c.makespan, c.ideal, round(c.bubble_fraction, 4), c.peak_in_flight
    (33.0, 24.0, 0.2727, (7, 5, 3, 1))
    """
    makespan = _lockstep(schedule, costs) if mode == "lockstep" else _async(schedule, costs)
    ideal = schedule.num_virtual * schedule.num_microbatches * float(costs.F + costs.B)
    busy = (sum(map(costs.of, schedule.row(device))) for device in range(schedule.num_devices))
    return Cost(makespan, ideal, tuple(makespan - time for time in busy), peak_in_flight(schedule))


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per device, the most (virtual stage, microbatch) pairs in flight.

    A pair is in flight from the start of its F to the end of its B, or of its W where the backward is split.
    A device runs one action at a time, so the number is the same on every clock.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> peak_in_flight(make_schedule("gpipe", stages=2, microbatches=3))
    (3, 3)
    """
    peaks = []
    for device in range(schedule.num_devices):
        live = peak = 0
        for action in schedule.row(device):
            live += action.kind == "F"
            peak = max(peak, live)
            live -= action.kind in ("B", "W")
        peaks.append(peak)
    return tuple(peaks)


class ClockFacts(TypedDict):
    """A schedule's cost on one clock, fit for JSON."""

    makespan: float
    bubble_fraction: float


def schedule_facts(schedule: Schedule, costs: Costs = Costs()) -> dict[str, object]:
    """The facts of a schedule, fit for JSON: its `table`, `lockstep`, `async`, `peak_in_flight` and what it
    is.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> facts = schedule_facts(make_schedule("gpipe", stages=1, microbatches=1))
    >>> facts["table"], facts["async"]
    ([['0F0'], ['0B0']], {'makespan': 3.0, 'bubble_fraction': 0.0})
    """

    def clock(mode: Mode) -> ClockFacts:
        at = cost(schedule, costs, mode)
        return {"makespan": at.makespan, "bubble_fraction": at.bubble_fraction}

    return {
        "name": schedule.name,
        "stages": schedule.num_devices,
        "virtual": schedule.num_virtual,
        "microbatches": schedule.num_microbatches,
        "costs": {"F": costs.F, "I": costs.I, "W": costs.W, "send": costs.send},
        "table": schedule.table(),
        "lockstep": clock("lockstep"),
        "async": clock("async"),
        "peak_in_flight": list(peak_in_flight(schedule)),
    }


def _lockstep(schedule: Schedule, costs: Costs) -> float:
    def sends(action: Action) -> bool:
        if action.kind == "W":
            return False
        to = action.stage + (1 if action.kind == "F" else -1)
        return 0 <= to < schedule.num_stages and schedule.device_of(to) != schedule.device_of(action.stage)

    makespan = 0.0
    for tick in schedule.ticks:
        actions = [action for action in tick if action is not None]
        makespan += max(map(costs.of, actions), default=0)
        makespan += costs.send if any(map(sends, actions)) else 0
    return makespan


def _async(schedule: Schedule, costs: Costs) -> float:
    rows = [schedule.row(device) for device in range(schedule.num_devices)]
    fronts = [0] * schedule.num_devices
    clocks = [0.0] * schedule.num_devices
    ended: dict[Action, float] = {}

    def arrival(alternatives: tuple[Action, ...], device: int) -> float | None:
        times = [
            ended[need] + (costs.send if schedule.device_of(need.stage) != device else 0)
            for need in alternatives
            if need in ended
        ]
        return min(times) if times else None

    while any(front < len(row) for front, row in zip(fronts, rows, strict=True)):
        moved = False
        for device, row in enumerate(rows):
            while fronts[device] < len(row):
                action = row[fronts[device]]
                arrivals = [arrival(need, device) for need in needs(action, schedule.num_stages)]
                if any(time is None for time in arrivals):
                    break
                start = max([clocks[device], *(time for time in arrivals if time is not None)])
                ended[action] = clocks[device] = start + costs.of(action)
                fronts[device] += 1
                moved = True
        if not moved:
            raise ScheduleError(f"schedule '{schedule.name}': deadlock; run the checker to see where")
    return max(clocks)
