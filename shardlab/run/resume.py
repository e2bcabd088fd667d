"""How a run outlives its end: what it saves beside its steps, and from where it goes on.

A checkpoint of step N says that rows 1 to N of the metrics are on disk: rows after it are dropped when a run goes on
from it, and made anew.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardlab.checkpoint.canonical import Canonical
from shardlab.checkpoint.seal import CheckpointError, Unfinished
from shardlab.checkpoint.store import Checkpoints
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.processes import by_first
from shardlab.run.record import METRICS, Row
from shardlab.run.view import View
from shardlab.step.state import TrainState


@dataclass(frozen=True)
class Saving:
    """When a run saves, and what it keeps.

    Attributes:
      every: save after so many steps, and after the last; 0 saves nothing.
      keep: how many of the last checkpoints to keep.
      keep_every: keep also those of steps that divide by this; 0 keeps none.
      where: a directory, or one of a bucket, whose checkpoints they are; none: the run's own.
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0
    where: str = ""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise DeclarationError(f"checkpoint_every: is {self.every}; give a number of steps, or 0 to save nothing")

    def store(self, out: Path) -> Checkpoints:
        """The checkpoints of the run in a directory."""
        return Checkpoints(self.where or out, keep=self.keep, keep_every=self.keep_every)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
      step: steps done.
      state: after them; None where none was restored.
      about: what was saved beside it.
    """

    step: int = 0
    state: TrainState | None = None
    about: Mapping[str, Any] | None = None


def start_from(store: Checkpoints, canonical: Canonical, view: View) -> Start:
    """The newest checkpoint that can be read; step 0 where there is none. What is passed over is told.

    Raises:
      DeclarationError: the newest is of another model or optimizer, or none that was finished can be read.
    """
    found = by_first(lambda: [_told(step, fault) for step, fault in store.found()])
    damaged: list[str] = []
    for step, fault, unfinished in reversed(found):
        if fault is None:
            try:
                state = store.load(canonical, step)
            except CheckpointError as error:
                fault = str(error)
            else:
                view.say(f"going on from the checkpoint of step {step}")
                about = by_first(functools.partial(_about, store, step))
                return Start(step, state, about)
        view.say(f"passing over: {fault}")
        if not unfinished:
            damaged.append(fault)
    if damaged:
        raise DeclarationError(
            f"resume: none of the {len(damaged)} checkpoints in {store.folder} can be read; the newest: {damaged[0]}"
        )
    view.say("nothing is saved yet: starting at step 0")
    return Start()


def _told(step: int, fault: CheckpointError | None) -> tuple[int, str | None, bool]:
    return step, None if fault is None else str(fault), isinstance(fault, Unfinished)


def _about(store: Checkpoints, step: int) -> dict[str, Any]:
    return dict(store.seal(step).about)


def check_rows(out: Path, step: int) -> list[Row]:
    """The rows of a run up to a step.

    Raises:
      DeclarationError: they are not steps 1 to `step`.
    """
    file, rows = out / METRICS, []
    for number, line in enumerate(_lines(file, step), start=1):
        try:
            row = json.loads(line)
            right = row["step"] == number
        except (ValueError, TypeError, KeyError, RecursionError):
            right = False
        if not right:
            raise DeclarationError(f"resume: {file} line {number} is not the row of step {number}: {_OTHERWISE}")
        rows.append(row)
    if len(rows) < step:
        raise DeclarationError(f"resume: {file} has {len(rows)} of the {step} rows before the checkpoint: {_OTHERWISE}")
    return rows


def drop_rows_after(out: Path, step: int) -> None:
    """Leaves the file of a run with its rows up to a step."""
    file = out / METRICS
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)  # what is written to a link lands elsewhere
    new.write_text("".join(_lines(file, step)))
    new.replace(file)


def _lines(file: Path, most: int) -> list[str]:
    return file.read_text(errors="replace").splitlines(keepends=True)[:most] if file.is_file() else []


_OTHERWISE = "put the file back as it was, or start anew in another directory"


def check_resumes(store: Checkpoints, out: Path, steps: int) -> None:
    """That a run can go on from its newest checkpoint; asked before anything is compiled.

    Raises:
      DeclarationError: it has more steps than the run is to have, or the metrics before it are not there.
    """
    newest = max(store.steps(), default=0)
    if newest > steps:
        raise DeclarationError(
            f"steps: {steps}, and the checkpoint in {store.folder} is of step {newest}; give as many steps at least"
        )
    check_rows(out, newest)


def refuse_to_replace(store: Checkpoints, out: Path) -> None:
    """That a new run does not take the place of one that can be gone on with.

    Raises:
      DeclarationError: there are checkpoints.
    """
    steps = store.steps()
    if steps:
        raise DeclarationError(
            f"out {str(out)!r}: holds a run with a checkpoint of step {steps[-1]}; go on with it by --resume, give "
            f"another directory, or remove {store.folder}"
        )
