"""`make_plan`: every decision in one place, every fault of a declaration in one message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from shardlab.mesh.build import abstract_mesh
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import path_of
from shardlab.module.model import Model, abstract, flowing, read_model
from shardlab.module.pipeline import Pipeline
from shardlab.module.residuals import POLICIES, REMAT, BlockVjp, residual_bytes, residual_shapes
from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.schedules import make_schedule
from shardlab.pipeline.stages import assign_layers
from shardlab.plan.optimizer import nest, state_specs, why_per_layer
from shardlab.plan.plan import Parameter, Plan, Stack, StateLeaf, shard_bytes
from shardlab.sharding.resolve import resolve
from shardlab.sharding.rules import Rules
from shardlab.sharding.zero import add_axes, without

DTYPES = ("float32", "bfloat16", "float64")
HEADS = ("auto", "examples", "last_stage")


def make_plan(
    model: Any,
    *,
    mesh: MeshSpec,
    rules: Rules,
    optimizer: optax.GradientTransformation,
    batch: Any,
    pipeline: Pipeline | None = None,
    specs: Mapping[str, PartitionSpec] | None = None,
    schedule: str = "1f1b",
    microbatches: int = 1,
    zero: int = 0,
    remat: str = "none",
    dtype: str = "float32",
    head: str = "auto",
    batch_axes: str = "manual",
    activation: PartitionSpec | None = None,
) -> Plan:
    """Where every array lives and what the step will do; no device is needed.

    Args:
      model: what `read_model` takes.
      mesh: the declared mesh.
      rules: specs by path pattern, and logical names.
      optimizer: any optax transformation.
      batch: a batch of the global size, or its shapes.
      pipeline: the names of the module's parts.
      specs: specs by path, before the rules.
      schedule: ``"1f1b"`` or ``"gpipe"``.
      microbatches: microbatches a step; without a pipeline, gradient accumulation.
      zero: ZeRO level 0 to 3.
      remat: ``"none"``, ``"full"`` or a name of `jax.checkpoint_policies`.
      dtype: what the step computes in; master parameters stay at least float32.
      head: ``"examples"`` spreads `before` and `after` over the stages by example, ``"last_stage"`` runs them whole
        on every stage and uses one; ``"auto"`` takes the first that divides.
      batch_axes: ``"manual"``: each shard accumulates its gradients and they are reduced once a step;
        ``"automatic"``: XLA places every reduction, which models that compute across examples need.
      activation: spec of what flows between blocks, for sequence parallelism: ``P("data", "tensor", None)``.

    Raises:
      DeclarationError: with every fault of the declaration.
    """
    shapes = abstract(batch)
    model = read_model(model, shapes, pipeline)
    sizes = mesh.sizes
    resolution = resolve(
        {path: leaf.shape for path, leaf in model.parameters.items()},
        mesh=mesh,
        rules=rules,
        annotations=model.annotations,
        specs=specs,
    )
    faults = list(resolution.faults)
    faults += _choices(zero=zero, remat=remat, dtype=dtype, head=head, batch_axes=batch_axes)
    notes: list[str] = []
    if model.buffers and model.parts is None and batch_axes == "manual":
        batch_axes = "automatic"
        notes.append(f"{next(iter(model.buffers))} follows the whole batch: all axes are automatic")
    manual = batch_axes == "manual"
    leaves = [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]]
    faults += _batch_faults(leaves, mesh, microbatches, manual)
    faults += _stage_faults(model, mesh, schedule, microbatches, manual, pipeline)
    raise_faults(faults)

    stages = sizes.get(mesh.stage, 1) if mesh.stage else 1
    layers: tuple[int, ...] = ()
    stacks: tuple[Stack, ...] = ()
    if model.parts is not None:
        layers = assign_layers(len(model.parts.layers), stages)
        stacks = _stacks(model, layers)
        raise_faults(_layer_faults(stacks, resolution.placements, mesh))
        if stages == 1 and schedule != "1f1b":
            notes.append(f"schedule {schedule} is ignored: one stage only accumulates its microbatches")
    rows = leaves[0][1].shape[0] // (mesh.batch_size_divisor if manual else 1) // microbatches
    if stages > 1:
        head = _head(head, rows, stages, notes)
    elif head == "auto":
        head = "last_stage"

    inside = {path for stack in stacks for path in stack.members}
    wide = "float64" if dtype == "float64" else None
    mixed = jnp.dtype(dtype).itemsize < 4
    parameters = []
    for path, leaf in model.parameters.items():
        placement = resolution.placements[path]
        lent = () if path in inside or stages == 1 or mesh.stage is None else (mesh.stage,)
        storage, state = _storage(
            placement.spec, leaf.shape, mesh, lent, shard=zero == 3 or (mixed and zero > 0), shard_state=zero > 0
        )
        if zero == 3 and mesh.batch_size_divisor > 1 and not set(mesh.batch) & _axes(storage):
            notes.append(f"{path}: no dim of {list(leaf.shape)} divides by the batch axes; replicated over them")
        kind = wide or str(leaf.dtype)
        parameters.append(
            Parameter(
                path=path,
                shape=leaf.shape,
                dtype=kind,
                spec=placement.spec,
                source=placement.source,
                compute=without(placement.spec, (*mesh.batch, *((mesh.stage,) if mesh.stage else ()))),
                storage=storage,
                state=state,
                bytes_per_device=shard_bytes(leaf.shape, kind, storage, sizes),
            )
        )
    reason = why_per_layer(optimizer, model, stacks) if stacks else None
    if reason is not None:
        notes.append(f"the optimizer runs per layer: {reason}")
    update = "per-layer" if reason is not None else "stacked"
    return Plan(
        mesh=mesh,
        pipeline=pipeline,
        parameters=tuple(parameters),
        buffers=tuple(model.buffers),
        stacks=stacks,
        layers=layers,
        optimizer_state=_optimizer_rows(optimizer, model, parameters, stacks, update, mesh),
        update=update,
        schedule=schedule,
        num_microbatches=microbatches,
        zero=zero,
        remat=remat,
        dtype=dtype,
        head=head,
        batch=tuple((path, leaf.shape, str(leaf.dtype)) for path, leaf in leaves),
        batch_axes_manual=manual,
        activation_bytes=_activation_bytes(model, shapes, mesh, rows, max(layers, default=0), dtype, remat),
        activation_spec=activation,
        notes=tuple(notes),
    )


def _axes(spec: PartitionSpec) -> set[str]:
    return {axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))}


def _storage(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: MeshSpec, lent: tuple[str, ...], *, shard: bool, shard_state: bool
) -> tuple[PartitionSpec, PartitionSpec]:
    """Specs of a parameter and of its optimizer state between steps.

    `lent` axes hold a share of a parameter that every stage uses, gathered once a step.
    """

    def add(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
        missing = tuple(axis for axis in axes if mesh.sizes[axis] > 1)
        if not missing or set(missing) & _axes(spec):
            return spec
        return add_axes(spec, shape, missing, mesh)[0]

    storage = add(add(spec, mesh.batch if shard else ()), lent)
    state = add(add(spec, mesh.batch if shard_state else ()), lent)
    return storage, state


def _choices(**given: Any) -> list[Fault]:
    """Faults of the options that are names or levels."""
    policies = (*REMAT, *POLICIES)
    allowed: dict[str, tuple[Any, ...]] = {
        "zero": (0, 1, 2, 3),
        "remat": policies,
        "dtype": DTYPES,
        "head": HEADS,
        "batch_axes": ("manual", "automatic"),
    }
    faults = []
    for name, value in given.items():
        if value not in allowed[name]:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in allowed[name]], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            faults.append(
                Fault(f"{name}={value!r}", f"is not one of {', '.join(map(str, allowed[name]))}", f"{hint}write one of them")
            )
    if given["dtype"] == "float64" and not jax.config.jax_enable_x64:
        faults.append(
            Fault("dtype='float64'", "JAX computes in 32 bits here", "call jax.config.update('jax_enable_x64', True) first")
        )
    return faults


def _batch_faults(leaves: list[tuple[str, Any]], mesh: MeshSpec, microbatches: int, manual: bool) -> list[Fault]:
    if not leaves:
        return [Fault("batch", "has no arrays", "pass a pytree whose arrays have the examples as leading dim")]
    faults = []
    first, size = leaves[0][0], leaves[0][1].shape[0] if leaves[0][1].shape else 0
    for path, leaf in leaves:
        here = leaf.shape[0] if leaf.shape else 0
        if here != size or not leaf.shape:
            faults.append(
                Fault(f"batch {path}", f"leading dim {here} is not the {size} examples of {first}", "give every array the examples first")
            )
    shards = mesh.batch_size_divisor
    axes = " x ".join(f"{axis}={mesh.sizes[axis]}" for axis in mesh.batch) or "no batch axis"
    if microbatches < 1:
        faults.append(Fault(f"microbatches={microbatches}", "is not a positive number", "write 1 or more"))
    elif size % (shards * microbatches):
        up = math.ceil(size / (shards * microbatches)) * shards * microbatches
        faults.append(
            Fault(
                "batch",
                f"{size} examples do not divide by {shards} shards ({axes}) x {microbatches} microbatches",
                f"use a batch of {up}, or fewer microbatches",
            )
        )
    if not manual and microbatches > 1:
        faults.append(
            Fault(
                f"microbatches={microbatches}",
                "the model computes across examples, and a microbatch is not the batch",
                "use microbatches=1",
            )
        )
    return faults


def _stage_faults(
    model: Model, mesh: MeshSpec, schedule: str, microbatches: int, manual: bool, pipeline: Pipeline | None
) -> list[Fault]:
    stages = mesh.sizes[mesh.stage] if mesh.stage else 1
    faults = []
    if stages > 1 and model.parts is None:
        faults.append(
            Fault(
                f"mesh axis {mesh.stage!r}",
                f"has {stages} stages, and the model's parts are not named",
                "pass pipeline=Pipeline(before=..., blocks=..., after=...)",
            )
        )
    if stages > 1 and not manual:
        faults.append(
            Fault(f"mesh axis {mesh.stage!r}", f"{stages} stages need manual batch axes", "use one stage, or batch_axes='manual'")
        )
    try:
        make_schedule(schedule, stages=stages, microbatches=max(microbatches, 1))
        if model.parts is not None:
            assign_layers(len(model.parts.layers), stages)
    except ScheduleError as error:
        raise DeclarationError(str(error)) from None
    return faults


def _head(head: str, rows: int, stages: int, notes: list[str]) -> str:
    if head == "examples" and rows % stages:
        raise DeclarationError(
            f"head='examples': a microbatch of {rows} examples a shard does not divide by {stages} stages; use "
            "head='last_stage', or fewer microbatches"
        )
    if head == "auto":
        if rows % stages == 0:
            return "examples"
        notes.append(f"head last_stage: {rows} examples of a microbatch do not divide by {stages} stages")
        return "last_stage"
    return head


def _stacks(model: Model, layers: tuple[int, ...]) -> tuple[Stack, ...]:
    """One stack for every array of a block; stage s holds slots s*K to s*K + K - 1, K the longest stage."""
    assert model.parts is not None
    longest = max(layers)
    slots: list[int | None] = []
    start = 0
    for count in layers:
        slots += [*range(start, start + count), *[None] * (longest - count)]
        start += count
    stacks = []
    for inner, path in model.parts.layers[0].items():
        name = path.removesuffix(inner).replace("0", "*") + inner
        members = tuple(None if slot is None else model.parts.layers[slot][inner] for slot in slots)
        stacks.append(Stack(name, members))
    return tuple(stacks)


def _layer_faults(stacks: tuple[Stack, ...], placements: Mapping[str, Any], mesh: MeshSpec) -> list[Fault]:
    faults = []
    for stack in stacks:
        paths = [path for path in stack.members if path and path in placements]
        for path in paths[1:]:
            if placements[path].spec != placements[paths[0]].spec:
                faults.append(
                    Fault(
                        path,
                        f"spec {placements[path].spec} ({placements[path].source}) is not that of {paths[0]}, "
                        f"{placements[paths[0]].spec}; blocks are stacked",
                        "give every block the same spec",
                    )
                )
                break
        if paths and mesh.stage and mesh.stage in _axes(placements[paths[0]].spec):
            faults.append(
                Fault(
                    paths[0],
                    f"its spec names the stage axis {mesh.stage!r} ({placements[paths[0]].source})",
                    "leave it out: blocks are laid on the stages by the pipeline",
                )
            )
    return faults


def optimizer_tree(model: Model, values: Mapping[str, Any], stacks: tuple[Stack, ...], update: str) -> Any:
    """The tree the optimizer sees: the user's own, or nested dicts with stacked layers."""
    if update == "per-layer" or not stacks:
        return model.tree(values)
    return nest(values)


