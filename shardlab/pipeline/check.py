"""The checker: does a table compute a train step? It knows nothing of who made the table.

What it asks, with S stages and M microbatches:

    once        every stage runs F, and B or else I and W, exactly once for every microbatch
    place       an action stands on the device that holds its stage
    order       F after the previous stage's F; B or I after its own F and the next stage's B or I; W after
                its I. After means in a later tick: what is sent in a tick arrives for the next one, with delayed
                sends for the one after that
    deadlock    devices that run their rows in order, each waiting only for its own data, come to the end

A table that fails is printed, each bad cell in brackets with its reason at the end of the line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from shardlab.pipeline.actions import KINDS, Action, Kind, ScheduleError, needs
from shardlab.pipeline.schedules import Schedule

__all__ = ["CellFault", "ScheduleError", "check", "find_faults"]

_CONTEXT = 2  # ticks printed before and after one with a fault
_LISTED = 12  # missing actions listed; more are counted

_HALVES: tuple[Kind, ...] = ("I", "W")
_Place = tuple[int, int]  # tick, device


@dataclass(frozen=True)
class CellFault:
    """What is wrong, and in which cell; both None for an action that stands nowhere."""

    tick: int | None
    device: int | None
    problem: str


def check(schedule: Schedule) -> None:
    """Nothing, if the schedule computes a train step; else every fault at once.

    Raises:
        ScheduleError: the printed table, bad cells marked.

    >>> from shardlab.pipeline.schedules import from_table
    >>> check(from_table([["0F0"], ["0B0"]], microbatches=1))
    >>> check(from_table([["0B0"], ["0F0"]], microbatches=1, name="mine"))
    Traceback (most recent call last):
    shardlab.pipeline.actions.ScheduleError: schedule 'mine': 1 stage on 1 device, 1 microbatch: 1 fault
    tick  device 0
       0  [0B0]     <-- 0B0 needs 0F0, which runs in tick 1; device 0 waits here for ever
       1  0F0
    """
    faults = find_faults(schedule)
    if faults:
        raise ScheduleError(_marked_table(schedule, faults))


def find_faults(schedule: Schedule) -> tuple[CellFault, ...]:
    """Every fault of a schedule: those of cells by tick and device, then what is missing."""
    faults: list[CellFault] = []
    places: dict[Action, list[_Place]] = defaultdict(list)
    for tick, device, action in _cells(schedule):
        problem = _impossible(schedule, action, device)
        if problem:
            faults.append(CellFault(tick, device, problem))
        # An action on a device that does not hold its stage still counts as having run: one fault, not ten.
        if 0 <= action.stage < schedule.num_stages and 0 <= action.microbatch < schedule.num_microbatches:
            places[action].append((tick, device))
    faults += _once(schedule, places)
    faults += _order(schedule, places)
    by_cell = {(f.tick, f.device, f.problem): f for f in faults}
    return tuple(sorted(by_cell.values(), key=lambda f: (f.tick is None, f.tick or 0, f.device or 0)))


def _cells(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for index, tick in enumerate(schedule.ticks):
        for device, action in enumerate(tick):
            if action is not None:
                yield index, device, action


def _impossible(schedule: Schedule, action: Action, device: int) -> str | None:
    """Why no device, or not this one, can run an action."""
    if action.kind not in KINDS:
        return f"{action}: there is no kind {action.kind!r}, only {', '.join(KINDS)}"
    if not 0 <= action.stage < schedule.num_stages:
        last = schedule.num_stages - 1
        return f"{action}: there is no stage {action.stage}, the last of {schedule.num_stages} is {last}"
    if not 0 <= action.microbatch < schedule.num_microbatches:
        last = schedule.num_microbatches - 1
        counts = f"the last of {schedule.num_microbatches} is {last}"
        return f"{action}: there is no microbatch {action.microbatch}, {counts}"
    holder = schedule.device_of(action.stage)
    if device != holder:
        return f"{action} stands on device {device}; device {holder} holds stage {action.stage}"
    return None


def _once(schedule: Schedule, places: dict[Action, list[_Place]]) -> Iterator[CellFault]:
    """What runs twice, what runs never, and backwards both whole and split."""
    for action, (first, *again) in places.items():
        for tick, device in again:
            yield CellFault(tick, device, f"{action} runs a second time; it has run in tick {first[0]}")
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            at: dict[Kind, Action] = {kind: Action(stage, kind, microbatch) for kind in KINDS}
            there = {kind for kind in KINDS if at[kind] in places}
            if "F" not in there:
                yield CellFault(None, None, f"{at['F']} is missing")
            if "B" in there:
                for kind in (kind for kind in _HALVES if kind in there):
                    tick, device = places[at[kind]][0]
                    yield CellFault(tick, device, f"{at[kind]} is part of {at['B']}, which runs too")
            elif not there & set(_HALVES):
                yield CellFault(None, None, f"{at['B']} is missing (or {at['I']} and {at['W']})")
            else:
                for kind in (kind for kind in _HALVES if kind not in there):
                    yield CellFault(None, None, f"{at[kind]} is missing")


def _order(schedule: Schedule, places: dict[Action, list[_Place]]) -> Iterator[CellFault]:
    """What runs before its data is there, in step and (a deadlock) at all."""
    stuck = _deadlocked(schedule, places)
    for action, ((tick, device), *_) in places.items():
        for alternatives in needs(action, schedule.num_stages):
            found = [(places[need][0], need) for need in alternatives if need in places]
            if not found:
                continue  # reported as missing
            (ready, where), need = min(found, key=lambda pair: pair[0])
            arrives = ready + (2 if schedule.delayed and where != device else 1)
            if arrives <= tick:
                continue
            waits = (tick, device) in stuck
            when = "in the same tick" if ready == tick else f"in tick {ready}"
            on = "" if where == device else f" on device {where}"
            on += f" and, sent a tick later, arrives for tick {arrives}" if ready < tick else ""
            ending = f"; device {device} waits here for ever" if waits else ""
            yield CellFault(tick, device, f"{action} needs {need}, which runs {when}{on}{ending}")


def _deadlocked(schedule: Schedule, places: dict[Action, list[_Place]]) -> set[_Place]:
    """The cells where devices that run their rows in order stop for ever; what is missing holds nobody up."""
    rows: list[list[tuple[_Place, Action]]] = [[] for _ in range(schedule.num_devices)]
    for tick, device, action in _cells(schedule):
        if action in places:
            rows[device].append(((tick, device), action))
    done: set[Action] = set()
    fronts = [0] * schedule.num_devices

    def ready(action: Action) -> bool:
        groups = ([need for need in group if need in places] for group in needs(action, schedule.num_stages))
        return all(not group or any(need in done for need in group) for group in groups)

    moved = True
    while moved:
        moved = False
        for device, row in enumerate(rows):
            while fronts[device] < len(row) and ready(row[fronts[device]][1]):
                done.add(row[fronts[device]][1])
                fronts[device] += 1
                moved = True
    return {row[front][0] for row, front in zip(rows, fronts, strict=True) if front < len(row)}


def _marked_table(schedule: Schedule, faults: tuple[CellFault, ...]) -> str:
    notes: dict[int, list[CellFault]] = defaultdict(list)
    for fault in faults:
        if fault.tick is not None:
            notes[fault.tick].append(fault)
    bad = {(fault.tick, fault.device) for fault in faults}
    lines = [_title(schedule, len(faults))]
    if notes:
        shown = {t for tick in notes for t in range(tick - _CONTEXT, tick + _CONTEXT + 1)}
        width = max([9] + [len(str(action)) + 3 for _, _, action in _cells(schedule)])
        header = "".join(f"device {device}".ljust(width) for device in range(schedule.num_devices))
        lines.append(f"tick  {header}".rstrip())
        previous = -1
        for index in sorted(shown & set(range(len(schedule.ticks)))):
            if index != previous + 1:
                lines.append(" ...")
            previous = index
            cells = (
                f"[{action}]" if (index, device) in bad else "." if action is None else str(action)
                for device, action in enumerate(schedule.ticks[index])
            )
            line = f"{index:4}  " + "".join(cell.ljust(width) for cell in cells)
            reasons = "; ".join(fault.problem for fault in notes[index])
            lines.append(f"{line} <-- {reasons}" if reasons else line.rstrip())
        if previous != len(schedule.ticks) - 1:
            lines.append(" ...")
    missing = [fault.problem for fault in faults if fault.tick is None]
    lines += missing[:_LISTED]
    if len(missing) > _LISTED:
        lines.append(f"and {len(missing) - _LISTED} more are missing")
    return "\n".join(lines)


def _title(schedule: Schedule, num_faults: int) -> str:
    counts = (
        _count(schedule.num_stages, "stage", "stages"),
        _count(schedule.num_devices, "device", "devices"),
        _count(schedule.num_microbatches, "microbatch", "microbatches"),
        _count(num_faults, "fault", "faults"),
    )
    return "schedule '{}': {} on {}, {}: {}".format(schedule.name, *counts)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
