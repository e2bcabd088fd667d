"""Buffers of slots, numbered as a schedule's program numbers them; a write that is not valid changes nothing.

Legend: S slots, K blocks of a stage.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def put(buffer: Any, value: Any, slot: jax.Array, valid: jax.Array) -> Any:
    """A tree of buffers [S, ...] with `value` [...] in `slot`, where `valid`."""
    index = jnp.maximum(slot, 0)

    def one(held: jax.Array, new: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(held, index, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(held, jnp.where(valid, new, old), index, 0)

    return jax.tree.map(one, buffer, value)


def take(buffer: Any, slot: jax.Array) -> Any:
    """What a tree of buffers [S, ...] holds in `slot`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(slot, 0), keepdims=False), buffer)


def write(buffer: jax.Array, value: jax.Array, at: tuple[jax.Array, jax.Array], valid: jax.Array) -> jax.Array:
    """`buffer` [S, K, ...] with `value` [...] at a slot and a block, where `valid`."""
    held = read(buffer, at)
    starts = (*at, *(jnp.int32(0),) * value.ndim)
    return jax.lax.dynamic_update_slice(buffer, jnp.where(valid, value, held)[None, None], starts)


def read(buffer: jax.Array, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    """What `buffer` [S, K, ...] holds at a slot and a block."""
    starts = (*at, *(jnp.int32(0),) * (buffer.ndim - 2))
    return jax.lax.dynamic_slice(buffer, starts, (1, 1, *buffer.shape[2:])).reshape(buffer.shape[2:])


def add(total: jax.Array, new: jax.Array, place: jax.Array, keep: jax.Array) -> jax.Array:
    """Accumulators [K, ...] with `new` [...] added at a block, where `keep`."""
    held = jax.lax.dynamic_index_in_dim(total, place, keepdims=False)
    added = jnp.where(keep, held + new.astype(total.dtype), held)
    return jax.lax.dynamic_update_index_in_dim(total, added, place, 0)
