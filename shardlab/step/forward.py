"""`compile_forward`: the model without its gradient, sharded as the plan says; to evaluate and to serve."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.module.functions import path_of
from shardlab.module.model import abstract, read_model
from shardlab.pipeline.buffers import breadth_first
from shardlab.pipeline.table_csv import to_csv
from shardlab.plan.plan import Plan
from shardlab.sharding.zero import without
from shardlab.step.calls import Calls, Loss
from shardlab.step.compile import cannot_hang, options_for, working_copy
from shardlab.step.pipelined import pipelined_forward
from shardlab.step.placed import placed
from shardlab.step.region import Region, check_rows, make_region
from shardlab.step.stage_arrays import leaves_out
from shardlab.step.state import abstract_stored, buffer_specs, shardings, storage_specs


@dataclass(frozen=True)
class CompiledForward:
    """The forward pass, compiled: ``(parameters, buffers, batch) -> y``, or ``-> (loss sum, weight)``.

    Parameters and buffers are those of a `TrainState`; dropout is off.
    """

    plan: Plan
    mesh: Mesh
    batch_shardings: Any
    lowered: Any
    compiled: Any

    def __call__(self, parameters: dict[str, jax.Array], buffers: dict[str, jax.Array], batch: Any) -> Any:
        return self.compiled(parameters, buffers, jax.tree.map(placed, batch, self.batch_shardings))


def compile_forward(model: Any, plan: Plan, batch: Any, loss: Loss | None = None) -> CompiledForward:
    """The forward pass of `plan`, compiled for batches like `batch`.

    Args:
      model: as given to `make_plan`.
      plan: of the training run whose parameters it takes.
      batch: a global batch, or its shapes; its size may differ from the plan's.
      loss: ``(y, batch) -> (sum, weight)``; without it the result is y, whose arrays lead with the examples; a
        vocabulary that the stages have parts of is gathered for it.

    Raises:
      DeclarationError: the batch does not divide by the batch axes, a leaf of y does not lead with the examples, or
        some stages would wait for others for ever.
    """
    shapes = abstract(batch)
    model = read_model(model, shapes, plan.pipeline)
    plan = _for_batch(plan if loss is not None else _with_whole_vocabulary(plan), shapes)
    mesh = build_mesh(plan.mesh)
    region = make_region(plan, mesh)
    calls = Calls(model, loss, plan, region, shapes, train=False)
    working = working_copy(plan, mesh)
    inner = pipelined_forward(model, plan, region, calls) if model.parts is not None else _whole(plan, region, calls)

    def forward(parameters: Any, buffers: Any, batch: Any) -> Any:
        return inner(working(parameters), buffers, batch)

    rows = NamedSharding(mesh, PartitionSpec(plan.mesh.batch or None))
    batch_shardings = jax.tree.map(lambda _: rows, shapes)
    stored = shardings(mesh, storage_specs(plan)), shardings(mesh, buffer_specs(plan))
    jitted = jax.jit(forward, in_shardings=(*stored, batch_shardings))
    with jax.set_mesh(mesh):
        lowered = jitted.lower(*abstract_stored(model, plan), shapes)
        compiled = lowered.compile(compiler_options=options_for(plan, mesh, None))
    if leaves_out(plan, region):
        cannot_hang(compiled, plan)
    return CompiledForward(plan, mesh, batch_shardings, lowered, compiled)


def _with_whole_vocabulary(plan: Plan) -> Plan:
    """The plan for a y with all of the vocabulary, which parts of it are not: parameters gathered over the stages."""
    if not plan.vocabulary:
        return plan
    stage = (plan.mesh.stage,) if plan.mesh.stage else ()
    parameters = tuple(dataclasses.replace(p, compute=without(p.compute, stage)) for p in plan.parameters)
    return dataclasses.replace(plan, parameters=parameters, head="last_stage")


def _for_batch(plan: Plan, shapes: Any) -> Plan:
    """The plan for a batch of this size: as many microbatches as divide it, at most the plan's."""
    leaves = [
        (path_of(keys), leaf.shape, str(leaf.dtype)) for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
    ]
    size, shards = leaves[0][1][0], plan.mesh.batch_size_divisor
    if size % shards:
        raise DeclarationError(
            f"batch: {size} examples do not divide by {shards} shards of the batch axes "
            f"({', '.join(plan.mesh.batch)}); use {-(-size // shards) * shards}"
        )
    each = size // (shards if plan.batch_axes_manual else 1)
    count = next(m for m in range(min(plan.num_microbatches, each), 0, -1) if each % m == 0)
    head = plan.head if plan.head == "vocab" or each // count % plan.num_stage_devices == 0 else "last_stage"
    plan = dataclasses.replace(plan, batch=tuple(leaves), num_microbatches=count, head=head, sends="direct")
    if plan.table_csv is None:
        return plan
    # A table of the user's own is for the plan's microbatches; its forwards need nothing but its placement.
    table = plan.table()
    return dataclasses.replace(plan, table_csv=to_csv(breadth_first(table, microbatches=count)))


def _whole(plan: Plan, region: Region, calls: Calls) -> Any:
    rows = plan.batch_size // region.shards

    def in_region(values: Any, buffers: Any, batch: Any) -> Any:
        y, _ = calls.whole({**values, **buffers}, batch, None, rows)
        if not calls.has_loss:
            return check_rows(y, rows)
        total, weight = calls.loss(y, batch)
        return jax.lax.psum((total, weight), region.batch) if region.batch else (total, weight)

    none, shard = PartitionSpec(), PartitionSpec(region.batch or None)
    return region.run(in_region, (none, none, shard), (none, none) if calls.has_loss else shard)
