"""The state of a training run on the mesh, and its creation leaf by leaf, already sharded."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.module.initialise import Recipe, recipes
from shardlab.module.model import Model
from shardlab.plan.layout import optimizer_shapes, optimizer_specs, optimizer_tree
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
    return plan.mesh.stage if plan.num_stage_devices > 1 else None


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
    for buffer in plan.buffers:
        stack = stacked.get(buffer.path)
        if stack is None:
            specs[buffer.path] = buffer.spec
        else:
            specs[stack.name] = PartitionSpec(stage_axis(plan), *buffer.spec)
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


def abstract_state_of(model: Model, plan: Plan, optimizer: optax.GradientTransformation) -> TrainState:
    """A `TrainState` of shapes and dtypes."""
    parameters, buffers = abstract_stored(model, plan)
    shapes = optimizer_shapes(plan.parameters, plan.stacks, plan.update)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        key=jax.ShapeDtypeStruct((2,), jnp.uint32),  # type: ignore[arg-type]
        parameters=parameters,
        buffers=buffers,
        optimizer=jax.eval_shape(optimizer.init, optimizer_tree(model, shapes, plan.stacks, plan.update)),
    )


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
    """Arrays by the user's own paths, in their stored shapes, from stored ones; pad slots are left out."""
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


def users_own(plan: Plan, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by the user's own paths and in their own shapes, from stored ones."""
    shapes = {parameter.path: parameter.shape for parameter in plan.parameters}
    return {path: cut(value, shapes.get(path, value.shape)) for path, value in unstacked(plan, stored).items()}


def cut(value: Any, shape: tuple[int, ...]) -> Any:
    """`value` without what is beyond `shape`."""
    return value if value.shape == shape else value[tuple(slice(size) for size in shape)]


def initial_values(
    model: Model, plan: Plan, mesh: Mesh, seed: int, *, without: Container[str] = ()
) -> dict[str, jax.Array]:
    """Every stored array but those named, parameters and buffers, made in its own sharding from a seed.

    Arrays whose programs differ only in integers share one compiled program, so that a model of many separate
    layers compiles as many programs as it has kinds of arrays; the others are compiled together.
    """
    made = recipes(model.initialise)
    specs = {name: spec for name, spec in {**storage_specs(plan), **buffer_specs(plan)}.items() if name not in without}
    dtypes = {p.path: jnp.dtype(p.dtype) for p in plan.parameters}
    stored = {p.path: p.stored_shape for p in plan.parameters}
    stacks = {stack.name: stack.members for stack in plan.stacks}
    kinds: dict[Any, list[_Array]] = {}
    for name, spec in specs.items():
        members = tuple(None if path is None else made[path] for path in stacks.get(name, (name,)))
        first = next(path for path in stacks.get(name, (name,)) if path)
        array = _Array(name, members, name in stacks, dtypes.get(first), stored.get(first), NamedSharding(mesh, spec))
        kinds.setdefault(array.kind, []).append(array)
    key = jax.random.key(seed)
    alone = [arrays[0] for arrays in kinds.values() if len(arrays) == 1]
    together = jax.jit(
        lambda key, integers: {array.name: array.make(key, integers[array.name]) for array in alone},
        out_shardings={array.name: array.sharding for array in alone},
    )
    values = together(key, {array.name: array.integers for array in alone})
    for arrays in kinds.values():
        if len(arrays) > 1:
            shared = jax.jit(arrays[0].make, out_shardings=arrays[0].sharding)
            values |= {array.name: shared(key, array.integers) for array in arrays}
    return {name: values[name] for name in specs}


@dataclass(frozen=True)
class _Array:
    """A stored array to be made: a recipe for every slot (None: a pad slot of zeros), or one for an array alone."""

    name: str
    members: tuple[Recipe | None, ...]
    stacked: bool
    dtype: Any
    stored_shape: tuple[int, ...] | None
    sharding: NamedSharding

    @property
    def kind(self) -> Any:
        """Equal for arrays that one program makes."""
        signatures = tuple(None if recipe is None else recipe.signature for recipe in self.members)
        return signatures, self.stacked, self.dtype, self.stored_shape, self.sharding

    @property
    def integers(self) -> Any:
        """The integers of every recipe, and which slots are used, as arrays."""
        # Without 64-bit types uint32 holds every bit; a cast to int32 brings the sign back.
        held = np.int64 if jax.config.read("jax_enable_x64") else np.uint32
        width = max(len(recipe.integers) for recipe in self.members if recipe)
        rows = [recipe.integers if recipe else () for recipe in self.members]
        padded = np.asarray([(*row, *(0,) * (width - len(row))) for row in rows], np.int64)
        return padded.reshape(len(rows), width).astype(held), np.asarray(
            [recipe is not None for recipe in self.members]
        )

    def make(self, key: jax.Array, given: Any) -> jax.Array:
        """The array, from the seed's key and `integers`."""
        # Said inside as well: of an output that is a constant XLA:GPU drops the sharding that is said outside.
        return jax.lax.with_sharding_constraint(self._whole(key, given), self.sharding)

    def _whole(self, key: jax.Array, given: Any) -> jax.Array:
        integers, used = given
        recipes = [recipe for recipe in self.members if recipe]

        def one(recipe: Recipe, row: jax.Array, used: jax.Array) -> jax.Array:
            def value(*_: Any) -> jax.Array:
                made = recipe.make(key, tuple(row[i] for i in range(len(recipe.integers))))
                return made if self.dtype is None else _widened(made, self.dtype)

            made = jax.eval_shape(value)
            if self.stored_shape in (None, made.shape):
                return jnp.where(used, value(), jnp.zeros(made.shape, made.dtype))
            # A loop of one pass keeps the padding out of the fused computation, where it would change the last bit
            # of some numbers.
            alone = jax.lax.fori_loop(0, used.astype(jnp.int32), value, jnp.zeros(made.shape, made.dtype))
            return jnp.pad(alone, [(0, n - m) for m, n in zip(made.shape, self.stored_shape, strict=True)])

        if not self.stacked:
            return one(recipes[0], integers[0], used[0])
        if len({recipe.signature for recipe in recipes}) == 1:
            return jax.vmap(lambda row, used: one(recipes[0], row, used))(integers, used)
        slots = [
            one(recipe or recipes[0], row, keep) for recipe, row, keep in zip(self.members, integers, used, strict=True)
        ]
        return jnp.stack(slots)


def _widened(made: jax.Array, dtype: Any) -> jax.Array:
    """`made` in `dtype`, rounded to its own first: XLA would leave out the way down and up again."""
    wide = made.astype(dtype)
    if made.dtype == wide.dtype or not jnp.issubdtype(made.dtype, jnp.floating):
        return wide
    info = jnp.finfo(made.dtype)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant) if info.bits < jnp.finfo(dtype).bits else wide