def optimizer_specs(parameters: Any, stacks: tuple[Stack, ...], update: str, mesh: MeshSpec) -> dict[str, PartitionSpec]:
    """Specs of optimizer state, gradients and updates in the tree that the optimizer sees, by path."""
    by_path = {parameter.path: parameter for parameter in parameters}
    inside = {path for stack in stacks for path in stack.members if path}
    stage = mesh.stage if mesh.stage and mesh.sizes[mesh.stage] > 1 else None
    specs = {}
    for path, parameter in by_path.items():
        if path not in inside:
            specs[path] = parameter.state
        elif update == "per-layer":
            specs[path] = add_axes(parameter.state, parameter.shape, (stage,), mesh)[0] if stage else parameter.state
    if update == "stacked":
        for stack in stacks:
            first = next(path for path in stack.members if path)
            if first in by_path:
                specs[stack.name] = PartitionSpec(stage, *by_path[first].state)
    return specs


def optimizer_shapes(parameters: Any, stacks: tuple[Stack, ...], update: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters in the tree that the optimizer sees, by path."""
    shapes = {p.path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)) for p in parameters}
    if update == "per-layer":
        return shapes
    for stack in stacks:
        members = [shapes.pop(path) for path in stack.members if path and path in shapes]
        if members:
            shapes[stack.name] = jax.ShapeDtypeStruct((len(stack.members), *members[0].shape), members[0].dtype)
    return shapes


def _optimizer_rows(
    optimizer: Any, model: Model, parameters: Any, stacks: tuple[Stack, ...], update: str, mesh: MeshSpec
) -> tuple[StateLeaf, ...]:
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


def _activation_bytes(
    model: Model, batch: Any, mesh: MeshSpec, rows: int, layers: int, dtype: str, remat: str
) -> int:
    """Residuals of one microbatch in the longest stage, as if no automatic axis split them."""
    if model.parts is None:
        return 0
    parts = model.parts
    key = jax.eval_shape(lambda: jax.random.key(0))
    kinds = {path: jnp.dtype(dtype) for path in model.parameters}
    values = {
        path: jax.ShapeDtypeStruct(leaf.shape, kinds.get(path, leaf.dtype))
        for path, leaf in {**model.parameters, **model.buffers}.items()
    }
    part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch)
    layer = {inner: values[path] for inner, path in parts.layers[0].items()}
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        x = jax.eval_shape(lambda v, b, k: flowing(parts.before(v, b, k, True), dtype), values, part, key)
        c = None if parts.context is None else jax.eval_shape(lambda v, b, k: parts.context(v, b, k, True), values, part, key)  # type: ignore[misc]
        _check_x(x, jax.eval_shape(lambda w, x, c, k: flowing(parts.block(w, x, c, k, True), dtype), layer, x, c, key))
        block = BlockVjp(lambda w, x, c, k: flowing(parts.block(w, x, c, k, True), dtype), remat, context=False)
        return layers * residual_bytes(residual_shapes(block, layer, x, c, key))


def _check_x(x: Any, y: Any) -> None:
    """A block keeps the structure and the shapes of what flows through it."""
    if jax.tree.structure(x) != jax.tree.structure(y):
        raise DeclarationError(f"block: returns {jax.tree.structure(y)} for x of {jax.tree.structure(x)}; return x's structure")
    for (keys, mine), theirs in zip(jax.tree_util.tree_flatten_with_path(x)[0], jax.tree.leaves(y), strict=True):
        if mine.shape != theirs.shape:
            raise DeclarationError(
                f"block: x {path_of(keys)} enters as {list(mine.shape)} and leaves as {list(theirs.shape)}; every block "
                "keeps x's shapes"
            )
