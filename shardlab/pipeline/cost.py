"""What a schedule costs: makespan, bubble, and how much is in flight.

Two clocks for the same table:

    lockstep    all devices start a tick together, so a tick lasts as long as its longest action, and then as
                long as a send if anything is sent in it. So runs a scan with a ppermute a tick. With delayed sends
                what the tick before made travels beside the action, and the tick lasts as long as the longer. (Of the
                program's scans one may begin with a send that stands alone, see `buffers`; that is not counted.)
    async       every device runs its row in order and waits only for its own data. So count published
                formulas.

With P devices, M microbatches and B = I + W, `gpipe` and `1f1b` have makespan (M+P-1)(F+B) on both clocks (sends
free), and the bubble fraction (P-1)/(M+P-1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from shardlab.pipeline.actions import Action, ScheduleError, needs
from shardlab.pipeline.schedules import Schedule

Mode = Literal["lockstep", "async"]


Time = float | tuple[float, ...]
"""One time for all stages, or one for each."""


@dataclass(frozen=True)
class Costs:
    """How long each kind of action takes on a (virtual) stage, and a send between devices, in one unit.

    F, I and W may be given by stage, as a tuple; a stage with the embedding or the head takes longer.

    Raises:
        ScheduleError: a cost that is negative or not finite, or nothing but zeros.

    >>> Costs(F=1, I=1, W=1).B
    2
    >>> Costs(F=(2, 1, 1, 3)).of(Action(3, "F", 0))
    3
    """

    F: Time = 1.0
    I: Time = 1.0  # noqa: E741 - the kind's name
    W: Time = 1.0
    send: float = 0.0

    def __post_init__(self) -> None:
        given = {"F": self.F, "I": self.I, "W": self.W, "send": self.send}
        bad = [
            f"{name} is {value}"
            for name, value in given.items()
            if not all(math.isfinite(time) and time >= 0 for time in _times(value))
        ]
        if bad:
            raise ScheduleError(f"costs: {', '.join(bad)}; give every cost as a finite time of at least 0")
        if not any(sum(_times(given[name])) for name in "FIW"):
            raise ScheduleError("costs: F, I and W are all 0; give at least one of them a time")

    @property
    def B(self) -> Time:
        """A whole backward, I + W."""
        if not isinstance(self.I, tuple) and not isinstance(self.W, tuple):
            return self.I + self.W
        count = max(len(_times(self.I)), len(_times(self.W)))
        return tuple(_of(self.I, stage) + _of(self.W, stage) for stage in range(count))

    def of(self, action: Action) -> float:
        """How long an action takes."""
        if action.kind == "B":
            return _of(self.I, action.stage) + _of(self.W, action.stage)
        return _of({"F": self.F, "I": self.I, "W": self.W}[action.kind], action.stage)

    def shared(self, schedule: Schedule) -> Costs:
        """Costs of all that a device holds, by device where they are tuples, as those of its virtual stages.

        >>> from shardlab.pipeline.schedules import make_schedule
        >>> Costs(F=(4, 2), I=1, W=1).shared(make_schedule("zb_v", stages=2, microbatches=4)).F
        (2.0, 1.0, 1.0, 2.0)
        """
        self.fit(schedule.num_devices)

        def share(value: Time) -> Time:
            if not isinstance(value, tuple):
                return value / schedule.num_virtual
            stages = range(schedule.num_stages)
            return tuple(value[schedule.device_of(stage)] / schedule.num_virtual for stage in stages)

        return Costs(share(self.F), share(self.I), share(self.W), self.send)

    def fit(self, num_stages: int) -> Costs:
        """These costs, if those given by stage are of as many stages.

        Raises:
            ScheduleError: naming the cost and both numbers.
        """
        for name, value in (("F", self.F), ("I", self.I), ("W", self.W)):
            if isinstance(value, tuple) and len(value) != num_stages:
                raise ScheduleError(
                    f"costs: {name} has {len(value)} times for {num_stages} stages; give one for each, or one for all"
                )
        return self


def _times(value: Time) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _of(value: Time, stage: int) -> float:
    return value[stage] if isinstance(value, tuple) else value


EQUAL = Costs()
"""F, I and W of one unit each, sends of none."""


@dataclass(frozen=True)
class Cost:
    """What a schedule costs on one clock, in the unit of the `Costs`."""

    makespan: float
    ideal: float
    """The work of the busiest device: the makespan without a bubble."""
    idle: tuple[float, ...]
    """Per device, the time in which it computes nothing."""
    waiting: tuple[float, ...]
    """Per device, the part of that between its first action and its last: the bubble where devices neither start nor
    end a step together, which papers on zero bubble count."""
    peak_in_flight: tuple[int, ...]
    """Per device, the most forwards that wait for their backward (see `peak_in_flight`)."""
    sends: tuple[int, ...]
    """Per device, how many activations and cotangents it sends to another."""

    @property
    def bubble_fraction(self) -> float:
        """The part of the makespan that is not work, 1 - ideal / makespan."""
        return 1 - self.ideal / self.makespan


def cost(schedule: Schedule, costs: Costs = EQUAL, mode: Mode = "lockstep") -> Cost:
    """The cost of a schedule that the checker passes.

    Raises:
        ScheduleError: on the async clock, a table that deadlocks; costs given for another number of stages.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> c = cost(make_schedule("1f1b", stages=4, microbatches=8), Costs(F=1, I=1, W=1))
    >>> c.makespan, c.ideal, round(c.bubble_fraction, 4), c.peak_in_flight
    (33.0, 24.0, 0.2727, (7, 5, 3, 1))
    """
    timeline = times(schedule, costs, mode)
    devices = range(schedule.num_devices)
    of = [[span for span in timeline.spans if span.device == device] for device in devices]
    busy = [sum(span.end - span.start for span in row) for row in of]
    return Cost(
        makespan=timeline.makespan,
        ideal=float(max(busy)),
        idle=tuple(timeline.makespan - time for time in busy),
        waiting=tuple(row[-1].end - row[0].start - time if row else 0.0 for row, time in zip(of, busy, strict=True)),
        peak_in_flight=peak_in_flight(schedule),
        sends=tuple(sum(sends(schedule, action) for action in schedule.row(device)) for device in devices),
    )


def idle_fraction(schedule: Schedule, layers: Sequence[int], costs: Costs = EQUAL) -> float:
    """The part of all devices' time in which they compute no layer, in lockstep.

    A stage computes as many slots as the longest one holds layers, so a slot that only fills a shorter stage is idle
    as the bubble is.

    Args:
        layers: of each stage, all alike.
        costs: of each kind of action, for all stages; F, I and W alike if left out.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> made = make_schedule("1f1b", stages=2, microbatches=4)
    >>> f"{idle_fraction(made, (2, 2)):.1%} {idle_fraction(made, (2, 1)):.1%}"
    '20.0% 40.0%'
    """
    slots = max(layers) * schedule.num_devices * cost(schedule, costs).makespan
    actions = (action for device in range(schedule.num_devices) for action in schedule.row(device))
    return 1 - sum(costs.of(action) * layers[action.stage] for action in actions) / slots


@dataclass(frozen=True)
class Span:
    """One action on a device, from its start to its end."""

    device: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every action runs, each device's in order, and when the step ends."""

    makespan: float
    spans: tuple[Span, ...]


