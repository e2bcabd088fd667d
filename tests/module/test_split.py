"""A backward in two halves: the numbers of the whole, nothing computed twice, only what crosses the cut handed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from shardlab.module.split import Split

D, H, B = 6, 10, 4


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def mlp(w: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ w["up"] + w["bias"]) @ w["down"]


def stacked(w: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, layer: (h + jnp.tanh(h @ layer["up"]) @ layer["down"], None), x, w)[0]


def stacked_remat(w: Any, x: jax.Array) -> jax.Array:
    layer = jax.checkpoint(lambda h, layer: (h + jnp.tanh(h @ layer["up"]) @ layer["down"], None))
    return jax.lax.scan(layer, x, w)[0]


def shared(w: Any, x: jax.Array) -> jax.Array:
    """One pair of weights in every step of a scan: their gradient is a carry of the backward."""
    h, sums = jax.lax.scan(lambda h, i: (jnp.tanh(h @ w["up"] @ w["down"]) + x[i][None], h.sum()), x, jnp.arange(3))
    return h + sums.sum()


def nested(w: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, _: (stacked(w, h), None), x, None, length=2)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(param_dtype=jnp.float64)(x[None])
        return x + nn.MultiHeadDotProductAttention(2, param_dtype=jnp.float64, use_bias=False)(y, y)[0]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.RNN(nn.GRUCell(D, param_dtype=jnp.float64))(x[None])[0]


def of_linen(module: nn.Module) -> tuple[Callable[..., jax.Array], Any]:
    params = module.init(jax.random.key(0), draw(2, B, D))["params"]
    return lambda w, x: module.apply({"params": w}, x), params  # type: ignore[return-value]


def weights(layers: int = 0) -> dict[str, jax.Array]:
    leading = (layers,) if layers else ()
    made = {"up": draw(0, *leading, D, H), "down": draw(1, *leading, H, D)}
    return made if layers else {**made, "bias": draw(3, H)}


# name: (function and weights, matmuls of the whole backward, of I, of W)
CASES: dict[str, tuple[Callable[[], tuple[Callable[..., jax.Array], Any]], int, int, int]] = {
    "mlp": (lambda: (mlp, weights()), 4, 2, 2),
    "mlp, jit": (lambda: (jax.jit(mlp), weights()), 4, 2, 2),
    "mlp, remat": (lambda: (jax.checkpoint(mlp), weights()), 5, 3, 2),
    "scan over layers": (lambda: (stacked, weights(3)), 12, 6, 6),
    "scan over layers, remat": (lambda: (stacked_remat, weights(3)), 15, 9, 6),
    "scan, shared weights": (lambda: (shared, {k: v for k, v in weights().items() if k != "bias"}), 12, 6, 6),
    "scan in a scan": (lambda: (nested, weights(3)), 24, 12, 12),
    # q, k, v, out: an I and a W each; scores and values: two I's each.
    "attention": (lambda: of_linen(Attention()), 12, 8, 4),
}


def matmuls(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += equation.params.get("length", 1) * matmuls(inner)
    return total


def halves(function: Callable[..., jax.Array], w: Any) -> tuple[Split, Callable[..., Any], Any, jax.Array]:
    """The backward split, the backward whole, its residuals and a cotangent."""
    y, pull = jax.vjp(function, w, draw(4, B, D))
    leaves, treedef = jax.tree.flatten(pull)

    def backward(kept: Any, dy: jax.Array) -> tuple[Any, Any]:
        dw, dx = jax.tree.unflatten(treedef, kept)(dy)
        return dx, dw

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return Split(backward, shapes, jax.ShapeDtypeStruct(y.shape, y.dtype)), backward, leaves, draw(5, B, D)


@pytest.mark.versions
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_whole_and_nothing_twice(name: str) -> None:
    with jax.enable_x64(True):
        make, whole, first, second = CASES[name]
        split, backward, kept, dy = halves(*make())
        dx, cut = jax.jit(split.first)(kept, dy)
        dw = jax.jit(split.second)(kept, cut)
        expected = backward(kept, dy)
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
        for found, wanted in zip(jax.tree.leaves((dx, dw)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14 * scale)
        assert matmuls(jax.make_jaxpr(backward)(kept, dy).jaxpr) == whole
        assert matmuls(jax.make_jaxpr(split.first)(kept, dy).jaxpr) == first
        assert matmuls(jax.make_jaxpr(split.second)(kept, cut).jaxpr) == second


def test_a_recurrent_cell() -> None:
    with jax.enable_x64(True):
        split, backward, kept, dy = halves(*of_linen(Recurrent()))
        dx, cut = split.first(kept, dy)
        for found, wanted in zip(
            jax.tree.leaves((dx, split.second(kept, cut))), jax.tree.leaves(backward(kept, dy)), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)


def test_the_cut_is_what_the_gradients_need_beside_the_residuals() -> None:
    """Of the MLP: the cotangents of both matmuls' results; of a scan over layers, each layer's."""
    split, _, kept, dy = halves(mlp, weights())
    assert [leaf.shape for leaf in jax.tree.leaves(split.first(kept, dy)[1])] == [(B, D), (B, H)]
    split, _, kept, dy = halves(stacked, weights(3))
    assert [leaf.shape for leaf in jax.tree.leaves(split.first(kept, dy)[1])] == [(3, B, D), (3, B, H)]


def test_what_the_second_half_is_given_again_is_not_cut() -> None:
    def both(kept: jax.Array, passing: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(passing), jnp.cos(kept) * jnp.sin(passing)

    split = Split(both, jnp.ones(3), jnp.ones(3))
    _, cut = split.first(jnp.ones(3), jnp.ones(3))
    assert len(jax.tree.leaves(cut)) == 1  # the sine: the cosine is of what is kept
