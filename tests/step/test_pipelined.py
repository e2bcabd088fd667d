"""Pipelined gradients: what a bubble holds reaches no result, and memory is the schedule's, not the batch's."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardlab.mesh.build import build_mesh
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rules
from shardlab.step.calls import Calls
from shardlab.step.compile import compile_train_step
from shardlab.step.pipelined import pipelined_gradients
from shardlab.step.region import make_region
from shardlab.step.state import storage_specs

WIDTH = 4
SGD = optax.sgd(0.1)


def init(key: jax.Array, *, layers: int = 4) -> Any:
    one, two, *keys = jax.random.split(key, 2 + layers)
    blocks = [{"w": jax.random.normal(k, (WIDTH, WIDTH))} for k in keys]
    return {"in": jax.random.normal(one, (3, WIDTH)), "blocks": blocks, "out": jax.random.normal(two, (WIDTH,))}


def model_of(layers: int) -> Functions:
    return Functions(
        init=functools.partial(init, layers=layers),
        before=lambda params, batch: batch["x"] @ params["in"],
        block=lambda layer, x: jnp.tanh(x @ layer["w"]),
        after=lambda params, x: x @ params["out"],
    )


def square(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    # Of every example another weight, so that an example counted twice shows.
    return (batch["weight"] * (y - 1) ** 2).sum(), batch["weight"].sum()


def batch_of(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(size, 3)), "weight": rng.uniform(1, 2, size)}


def planned(size: int, *, layers: int = 4, **more: Any) -> tuple[Any, Plan]:
    model = model_of(layers)
    sizes = {axis: more.pop(axis, 1) for axis in ("data", "stage")}
    mesh = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    given = {"rules": Rules((("**", None),)), "optimizer": SGD, "batch": batch_of(size), **more}
    return model, make_plan(model, mesh=mesh, **given)


CASES: dict[str, dict[str, Any]] = {
    "head over examples": {"stage": 4, "microbatches": 2, "head": "examples"},
    "last-stage head": {"stage": 4, "microbatches": 2, "head": "last_stage"},
    "gpipe": {"stage": 4, "microbatches": 2, "schedule": "gpipe"},
    "delayed sends": {"stage": 4, "microbatches": 4, "sends": "delayed"},
    "delayed sends, one before a scan": {"stage": 2, "microbatches": 4, "schedule": "1f1b_split", "sends": "delayed"},
    "uneven, two shards": {"data": 2, "stage": 3, "microbatches": 2, "size": 12, "layers": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_no_garbage_reaches_a_result(name: str) -> None:
    """Buffers that start as NaN and as zeros give the same bits, and what plain JAX gives."""
    with jax.enable_x64(True):
        options = dict(CASES[name])
        size, layers = options.pop("size", 16), options.get("layers", 4)
        model, plan = planned(size, dtype="float64", **options)
        batch = batch_of(size)
        read, region = read_model(model, batch), make_region(plan, build_mesh(plan.mesh))
        calls = Calls(read, square, plan, region, batch, train=True)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), init(jax.random.key(0), layers=layers))
        flat = read.flat(params)
        stored: dict[str, Any] = {"in": flat["in"], "out": flat["out"]}
        for stack in plan.stacks:
            parts = [np.full((WIDTH, WIDTH), np.nan) if path is None else flat[path] for path in stack.members]
            stored[stack.name] = np.stack(parts)

        found = []
        for fill in (float("nan"), 0.0):
            gradients = pipelined_gradients(read, plan, region, calls, storage_specs(plan, "state"), fill)
            with jax.set_mesh(region.mesh):
                out = jax.jit(gradients)(stored, {}, batch, jax.random.key_data(jax.random.key(0)))
            found.append(jax.tree.map(np.asarray, out))
        jax.tree.map(np.testing.assert_array_equal, *found)

        def total(params: Any) -> Any:
            x = batch["x"] @ params["in"]
            for layer in params["blocks"]:
                x = jnp.tanh(x @ layer["w"])
            return square(x @ params["out"], batch)

        (value, weight), pull = jax.vjp(total, params)
        (expected,) = pull((jnp.float64(1), jnp.float64(0)))
        gradient, sums = found[0]
        np.testing.assert_allclose(sums[:2], [value, weight], rtol=1e-12)
        wanted = read.flat(expected)
        for stack in plan.stacks:
            for slot, path in enumerate(stack.members):
                # A pad slot, which holds NaN here, gets a gradient of zero.
                one = np.zeros((WIDTH, WIDTH)) if path is None else wanted[path]
                np.testing.assert_allclose(gradient[stack.name][slot], one, rtol=1e-11, atol=1e-13)
        for path in ("in", "out"):
            np.testing.assert_allclose(gradient[path], wanted[path], rtol=1e-11)


@pytest.mark.parametrize("head", ["examples", "last_stage"])
def test_a_head_that_only_takes_what_the_last_stage_makes(head: str) -> None:
    """The logarithm of what other stages hold is not a number: it is masked, not multiplied by zero."""
    model = Functions(
        init=lambda key: {"blocks": [{"w": jnp.ones(())}] * 4},
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: x + layer["w"],
        after=lambda params, x: jnp.log(x),
    )
    mesh = MeshSpec({"stage": 4}, stage="stage", target="cpu:4")
    batch = {"x": np.full(8, -3.5, np.float32)}
    plan = make_plan(
        model, mesh=mesh, rules=Rules((("**", None),)), optimizer=SGD, batch=batch, microbatches=2, head=head
    )
    step = compile_train_step(model, lambda y, batch: (y.sum(), len(y)), SGD, plan, batch, prove=True)
    _, metrics = step(step.init(0), batch)
    # -3.5 and four times 1: the logarithm of a half, whose derivative is 2.
    np.testing.assert_allclose(metrics["loss"], math.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(metrics["gradients"]["blocks/*/w"], [2.0] * 4, rtol=1e-6)


def temporary(microbatches: int, schedule: str) -> int:
    """Bytes beside arguments and results; microbatches of 4 examples each."""
    model, plan = planned(4 * microbatches, stage=4, microbatches=microbatches, schedule=schedule)
    step = compile_train_step(model, square, SGD, plan, batch_of(4 * microbatches))
    return int(step.compiled.memory_analysis().temp_size_in_bytes)


def test_memory_does_not_grow_with_microbatches() -> None:
    """Of what a microbatch keeps, x [4, 4] and a tanh [4, 4] of one block a stage, 1F1B holds 7 whatever their number.

    Their tables grow, by 14 rows of int32 at most a microbatch and stage; GPipe holds all.
    """
    few, many = (temporary(count, "1f1b") for count in (8, 32))
    assert many - few <= 24 * 14 * 4
    few, many = (temporary(count, "gpipe") for count in (8, 32))
    assert many - few >= 24 * 2 * 4 * 4 * 4


def test_the_step_of_one_stage_sends_nothing() -> None:
    model, plan = planned(8, microbatches=4)
    assert make_region(plan, build_mesh(plan.mesh)).manual == ()
    step = compile_train_step(model, square, SGD, plan, batch_of(8))
    assert not any(word in step.compiled.as_text() for word in ("collective-permute", "all-to-all", "all-gather"))


def test_stages_send_to_their_neighbours_only() -> None:
    """And the head over examples deals out by all-to-all; a last-stage head does not."""
    texts = {}
    for head in ("examples", "last_stage"):
        model, plan = planned(8, stage=2, microbatches=2, head=head)
        texts[head] = compile_train_step(model, square, SGD, plan, batch_of(8)).compiled.as_text()
    assert all("collective-permute" in text for text in texts.values())
    assert "all-to-all" in texts["examples"]
    assert "all-to-all" not in texts["last_stage"]
