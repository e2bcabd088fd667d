"""A digest of an array that every layout of it has: two sums of its numbers' bits, each mixed with its place.

    digest = sum over places p of mix(bits[p] ^ mix(p)), modulo 2**32, twice with other constants

A sum does not ask on which device a term is, nor in which order, and each device can add up its own. `mix` is one to
one, so one number that is another always shows, however many of its bits are; of several all but one in 2**64 do.
Numbers that change places show, as a layer does that was taken for another.

Source of `mix`: the finalizer of MurmurHash3 (Austin Appleby, public domain).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardlab.sharding.rules import axes_of

_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def digest(array: jax.Array) -> jax.Array:
    """uint32 [2], of an array of any shape and dtype; traceable.

    >>> a = jnp.arange(6.0).reshape(2, 3)
    >>> bool((digest(a) == digest(a + 0)).all()), bool((digest(a) == digest(a.at[1, 2].add(1e-6))).any())
    (True, False)
    >>> bool((digest(a) == digest(a[::-1])).any())
    False
    """
    return _digest(array, (0,) * array.ndim, {})


digest_of = jax.jit(digest)


def digests_by_device(array: jax.Array, sharding: NamedSharding, shape: Sequence[int]) -> jax.Array:
    """uint32 [devices, arrays, 2]: their sum over devices is the digests of stacked arrays, or of one; traceable.

    Each device adds up what it stores, and nothing is sent.

    Args:
      array: of `shape`, or with one dim before that counts arrays; numbers beyond `shape` are padding.
      sharding: how it lies.
    """
    mesh, stacked, count = sharding.mesh, array.ndim > len(shape), array.shape[0] if array.ndim > len(shape) else 1
    dims = [axes_of(entry) for entry in (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))]
    others = [axis for axis in mesh.axis_names if not any(axis in axes for axes in dims)]
    sizes = zip(shape, array.shape[stacked:], strict=True)
    ends = {dim: size for dim, (size, stored) in enumerate(sizes) if size < stored}

    def local(shard: jax.Array) -> jax.Array:
        first = [jax.lax.axis_index(axes) * size if axes else 0 for axes, size in zip(dims, shard.shape, strict=True)]
        mine = jax.vmap(lambda one: _digest(one, first[stacked:], ends))(shard if stacked else shard[None])
        # Of several copies of a shard one counts.
        mine = jnp.where(sum(jax.lax.axis_index(axis) for axis in others) == 0, mine, jnp.uint32(0))
        nothing = jnp.zeros((count, 2), jnp.uint32)
        return jax.lax.dynamic_update_slice(nothing, mine, (first[0] if stacked else 0, 0))[None]

    one_each = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=sharding.spec, out_specs=one_each, check_vma=False)
    by_device: jax.Array = mapped(array)
    return by_device


def _digest(part: jax.Array, first: Sequence[Any], ends: Mapping[int, int]) -> jax.Array:
    """What a part of an array adds to its digest.

    Args:
      first: where the part begins, in each dim.
      ends: of dims that are padded where the array ends.
    """
    words = _words(part)
    starts = [*first, *(0,) * (words.ndim - len(first))]
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) + jnp.asarray(start, jnp.uint32)
        for dim, start in enumerate(starts)
    ]
    found = []
    for seed in _SEEDS:
        mixed = jnp.broadcast_to(_mix(jnp.uint32(seed)), words.shape)
        for place in places:
            mixed = _mix(mixed ^ place)
        terms = _mix(words ^ mixed)
        for dim, end in ends.items():
            terms = jnp.where(places[dim] < end, terms, jnp.uint32(0))
        found.append(jnp.sum(terms, dtype=jnp.uint32))
    return jnp.stack(found)


def _mix(word: jax.Array) -> jax.Array:
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _words(array: jax.Array) -> jax.Array:
    """The bits as uint32, of wide numbers in one dim more."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if array.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    bits = {1: jnp.uint8, 2: jnp.uint16}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)