def times(schedule: Schedule, costs: Costs = EQUAL, mode: Mode = "lockstep") -> Timeline:
    """When every action of a schedule runs, on one of the two clocks.

    Raises:
        ScheduleError: on the async clock, a table that deadlocks; costs given for another number of stages.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> one = times(make_schedule("gpipe", stages=1, microbatches=1), Costs(F=2, I=1, W=1))
    >>> [(str(span.action), span.start, span.end) for span in one.spans]
    [('0F0', 0.0, 2.0), ('0B0', 2.0, 4.0)]
    """
    costs.fit(schedule.num_stages)
    return _lockstep(schedule, costs) if mode == "lockstep" else _async(schedule, costs)


def sends(schedule: Schedule, action: Action) -> bool:
    """Whether an action's result goes to another device."""
    if action.kind == "W":
        return False
    to = action.stage + (1 if action.kind == "F" else -1)
    return 0 <= to < schedule.num_stages and schedule.device_of(to) != schedule.device_of(action.stage)


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per device, the most (virtual stage, microbatch) pairs in flight.

    A pair is in flight from the start of its F to the end of its B, or of its W where the backward is split.
    A device runs one action at a time, so the number is the same on every clock.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> peak_in_flight(make_schedule("gpipe", stages=2, microbatches=3))
    (3, 3)
    """
    return _most(schedule, "F", "BW")


def peak_waiting(schedule: Schedule) -> tuple[int, ...]:
    """Per device, the most (virtual stage, microbatch) pairs whose I has begun and whose W has not ended.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> peak_waiting(make_schedule("zb_h1", stages=2, microbatches=4))
    (1, 2)
    """
    return _most(schedule, "I", "W")


def _most(schedule: Schedule, begin: str, end: str) -> tuple[int, ...]:
    """Per device, the most actions of the kinds `begin` that no action of the kinds `end` has followed."""
    peaks = []
    for device in range(schedule.num_devices):
        live = peak = 0
        for action in schedule.row(device):
            live += action.kind in begin
            peak = max(peak, live)
            live -= action.kind in end
        peaks.append(peak)
    return tuple(peaks)


class ClockFacts(TypedDict):
    """A schedule's cost on one clock, fit for JSON."""

    makespan: float
    bubble_fraction: float


def schedule_facts(schedule: Schedule, costs: Costs = EQUAL) -> dict[str, object]:
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
        "sends": "delayed" if schedule.delayed else "direct",
        "costs": {"F": costs.F, "I": costs.I, "W": costs.W, "send": costs.send},
        "table": schedule.table(),
        "lockstep": clock("lockstep"),
        "async": clock("async"),
        "peak_in_flight": list(peak_in_flight(schedule)),
    }


def _lockstep(schedule: Schedule, costs: Costs) -> Timeline:
    now = 0.0
    spans = []
    travelling = 0.0
    for tick in schedule.ticks:
        working = [(device, action, costs.of(action)) for device, action in enumerate(tick) if action is not None]
        spans += [Span(device, action, now, now + time) for device, action, time in working]
        busy = max((time for *_, time in working), default=0)
        sent = costs.send if any(sends(schedule, action) for _, action, _ in working) else 0.0
        now += max(busy, travelling) if schedule.delayed else busy + sent
        travelling = sent
    return Timeline(now, tuple(spans))


def _async(schedule: Schedule, costs: Costs) -> Timeline:
    rows = [schedule.row(device) for device in range(schedule.num_devices)]
    fronts = [0] * schedule.num_devices
    clocks = [0.0] * schedule.num_devices
    spans: list[Span] = []
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
                spans.append(Span(device, action, start, clocks[device]))
                fronts[device] += 1
                moved = True
        if not moved:
            raise ScheduleError(f"schedule '{schedule.name}': deadlock; run the checker to see where")
    return Timeline(max(clocks), tuple(spans))
