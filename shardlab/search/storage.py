"""What a device holds of a model's parameters and what they send, for a mesh and a ZeRO level: bytes, by group.

The same decisions as `shardlab.plan.make` takes, for one block of each kind instead of for every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from jax.sharding import PartitionSpec

from shardlab.mesh.spec import MeshSpec
from shardlab.plan.layout import axes_in, storage_of
from shardlab.search.subject import Array, Subject
from shardlab.sharding.rules import axes_of
from shardlab.sharding.zero import without

Axes = tuple[str, ...]
Sent = Mapping[tuple[str, Axes], tuple[float, float]]
"""By kind of collective and its axes: bytes on the wire, and how many collectives."""

SMALL = 8 * 2**20
"""Bytes of a gathered array of which XLA:TPU may make an all-reduce."""


@dataclass
class Group:
    """Bytes of some arrays on a device; what they send is on the wire, by (kind, axes).

    Attributes:
      stored: as they lie between steps.
      state: of the optimizer.
      whole: as a step computes with them, gathered.
      shard: as they lie, in the dtype that is computed with.
      cast: whether that is another dtype than they are stored in.
      cut: whether the batch axes (or, outside blocks, the stages) cut what is stored.
      accumulated: of their gradients, whole.
      pieces: of their gradients, as the optimizer's state lies.
      largest: of them, the largest whole one in the dtype that gradients are summed in; `summed`: all of them.
      gathers: to have them whole once.
      small: of `gathers`, by axes, those of at most `SMALL` bytes each.
      reduces: to sum their gradients once.
      updates: of new parameters, where only the optimizer's state is cut.
      numbers: as they are updated.
    """

    stored: float = 0.0
    state: float = 0.0
    whole: float = 0.0
    shard: float = 0.0
    cast: bool = False
    cut: bool = False
    accumulated: float = 0.0
    pieces: float = 0.0
    largest: float = 0.0
    summed: float = 0.0
    gathers: dict[tuple[str, Axes], tuple[float, float]] = field(default_factory=dict)
    small: dict[tuple[str, Axes], tuple[float, float]] = field(default_factory=dict)
    reduces: dict[tuple[str, Axes], tuple[float, float]] = field(default_factory=dict)
    updates: dict[tuple[str, Axes], tuple[float, float]] = field(default_factory=dict)
    numbers: float = 0.0


@dataclass(frozen=True)
class Storage:
    """Groups by kind of block, and outside blocks by the parts that read them.

    Attributes:
      faults: why the mesh cannot hold the parameters so; empty if it can.
      sharded: whether some block's parameters lie in shards of the batch axes; `reduced`: their gradients.
    """

    blocks: tuple[Group, ...]
    outside: Mapping[Axes, Group]
    faults: tuple[str, ...]
    sharded: bool
    reduced: bool


def storage(subject: Subject, mesh: MeshSpec, zero: int, whole: tuple[tuple[str, str], ...], head: str) -> Storage:
    """Where the parameters lie."""
    config, sizes = subject.config, mesh.sizes
    specs = subject.specs(whole)
    kinds = max(subject.kinds, default=-1) + 1
    blocks = tuple(Group() for _ in range(kinds))
    outside: dict[Axes, Group] = {}
    faults: list[str] = []
    stage = mesh.stage if mesh.stage and sizes[mesh.stage] > 1 else None
    wide = 8 if config.dtype == "float64" else 4
    reduce = {"float32": 4, "bfloat16": 2, "float64": 8}.get(config.reduce_dtype, wide)
    mixed = config.dtype == "bfloat16"
    stored_over = (*mesh.batch, *((mesh.stage,) if mesh.stage and not (stage and head == "vocab") else ()))
    sharded = reduced = False
    for array in subject.arrays:
        spec, inside = specs[array.path], array.kind >= 0
        shape, fault = _stored_shape(array, spec, sizes)
        if fault:
            faults.append(fault)
            continue
        lent = (stage,) if stage and not inside else ()
        lies, state = storage_of(spec, shape, mesh, lent, shard=zero == 3 or (mixed and zero > 0), shard_state=zero > 0)
        compute = without(spec, stored_over)
        group = blocks[array.kind] if inside else outside.setdefault(array.read_by, Group())
        elements = math.prod(shape)
        at = {
            name: elements / _parts(one, sizes)
            for name, one in (("lies", lies), ("state", state), ("compute", compute))
        }
        group.stored += at["lies"] * array.stored
        group.numbers += at["state"]
        for size, dims in array.states:
            follows = [state[dim] if dim < len(state) else None for dim in dims]
            count = math.prod(shape[dim] for dim in dims)
            group.state += count * size / math.prod(sizes[axis] for entry in follows for axis in axes_of(entry))
        group.whole += at["compute"] * array.computed
        group.shard += at["lies"] * array.computed
        group.cast |= array.computed != array.stored
        group.accumulated += at["compute"] * wide
        group.pieces += at["state"] * wide
        group.largest = max(group.largest, at["compute"] * reduce)
        group.summed += at["compute"] * reduce
        over = _ordered(axes_in(lies) - axes_in(compute), mesh)
        group.cut |= bool(over)
        if inside:
            sharded |= bool(axes_in(lies) & {*mesh.batch})
            reduced |= bool(axes_in(state) & {*mesh.batch}) and zero > 1
        _send(group.gathers, "all-gather", over, at["compute"] * array.computed, sizes)
        if at["compute"] * array.computed <= SMALL:
            _send(group.small, "all-gather", over, at["compute"] * array.computed, sizes)
        summed = {axis for axis in mesh.batch if sizes[axis] > 1}
        if not inside and stage and stage not in axes_in(compute):
            summed.add(stage)
        # One after another, as its spec names them.
        scattered = [axis for entry in state for axis in axes_of(entry) if axis in summed]
        left = at["compute"] * reduce
        for axis in scattered:
            _send(group.reduces, "reduce-scatter", (axis,), left, sizes)
            left /= sizes[axis]
        _send(group.reduces, "all-reduce", _ordered(summed - set(scattered), mesh), left, sizes)
        updated = _ordered(axes_in(state) - axes_in(lies), mesh)
        _send(group.updates, "all-gather", updated, at["lies"] * array.stored, sizes)
    return Storage(blocks, outside, tuple(faults), sharded, reduced)


def gathered(group: Group, wide: Callable[[Axes], bool]) -> Sent:
    """To have a group's weights once, where small ones are all-reduced over `wide` axes."""
    found = dict(group.gathers)
    for (kind, axes), (size, count) in group.small.items():
        if wide(axes):
            whole, times = found[kind, axes]
            found[kind, axes] = whole - size, times - count
            found["all-reduce", axes] = 2 * size, count
    return found


