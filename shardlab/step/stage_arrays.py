"""Which stored arrays belong to blocks, and which block lies in every slot of every stage.

Legend: P devices of the stage axis, V virtual stages of each, R repeats of a run, Q kinds in its pattern.
"""

from __future__ import annotations

import numpy as np

from shardlab.module.model import Model
from shardlab.pipeline.buffers import program
from shardlab.plan.layout import remats, slots_of
from shardlab.plan.plan import Plan
from shardlab.step.region import Region


def diverges(plan: Plan) -> bool:
    """Whether stages do different kinds of action in one tick, each in a branch of its own."""
    return any(phase.divergent for phase in program(plan.table()).phases)


def leaves_out(plan: Plan, region: Region) -> bool:
    """Whether a stage leaves out slots for blocks of a kind that it has none for, in a branch of its own.

    Where an axis inside the stages is automatic XLA puts collectives into the blocks. Only in a schedule whose stages
    take branches anyway may these stand in a branch; in others every stage runs the slot, and the result is masked.
    Blocks of one kind always do: in a tick the longest stage is waited for.
    """
    if len(set(plan.kinds)) < 2 or region.stage is None:
        return False
    _, slots = slots_of(plan.kinds, plan.layers, plan.table())
    short = any(block is None for device in slots for stage in device for run in stage for row in run for block in row)
    sizes = region.mesh.shape
    automatic = any(sizes[axis] > 1 for axis in region.mesh.axis_names if axis not in region.manual)
    return short and (not automatic or diverges(plan))


class StageArrays:
    """The blocks of a plan as its step goes through them: run after run, every run a scan.

    Attributes:
      inner: by name of a stored array of blocks, their kind and what a block calls it.
      kinds: by kind, the model's own kind of block, and the remat policy.
      runs: what all stages go through, as long as the longest.
      blocks: by run, [P, V, R, Q]: the block in every slot; 0 where there is none.
      used: by run, [P, V, R, Q]: whether there is one.
      places: by run, [R, Q]: which of a stage's slots for blocks of its kind a slot is.
    """

    def __init__(self, model: Model, plan: Plan) -> None:
        parts = model.parts
        assert parts is not None
        owner = {path: (block, inner) for block, layer in enumerate(parts.layers) for inner, path in layer.items()}
        self.inner: dict[str, tuple[int, str]] = {}
        for stack in plan.stacks:
            block, inner = owner[next(path for path in stack.members if path)]
            self.inner[stack.name] = plan.kinds[block], inner
        firsts = [plan.kinds.index(kind) for kind in range(max(plan.kinds) + 1)]
        policies = remats(plan.kinds, plan.layers, plan.remat)
        self.kinds = tuple((parts.kinds[block], policy) for block, policy in zip(firsts, policies, strict=True))
        self.runs, slots = slots_of(plan.kinds, plan.layers, plan.table())
        by_run = [
            np.asarray([[[[-1 if b is None else b for b in row] for row in stage[run]] for stage in d] for d in slots])
            for run in range(len(self.runs))
        ]
        self.blocks = tuple(np.maximum(run, 0).astype(np.int32) for run in by_run)
        self.used = tuple(run >= 0 for run in by_run)
        self.places = self._places()

    def room(self, kind: int) -> int:
        """How many blocks of a kind a stage has slots for."""
        return sum(run.count(kind) for run in self.runs)

    def _places(self) -> tuple[np.ndarray, ...]:
        taken = [0] * len(self.kinds)
        places = []
        for run in self.runs:
            rows = np.zeros((run.repeats, len(run.kinds)), np.int32)
            for at in np.ndindex(rows.shape):
                kind = run.kinds[at[1]]
                rows[at], taken[kind] = taken[kind], taken[kind] + 1
            places.append(rows)
        return tuple(places)
