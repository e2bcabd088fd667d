"""Buffers of slots: what is valid is written, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardlab.step.slots import add, put, read, take, write

NAN = jnp.full(2, jnp.nan)


def test_accumulators_add_where_it_is_kept() -> None:
    total = jnp.arange(6.0).reshape(3, 2)
    added = add(total, jnp.ones(2, jnp.bfloat16), jnp.int32(1), jnp.bool_(True))
    assert added.dtype == jnp.float32
    np.testing.assert_array_equal(added, [[0, 1], [3, 4], [4, 5]])
    np.testing.assert_array_equal(add(total, NAN, jnp.int32(1), jnp.bool_(False)), total)


def test_buffers_are_written_where_it_is_valid() -> None:
    buffer: Any = jnp.zeros((2, 3, 2))
    at = jnp.int32(1), jnp.int32(2)
    written = write(buffer, jnp.array([5.0, 6.0]), at, jnp.bool_(True))
    assert written.sum() == 11
    np.testing.assert_array_equal(read(written, at), [5, 6])
    np.testing.assert_array_equal(write(written, NAN, at, jnp.bool_(False)), written)
    np.testing.assert_array_equal(jax.jit(read)(written, (jnp.int32(0), jnp.int32(2))), [0, 0])


def test_a_slot_of_a_tree_is_put_where_it_is_valid() -> None:
    buffer = {"x": jnp.zeros((3, 2)), "y": jnp.zeros(3)}
    there = put(buffer, {"x": jnp.array([5.0, 6.0]), "y": jnp.float32(7)}, jnp.int32(1), jnp.bool_(True))
    np.testing.assert_array_equal(there["x"], [[0, 0], [5, 6], [0, 0]])
    held = take(there, jnp.int32(1))
    assert (held["x"].tolist(), float(held["y"])) == ([5, 6], 7)
    # No slot: nothing is written, whatever it is.
    same = put(there, {"x": NAN, "y": jnp.float32(jnp.nan)}, jnp.int32(-1), jnp.bool_(False))
    np.testing.assert_array_equal(same["x"], there["x"])
    np.testing.assert_array_equal(same["y"], there["y"])