def _parts(spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes_in(spec))


def _ordered(axes: Iterable[str], mesh: MeshSpec) -> Axes:
    return tuple(axis for axis in mesh.names if axis in set(axes) and mesh.sizes[axis] > 1)


def _send(
    to: dict[tuple[str, Axes], tuple[float, float]], kind: str, axes: Axes, payload: float, sizes: Mapping[str, int]
) -> None:
    if axes:
        size, count = to.get((kind, axes), (0.0, 0.0))
        to[kind, axes] = size + wire(kind, payload, axes, sizes), count + 1


def wire(kind: str, payload: float, axes: Axes, sizes: Mapping[str, int]) -> float:
    """Bytes on the wire of a ring, as `shardlab.hlo.collectives` counts them.

    >>> wire("all-reduce", 100.0, ("data",), {"data": 4})
    150.0
    """
    count = math.prod(sizes[axis] for axis in axes)
    if kind == "collective-permute":
        return payload
    return payload * (count - 1) / count * (2 if kind == "all-reduce" else 1)


def _stored_shape(array: Array, spec: PartitionSpec, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], str]:
    shape = list(array.shape)
    for dim, entry in enumerate(spec):
        count = math.prod(sizes[axis] for axis in axes_of(entry))
        if shape[dim] % count:
            if not array.pad:
                axes = " x ".join(f"{axis}={sizes[axis]}" for axis in axes_of(entry))
                return (), f"{array.path}: dim {dim} of size {shape[dim]} does not divide by {axes}"
            shape[dim] = -(-shape[dim] // count) * count
    return tuple(shape), ""
