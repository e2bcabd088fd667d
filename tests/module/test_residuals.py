"""A block's forward and backward apart: the derivatives of the block whole, and nothing kept that is there anyway."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardlab.mesh.spec import MeshSpec
from shardlab.module.pipeline import Pipeline
from shardlab.module.residuals import (
    POLICIES,
    REMAT,
    BlockVjp,
    differentiable,
    rematerialised,
    residual_bytes,
    residual_shapes,
)
from shardlab.sharding.rules import Rules
from shardlab.testing import assert_matches_reference

ROWS, DIM, WIDTH = 3, 5, 7


def run(layer: Any, x: Any, c: Any, extra: Any) -> tuple[Any, Any]:
    scale, shift = extra
    y = x + jnp.tanh(x @ layer["up"] + c) @ layer["down"] * scale + shift
    return y, (jnp.sum(y**2), jnp.float32(x.shape[0]))


def arguments() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    layer = {"up": draw(DIM, WIDTH), "down": draw(WIDTH, DIM)}
    return layer, draw(ROWS, DIM), draw(ROWS, WIDTH), (draw(), draw(DIM))


@pytest.mark.parametrize("remat", [*REMAT, *POLICIES])
@pytest.mark.parametrize("context", [True, False])
def test_derivatives_are_those_of_the_block_whole(remat: str, context: bool) -> None:
    with jax.enable_x64(True):
        layer, x, c, extra = arguments()
        dy = jnp.cos(x)
        block = BlockVjp(run, remat, context=context)
        y, stored = block.forward(layer, x, c, extra)
        dlayer, dx, dc = block.backward(stored, layer, c, extra, dy)

        def total(layer: Any, x: Any, c: Any) -> jax.Array:
            y, (auxiliary, _) = run(layer, x, c, extra)
            return jnp.sum(y * dy) + auxiliary

        expected = jax.grad(total, (0, 1, 2))(layer, x, c)
        np.testing.assert_array_equal(y[0], run(layer, x, c, extra)[0])
        for found, wanted in zip(jax.tree.leaves((dlayer, dx)), jax.tree.leaves(expected[:2]), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-12)
        if context:
            np.testing.assert_allclose(dc[0], expected[2], rtol=1e-12)
        else:
            assert dc is None


def test_the_backward_in_another_trace() -> None:
    """Residuals cross from one scan to another: only shapes are shared."""
    layer, x, c, extra = arguments()
    block = BlockVjp(run, "none", context=False)
    (y, _), stored = jax.jit(block.forward)(layer, x, c, extra)
    dlayer, dx, _ = jax.jit(block.backward)(stored, layer, c, extra, jnp.ones_like(y))
    expected = jax.grad(lambda layer, x: jnp.sum(run(layer, x, c, extra)[0]) + run(layer, x, c, extra)[1][0], (0, 1))
    np.testing.assert_allclose(dx, expected(layer, x)[1], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(dlayer["up"], expected(layer, x)[0]["up"], rtol=2e-5, atol=1e-5)


def simple(layer: Any, x: Any, c: Any, extra: Any) -> tuple[Any, None]:
    return jnp.sin(x @ layer["w"]), None


def kept(function: Any, remat: str) -> list[tuple[int, ...]]:
    layer = {"w": jax.ShapeDtypeStruct((DIM, DIM), jnp.float32)}
    x = jax.ShapeDtypeStruct((ROWS, DIM), jnp.float32)
    shapes = residual_shapes(BlockVjp(function, remat, context=False), layer, x, None, None)
    assert residual_bytes(shapes) == sum(4 * shape.size for shape in shapes)
    return [shape.shape for shape in shapes]


def test_parameters_are_not_kept() -> None:
    # x for the kernel's derivative, the cosine for the sine's; the kernel itself is given again.
    assert kept(simple, "none") == [(ROWS, DIM)] * 2
    assert kept(simple, "full") == [(ROWS, DIM)]
    # Of the product, from which the cosine is computed again, and x.
    assert kept(simple, "dots_saveable") == [(ROWS, DIM)] * 2


def test_what_is_used_twice_is_kept_once() -> None:
    def twice(layer: Any, x: Any, c: Any, extra: Any) -> tuple[Any, None]:
        return (x @ layer["w"]) * x, None

    # x for the kernel's derivative and for the product's, and the other factor.
    assert kept(twice, "none") == [(ROWS, DIM)] * 2


def test_remat_runs_the_function_again() -> None:
    def sines(remat: str) -> int:
        function = rematerialised(lambda x: jnp.sum(jnp.sin(jnp.sin(x))), remat)
        return str(jax.make_jaxpr(jax.grad(function))(1.0)).count(" sin ")

    assert sines("full") > sines("none")
    assert rematerialised(np.sum, "none") is np.sum


def test_a_backward_needs_its_forward() -> None:
    with pytest.raises(AssertionError, match="the forward has not been traced"):
        BlockVjp(simple, "none", context=False).backward((), {}, None, None, None)


EXAMPLES = {"x": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


def mixed(bias: Any) -> dict[str, Any]:
    """A context of an array with a gradient, a mask, places, a key and a number."""
    return {
        "bias": bias,
        "key": jax.random.key(1),
        "mask": jnp.asarray([True, False, True, True]),
        "places": [jnp.arange(4), 3],
        "scale": 0.5,
    }


def test_what_is_differentiable() -> None:
    assert [jnp.shape(leaf) for leaf in differentiable(mixed(jnp.ones(3)))] == [(3,), ()]
    assert differentiable({"mask": jnp.ones(2, bool)}) == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_beside_a_mask(remat: str) -> None:
    layer, x, bias = jnp.eye(4) * 0.3, jnp.arange(8.0).reshape(2, 4) / 7, jnp.linspace(-1, 1, 4)

    def masked(layer: Any, x: Any, c: Any, extra: Any) -> tuple[Any, None]:
        return jnp.where(c["mask"], jnp.sin(x @ layer + c["bias"]) * c["scale"], x) + c["places"][0], None

    def whole(layer: Any, x: Any, bias: Any) -> Any:
        return jnp.sum(masked(layer, x, mixed(bias), None)[0] ** 2)

    block, c = BlockVjp(masked, remat, context=True), mixed(bias)
    (y, _), stored = block.forward(layer, x, c, None)
    dlayer, dx, (dbias, _) = block.backward(stored, layer, c, None, 2 * y)
    for found, expected in zip((dlayer, dx, dbias), jax.grad(whole, (0, 1, 2))(layer, x, bias), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array, c: Any) -> jax.Array:
        return x + jnp.tanh(self.up(x)) * c["bias"] * c["mask"][:, None] + 0.1 * c["places"][:, None]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inputs = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.bias = nnx.Param(jnp.linspace(0.5, 1, 4))

    def embed(self, batch: Any) -> jax.Array:
        return self.inputs(batch["x"])

    def context(self, batch: Any) -> Any:
        return {"bias": self.bias[...], "mask": batch["x"][:, 0] > 0, "places": jnp.argsort(batch["x"], axis=1)[:, 0]}

    def head(self, x: jax.Array) -> jax.Array:
        return x

    def __call__(self, batch: Any) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x, self.context(batch))
        return x


@pytest.mark.parametrize("schedule", ["1f1b", "1f1b_split"])
def test_a_context_of_parameters_and_a_mask(schedule: str) -> None:
    assert_matches_reference(
        Net,
        lambda y, batch: (jnp.sum(y**2), y.shape[0]),
        optax.sgd(0.1),
        EXAMPLES,
        mesh=MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4"),
        rules=Rules((("**", None),)),
        pipeline=PARTS,
        schedule=schedule,
        microbatches=2,
        steps=2,
    )
