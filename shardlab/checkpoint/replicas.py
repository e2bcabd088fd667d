"""Replicas that have diverged: copies of one shard on several devices that should be equal bit for bit and are not.

A broken chip or link, or a collective that summed in another order on one device, leaves copies apart, and nothing
notices: each device goes on with its own. Every device digests what it holds, and the digests are compared.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.checkpoint.digest import digest
from shardlab.plan.proof import place_of


@dataclass(frozen=True)
class Diverged:
    """An array whose replicas differ.

    Attributes:
      name: where it is in the state; of stacked layers the name of their stack.
      devices: those whose copy is not that of most, in the mesh's order; where no copy is that of most, all of them.
      copies: how many devices hold a copy of the same shard.
    """

    name: str
    devices: tuple[Any, ...]
    copies: int

    def __str__(self) -> str:
        where = ", ".join(f"{one.id} (process {one.process_index})" for one in self.devices)
        return f"{self.name}: of {self.copies} copies of a shard those on these devices differ: {where}"


def diverged(tree: Any) -> list[Diverged]:
    """Arrays of a tree whose replicas differ; every process must ask, and gets the same answer.

    Each device reads what it holds once, and 8 bytes an array and device are gathered.

    Args:
      tree: of global arrays, laid on one mesh by `NamedSharding`.

    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    >>> everywhere = NamedSharding(mesh, PartitionSpec())
    >>> diverged({"kernel": jax.device_put(jnp.ones(3), everywhere)})
    []
    >>> copies = [jax.device_put(jnp.full(3, value), device) for value, device in zip((1.0, 2.0), mesh.devices)]
    >>> broken = jax.make_array_from_single_device_arrays((3,), everywhere, copies)
    >>> print(*diverged({"kernel": broken}))
    kernel: of 2 copies of a shard those on these devices differ: 0 (process 0), 1 (process 0)
    """
    named = [
        ("/".join(place_of(keys)), leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if not leaf.sharding.is_fully_replicated or leaf.sharding.num_devices > 1
    ]
    named = [(name, leaf) for name, leaf in named if max(map(len, _copies(leaf))) > 1]
    if not named:
        return []
    mesh = named[0][1].sharding.mesh
    leaves = [leaf for _, leaf in named]
    digests = np.asarray(_digests(mesh, tuple(leaf.sharding.spec for leaf in leaves))(*leaves))
    devices = list(mesh.devices.flat)
    found = []
    for number, (name, leaf) in enumerate(named):
        apart, copies = [], 0
        for places in _copies(leaf):
            held = [digests[place, number].tobytes() for place in places]
            most, times = Counter(held).most_common(1)[0]
            if times < len(places):
                apart += [p for p, one in zip(places, held, strict=True) if one != most or 2 * times <= len(places)]
                copies = len(places)
        if apart:
            found.append(Diverged(name, tuple(devices[place] for place in sorted(apart)), copies))
    return found


def _copies(leaf: jax.Array) -> list[list[int]]:
    """The places in the mesh that hold a copy of one shard, of every shard."""
    places = {device: place for place, device in enumerate(leaf.sharding.mesh.devices.flat)}  # type: ignore[attr-defined]
    shards: dict[str, list[int]] = defaultdict(list)
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        shards[str(index)].append(places[device])
    return list(shards.values())


@functools.lru_cache(maxsize=8)
def _digests(mesh: Mesh, specs: Sequence[PartitionSpec]) -> Any:
    """A program: of every device, the digest of the shard that it holds of each array; uint32 [devices, arrays, 2]."""

    def local(*shards: jax.Array) -> jax.Array:
        return jnp.stack([digest(shard) for shard in shards])[None]

    everywhere = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=everywhere, check_vma=False)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))
