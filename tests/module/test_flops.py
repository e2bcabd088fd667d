"""Operations of traced programs: products and convolutions as XLA counts them, loops as often as they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from shardlab.module.flops import flops, trained_flops

X, W = jnp.ones((2, 3)), jnp.ones((3, 3))
PRODUCT = 2 * 2 * 3 * 3


@jax.custom_vjp
def own_backward(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


own_backward.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))


@jax.custom_jvp
def own_tangent(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


own_tangent.defjvp(lambda at, along: (at[0] @ at[1], along[0] @ at[1] + at[0] @ along[1]))


def looped(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=5)[0]


# name: (function, products in it, products in it and in its derivatives)
PROGRAMS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "a product": (lambda x, w: x @ w, 1, 3),
    "what is elementwise": (lambda x, w: jnp.tanh(x) * w.sum(), 0, 0),
    "inside a jit": (jax.jit(lambda x, w: x @ w), 1, 3),
    "a loop of 5": (looped, 5, 15),
    "a loop in a loop": (lambda x, w: lax.scan(lambda h, _: (looped(h, w), None), x, None, length=2)[0], 10, 30),
    "a backward of its own": (own_backward, 1, 3),
    "a tangent of its own": (own_tangent, 1, 3),
    "computed again": (jax.checkpoint(lambda x, w: jnp.tanh(x @ w)), 1, 4),
    "the costlier branch": (lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), 2, 6),
    "complex": (lambda x, w: lax.complex(x, x) @ lax.complex(w, w), 4, 12),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products(name: str) -> None:
    function, forward, trained = PROGRAMS[name]
    assert flops(jax.make_jaxpr(function)(X, W)) == forward * PRODUCT
    shapes = jax.eval_shape(lambda: (X, W))
    assert trained_flops(lambda both: function(*both), shapes) == trained * PRODUCT


def test_a_while_loop_counts_once() -> None:
    found = flops(jax.make_jaxpr(lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ W, x))(X))
    assert found == PRODUCT


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"window_strides": (1, 1), "padding": "VALID"},
    "padded": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 3), "padding": "SAME"},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1)},
    "transposed": {"window_strides": (1, 1), "padding": ((2, 2), (1, 3)), "lhs_dilation": (2, 3)},
    "grouped": {"window_strides": (1, 2), "padding": "SAME", "feature_group_count": 2},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_derivatives_are_counted_as_by_xla(name: str) -> None:
    """XLA's count of a program without loops is right; it counts elementwise operations too, here there are none."""
    given = CONVOLUTIONS[name]
    image, kernel = jnp.ones((2, 8, 9, 4)), jnp.ones((3, 3, 4 // given.get("feature_group_count", 1), 6))

    def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(image, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **given)

    def both(image: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(convolve, image, kernel)
        return y, pull(dy)

    args = image, kernel, jnp.ones_like(convolve(image, kernel))
    found = flops(jax.make_jaxpr(both)(*args))
    counted = jax.jit(both).lower(*args).cost_analysis()
    assert counted is not None
    assert found == counted["flops"] > 0
    assert trained_flops(lambda both: convolve(*both), (image, kernel)) == found


def test_only_what_is_trained_has_a_derivative() -> None:
    """Neither integers among it, nor what is given beside it."""

    def function(trained: Any, x: jax.Array) -> Any:
        w, k = trained
        return {"y": x @ w * k, "k": k + 1}

    assert trained_flops(function, (W, jnp.int32(3)), X) == 2 * PRODUCT
