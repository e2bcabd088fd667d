"""The state of a run by the user's own paths, whatever the plan: what a checkpoint holds.

    step, key                  as in `TrainState`
    parameters/PATH            every parameter in the user's own shape
    buffers/PATH               every array that the model holds and does not train
    optimizer/PLACE            every leaf of the state that the optimizer makes of the user's own tree, by its place

Stages, stacks of layers, padding and ZeRO are how a plan lays these out. Both ways are compiled programs, from shards
to shards: no device and no host holds the model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.checkpoint.digest import digests_by_device
from shardlab.module.model import Model
from shardlab.plan.plan import Plan
from shardlab.plan.proof import place_of
from shardlab.sharding.rules import axes_of, entry
from shardlab.sharding.zero import add_axes
from shardlab.step.state import TrainState, abstract_state_of, cut, stage_axis, state_spec_tree, storage_specs

_AT_ONCE = 8
"""Leaves that a program makes the parts of at most; more would be long to compile."""


@dataclass(frozen=True)
class _Held:
    """What a leaf of a `TrainState` holds.

    Attributes:
      names: canonical ones; of a stack one for every slot, None for a pad slot.
      stacked: whether the leaf's first dim counts slots.
    """

    names: tuple[str | None, ...]
    stacked: bool

    @property
    def filled(self) -> tuple[str, ...]:
        """The names of arrays that it holds."""
        return tuple(filter(None, self.names))

    @property
    def slots(self) -> tuple[int, ...] | None:
        """Of a stack where each of them is."""
        return tuple(slot for slot, name in enumerate(self.names) if name) if self.stacked else None


@dataclass(frozen=True)
class _Group:
    """A program for some leaves of a `TrainState`, which are at these places among its leaves."""

    program: Any
    places: tuple[int, ...]


class Canonical:
    """The canonical form of the states of one plan.

    Arrays of one shape, dtype and layout share their programs, so that a model of many layers compiles few.

    Args:
      model: as read.
      plan: whose states they are.
      optimizer: the one that the plan was made for.
      mesh: the devices.

    Attributes:
      mesh: the devices.
      leaves: shape, dtype and sharding of every canonical array, by name.
    """

    def __init__(self, model: Model, plan: Plan, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
        self.mesh = mesh
        specs = state_spec_tree(model, plan, optimizer)
        shapes = abstract_state_of(model, plan, optimizer)
        own = _own_shapes(model, plan, optimizer)
        self._held = _held(model, plan, shapes, own)
        self._stored, self._treedef = jax.tree.flatten(shapes)
        laid = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        self._shardings = [NamedSharding(mesh, spec) for spec in laid]
        leaves = {}
        for one, spec in zip(self._held, laid, strict=True):
            for name in one.filled:
                sharding = NamedSharding(mesh, _unstacked_spec(spec, own[name].shape, one.stacked, plan))
                leaves[name] = jax.ShapeDtypeStruct(own[name].shape, own[name].dtype, sharding=sharding)
        self.leaves: dict[str, jax.ShapeDtypeStruct] = dict(sorted(leaves.items()))
        self._groups = self._grouped()
        self._total = _total_of(mesh, self._rows())

    def arrays_of(self, state: TrainState) -> tuple[dict[str, jax.Array], jax.Array]:
        """The canonical arrays of a state by name, in the order of `leaves`, and their digests, uint32 [arrays, 2]."""
        leaves = jax.tree.leaves(state)
        arrays: dict[str, jax.Array] = {}
        by_device: list[jax.Array] = []
        for group in self._groups:
            found, digests = group.program([leaves[place] for place in group.places])
            by_device += digests
            for place, parts in zip(group.places, found, strict=True):
                # What is held once is that of every name.
                arrays.update(zip(self._held[place].filled, itertools.cycle(parts), strict=False))
        return {name: arrays[name] for name in self.leaves}, self._total(by_device)

    def state_of(self, arrays: Mapping[str, jax.Array]) -> TrainState:
        """The state that canonical arrays are those of."""
        leaves = []
        for one, stored, sharding in zip(self._held, self._stored, self._shardings, strict=True):
            names = one.filled if one.stacked else one.filled[:1]
            leaves.append(_whole_of(one.slots, stored.shape, sharding)([arrays[name] for name in names]))
        state: TrainState = jax.tree.unflatten(self._treedef, leaves)
        return state

    def _grouped(self) -> list[_Group]:
        """Leaves that share a program, which makes the parts of all of them: a call costs more than they do."""
        alike: dict[Any, list[int]] = {}
        for place, (one, stored, sharding) in enumerate(zip(self._held, self._stored, self._shardings, strict=True)):
            first = self.leaves[one.filled[0]]
            kind = (one.slots, first.shape, first.sharding, sharding)
            alike.setdefault((kind, stored.shape, stored.dtype), []).append(place)
        return [
            _Group(_saved_of(*kind), tuple(places[start : start + _AT_ONCE]))
            for (kind, *_), places in alike.items()
            for start in range(0, len(places), _AT_ONCE)
        ]

    def _rows(self) -> tuple[int, ...]:
        """Of every name, in the order of `leaves`, where its digest is among those that the groups' programs make."""
        rows: dict[str, int] = {}
        made = 0
        for group in self._groups:
            for one in (self._held[place] for place in group.places):
                rows.update((name, made + slot * one.stacked) for slot, name in enumerate(one.names) if name)
                made += len(one.names) if one.stacked else 1
        return tuple(rows[name] for name in self.leaves)


