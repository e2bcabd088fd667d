"""Schedules: which action each device runs in each tick, as a table.

A schedule is data, made by a pure function of the number of stages and microbatches. Legend, used throughout:

    P   devices on the stage axis          V   virtual stages a device holds (1: a stage per device)
    M   microbatches of a step             r   a device, 0 to P-1

    placement   loop   stage s of the P x V stages sits on device s % P
                v      back and forth: 0 to P-1, then P-1 to 0; the turns need no send

    sends       direct     what a tick makes travels when all have ended the tick, and is read from the next tick on
                delayed    it travels during the next tick, beside what that computes, and is read from the one after

`uniform` has the schedules in which all devices do the same kind of action in a tick, `zero_bubble` the others.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shardlab.pipeline.actions import Action, ScheduleError, Tick, parse_action
from shardlab.pipeline.uniform import gpipe, interleaved_1f1b, looped_bfs, one_f_one_b, one_f_one_b_split
from shardlab.pipeline.zero_bubble import dualpipe_v, zb_h1, zb_h2, zb_v

Placement = Literal["loop", "v"]


@dataclass(frozen=True)
class Schedule:
    """A table of ticks x devices, each cell one action or None.

    Only the table's shape is checked here; `shardlab.pipeline.check.check` says whether it computes a train
    step.

    Attributes:
        name: of the schedule.
        num_devices: P.
        num_virtual: V.
        num_microbatches: M.
        ticks: the table. With delayed sends a tick without actions counts: what the tick before made travels in it.
        placement: of the stages on the devices.
        delayed: whether sends are delayed; what stays on a device is not sent.

    Raises:
        ScheduleError: a count below 1, or a tick that has not one cell per device.
    """

    name: str
    num_devices: int
    num_virtual: int
    num_microbatches: int
    ticks: tuple[Tick, ...]
    placement: Placement = "loop"
    delayed: bool = False

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise ScheduleError(f"schedule '{self.name}': placement {self.placement!r} is not 'loop' or 'v'")
        _at_least_one(devices=self.num_devices, virtual=self.num_virtual, microbatches=self.num_microbatches)
        for index, tick in enumerate(self.ticks):
            if len(tick) != self.num_devices:
                raise ScheduleError(
                    f"schedule '{self.name}': tick {index} has {len(tick)} cells for {self.num_devices} "
                    "devices; give every tick one action or None per device"
                )

    @property
    def num_stages(self) -> int:
        """The number of stages on all devices, P x V."""
        return self.num_devices * self.num_virtual

    def device_of(self, stage: int) -> int:
        """The device that holds a stage."""
        turn, place = divmod(stage, self.num_devices)
        return self.num_devices - 1 - place if self.placement == "v" and turn % 2 else place

    def stage_of(self, device: int, virtual: int) -> int:
        """The stage that a device holds as its `virtual`-th."""
        place = self.num_devices - 1 - device if self.placement == "v" and virtual % 2 else device
        return virtual * self.num_devices + place

    def row(self, device: int) -> tuple[Action, ...]:
        """The actions of one device, in order."""
        return tuple(action for tick in self.ticks if (action := tick[device]) is not None)

    def table(self) -> list[list[str | None]]:
        """The table as texts, fit for JSON: a list of ticks, each with one action text or None per device."""
        return [[None if action is None else str(action) for action in tick] for tick in self.ticks]


def from_table(
    table: Sequence[Sequence[str | None]],
    *,
    microbatches: int,
    virtual: int = 1,
    placement: Placement = "loop",
    name: str = "table",
    delayed: bool = False,
) -> Schedule:
    """The schedule that a table of texts describes; the inverse of `Schedule.table`.

    Raises:
        ScheduleError: a text that is no action, or ticks that differ in length.

    >>> one = make_schedule("1f1b", stages=2, microbatches=3)
    >>> from_table(one.table(), microbatches=3, name="1f1b") == one
    True
    """
    ticks = tuple(tuple(None if text is None else parse_action(text) for text in tick) for tick in table)
    if not ticks:
        raise ScheduleError(f"schedule '{name}': the table has no ticks; give it at least an F and a B")
    return Schedule(name, len(ticks[0]), virtual, microbatches, ticks, placement, delayed)


@dataclass(frozen=True)
class Published:
    """A schedule by its name.

    Attributes:
        ticks: of (devices, microbatches, virtual stages, whether sends are delayed).
        virtual: how many virtual stages a device holds if nothing is said.
        any_virtual: whether it may be another number.
        placement: of the stages on the devices.
    """

    ticks: Callable[[int, int, int, bool], tuple[Tick, ...]]
    virtual: int = 1
    any_virtual: bool = False
    placement: Placement = "loop"


SCHEDULES: Mapping[str, Published] = {
    "gpipe": Published(gpipe),
    "1f1b": Published(one_f_one_b),
    "interleaved_1f1b": Published(interleaved_1f1b, virtual=2, any_virtual=True),
    "looped_bfs": Published(looped_bfs, virtual=2, any_virtual=True),
    "1f1b_split": Published(one_f_one_b_split, any_virtual=True),
    "zb_h1": Published(zb_h1),
    "zb_h2": Published(zb_h2),
    "zb_v": Published(zb_v, virtual=2, placement="v"),
    "dualpipe_v": Published(dualpipe_v, virtual=2, placement="v"),
}
"""The schedules by name."""


def make_schedule(
    name: str, *, stages: int, microbatches: int, virtual: int | None = None, delayed: bool = False
) -> Schedule:
    """The schedule of that name for P = `stages` devices and M = `microbatches`.

    Args:
        name: one of `SCHEDULES`.
        stages: devices on the stage axis; each holds `virtual` stages.
        microbatches: slices of a step's batch.
        virtual: stages a device holds; None takes the schedule's own number, 1 or 2.
        delayed: whether sends are delayed. On one device nothing is sent, and the table is the same.

    Raises:
        ScheduleError: an unknown name, a count below 1, or a number of virtual stages that the schedule cannot have.

    >>> for tick in make_schedule("1f1b", stages=2, microbatches=2).table():
    ...     print(tick)
    ['0F0', None]
    ['0F1', '1F0']
    [None, '1B0']
    [None, '1F1']
    ['0B0', '1B1']
    ['0B1', None]
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else "choose one of these"
        raise ScheduleError(f"schedule '{name}': unknown, there are {', '.join(SCHEDULES)}; {hint}")
    made = SCHEDULES[name]
    virtual = made.virtual if virtual is None else virtual
    _at_least_one(stages=stages, microbatches=microbatches, virtual=virtual)
    if virtual != made.virtual and not made.any_virtual:
        others = ", ".join(other for other, each in SCHEDULES.items() if each.any_virtual)
        raise ScheduleError(
            f"schedule '{name}': a device holds {made.virtual} of its stages, not {virtual} ({stages * virtual} stages "
            f"on {stages} devices); write virtual={made.virtual}, or take one that holds any number: {others}"
        )
    ticks = made.ticks(stages, microbatches, virtual, delayed)
    return Schedule(name, stages, virtual, microbatches, ticks, made.placement, delayed)


def _at_least_one(**counts: int) -> None:
    bad = [f"{name} is {count}" for name, count in counts.items() if count < 1]
    if bad:
        raise ScheduleError(f"{', '.join(bad)}; a schedule needs at least 1 of each")
