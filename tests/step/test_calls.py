"""The user's functions as the engine calls them: on which rows, with which keys, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rules
from shardlab.step.calls import Calls, block_function, scalars
from shardlab.step.compile import compile_train_step
from shardlab.step.region import make_region
from shardlab.step.verify import verify

ROWS, WIDTH = 8, 3
BATCH = {"x": np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)}
SGD = optax.sgd(0.1)
MESH = MeshSpec({"data": 2}, batch="data", target="cpu:2")
Noise = Callable[[jax.Array, jax.Array], jax.Array]


def square(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return (y**2).sum(), jnp.float32(len(y))


def noisy(noise: Noise) -> Functions:
    """A model in parts, each of which adds `noise` of (key, x) in training."""

    def added(x: jax.Array, key: Any, train: bool) -> jax.Array:
        return x + noise(key, x).astype(x.dtype) if train else x

    return Functions(
        init=lambda key: {"blocks": [{"w": jnp.eye(WIDTH)}] * 2, "b": jnp.zeros(WIDTH)},
        before=lambda params, batch, key, train: added(batch["x"] + params["b"], key, train),
        block=lambda layer, x, key, train: added(x @ layer["w"], key, train),
        after=lambda params, x, key, train: added(x, key, train),
    )


def calls_of(model: Functions, *, train: bool = True, loss: Any = square, **more: Any) -> Calls:
    sizes = {axis: more.pop(axis, 1) for axis in ("data", "stage")}
    mesh = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    plan = make_plan(model, mesh=mesh, rules=Rules((("**", None),)), optimizer=SGD, batch=BATCH, **more)
    return Calls(read_model(model, BATCH), loss, plan, make_region(plan, build_mesh(plan.mesh)), BATCH, train=train)


def normal(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.normal(key, x.shape)


def test_sites_draw_apart_and_rows_together() -> None:
    """Each of before, the blocks and after has a key of its own; its rows do not know who computes them."""
    calls = calls_of(noisy(normal), data=2)
    data = jax.random.key_data(jax.random.key(1))
    params = {"b": jnp.zeros(WIDTH)}
    zeros, layer = jnp.zeros((ROWS, WIDTH)), {"w": jnp.eye(WIDTH)}

    def drawn(first: int, rows: int) -> dict[str, Any]:
        key, x = (data, jnp.int32(first)), zeros[:rows]
        return {
            "before": calls.before(params, {"x": x}, key, rows),
            "block 0": calls.block(0, layer, x, None, ({}, jnp.int32(0), *key), rows)[0],
            "block 1": calls.block(0, layer, x, None, ({}, jnp.int32(1), *key), rows)[0],
            "after": calls.after(params, x, {"x": x}, key, rows),
        }

    half = ROWS // 2
    with jax.set_mesh(build_mesh(MESH)):
        draw = jax.jit(drawn, static_argnums=1)
        whole, parts = draw(0, ROWS), [draw(0, half), draw(half, half)]
    for site, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[site] for part in parts]), value, err_msg=site)
    assert len({float(value[0, 0]) for value in whole.values()}) == 4


def test_without_a_key_nothing_is_drawn() -> None:
    calls = calls_of(noisy(normal), train=False, loss=None, data=2)
    assert not calls.has_loss
    with jax.set_mesh(build_mesh(MESH)):
        x = calls.before({"b": jnp.ones(WIDTH)}, BATCH, None, ROWS)
    np.testing.assert_array_equal(x, BATCH["x"] + 1)
    assert calls.context({}, BATCH, None, ROWS) is None


def test_noise_is_the_same_on_any_mesh() -> None:
    def both(key: jax.Array, x: jax.Array) -> jax.Array:
        own = jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(jax.random.split(key, len(x)))
        return own + jax.random.uniform(key, x.shape, jnp.bfloat16)

    mesh = MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4")
    plan = make_plan(noisy(both), mesh=mesh, rules=Rules((("**", None),)), optimizer=SGD, batch=BATCH, microbatches=2)
    found = verify(noisy(both), square, SGD, plan, [BATCH])
    assert found.passed, str(found)


REFUSED: dict[str, tuple[Noise, str]] = {
    "a permutation": (
        lambda key, x: jax.random.permutation(key, x),
        "before: sort at FILE orders the examples, and a device holds 4 of the batch's",
    ),
    "a choice of rows": (
        lambda key, x: x[jax.random.choice(key, len(x), (len(x),), replace=False)],
        "before: sort at FILE orders the examples, and a device holds 4 of the batch's",
    ),
    "another dim": (
        lambda key, x: jax.random.normal(key, x.shape[::-1]).T,
        "before: a random draw of shape [3, 4] for 4 examples has shape [3, 8] for 8; the batch must be its leading "
        "dim, so that each device can draw its own rows",
    ),
    "one draw of them all": (
        lambda key, x: jnp.max(jax.random.normal(key, x.shape)),
        "before: reduce_max at FILE takes one value of all examples, and a device holds 4 of the batch's",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_noise_that_cannot_be_cut_is_refused(name: str) -> None:
    noise, message = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        calls_of(noisy(noise), data=2)
    before, _, after = message.partition("FILE")
    assert str(error.value).startswith(before)
    assert after in str(error.value)
    # On one device that holds all examples it is as good as any other.
    calls_of(noisy(noise))


def test_shared_examples_are_counted_by_share() -> None:
    calls = calls_of(noisy(normal), data=2, stage=2, head="examples")
    assert calls.shared
    assert not calls_of(noisy(normal), data=2, stage=2, head="last_stage").shared
    assert not calls_of(noisy(normal), data=2).shared


def test_the_weight_is_a_constant() -> None:
    def mean(x: jax.Array) -> jax.Array:
        total, weight = scalars((jnp.sum(x**2), jnp.sum(x)))
        return total / weight

    x = jnp.array([1.0, 3.0])
    np.testing.assert_allclose(jax.grad(mean)(x), 2 * x / 4)
    total, weight = scalars((jnp.bfloat16(3), 7))
    assert (total.dtype, weight.dtype, float(weight)) == (jnp.float32, jnp.float32, 7)
    with jax.enable_x64(True):
        assert scalars((jnp.float64(1), 1))[0].dtype == jnp.float64


def test_x_flows_on_in_the_steps_dtype() -> None:
    model = Functions(
        init=lambda key: {"blocks": [{"w": jnp.eye(WIDTH)}]},
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: (x.astype(jnp.float32) @ layer["w"], (jnp.sum(x), len(x))),
        after=lambda params, x: x,
    )
    parts = read_model(model, BATCH).parts
    assert parts is not None
    block = block_function(parts, 0, "bfloat16", True)
    x, (total, weight) = block({"w": jnp.eye(WIDTH)}, jnp.ones((2, WIDTH), jnp.bfloat16), None, None)
    assert (x.dtype, total.dtype, float(weight)) == (jnp.bfloat16, jnp.float32, 2)
    assert calls_of(model).has_auxiliary
    assert not calls_of(noisy(normal)).has_auxiliary


def test_the_auxiliary_loss_of_a_step_is_reported() -> None:
    model = Functions(
        init=lambda key: {"blocks": [{"w": jnp.eye(WIDTH)}] * 2},
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: (x @ layer["w"], (0.5 * jnp.sum(x**2), len(x))),
        after=lambda params, x: x,
    )
    plan = make_plan(model, mesh=MESH, rules=Rules((("**", None),)), optimizer=SGD, batch=BATCH, microbatches=2)
    _, metrics = (step := compile_train_step(model, square, SGD, plan, BATCH))(step.init(0), BATCH)
    squares = np.sum(BATCH["x"] ** 2) / ROWS
    # w is the identity: x stays, and each of two blocks adds a half of its squares.
    np.testing.assert_allclose(metrics["auxiliary"], squares / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 2 * squares, rtol=1e-6)
