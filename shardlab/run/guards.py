"""What ends a run whose numbers go wrong: what is not finite, losses that leap, copies that differ.

Each ends it by an error that names the steps, what was seen in them, and the checkpoint from before to go on from.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardlab.checkpoint.replicas import diverged
from shardlab.checkpoint.store import Checkpoints
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.plan.plan import Plan
from shardlab.run.record import Row
from shardlab.run.rows import Rows
from shardlab.step.finite import not_finite
from shardlab.step.state import TrainState

WINDOW = 20
"""Losses before a step whose median a leap is measured by."""


@dataclass(frozen=True)
class Guards:
    """What a run is watched for; 0 switches each off.

    Attributes:
      max_skipped: make no update where the loss or a gradient is not finite; end after so many such steps in a row.
      max_spike: end at a loss more than so many times the median of the 20 steps before, where that is above 0.
      check_replicas: compare the copies of what several devices hold every so many steps, and before a checkpoint.

    >>> Guards(max_spike=0.5)
    Traceback (most recent call last):
        ...
    shardlab.mesh.faults.DeclarationError: max_spike: is 0.5; give more than 1, or 0 to let every loss pass
    """

    max_skipped: int = 0
    max_spike: float = 0.0
    check_replicas: int = 0

    def __post_init__(self) -> None:
        faults = []
        if self.max_skipped < 0:
            faults.append(Fault("max_skipped", f"is {self.max_skipped}", "give a number of steps, or 0 to skip none"))
        if self.max_spike and not self.max_spike > 1:
            faults.append(Fault("max_spike", f"is {self.max_spike}", "give more than 1, or 0 to let every loss pass"))
        if self.check_replicas < 0:
            faults.append(
                Fault("check_replicas", f"is {self.check_replicas}", "give a number of steps, or 0 to compare none")
            )
        raise_faults(faults)


class NotFinite(DeclarationError):
    """Steps in a row whose loss or gradients were not finite."""


class LossSpike(DeclarationError):
    """A step whose loss is far above those before it."""


class ReplicasDiffer(DeclarationError):
    """Devices that hold other copies of what should be the same."""


class Watch:
    """Looks at the steps of a run as they end.

    Args:
      guards: what for.
      plan: of the run.
      rows: those so far, and where the one that ends the run is put.
      store: the checkpoints of the run.
    """

    def __init__(self, guards: Guards, plan: Plan, rows: Rows, store: Checkpoints) -> None:
        self._guards, self._plan, self._rows, self._store = guards, plan, rows, store
        self._skipped = 0
        self._losses: deque[float] = deque(
            (row["loss"] for row in rows.all[-WINDOW:] if row["loss"] is not None), maxlen=WINDOW
        )

    def look(self, row: Row, metrics: Mapping[str, Any]) -> None:
        """Marks the row of a step that made no update.

        Raises:
          NotFinite, LossSpike: it is one too many; its row is written.
        """
        if self._guards.max_skipped:
            self._look_for_numbers(row, metrics)
        if self._guards.max_spike:
            self._look_for_spikes(row)

    def compares(self, number: int) -> bool:
        """Whether the copies are to be compared after a step, beside those of checkpoints."""
        return self._guards.check_replicas > 0 and number % self._guards.check_replicas == 0

    def compare(self, number: int, state: TrainState) -> None:
        """Compares the copies, where the run is watched for it.

        Raises:
          ReplicasDiffer: some differ.
        """
        found = diverged(state) if self._guards.check_replicas else []
        if found:
            some = "; ".join(map(str, found[:3])) + (f"; and {len(found) - 3} arrays more" if len(found) > 3 else "")
            raise ReplicasDiffer(
                f"step {number}: {some}: a device or a link computes or carries wrong numbers, or the step is not the "
                f"same on all; {self._way_on()}, on other devices where these do it again"
            )

    def _look_for_numbers(self, row: Row, metrics: Mapping[str, Any]) -> None:
        paths = not_finite(metrics["finite"], self._plan)
        loss = [] if math.isfinite(row["loss"] or 0.0) else ["the loss"]
        if not (paths or loss):
            self._skipped = 0
            return
        self._skipped += 1
        row["skipped"] = True
        some = ", ".join([*loss, *paths[:3]]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        self._rows.view.say(f"step {row['step']}: no update: not finite: {some} ({self._skipped} in a row)")
        if self._skipped >= self._guards.max_skipped:
            self._rows.add(row)
            raise NotFinite(
                f"steps {row['step'] - self._skipped + 1} to {row['step']}: not finite: {some}; parameters are as they "
                f"were before; look at the data and the learning rate of these steps, and {self._way_on()}"
            )

    def _look_for_spikes(self, row: Row) -> None:
        loss = row["loss"]
        if loss is None or not math.isfinite(loss):
            return
        usual = statistics.median(self._losses) if len(self._losses) == WINDOW else 0.0
        if usual > 0 and loss > self._guards.max_spike * usual:
            self._rows.add(row)
            raise LossSpike(
                f"step {row['step']}: the loss is {loss:.4g}, {loss / usual:.2f} times the median of the {WINDOW} "
                f"steps before ({usual:.4g}), and max_spike is {self._guards.max_spike:g}; {self._way_on()}, with "
                "--skip-batches to leave out the data that led here"
            )
        self._losses.append(loss)

    def _way_on(self) -> str:
        """What to do, once what is being saved is there."""
        self._store.wait()
        saved = self._store.steps()
        return f"go on from the checkpoint of step {saved[-1]} with --resume" if saved else "start anew"