def own_parameters(plan: Plan, parameters: Mapping[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
    """Parameters by the user's own paths and in their own shapes, in shards still; those of one stack at a time.

    Args:
      plan: whose parameters they are.
      parameters: as a `TrainState` of the plan has them.
    """
    members = {stack.name: stack.members for stack in plan.stacks}
    shapes = {parameter.path: parameter.shape for parameter in plan.parameters}
    for name, spec in storage_specs(plan).items():
        held = _Held(members.get(name, (name,)), stacked=name in members)
        shape, leaf = shapes[held.filled[0]], parameters[name]
        sharding = NamedSharding(leaf.sharding.mesh, _unstacked_spec(spec, shape, held.stacked, plan))  # type: ignore[attr-defined]
        yield from zip(held.filled, _parts_of(held.slots, shape, sharding)(leaf), strict=True)


def _unstacked_spec(spec: PartitionSpec, shape: tuple[int, ...], stacked: bool, plan: Plan) -> PartitionSpec:
    """How an array of the user's own shape lies that is stored by `spec`: a stack's stages have a part of each."""
    stage = stage_axis(plan)
    entries = [*spec, *(None,) * (len(shape) + stacked - len(spec))][int(stacked) :]
    fitting = _dividing(PartitionSpec(*entries), shape, plan)
    return add_axes(fitting, shape, (stage,), plan.mesh)[0] if stacked and stage else fitting


@functools.cache
def _parts_of(slots: tuple[int, ...] | None, shape: tuple[int, ...], sharding: NamedSharding) -> Any:
    """A program that cuts a stack into the arrays of its slots; None: the array alone."""
    return jax.jit(lambda leaf: _parts(leaf, slots, shape), out_shardings=sharding)


@functools.cache
def _saved_of(
    slots: tuple[int, ...] | None, shape: tuple[int, ...], sharding: NamedSharding, stored: NamedSharding
) -> Any:
    """A program that does so with several leaves, and gives of each also the digests by device, of pad slots too."""

    def saved(leaves: list[jax.Array]) -> Any:
        parts = [_parts(leaf, slots, shape) for leaf in leaves]
        return parts, [digests_by_device(leaf, stored, shape) for leaf in leaves]

    by_device = NamedSharding(stored.mesh, PartitionSpec(stored.mesh.axis_names))
    return jax.jit(saved, out_shardings=(sharding, by_device))


def _parts(leaf: jax.Array, slots: tuple[int, ...] | None, shape: tuple[int, ...]) -> list[jax.Array]:
    return [cut(leaf, shape)] if slots is None else [cut(leaf[slot], shape) for slot in slots]


def _total_of(mesh: Mesh, rows: tuple[int, ...]) -> Any:
    """A program that adds up what the devices have, and takes these rows of it: one sum for all arrays."""

    def total(by_device: list[jax.Array]) -> jax.Array:
        return jnp.concatenate(by_device, axis=1).sum(axis=0, dtype=jnp.uint32)[np.array(rows)]

    # Every process reads it.
    return jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _whole_of(slots: tuple[int, ...] | None, shape: tuple[int, ...], sharding: NamedSharding) -> Any:
    """A program that makes a stack of arrays, with zeros in its pad slots and where it is padded."""

    def whole(parts: list[jax.Array]) -> jax.Array:
        if slots is None:
            return _padded(parts[0], shape)
        wide = [_padded(part, shape[1:]) for part in parts]
        at = dict(zip(slots, wide, strict=True))
        return jnp.stack([at.get(slot, jnp.zeros_like(wide[0])) for slot in range(shape[0])])

    return jax.jit(whole, out_shardings=sharding)


def _padded(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if value.shape == shape:
        return value
    return jnp.pad(value, [(0, n - m) for m, n in zip(value.shape, shape, strict=True)])


def _dividing(spec: PartitionSpec, shape: tuple[int, ...], plan: Plan) -> PartitionSpec:
    """The spec without axes that a dim of the user's own shape does not divide by, as one that is padded may not."""
    entries = []
    for size, entries_ in zip(shape, (*spec, *(None,) * (len(shape) - len(spec))), strict=True):
        axes, kept = axes_of(entries_), []
        for axis in axes:
            size, rest = divmod(size, plan.mesh.size(axis))
            if rest:
                break
            kept.append(axis)
        entries.append(entry(kept))
    return PartitionSpec(*entries)


def _own_shapes(model: Model, plan: Plan, optimizer: optax.GradientTransformation) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the canonical arrays, by name."""
    parameters = {p.path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)) for p in plan.parameters}
    state = jax.eval_shape(optimizer.init, model.tree(parameters))
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
        **{f"parameters/{path}": leaf for path, leaf in parameters.items()},
        **{f"buffers/{path}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in model.buffers.items()},
        **{
            _optimizers(place_of(keys)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
        },
    }


def _optimizers(place: tuple[str, ...]) -> str:
    return "/".join(("optimizer", *place))


def _held(model: Model, plan: Plan, shapes: TrainState, own: Mapping[str, Any]) -> list[_Held]:
    """What every leaf of the state holds, in the order of its leaves."""
    stacks = {stack.name: stack.members for stack in plan.stacks}

    def array(kind: str, name: str) -> _Held:
        members = stacks.get(name)
        if members is None:
            return _Held((f"{kind}/{name}",), stacked=False)
        return _Held(tuple(None if path is None else f"{kind}/{path}" for path in members), stacked=True)

    paths = {p.path: p.path for p in plan.parameters}
    places = {path: place_of(keys) for keys, path in jax.tree_util.tree_flatten_with_path(model.tree(paths))[0]}
    in_stacks = plan.update == "stacked" and bool(plan.stacks)
    owners: dict[tuple[str, ...], tuple[str | None, ...]] = {}
    for path in paths:
        owners[tuple(path.split("/")) if in_stacks else places[path]] = (path,)
    for name, members in stacks.items() if in_stacks else ():
        owners[tuple(name.split("/"))] = members

    def state(keys: Any, leaf: Any) -> _Held:
        place = place_of(keys)
        for length in range(len(place), 0, -1):
            members = owners.get(place[len(place) - length :])
            if members is None:
                continue
            before = place[: len(place) - length]
            names = tuple(None if path is None else _optimizers((*before, *places[path])) for path in members)
            first = own[next(filter(None, names))]
            # A placeholder is held once for all layers.
            return _Held(names, stacked=leaf.ndim > first.ndim)
        return _Held((_optimizers(place),), stacked=False)

    return [
        _Held(("step",), stacked=False),
        _Held(("key",), stacked=False),
        *(array("parameters", name) for name in sorted(shapes.parameters)),
        *(array("buffers", name) for name in sorted(shapes.buffers)),
        *(state(keys, leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes.optimizer)[0]),
    ]
