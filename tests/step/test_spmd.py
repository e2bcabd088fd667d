"""Gradients of a model taken whole: accumulated wide, reduced once, buffers carried on."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rules
from shardlab.step.compile import CompiledStep, compile_train_step

SGD = optax.sgd(2.0**-12)


def compiled(model: Any, batch: Any, loss: Any, **more: Any) -> CompiledStep:
    sizes = {axis: more.pop(axis, 1) for axis in ("data", "stage")}
    mesh = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    plan = make_plan(model, mesh=mesh, rules=Rules((("**", None),)), optimizer=SGD, batch=batch, **more)
    return compile_train_step(model, loss, SGD, plan, batch, prove=True)


def total(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return y.astype(jnp.float32).sum(), jnp.float32(len(y))


def shifted(*, parts: bool) -> Functions:
    """y = x + w for each example: the gradient of the mean over examples is exactly 1, whatever w is."""

    def init(key: jax.Array) -> Any:
        return {"blocks": [{"w": jnp.ones(())}]} if parts else {"w": jnp.ones(())}

    if not parts:
        return Functions(init=init, apply=lambda params, batch: batch["x"] + params["w"])
    return Functions(
        init=init,
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: x + layer["w"],
        after=lambda params, x: x,
    )


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_gradients_of_bfloat16_accumulate_in_float32(parts: bool) -> None:
    """In bfloat16 256 + 1 is 256: the mean over 512 microbatches would be a half."""
    batch = {"x": np.zeros(512, jnp.bfloat16)}
    step = compiled(shifted(parts=parts), batch, total, dtype="bfloat16", microbatches=512)
    state, metrics = step(step.init(0), batch)
    (name,) = state.parameters
    (gradient,) = metrics["gradients"].values()
    assert (gradient.dtype, state.parameters[name].dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_array_equal(gradient.reshape(()), 1.0)
    # Below 1 a bfloat16 is a multiple of 2**-8: the update would be lost.
    np.testing.assert_array_equal(state.parameters[name].reshape(()), 1 - 2.0**-12)
    assert metrics["weight"] == 512


def test_accumulation_over_microbatches_and_shards() -> None:
    """However the examples are cut, the same mean: 8 of them, of unequal weight."""
    model = Functions(
        init=lambda key: {"w": jax.random.normal(key, (3,))}, apply=lambda params, batch: batch["x"] @ params["w"]
    )
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 3)), "weight": rng.uniform(1, 5, 8)}

    def weighted(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        return (batch["weight"] * y**2).sum(), batch["weight"].sum()

    with jax.enable_x64(True):
        w = jax.random.normal(jax.random.key(0), (3,))
        mean, expected = jax.value_and_grad(lambda w: weighted(batch["x"] @ w, batch)[0] / batch["weight"].sum())(w)
        for options in ({"microbatches": 8}, {"data": 4, "microbatches": 2}, {"data": 2, "zero": 0, "remat": "full"}):
            step = compiled(model, batch, weighted, dtype="float64", **options)
            _, metrics = step(step.init(0), batch)
            np.testing.assert_allclose(metrics["gradients"]["w"], expected, rtol=1e-12)
            np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-12)


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.norm(batch["x"]).sum(-1)


def test_batch_statistics_are_those_of_the_whole_batch() -> None:
    """Over two devices with automatic axes, as Flax has them after each call on all examples."""
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(2.0, 3.0, size=(6, 3)).astype(np.float32)} for _ in range(2)]
    step, own = compiled(Normed, batches[0], total, data=2), Normed(nnx.Rngs(0))
    state = step.init(0)
    for batch in batches:
        state, _ = step(state, batch)
        own(batch)
    np.testing.assert_allclose(state.buffers["norm/mean"], own.norm.mean[...], rtol=1e-5)
    np.testing.assert_allclose(state.buffers["norm/var"], own.norm.var[...], rtol=1e-5)
    assert np.all(np.abs(state.buffers["norm/mean"]) > 0.5)
