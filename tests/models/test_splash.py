"""Splash attention: the kernel is causal grouped-query attention, and where there is no TPU plain JAX is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

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


def seen_by(heads_axis: str | None, manual: set[str]) -> tuple[set[Any], jax.Array, jax.Array]:
    """Shapes of q and k where they are attended to, what is found and what is right; on data=2 x tensor=4."""
    seen = set()

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        seen.add((q.shape[:3:2], k.shape[:3:2]))
        return causal_attention(q, k, v)

    given = drawn(heads=8, length=6, width=4)
    mesh = Mesh(
        np.array(jax.devices()[:8]).reshape(2, 1, 4), ("data", "stage", "tensor"), axis_types=(AxisType.Auto,) * 3
    )

    def over(*given: jax.Array) -> jax.Array:
        return over_heads(attend, heads_axis, *given)

    inside = jax.shard_map(over, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names=manual, check_vma=False)
    with jax.set_mesh(mesh):
        found = jax.jit(inside)(*given)
    return seen, found, causal_attention(*given)


def test_each_device_attends_with_its_heads() -> None:
    seen, found, expected = seen_by("tensor", {"data"})
    assert seen == {((1, 2), (1, 1))}
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_no_axis_of_the_mesh_is_left_automatic() -> None:
    """XLA:TPU refuses a kernel beside an automatic axis, of size 1 too."""
    left = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        left.append(
            [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
        )
        return causal_attention(q, k, v)

    mesh = Mesh(
        np.array(jax.devices()[:2]).reshape(2, 1, 1), ("data", "stage", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    inside = jax.shard_map(
        lambda *given: over_heads(attend, "tensor", *given),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        jax.jit(inside).trace(*drawn(length=6, width=4))
    assert left
    assert not any(left)


def test_beside_other_automatic_axes_plain_jax_takes_its_place() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        traced = str(jax.make_jaxpr(on_tpu(causal_attention, heads_axis="tensor"))(*drawn()))
        alone = str(jax.make_jaxpr(on_tpu(causal_attention, heads_axis=None))(*drawn()))
    assert "pallas_call" not in traced + alone
    assert "pallas_call" in str(jax.make_jaxpr(on_tpu(causal_attention, heads_axis=None))(*drawn()))
