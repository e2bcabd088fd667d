"""Schedules: which action each device runs in each tick, as a table.

A schedule is data, made by a pure function of the number of stages and microbatches. Legend, used throughout:

    P   devices on the stage axis          V   virtual stages a device holds (1: a stage per device)
    M   microbatches of a step             stage s of the P x V stages sits on device s % P

Both schedules here are *uniform*: in one tick every device does the same kind of action, or idles. One
program then serves all devices without a branch, and any collective is legal inside a stage.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shardlab.pipeline.actions import Action, Kind, ScheduleError, parse_action

Tick = tuple[Action | None, ...]


@dataclass(frozen=True)
class Schedule:
    """A table of ticks x devices, each cell one action or None.

    Only the table's shape is checked here; `shardlab.pipeline.check.check` says whether it computes a train
    step.

    Raises:
        ScheduleError: a count below 1, or a tick that has not one cell per device.
    """

    name: str
    num_devices: int
    num_virtual: int
    num_microbatches: int
    ticks: tuple[Tick, ...]

    def __post_init__(self) -> None:
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
        return stage % self.num_devices

    def row(self, device: int) -> tuple[Action, ...]:
        """The actions of one device, in order."""
        return tuple(action for tick in self.ticks if (action := tick[device]) is not None)

    def table(self) -> list[list[str | None]]:
        """The table as texts, fit for JSON: a list of ticks, each with one action text or None per device."""
        return [[None if action is None else str(action) for action in tick] for tick in self.ticks]


def from_table(
    table: Sequence[Sequence[str | None]], *, microbatches: int, virtual: int = 1, name: str = "table"
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
    return Schedule(name, len(ticks[0]), virtual, microbatches, ticks)


def gpipe(stages: int, microbatches: int) -> tuple[Tick, ...]:
    """All forwards, then all backwards (GPipe: Huang et al., 2019, arXiv 1811.06965).

    2 (M+P-1) ticks; every device holds all M microbatches' activations at the turn. P=3, M=3:

        device 0   F0 F1 F2 .  .  .  .  B0 B1 B2
        device 1   .  F0 F1 F2 .  .  B0 B1 B2 .
        device 2   .  .  F0 F1 F2 B0 B1 B2 .  .

    Backwards run in the order of the forwards, so that gradients add up in the same order as in every other
    schedule.
    """
    length = microbatches + stages - 1
    return tuple(_tick("F", cell, stages, microbatches) for cell in range(length)) + tuple(
        _tick("B", cell, stages, microbatches) for cell in range(length)
    )


def one_f_one_b(stages: int, microbatches: int) -> tuple[Tick, ...]:
    """Backwards as soon as they can run, in step: an F tick, then a B tick.

    Its idea is PipeDream-flush's (Narayanan et al., 2021, arXiv 2006.09503): few microbatches in flight.
    Where all devices keep step, as under a scan, one action a tick in that paper's order is 54 % over ideal
    (P=8, M=32, B=2F); an F tick and then a B tick is 22 % over, a bubble of (P-1)(F+B), and stage s holds
    min(M, 2(P-1-s)+1) microbatches. A *cell* is an F tick and a B tick; the first P-1 cells have no B tick,
    the last P-1 no F tick. P=3, M=3:

        cell       0    1    2     3     4     5    6
        device 0   F0   F1   F2 .  .  .  .  B0 B1   B2
        device 1   .    F0   F1 .  F2 B0 .  B1 B2   .
        device 2   .    .    F0 B0 F1 B1 F2 B2 .    .

    F comes first in a cell: the last stage runs the backward of the forward it has just run.
    """
    ticks: list[Tick] = []
    for cell in range(microbatches + 2 * (stages - 1)):
        if cell < microbatches + stages - 1:
            ticks.append(_tick("F", cell, stages, microbatches))
        if cell >= stages - 1:
            ticks.append(_tick("B", cell - (stages - 1), stages, microbatches))
    return tuple(ticks)


SCHEDULES: Mapping[str, Callable[[int, int], tuple[Tick, ...]]] = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""The schedules by name: functions of (devices, microbatches) that return the ticks."""


def make_schedule(name: str, *, stages: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The schedule of that name for P = `stages` devices and M = `microbatches`.

    Args:
        name: one of `SCHEDULES`.
        stages: devices on the stage axis; each holds `virtual` stages.
        microbatches: slices of a step's batch.
        virtual: stages a device holds.

    Raises:
        ScheduleError: an unknown name, a count below 1, or virtual stages where the schedule has none.

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
    _at_least_one(stages=stages, microbatches=microbatches, virtual=virtual)
    if virtual != 1:
        raise ScheduleError(
            f"schedule '{name}': holds 1 stage per device, not {virtual} ({stages * virtual} stages on "
            f"{stages} devices); write virtual=1, so that each device holds its layers as one stage"
        )
    return Schedule(name, stages, virtual, microbatches, SCHEDULES[name](stages, microbatches))


def _tick(kind: Kind, index: int, stages: int, microbatches: int) -> Tick:
    """The index-th tick of a wave: forwards run down the stages, one stage a tick, and backwards up."""
    lags = (stage if kind == "F" else stages - 1 - stage for stage in range(stages))
    return tuple(
        Action(stage, kind, index - lag) if 0 <= index - lag < microbatches else None for stage, lag in enumerate(lags)
    )


def _at_least_one(**counts: int) -> None:
    bad = [f"{name} is {count}" for name, count in counts.items() if count < 1]
    if bad:
        raise ScheduleError(f"{', '.join(bad)}; a schedule needs at least 1 of each")
