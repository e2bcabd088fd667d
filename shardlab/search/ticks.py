"""How often a device runs each part of a step, from the program of a schedule; what it keeps meanwhile.

Counting hundreds of schedules takes as long as all else in a search, so a second process counts most of them
(`counting_beside`); nothing here imports JAX, and it is there at once.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardlab.pipeline.actions import Kind
from shardlab.pipeline.buffers import phase_iterations, slot_counts
from shardlab.pipeline.schedules import make_schedule


@dataclass(frozen=True)
class Ticks:
    """A schedule, counted.

    Attributes:
      lasts: of the ticks, in which some device does one of these kinds: how many there are; a tick lasts as long as
        the longest of its kinds, on every device.
      cells: how often a device runs each kind, masked runs included; of divergent ones the busiest device.
      before, after, finish: how often it runs what comes before the blocks, what comes after them (with its backward),
        and the backward of what comes before.
      residuals, cuts, mail: slots of each buffer.
      work: how often a device runs each kind for a microbatch: the rest is bubble.
      sends: how often it hands something on.
      branches: whether devices do different kinds of action in one tick.
    """

    lasts: tuple[tuple[tuple[Kind, ...], int], ...]
    cells: Mapping[str, int]
    before: int
    after: int
    finish: int
    residuals: int
    cuts: int
    mail: int
    work: Mapping[str, int]
    sends: int
    branches: bool


Key = tuple[str, int, int, int]
"""A schedule's name, its stages, microbatches, and virtual stages of a device."""

_known: dict[Key, Ticks] = {}


def ticks(schedule: str, stages: int, microbatches: int, virtual: int) -> Ticks:
    """The counts of a schedule by name, counted once.

    >>> found = ticks("1f1b", 4, 8, 1)
    >>> found.cells["F"], found.work["F"], found.residuals
    (11, 8, 7)
    """
    key = schedule, stages, microbatches, virtual
    if key not in _known:
        _known[key] = _count(*key)
    return _known[key]


@contextlib.contextmanager
def counting_beside(keys: Iterable[Key]) -> Iterator[None]:
    """Meanwhile a second process counts schedules, those first that take long; what it has counted `ticks` knows.

    Who asks for short ones first meets it in the middle. What it fails to count is counted when it is asked for.
    """
    todo = sorted({key for key in keys if key not in _known}, key=size, reverse=True)
    if sum(map(size, todo)) < _WORTH_A_PROCESS:
        yield
        return
    command = [sys.executable, "-c", "from shardlab.search.ticks import answer; answer()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdin is not None
        with contextlib.suppress(BrokenPipeError), second.stdin as given:  # it has failed to start
            given.write(json.dumps(todo))
        reader = threading.Thread(target=_learn, args=(todo, second.stdout))
        reader.start()
        try:
            yield
        finally:
            second.kill()
            reader.join()


def answer() -> None:
    """The second process: keys as JSON on standard input, their counts on standard output, one a line."""
    for key in json.load(sys.stdin):
        print(json.dumps(vars(_count(*key))), flush=True)


def _learn(keys: Iterable[Key], lines: Iterable[str]) -> None:
    for key, line in zip(keys, lines, strict=False):
        with contextlib.suppress(ValueError):  # cut off: the process was ended as it wrote
            _known.setdefault(key, _read(json.loads(line)))


def size(key: Key) -> int:
    """The actions in a schedule's table, in units of about how long one takes to count."""
    _, stages, microbatches, virtual = key
    return stages * microbatches * max(virtual, 1)


_WORTH_A_PROCESS = 20_000  # actions in its tables, below which a process costs more than it saves


def _read(data: Mapping[str, Any]) -> Ticks:
    lasts = tuple((tuple(kinds), count) for kinds, count in data["lasts"])
    return Ticks(**{**data, "lasts": lasts, "cells": Counter(data["cells"]), "work": Counter(data["work"])})


def _count(schedule: str, stages: int, microbatches: int, virtual: int) -> Ticks:
    table = make_schedule(schedule, stages=stages, microbatches=microbatches, virtual=virtual or None)
    mail, residuals, cuts = slot_counts(table)
    lasts: Counter[tuple[Kind, ...]] = Counter()
    cells: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    sends, branches = 0, False
    last = table.num_stages - 1
    for phase in phase_iterations(table):
        cell, divergent, length = phase[0].cell, phase[0].divergent, len(phase)
        branches |= divergent
        if divergent:
            rows = [[action.kind for action in iteration.actions] for iteration in phase]
            for row in rows:
                lasts[tuple(sorted(set(row)))] += 1
            for kind in cell:
                by_device = Counter(
                    table.device_of(action.stage)
                    for iteration in phase
                    for action in iteration.actions
                    if action.kind == kind
                )
                cells[kind] += max(by_device.values(), default=0)
            sends += 2 * length
        else:
            for kind in cell:
                lasts[kind,] += length
                cells[kind] += length
            sends += sum(kind in "FBI" for kind in cell) * length
        for name, kinds, stage in (("before", "F", 0), ("after", "F", last), ("finish", "BI", 0)):
            due = sum(
                any(action.kind in kinds and action.stage == stage for action in iteration.actions)
                for iteration in phase
            )
            # In all iterations, masked, where one stage a device makes nearly all of them due: `Cells.where_due`.
            ends[name] += length if due and table.num_virtual == 1 and not divergent else due
    work: Counter[str] = Counter(action.kind for action in table.row(0))
    return Ticks(
        lasts=tuple(lasts.items()),
        cells=cells,
        before=ends["before"],
        after=ends["after"],
        finish=ends["finish"],
        residuals=residuals,
        cuts=cuts,
        mail=mail,
        work=work,
        sends=sends if stages > 1 else 0,
        branches=branches,
    )
