"""Splash attention: the kernel is causal grouped-query attention, and where there is no TPU plain JAX is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from shardlab.models.decoder import causal_attention
from shardlab.models.splash import kernel, on_tpu, over_heads

pytestmark = pytest.mark.versions


def drawn(heads: int = 4, length: int = 512, width: int = 128) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, count, width) for count in (heads, heads // 2, heads // 2)]
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def both(attend: Any, given: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """Out, and the gradients of the sum of its squares."""
    return jax.jit(attend)(*given), jax.jit(jax.grad(lambda *args: (attend(*args) ** 2).sum(), (0, 1, 2)))(*given)


def test_the_kernel_is_causal_attention() -> None:
    """Interpreted, in one block of each example: on CPU that takes seconds."""
    given = tuple(one[:1] for one in drawn(heads=2))
    found, expected = both(lambda q, k, v: kernel(q, k, v, interpret=True), given), both(causal_attention, given)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-4, atol=2e-4 * float(jnp.abs(other).max()))


def test_elsewhere_plain_jax_takes_its_place() -> None:
    given = drawn(heads=2)
    found, expected = both(on_tpu(causal_attention, heads_axis=None), given), both(causal_attention, given)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_shapes_that_the_kernel_does_not_serve_are_left_to_plain_jax() -> None:
    given = drawn(length=6, width=4)
    found = on_tpu(causal_attention, heads_axis=None)(*given)
    np.testing.assert_array_equal(found, causal_attention(*given))


def test_each_device_attends_with_its_heads() -> None:
    seen = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        seen.append((q.shape[2], k.shape[2]))
        return causal_attention(q, k, v)

    given = drawn(heads=8, length=6, width=4)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *args: over_heads(attend, "tensor", *args))(*given)
    assert seen[-1] == (2, 1)
    np.testing.assert_allclose(found, causal_attention(*given), rtol=1e-6, atol=1e-6)
