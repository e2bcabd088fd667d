"""A host's arrays as global ones: each process hands over what its own devices hold of them, and nothing is sent."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def placed(value: Any, sharding: NamedSharding) -> jax.Array:
    """The global array of a value that every process has all of; one that lies there already is as it is.

    >>> from jax.sharding import PartitionSpec
    >>> from shardlab.mesh.build import build_mesh
    >>> from shardlab.mesh.spec import MeshSpec
    >>> rows = NamedSharding(build_mesh(MeshSpec({"data": 8})), PartitionSpec("data"))
    >>> placed(np.arange(16), rows).addressable_shards[1].data
    Array([2, 3], dtype=int32)
    """
    # For an array that lies there already `jax.device_put` takes longer than the rest of a call of a step.
    if isinstance(value, jax.Array) and value.sharding == sharding:
        return value
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    # Here `jax.device_put` would compare the value with that of every other process, and wait for it.
    array = np.asarray(value)
    return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])


def placed_rows(value: Any, sharding: NamedSharding, shape: tuple[int, ...], first: int) -> jax.Array:
    """The global array of `shape` of which a process has rows from `first` on, all that its devices hold."""
    array = np.asarray(value)

    def part(place: Any) -> np.ndarray:
        start, stop, _ = place[0].indices(shape[0])
        return array[(slice(start - first, stop - first), *place[1:])]

    return jax.make_array_from_callback(shape, sharding, part)


def rows_here(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, int]:
    """Which share of how many equal ones has all rows that this process's devices hold: (index, count).

    The count is the same in every process; it is 1 where the rows of some process are no such share.
    """
    held: dict[int, list[tuple[int, int]]] = {}
    places: Any = sharding.devices_indices_map(shape)
    for device, place in places.items():
        held.setdefault(device.process_index, []).append(place[0].indices(shape[0])[:2])
    spans = {process: (min(a for a, _ in rows), max(b for _, b in rows)) for process, rows in held.items()}
    sizes = {stop - start for start, stop in spans.values()}
    size = sizes.pop()
    if sizes or any(start % size for start, _ in spans.values()) or shape[0] % size:
        return 0, 1
    return spans[jax.process_index()][0] // size, shape[0] // size
