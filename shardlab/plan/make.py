"""`make_plan`: every decision in one place, every fault of a declaration in one message."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from shardlab.mesh.build import abstract_mesh
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import path_of
from shardlab.module.model import Model, abstract, computed, read_model
from shardlab.module.pipeline import Pipeline
from shardlab.module.residuals import residual_bytes
from shardlab.module.written import written_by
from shardlab.pipeline.cost import peak_waiting
from shardlab.pipeline.runs import stage_runs
from shardlab.pipeline.schedules import Schedule, make_schedule
from shardlab.pipeline.stages import LayerCosts, Stages, stage_layers
from shardlab.pipeline.table_csv import to_csv
from shardlab.plan.check import (
    activation_faults,
    batch_faults,
    choice_faults,
    dtype_faults,
    fault_of,
    flow_faults,
    in_shards,
    layer_faults,
    padding_faults,
    random_faults,
    reduce_faults,
    remat_faults,
    sharding_faults,
    stage_faults,
    traced_in,
)
from shardlab.plan.layout import (
    axes_in,
    engine_kinds,
    optimizer_shapes,
    optimizer_specs,
    optimizer_tree,
    policies_of_blocks,
    policy_within_stage,
    remats,
    stacks_of,
    storage_of,
)
from shardlab.plan.lookups import looked_up, lookup_note
from shardlab.plan.microbatch import Microbatch
from shardlab.plan.notes import (
    PER_LAYER,
    ignored_notes,
    kind_notes,
    saved_notes,
    stage_notes,
    storage_notes,
    update_notes,
)
from shardlab.plan.optimizer import state_specs, why_per_layer
from shardlab.plan.plan import Buffer, Parameter, Plan, Stack, StateLeaf, shard_bytes
from shardlab.plan.scatter import scatter_faults
from shardlab.plan.vocabulary import vocabulary_faults
from shardlab.plan.whole import kept_whole, whole_note
from shardlab.sharding.resolve import Placement, flatten, resolve
from shardlab.sharding.rules import Rules, read_rules
from shardlab.sharding.zero import without


def make_plan(
    model: Any,
    *,
    mesh: MeshSpec,
    rules: Rules | Iterable[Any],
    optimizer: optax.GradientTransformation,
    batch: Any,
    pipeline: Pipeline | None = None,
    specs: Mapping[str, PartitionSpec] | None = None,
    schedule: str | Schedule = "1f1b",
    virtual: int | None = None,
    stages: Stages = None,
    microbatches: int = 1,
    zero: int = 0,
    remat: str | Sequence[str] = "none",
    dtype: str = "float32",
    reduce_dtype: str = "auto",
    head: str = "auto",
    gather: str = "step",
    accumulate: str = "full",
    sends: str = "auto",
    scatter: str = "auto",
    batch_axes: str = "manual",
    activation: PartitionSpec | None = None,
    saved_activation: PartitionSpec | None = None,
) -> Plan:
    """Where every array lives and what the step will do; no device is needed.

    Args:
      model: what `read_model` takes.
      mesh: the declared mesh.
      rules: specs by path pattern, and logical names; pairs (pattern, spec) are made rules.
      optimizer: any optax transformation.
      batch: a batch of the global size, or its shapes.
      pipeline: the names of the module's parts.
      specs: specs by path, before the rules.
      schedule: a name of `shardlab.pipeline.schedules.SCHEDULES`, or a schedule of your own, as
        `shardlab.pipeline.table_csv.read_csv` or `shardlab.pipeline.automatic.automatic` give one.
      virtual: stages that a device of the stage axis holds; None leaves it to the schedule.
      stages: which blocks each stage holds; None: as even as can be. A list of them, virtual stages too, in the order
        in which a microbatch passes them: ``"E t*2 | t*3 | t*3 | t*2 H"`` or ``(2, 3, 3, 2)``; a stage may be empty.
        Or what to balance them by: ``"balanced"``, the operations that each part is estimated to take, or a
        `shardlab.pipeline.stages.LayerCosts`, what was measured. `before` and `after` count on their stages with
        ``head="last_stage"``. Where blocks are of one kind no stage is made longer than the longest of even
        ones: every device computes as many slots in a tick, so that an even longest stage is the fastest.
      microbatches: microbatches a step; without a pipeline, gradient accumulation.
      zero: ZeRO level 0 to 3.
      remat: what a stage keeps of a microbatch for its backward: ``"none"``, everything; ``"full"``, every block's
        input; a name of `jax.checkpoint_policies`, what that saves of every block; ``"stage"``, the stage's input
        alone, from which its backward runs the forward again, keeping everything, or, as ``"stage/full"``, what another
        policy says. One for all stages, or one for each, in order.
      dtype: what the step computes in; master parameters stay at least float32.
      reduce_dtype: what gradients are summed over the batch axes in, once they have accumulated over the
        microbatches. ``"auto"``: what they accumulate in, float32 or `dtype` if that is wider. ``"bfloat16"`` halves
        what is sent and rounds every shard's gradient.
      head: ``"examples"`` spreads `before` and `after` over the stages by example, ``"last_stage"`` runs them whole
        on every stage and uses one; ``"auto"`` takes the first that divides. ``"vocab"`` computes with parts of the
        vocabulary: the parameters outside the blocks whose specs name the stage axis, as in
        ``Rule("head/kernel", P(None, "stage"))``, are never gathered over it; on every stage `after` is given the
        stage's part and all examples, and gives that part of the logits, of which the loss makes nothing but
        `shardlab.cross_entropy`. `before` is spread by example where that divides.
      gather: when weights that lie in shards (ZeRO 3) are gathered. ``"step"``: all once a step, a whole working copy;
        ``"layer"``: each block's whenever it is used, in every tick. ``"auto"``: by layer with one stage, which would
        hold the whole model, and else once a step.
      accumulate: how gradients add up over microbatches (from ZeRO 2). ``"full"``: each shard's own, reduced once a
        step; ``"sharded"``: each block's reduce-scattered in every backward, to a piece on each device, and those of
        what comes before and after the blocks with every microbatch. ``"auto"``: sharded, from ZeRO 2.
      sends: when what a tick makes for another stage is sent. ``"direct"``: at its end; ``"delayed"``: during the next
        tick, beside what that computes, to be read in the one after. ``"auto"``: as `schedule` says; by name, direct.
      scatter: how gradients are reduce-scattered over a batch axis. ``"whole"``: at once, of which XLA:TPU makes an
        all-reduce where the axis covers three dims of the torus; ``"data=32x8"``: over parts of it one after another,
        outermost first; ``"auto"``: what takes less time on the links of the devices.
      batch_axes: ``"manual"``: each shard accumulates its gradients and they are reduced once a step;
        ``"automatic"``: XLA places every reduction, which models that compute across examples need.
      activation: spec of what flows between blocks, for sequence parallelism: ``P("data", "tensor", None)``.
      saved_activation: spec of the same where it is kept for the backward, as a stage's or a block's input: blocks
        compute with x as it flows, and it is spread over an axis inside a stage when it is put away and gathered when
        it is needed again (Megatron-LM's distributed saved activations, DeepSpeed's partitioned ones). None: as it
        flows.

    Raises:
      DeclarationError: with every fault of the declaration.
    """
    raise_faults(random_faults())
    shapes = abstract(batch)
    model = read_model(model, shapes, pipeline)
    rules, sizes = read_rules(rules), mesh.sizes
    # A rule need not speak of what is not trained.
    spoken_of = [
        path
        for path in model.buffers
        if path in flatten(specs or {}) or any(rule.matches(path) for rule in rules.rules)
    ]
    resolution = resolve(
        {path: leaf.shape for path, leaf in model.parameters.items()}
        | {path: model.buffers[path].shape for path in spoken_of},
        mesh=mesh,
        rules=rules,
        annotations=model.annotations,
        specs=specs,
        blocks=model.parts.block_paths if model.parts is not None else (),
    )
    remat = _policies(remat)
    untrained = dtype_faults(model)
    choices = choice_faults(
        zero=zero,
        dtype=dtype,
        reduce_dtype=reduce_dtype,
        head=head,
        batch_axes=batch_axes,
        gather=gather,
        accumulate=accumulate,
        sends=sends,
    )
    choices += [*remat_faults(remat), *scatter_faults(scatter, mesh)]
    if not isinstance(schedule, str | Schedule):
        problem = "is neither a name nor a table"
        choices.append(Fault(f"schedule={schedule!r}", problem, "write a name as '1f1b', or give a Schedule"))
        schedule = "1f1b"
    faults = [*resolution.faults, *untrained, *_padded_buffers(spoken_of, resolution.placements), *choices]
    notes: list[str] = []
    written = _written(model, shapes, mesh) if batch_axes == "manual" else ()
    if written:
        batch_axes = "automatic"
        notes.append(f"{written[0]} follows the whole batch: all axes are automatic")
    manual = batch_axes == "manual"
    leaves = [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]]
    examples = batch_faults(leaves, mesh, microbatches, manual)
    faults += examples
    faults += reduce_faults(reduce_dtype, dtype, _accumulated(dtype), manual)
    if isinstance(schedule, Schedule) and sends != "auto":
        schedule = dataclasses.replace(schedule, delayed=sends == "delayed")
    delayed = schedule.delayed if isinstance(schedule, Schedule) else sends == "delayed"
    faults += stage_faults(model, mesh, schedule, virtual, stages, microbatches, manual, remat, delayed=delayed)
    faults += layer_faults(model, resolution.placements)

    # What is found by going on stands in the same message, where what it needs is there.
    devices = sizes.get(mesh.stage, 1) if mesh.stage else 1
    inside = model.parts.block_paths if model.parts is not None else frozenset()
    parameters: list[Parameter] = []
    if not (resolution.faults or untrained or choices):
        parameters = _parameters(model, resolution.placements, mesh, zero, dtype, head)
        of_blocks = [one for one in parameters if one.path in inside]
        if gather == "auto":
            gather = "layer" if devices == 1 and manual and in_shards(of_blocks, mesh, "storage") else "step"
        if accumulate == "auto":
            accumulate = "sharded" if zero > 1 and manual and in_shards(of_blocks, mesh, "state") else "full"
        faults += sharding_faults(of_blocks, mesh, zero, gather, accumulate)
        faults += padding_faults(optimizer, model, parameters)
    flows = {"activation": activation, "saved_activation": saved_activation}
    wrong_axes = [fault for option, spec in flows.items() for fault in activation_faults(option, spec, model, mesh)]
    faults += wrong_axes
    stages = stages or None if isinstance(stages, str) else stages
    if devices == 1:
        notes += ignored_notes(schedule, sends, stages)
        stages = None
    entering: Microbatch | None = None
    kept: dict[tuple[int, str], int] = {}
    saved = activation if saved_activation is None else saved_activation
    x_parts = 1
    if saved is not None and not wrong_axes:
        x_parts = math.prod(sizes[axis] for axis in axes_in(saved) - {*mesh.batch})
    if model.parts is not None and not (untrained or choices or examples):
        rows = leaves[0][1].shape[0] // (mesh.batch_size_divisor if manual else 1) // microbatches
        entering = Microbatch(model, shapes, mesh, rows, dtype)
        with _after(faults), traced_in(dtype):
            if devices > 1 and head == "vocab" and not resolution.faults:
                shapes_of = entering.x, entering.values, entering.examples, entering.key
                with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
                    faults += vocabulary_faults(model, shapes_of, mesh, resolution.placements)
            if devices > 1:
                head = _head(head, entering, devices, notes, faults)
            for kind, policy in itertools.product(range(len(model.parts.blocks)), policies_of_blocks(remat)):
                kept[kind, policy] = entering.kept_bytes(kind, policy, x_parts)
            if saved_activation is not None:
                of_stage = policy_within_stage(remat) is not None
                in_parts = x_parts > 1 and (of_stage or kept != {of: entering.kept_bytes(*of) for of in kept})
                notes += saved_notes(saved_activation, in_parts=in_parts)
            for option, spec in flows.items():
                if spec is not None and not wrong_axes:
                    faults += flow_faults(option, spec, entering.x, mesh)
    raise_faults(faults)

    if devices == 1:
        schedule, virtual, delayed, head = "1f1b", 1, False, "last_stage" if head == "auto" else head
    table = schedule
    if isinstance(table, str):
        table = make_schedule(table, stages=devices, microbatches=microbatches, virtual=virtual, delayed=delayed)
    layers: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()
    stacks: tuple[Stack, ...] = ()
    activation_bytes = recomputed_bytes = cut_bytes = 0
    if entering is not None:
        layers, remarks = _layers(stages, entering, table.num_stages, remat, head)
        kinds = engine_kinds(entering.parts.kinds, layers, remat)
        notes += [*remarks, *kind_notes(kinds, layers)]
        stacks = stacks_of(model, kinds, layers, table)
        parameters = [
            one if one.path in inside else dataclasses.replace(one, read_by=entering.read_by[one.path])
            for one in parameters
        ]
        policies = remats(kinds, layers, remat)
        split = max(peak_waiting(table)) > 0
        for kind, policy in enumerate(policies):
            room = sum(run.count(kind) for run in stage_runs(kinds, layers)[0])
            of = entering.parts.kinds[kinds.index(kind)]
            activation_bytes += room * kept[of, policy]
            cut_bytes += room * entering.cut_bytes(of, policy) if split else 0
        if policy_within_stage(remat):
            recomputed_bytes = activation_bytes
            activation_bytes = residual_bytes(tuple(jax.tree.leaves(entering.x))) // x_parts
    notes += storage_notes(parameters, inside, mesh, zero, head)
    regional = {*(mesh.batch if manual else ()), *((mesh.stage,) if mesh.stage else ())}
    notes += _whole_notes(model, shapes, entering, parameters, mesh, regional)
    widened = [p.path for p in parameters if jnp.dtype(p.dtype).itemsize > model.parameters[p.path].dtype.itemsize]
    if widened and dtype != "float64":
        more = f" and {len(widened) - 1} more" if len(widened) > 1 else ""
        declared = f"declared in {model.parameters[widened[0]].dtype}, stored and updated in float32"
        notes.append(f"{widened[0]}{more}: {declared}")
    reason = why_per_layer(optimizer, model, optimizer_shapes(parameters, stacks, "per-layer"), stacks)
    notes += update_notes(reason)
    update = "stacked" if reason is None else "per-layer"
    return Plan(
        mesh=mesh,
        pipeline=pipeline,
        parameters=tuple(parameters),
        buffers=_buffer_rows(model, resolution.placements, sizes),
        stacks=stacks,
        layers=layers,
        kinds=kinds,
        virtual=table.num_virtual,
        optimizer_state=optimizer_rows(optimizer, model, parameters, stacks, update, mesh),
        update=update,
        schedule=table.name,
        table_csv=None if isinstance(schedule, str) else to_csv(table),
        num_microbatches=microbatches,
        zero=zero,
        remat=remat,
        dtype=dtype,
        reduce_dtype=(_accumulated(dtype) if manual else dtype) if reduce_dtype == "auto" else reduce_dtype,
        head=head,
        batch=tuple((path, leaf.shape, str(leaf.dtype)) for path, leaf in leaves),
        batch_axes_manual=manual,
        activation_bytes=activation_bytes,
        recomputed_bytes=recomputed_bytes,
        cut_bytes=cut_bytes,
        gather=gather,
        accumulate=accumulate,
        sends="delayed" if delayed else "direct",
        scatter=scatter,
        activation_spec=activation,
        saved_activation_spec=saved_activation,
        notes=tuple(notes),
    )


def for_optimizer(plan: Plan, model: Model, optimizer: optax.GradientTransformation) -> Plan:
    """The plan with another optimizer.

    Raises:
      DeclarationError: the optimizer needs what a step does not know, or its update is another where parameters are
        padded.
    """
    raise_faults(padding_faults(optimizer, model, plan.parameters))
    reason = why_per_layer(optimizer, model, optimizer_shapes(plan.parameters, plan.stacks, "per-layer"), plan.stacks)
    update = "stacked" if reason is None else "per-layer"
    rows = optimizer_rows(optimizer, model, plan.parameters, plan.stacks, update, plan.mesh)
    others = (note for note in plan.notes if not note.startswith(PER_LAYER))
    return dataclasses.replace(plan, optimizer_state=rows, update=update, notes=(*others, *update_notes(reason)))


def _parameters(
    model: Model, placements: Mapping[str, Placement], mesh: MeshSpec, zero: int, dtype: str, head: str
) -> list[Parameter]:
    """Where every parameter lies, by its placement."""
    inside = model.parts.block_paths if model.parts is not None else frozenset()
    several = mesh.stage is not None and mesh.sizes[mesh.stage] > 1
    mixed = jnp.dtype(dtype).itemsize < 4
    # Over a vocabulary the stage axis is what a parameter is computed with, elsewhere where it is stored.
    stored_over = (*mesh.batch, *((mesh.stage,) if mesh.stage and not (several and head == "vocab") else ()))
    parameters = []
    for path, leaf in model.parameters.items():
        placement = placements[path]
        stored = placement.padded or leaf.shape
        lent = (mesh.stage,) if mesh.stage is not None and several and path not in inside else ()
        storage, state = storage_of(
            placement.spec,
            stored,
            mesh,
            lent,
            shard=zero == 3 or (mixed and zero > 0),
            shard_state=zero > 0,
        )
        kind = _master_dtype(leaf.dtype, dtype)
        parameters.append(
            Parameter(
                path=path,
                shape=leaf.shape,
                dtype=kind,
                spec=placement.spec,
                source=placement.source,
                compute=without(placement.spec, stored_over),
                storage=storage,
                state=state,
                bytes_per_device=shard_bytes(stored, kind, storage, mesh.sizes),
                stored_shape=stored,
                read_by=(),
            )
        )
    return parameters


@contextlib.contextmanager
def _after(faults: list[Fault]) -> Iterator[None]:
    """Tracing of the model with faults known: what it finds joins them, and they come before an error of the model."""
    try:
        yield
    except Exception as error:
        found = fault_of(error) if isinstance(error, DeclarationError) and faults else None
        if found is None:
            raise_faults(faults)
            raise
        faults.append(found)


def _layers(
    stages: Stages, entering: Microbatch, num_stages: int, remat: str | tuple[str, ...], head: str
) -> tuple[tuple[int, ...], list[str]]:
    """How many blocks each stage holds, and what to note of it."""
    costs = stages if isinstance(stages, LayerCosts) else None
    source = "estimated" if costs is None else "given"
    if isinstance(stages, str) and stages == "balanced":
        policy = remat if isinstance(remat, str) else "none"
        costs = entering.costs("full" if policy_within_stage(policy) else policy)
    if costs is not None and head != "last_stage":  # every stage has its share of them
        costs = dataclasses.replace(costs, before=0, after=0)
    kinds = entering.parts.kinds
    layers = stage_layers(costs or stages, len(kinds), num_stages, alike=max(kinds) == 0)
    one_kind = max(engine_kinds(kinds, layers, remat)) == 0
    return layers, stage_notes(layers, costs, head, source, one_kind)


def _master_dtype(kind: Any, dtype: str) -> str:
    """What a parameter declared in `kind` is stored and updated in: float32 at least, float64 for a step in float64."""
    return computed(kind, "float64") if dtype == "float64" else jnp.promote_types(kind, jnp.float32).name


def _policies(remat: str | Sequence[str]) -> str | tuple[str, ...]:
    """Remat policies, one for all stages or one for each; a text may name those of each, ``|`` between them.

    >>> _policies("full | none | none"), _policies(["full", "full"])
    (('full', 'none', 'none'), 'full')
    """
    if isinstance(remat, str):
        each = tuple(one.strip() for one in remat.split("|"))
    else:
        each = tuple(remat) if isinstance(remat, Sequence) else (remat,)  # what is no policy is told with the faults
    return each[0] if len(set(each)) == 1 else each


def _written(model: Model, batch: Any, mesh: MeshSpec) -> tuple[str, ...]:
    """The buffers that a step of the model taken whole writes to."""
    if not model.buffers or model.parts is not None:
        return ()

    def after(held: Any, values: Any, batch: Any, key: Any) -> Any:
        return model.forward({**values, **held}, batch, key, True)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        return written_by(after, model.buffers, model.parameters, batch, key)


def _whole_notes(
    model: Model,
    batch: Any,
    entering: Microbatch | None,
    parameters: Sequence[Parameter],
    mesh: MeshSpec,
    manual: set[str],
) -> list[str]:
    """What is laid whole for operations that XLA gets wrong otherwise, beside `manual` axes."""
    sizes = {axis: size for axis, size in mesh.sizes.items() if size > 1 and axis not in manual}
    if not sizes:
        return []
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        of_whole = (
            lambda v, b, k: model.forward(v, b, k, True),
            {**model.parameters, **model.buffers},
            batch,
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        axes = len(sizes)
        notes = whole_note(kept_whole(*of_whole, axes=axes) if entering is None else entering.kept_whole(axes))
        if axes < 2 or all(mesh.sizes[axis] == 1 for axis in manual):
            return notes
        found = looked_up(*of_whole) if entering is None else entering.looked_up()
    return notes + [
        note
        for one in parameters
        if one.path in found
        for note in lookup_note(one.path, without(one.compute, tuple(manual)), one.stored_shape, found[one.path], sizes)
    ]


def _padded_buffers(paths: list[str], placements: Mapping[str, Placement]) -> list[Fault]:
    return [
        Fault(
            f"{path} ({placements[path].source})",
            "pad=True pads parameters, and it is not trained",
            f'give it a rule of its own, before that one: ("{path}", None) replicates it',
        )
        for path in paths
        if path in placements and placements[path].padded
    ]


def _buffer_rows(model: Model, placements: Mapping[str, Placement], sizes: Mapping[str, int]) -> tuple[Buffer, ...]:
    rows = []
    for path, leaf in model.buffers.items():
        placed = placements.get(path, Placement(PartitionSpec(), "no rule: replicated"))
        kind = str(leaf.dtype)
        size = shard_bytes(leaf.shape, kind, placed.spec, sizes)
        rows.append(Buffer(path, leaf.shape, kind, placed.spec, placed.source, size))
    return tuple(rows)


def _accumulated(dtype: str) -> str:
    """What a step in `dtype` accumulates gradients in."""
    return dtype if dtype == "float64" else "float32"


def _head(head: str, entering: Microbatch, stages: int, notes: list[str], faults: list[Fault]) -> str:
    """How `before` and `after` are spread over several stages."""
    rows, other = entering.rows, entering.not_by_example(stages)
    if rows % stages:
        counted = f"{rows} example{'s' if rows != 1 else ''}"
        problem, way_out = f"a microbatch of {counted} a shard does not divide by {stages} stages", "fewer microbatches"
    elif other is not None:
        problem = f"{other}, and stages share x by example"
        way_out = "give every array of x the examples as its first dim"
    else:
        return "examples" if head == "auto" else head
    if head == "vocab":
        notes.append(f"head vocab: every stage runs before whole: {problem}")
        return head
    if head == "examples":
        faults.append(Fault("head='examples'", problem, f"use head='last_stage', or {way_out}"))
    if head == "auto":
        notes.append(f"head last_stage: {problem}")
    return "last_stage"


def optimizer_rows(
    optimizer: optax.GradientTransformation,
    model: Model,
    parameters: Sequence[Parameter],
    stacks: tuple[Stack, ...],
    update: str,
    mesh: MeshSpec,
) -> tuple[StateLeaf, ...]:
    """The arrays of an optimizer's state, on the tree that `update` says."""
    shapes = optimizer_shapes(parameters, stacks, update)
    specs = optimizer_specs(parameters, stacks, update, mesh)
    tree = optimizer_tree(model, shapes, stacks, update)
    state = jax.eval_shape(optimizer.init, tree)
    found = state_specs(state, tree, optimizer_tree(model, specs, stacks, update))
    rows = []
    for (keys, leaf), spec in zip(
        jax.tree_util.tree_flatten_with_path(state)[0],
        jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)),
        strict=True,
    ):
        kind = str(leaf.dtype)
        rows.append(StateLeaf(path_of(keys), leaf.shape, kind, spec, shard_bytes(leaf.shape, kind, spec, mesh.sizes)))
    return tuple(rows)
