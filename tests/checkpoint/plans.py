"""Plans between which a state is moved: one model, one optimizer, every way that a plan lays arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardlab.checkpoint import Canonical, Checkpoints
from shardlab.mesh.processes import whole
from shardlab.step.compile import CompiledStep
from shardlab.step.state import TrainState
from tests.equivalence.cases import Case, case, compiled, subject_of

MODEL = "mlp-7-layers"
BATCHES = 3


def _plan(subject: str = MODEL, **given: Any) -> Case:
    return case(subject, batch=8, **given)


PLANS: dict[str, Case] = {
    "one device": _plan(),
    "data": _plan(data=4),
    "fsdp 1": _plan(data=4, zero=1),
    "fsdp 2": _plan(data=2, zero=2, microbatches=2),
    "fsdp 3": _plan(data=8, zero=3),
    "fsdp 3 by layer": _plan(data=4, zero=3, gather="layer", accumulate="sharded"),
    "tensor": _plan(data=2, tensor=2),
    "1f1b 2": _plan(stage=2, microbatches=4),
    "1f1b 4": _plan(stage=4, data=2, microbatches=2, zero=1),
    "interleaved": _plan(stage=2, microbatches=4, schedule="interleaved_1f1b"),
    "uneven": _plan(stage=4, data=2, microbatches=2, stages="E t | t*3 | t*2 | t H"),
    "hybrid": _plan(data=2, stage=2, tensor=2, microbatches=2, zero=3),
    "zb_v": _plan(stage=2, data=2, microbatches=4, schedule="zb_v", zero=2),
}

FEW = ("one device", "uneven", "hybrid")
"""Those between which a state is moved in the default tests."""

TWO: dict[str, Case] = {
    "two processes": _plan(data=2, stage=2, tensor=2, microbatches=2, zero=3),
    "two processes, a stage each": _plan(stage=2, tensor=4, microbatches=4),
}
"""Those of two processes, four devices each: shards of every array are in both, or each has its own layers."""


@dataclass(frozen=True)
class Planned:
    """A plan, compiled."""

    case: Case
    step: CompiledStep
    canonical: Canonical

    def next_loss(self, state: TrainState, number: int) -> float:
        """The loss of a step on the batch of that number; it takes the state's memory."""
        return float(self.step(state, batch(self.case, number))[1]["loss"])

    def save(self, folder: Path) -> tuple[dict[str, np.ndarray], float]:
        """Saves what it has after two steps; the arrays, on the first process, and the loss of its third step."""
        state = self.step.init(0)
        for number in range(2):
            state, _ = self.step(state, batch(self.case, number))
        store = Checkpoints(folder)
        store.save(self.canonical, state, {"data": 2})
        store.wait()
        return self.arrays(state), self.next_loss(state, 2)

    def arrays(self, state: TrainState) -> dict[str, np.ndarray]:
        """The canonical arrays; none on processes but the first."""
        found = {name: whole(array, self.step.mesh) for name, array in self.canonical.arrays_of(state)[0].items()}
        return {name: array for name, array in found.items() if array is not None}


def canonical_of(step: CompiledStep) -> Canonical:
    return Canonical(step.model, step.plan, step.optimizer, step.mesh)


def planned(this: Case) -> Planned:
    step = compiled(this)
    return Planned(this, step, canonical_of(step))


def batch(this: Case, number: int) -> Any:
    """One of the batches, all of them different."""
    all_of_them = subject_of(this).batch(this.batch_size * BATCHES)
    return jax.tree.map(lambda leaf: leaf[number * this.batch_size : (number + 1) * this.batch_size], all_of_them)
