"""The state of a training run on the mesh, and its creation leaf by leaf, already sharded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.module.initialise import Recipe, recipes
from shardlab.module.model import Model
from shardlab.plan.make import optimizer_shapes, optimizer_specs, optimizer_tree
from shardlab.plan.optimizer import state_specs
from shardlab.plan.plan import Plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes; a pytree of global arrays.

    Attributes:
      step: int32, steps done.
      key: uint32 [2], the key data that dropout derives from; the same in every step.
      parameters: by path, layers stacked as the plan says.
      buffers: arrays the model holds that are not trained, by path.
      optimizer: the optimizer's own state.
    """

    step: jax.Array
    key: jax.Array
    parameters: dict[str, jax.Array]
    buffers: dict[str, jax.Array]
    optimizer: Any


def stage_axis(plan: Plan) -> str | None:
    """The stage axis where there is more than one stage."""
    return plan.mesh.stage if plan.num_stages > 1 else None


def storage_specs(plan: Plan, which: str = "storage") -> dict[str, PartitionSpec]:
    """Specs of the stored arrays by name: ``which`` is ``"storage"``, ``"compute"`` or ``"state"``."""
    inside = {path for stack in plan.stacks for path in stack.members}
    specs = {p.path: getattr(p, which) for p in plan.parameters if p.path not in inside}
    by_path = {p.path: p for p in plan.parameters}
    for stack in plan.stacks:
        first = next(path for path in stack.members if path)
        if first in by_path:
            specs[stack.name] = PartitionSpec(stage_axis(plan), *getattr(by_path[first], which))
    return specs


def buffer_specs(plan: Plan) -> dict[str, PartitionSpec]:
    """Specs of the stored buffers by name."""
    stacked = {path: stack for stack in plan.stacks for path in stack.members if path}
    specs = {}
    for path in plan.buffers:
        stack = stacked.get(path)
        specs[path if stack is None else stack.name] = PartitionSpec() if stack is None else PartitionSpec(stage_axis(plan))
    return specs


def abstract_stored(model: Model, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes and dtypes of stored parameters and of stored buffers, by name."""
    stacks = {stack.name: stack for stack in plan.stacks}
    buffers = {}
    for name in buffer_specs(plan):
        if name in stacks:
            leaf = model.buffers[next(path for path in stacks[name].members if path)]
            buffers[name] = jax.ShapeDtypeStruct((len(stacks[name].members), *leaf.shape), leaf.dtype)
        else:
            buffers[name] = model.buffers[name]
    return dict(optimizer_shapes(plan.parameters, plan.stacks, "stacked")), buffers


def state_spec_tree(model: Model, plan: Plan, optimizer: optax.GradientTransformation) -> Any:
    """A `TrainState` of specs."""
    shapes = optimizer_shapes(plan.parameters, plan.stacks, plan.update)
    tree = optimizer_tree(model, shapes, plan.stacks, plan.update)
    specs = optimizer_specs(plan.parameters, plan.stacks, plan.update, plan.mesh)
    state = jax.eval_shape(optimizer.init, tree)
    return TrainState(
        step=PartitionSpec(),  # type: ignore[arg-type]
        key=PartitionSpec(),  # type: ignore[arg-type]
        parameters=storage_specs(plan),  # type: ignore[arg-type]
        buffers=buffer_specs(plan),  # type: ignore[arg-type]
        optimizer=state_specs(state, tree, optimizer_tree(model, specs, plan.stacks, plan.update)),
    )


def shardings(mesh: Mesh, specs: Any) -> Any:
    """A tree of `NamedSharding` from one of specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def unstacked(plan: Plan, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by the user's own paths, from stored ones; pad slots are left out."""
    stacks = {stack.name: stack for stack in plan.stacks}
    out = {}
    for name, value in stored.items():
        if name not in stacks:
            out[name] = value
            continue
        for slot, path in enumerate(stacks[name].members):
            if path is not None:
                out[path] = value[slot]
    return out


def initial_values(model: Model, plan: Plan, mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Every stored array, parameters and buffers, made in its own sharding from a seed."""
    made = recipes(model.initialise)
    specs = {**storage_specs(plan), **buffer_specs(plan)}
    stacks = {stack.name: stack for stack in plan.stacks}
    dtypes = {p.path: jnp.dtype(p.dtype) for p in plan.parameters}
    key = jax.random.key(seed)
    programs: dict[tuple[Any, ...], Any] = {}
    values = {}
    for name, spec in specs.items():
        members = stacks[name].members if name in stacks else (name,)
        paths = [path for path in members if path is not None]
        sharding = NamedSharding(mesh, spec)
        dtype = dtypes.get(paths[0])
        signatures = {made[path].signature for path in paths}
        if name not in stacks or len(signatures) == 1:
            recipe = made[paths[0]]
            # A leaf's integers are arguments, so leaves that differ only in them share one compiled program.
            cached = (recipe.signature, sharding, len(members), name in stacks, dtype)
            if cached not in programs:
                programs[cached] = jax.jit(_maker(recipe, name in stacks, dtype), out_shardings=sharding)
            rows = [made[path].integers if path else (0,) * len(recipe.integers) for path in members]
            used = jnp.asarray([path is not None for path in members])
            # Without 64-bit types uint32 holds every bit; a cast to int32 brings the sign back.
            held = np.int64 if jax.config.jax_enable_x64 else np.uint32
            integers = tuple(np.asarray(column, np.int64).astype(held) for column in zip(*rows, strict=True))
            values[name] = programs[cached](key, integers, used)
        else:
            values[name] = jax.jit(_joined([made[path] if path else None for path in members], dtype), out_shardings=sharding)(key)
    return values


def _maker(recipe: Recipe, stacked: bool, dtype: Any) -> Any:
    def one(key: jax.Array, integers: Any, used: jax.Array) -> jax.Array:
        value = recipe.make(key, integers)
        value = value if dtype is None else value.astype(dtype)
        return jnp.where(used, value, jnp.zeros_like(value))

    def single(key: jax.Array, integers: Any, used: jax.Array) -> jax.Array:
        return one(key, tuple(column[0] for column in integers), used[0])

    return jax.vmap(one, in_axes=(None, 0, 0)) if stacked else single


def _joined(members: list[Recipe | None], dtype: Any) -> Any:
    def all_of(key: jax.Array) -> jax.Array:
        made = [None if recipe is None else recipe.make(key, recipe.integers) for recipe in members]
        like = next(value for value in made if value is not None)
        stacked = jnp.stack([jnp.zeros_like(like) if value is None else value for value in made])
        return stacked if dtype is None else stacked.astype(dtype)

    return all_of
