"""A model cut at its blocks, on a mesh with or without a stage axis: one SPMD program that follows a table.

tick scan     for each phase of the table: F cell, head, B or I cell, W cell, whichever the phase has
  F cell      x = before(share of the microbatch), gathered to stage 0;  else what the last tick brought
              scan over this stage's blocks, residuals written into the table's slot
              y -> next stage
  head        last stage's y is dealt out by example; each stage runs after + loss + their vjp on its share
              (head="vocab": all stages get y, and run them with their part of the vocabulary)
  B cell      reverse scan over this stage's blocks: vjp of one block, its gradient added to its slice
              dx -> previous stage;  stage 0's dx is dealt out by example for before's vjp
  I, W cells  the same in two: what the previous stage waits for, and later the gradients

With delayed sends an arrow is a permute beside the next cell, and what it brings is there for the cell after that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from shardlab.module.model import Model
from shardlab.pipeline.buffers import Phase, forward_program, program
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls
from shardlab.step.cells import Cells
from shardlab.step.phases import evaluate, train
from shardlab.step.region import Region
from shardlab.step.stage_arrays import StageArrays
from shardlab.step.state import storage_specs

Arrays = dict[str, Any]


def pipelined_gradients(
    model: Model, plan: Plan, region: Region, calls: Calls, specs: dict[str, PartitionSpec], fill: float
) -> Callable[..., tuple[Arrays, jax.Array]]:
    """``(values, buffers, batch, key data) -> (gradient sums by name, sums)``; sums as `Cells.sums` gives them.

    Gradients are sums over the whole batch, reduced once, laid out as `specs`; divide them by the weight.

    Args:
      fill: what unused buffers hold at first; NaN shows whether a bubble reaches a result.
    """
    arrays = StageArrays(model, plan)
    table = program(plan.table())

    def in_region(values: Arrays, buffers: Arrays, batch: Any, key_data: jax.Array, where: Any, rows: Any) -> Any:
        cells = Cells(plan, region, calls, arrays, table, values, buffers, batch, key_data, where, fill)
        carry = cells.allocate()
        for phase, phase_rows in zip(table.phases, rows, strict=True):
            carry = train(cells, carry, phase, phase_rows)
        return cells.reduced(carry, specs)

    none = PartitionSpec()
    out_specs = ({name: region.manual_part(spec) for name, spec in specs.items()}, none)
    return _entered(plan, region, arrays, in_region, out_specs, table.phases)


def pipelined_forward(model: Model, plan: Plan, region: Region, calls: Calls) -> Callable[..., Any]:
    """``(values, buffers, batch) -> y``, or, where `calls` has a loss, ``-> (loss sum, weight)``.

    Raises:
      DeclarationError: when tracing, if a leaf of y does not have the examples as its leading dim.
    """
    arrays = StageArrays(model, plan)
    table = forward_program(plan.table())

    def in_region(values: Arrays, buffers: Arrays, batch: Any, key_data: None, where: Any, rows: Any) -> Any:
        cells = Cells(plan, region, calls, arrays, table, values, buffers, batch, None, where, 0.0)
        carry = cells.allocate()
        found = []
        for phase, phase_rows in zip(table.phases, rows, strict=True):
            carry, out = evaluate(cells, carry, phase, phase_rows)
            found += [out] if phase.head != "never" else []
        if calls.has_loss:
            total, weight, *_ = cells.sums(carry)
            return total, weight
        (y,) = found
        # [length, r, ...] here is [D, M, P, r, ...] of all shards and stages.
        return jax.tree.map(lambda leaf: leaf[ended][None, :, None], y)

    last_device = table.schedule.device_of(table.schedule.num_stages - 1)
    (heads,) = (phase.head_microbatch for phase in table.phases if phase.head != "never")
    ended = np.argsort([at if at >= 0 else len(heads) for at in heads], kind="stable")[: plan.num_microbatches]

    def joined(leaf: jax.Array) -> jax.Array:
        if plan.head != "examples":
            leaf = leaf[:, :, last_device : last_device + 1]
        return leaf.reshape(plan.batch_size, *leaf.shape[4:])

    none = PartitionSpec()
    out_specs: Any = (none, none) if calls.has_loss else PartitionSpec(region.batch or None, None, region.stage)
    entered = _entered(plan, region, arrays, in_region, out_specs, table.phases)

    def forward(values: Arrays, buffers: Arrays, batch: Any) -> Any:
        out = entered(values, buffers, batch, None)
        return out if calls.has_loss else jax.tree.map(joined, out)

    return forward


def _entered(
    plan: Plan,
    region: Region,
    arrays: StageArrays,
    in_region: Callable[..., Any],
    out_specs: Any,
    phases: tuple[Phase, ...],
) -> Callable[..., Any]:
    """`in_region` of ``(values, buffers, batch, key data)`` in global arrays."""
    none, stage, shard = PartitionSpec(), PartitionSpec(region.stage), PartitionSpec(region.batch or None)
    tables, storage = [_rows(phase) for phase in phases], storage_specs(plan)
    compute, vocabulary = storage_specs(plan, "compute"), plan.vocabulary
    table_specs = [
        {name: PartitionSpec(None, *stage) if x.ndim == 2 else none for name, x in rows.items()} for rows in tables
    ]
    where = {
        "shard": np.arange(region.shards, dtype=np.int32),
        "stage": np.arange(region.num_stages, dtype=np.int32),
        "blocks": arrays.blocks,
        "used": arrays.used,
    }
    where_specs = {"shard": shard, "stage": stage, "blocks": stage, "used": stage}

    def entered(values: Arrays, buffers: Arrays, batch: Any, key_data: Any) -> Any:
        def spec_of(name: str) -> PartitionSpec:
            if name in storage and name in arrays.inner and plan.gather == "layer":
                return region.manual_part(storage[name])
            if name in vocabulary:
                return region.manual_part(compute[name])
            return stage if name in arrays.inner else none

        in_specs = (
            {name: spec_of(name) for name in values},
            {name: spec_of(name) for name in buffers},
            jax.tree.map(lambda _: shard, batch),
            none,
            where_specs,
            table_specs,
        )
        return region.run(in_region, in_specs, out_specs)(values, buffers, batch, key_data, where, tables)

    return entered


def _rows(phase: Phase) -> dict[str, np.ndarray]:
    """The tables of a phase: [length, P] where devices differ, [length] where they do not."""
    names = ["before_microbatch", "head_microbatch", "head_slot", "finish_microbatch", "kind"]
    for kind, slots in (("f", ("mail", "residual")), ("b", ("mail", "residual", "cut")), ("w", ("residual", "cut"))):
        names += [f"{kind}_microbatch", f"{kind}_virtual", *(f"{kind}_{slot}_slot" for slot in slots)]
    names += ["onward_slot", "back_slot", "local_slot"]
    return {name: np.asarray(getattr(phase, name), np.int32) for name in names}
