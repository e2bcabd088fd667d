"""How arrays are laid out: stacks of layers, storage between steps, and the tree that the optimizer sees."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardlab.mesh.spec import MeshSpec
from shardlab.module.model import Model
from shardlab.pipeline.runs import Run, Slots, stage_runs
from shardlab.pipeline.schedules import Schedule
from shardlab.plan.optimizer import nest
from shardlab.plan.plan import Stack
from shardlab.sharding.zero import add_axes, without


def axes_in(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a spec names."""
    return {axis for entry in spec if entry for axis in (entry if isinstance(entry, tuple) else (entry,))}


def storage_of(
    spec: PartitionSpec,
    shape: tuple[int, ...],
    mesh: MeshSpec,
    lent: tuple[str, ...],
    *,
    shard: bool,
    shard_state: bool,
) -> tuple[PartitionSpec, PartitionSpec]:
    """Specs of a parameter and of its optimizer state between steps.

    `lent` axes hold a share of a parameter that every stage uses, gathered once a step.
    """

    def add(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
        missing = tuple(axis for axis in axes if mesh.sizes[axis] > 1)
        if not missing or set(missing) & axes_in(spec):
            return spec
        return add_axes(spec, shape, missing, mesh)[0]

    # Both are cut from one layout, lent axes before batch axes on a dim: going from one to the other is then a local
    # slice or a gather, and never moves a shard elsewhere.
    most = add(spec, (*lent, *mesh.batch))
    if most == spec:
        most = add(add(spec, mesh.batch), lent)
    least = without(most, tuple(axes_in(most) - axes_in(spec) - set(lent)))
    return (most if shard else least), (most if shard_state else least)


def stacks_of(model: Model, kinds: tuple[int, ...], layers: tuple[int, ...], schedule: Schedule) -> tuple[Stack, ...]:
    """One stack for every array of a block of each kind: by device, by its virtual stages, slot by slot of the runs."""
    assert model.parts is not None
    runs, slots = slots_of(kinds, layers, schedule)
    stacks = []
    for kind in range(max(kinds) + 1):
        mine = [
            block
            for device in slots
            for stage in device
            for run, repeats in zip(runs, stage, strict=True)
            for repeat in repeats
            for of, block in zip(run.kinds, repeat, strict=True)
            if of == kind
        ]
        for inner, path in model.parts.layers[kinds.index(kind)].items():
            star = "*" if max(kinds) == 0 else f"*:{kind}"
            name = re.sub(r"\d+(?=\D*$)", star, path.removesuffix(inner)) + inner
            members = tuple(None if block is None else model.parts.layers[block][inner] for block in mine)
            stacks.append(Stack(name, members))
    return tuple(stacks)


def engine_kinds(kinds: tuple[int, ...], layers: tuple[int, ...], remat: str | tuple[str, ...]) -> tuple[int, ...]:
    """Of each block which kind it is to the engine: of one kind in the model, and under one remat policy.

    >>> engine_kinds((0, 0, 1, 1), (3, 1), "none"), engine_kinds((0, 0, 0, 0), (3, 1), ("full", "none"))
    ((0, 0, 1, 1), (0, 0, 0, 1))
    """
    policies = (remat,) * len(layers) if isinstance(remat, str) else remat
    stage_of = [stage for stage, count in enumerate(layers) for _ in range(count)]
    pairs = [(kind, policies[stage]) for kind, stage in zip(kinds, stage_of, strict=True)]
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    return tuple(numbers[pair] for pair in pairs)


def remats(kinds: tuple[int, ...], layers: tuple[int, ...], remat: str | tuple[str, ...]) -> tuple[str, ...]:
    """By kind of `engine_kinds`, the remat policy of its blocks.

    >>> remats((0, 0, 0, 1), (3, 1), ("full", "none"))
    ('full', 'none')
    """
    if isinstance(remat, str):
        return policies_of_blocks(remat) * (max(kinds) + 1)
    stage_of = [stage for stage, count in enumerate(layers) for _ in range(count)]
    return tuple(remat[stage_of[kinds.index(kind)]] for kind in range(max(kinds) + 1))


def policies_of_blocks(remat: str | tuple[str, ...]) -> tuple[str, ...]:
    """The policies that some block is under, of ``"stage"`` while the stage runs its forward again.

    >>> policies_of_blocks("stage/full"), policies_of_blocks(("full", "none", "none"))
    (('full',), ('full', 'none'))
    """
    if isinstance(remat, str):
        return (policy_within_stage(remat) or remat,)
    return tuple(dict.fromkeys(remat))


def policy_within_stage(remat: str | tuple[str, ...]) -> str | None:
    """What the blocks keep while a stage that kept its input alone runs its forward again; None if it kept more.

    >>> policy_within_stage("stage"), policy_within_stage("stage/full"), policy_within_stage("full")
    ('none', 'full', None)
    """
    name, _, policy = remat.partition("/") if isinstance(remat, str) else ("", "", "")
    return (policy or "none") if name == "stage" else None


def slots_of(
    kinds: tuple[int, ...], layers: tuple[int, ...], schedule: Schedule
) -> tuple[tuple[Run, ...], tuple[tuple[Slots, ...], ...]]:
    """The runs that all stages go through; by device and its virtual stages the block in each of their slots.

    None in those that only fill a shorter stage.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> _, slots = slots_of((0,) * 5, (2, 1, 1, 1), make_schedule("zb_v", stages=2, microbatches=4))
    >>> slots
    (((((0,), (1,)),), (((4,), (None,)),)), ((((2,), (None,)),), (((3,), (None,)),)))
    """
    runs, stages = stage_runs(kinds, layers)
    return runs, tuple(
        tuple(stages[schedule.stage_of(device, virtual)] for virtual in range(schedule.num_virtual))
        for device in range(schedule.num_devices)
    )


def optimizer_tree(model: Model, values: Mapping[str, Any], stacks: tuple[Stack, ...], update: str) -> Any:
    """The tree the optimizer sees: the user's own, or nested dicts with stacked layers."""
    if update == "per-layer" or not stacks:
        return model.tree(values)
    return nest(values)


def optimizer_specs(
    parameters: Any, stacks: tuple[Stack, ...], update: str, mesh: MeshSpec
) -> dict[str, PartitionSpec]:
    """Specs of optimizer state, gradients and updates in the tree that the optimizer sees, by path."""
    by_path = {parameter.path: parameter for parameter in parameters}
    inside = {path for stack in stacks for path in stack.members if path}
    stage = mesh.stage if mesh.stage and mesh.sizes[mesh.stage] > 1 else None
    specs = {}
    for path, parameter in by_path.items():
        if path not in inside:
            specs[path] = parameter.state
        elif update == "per-layer":
            specs[path] = (
                add_axes(parameter.state, parameter.stored_shape, (stage,), mesh)[0] if stage else parameter.state
            )
    if update == "stacked":
        for stack in stacks:
            first = next(path for path in stack.members if path)
            if first in by_path:
                specs[stack.name] = PartitionSpec(stage, *by_path[first].state)
    return specs


def optimizer_shapes(parameters: Any, stacks: tuple[Stack, ...], update: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters, as they are stored, in the tree that the optimizer sees, by path."""
    shapes = {p.path: jax.ShapeDtypeStruct(p.stored_shape, jnp.dtype(p.dtype)) for p in parameters}
    if update == "per-layer":
        return shapes
    for stack in stacks:
        members = [shapes.pop(path) for path in stack.members if path and path in shapes]
        if members:
            shapes[stack.name] = jax.ShapeDtypeStruct((len(stack.members), *members[0].shape), members[0].dtype)
    return shapes
