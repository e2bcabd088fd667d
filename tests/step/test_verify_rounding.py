"""In bfloat16 `verify` passes what only rounds, however much of a gradient that is, and still names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rules
from shardlab.step.compile import compile_train_step
from shardlab.step.reference import ReferenceStep
from shardlab.step.rounding import gradient_rounding
from shardlab.step.state import users_own
from shardlab.step.verify import TOLERANCES, over_rounding
from tests.equivalence.declarations import attempt

SGD, WIDTH, SHARDS, MICROBATCHES = optax.sgd(0.1), 16, 2, 4
TOKENS = np.random.default_rng(0).integers(0, 6, (32, 5)).astype(np.int32)
BATCH = {"x": TOKENS, "counts": np.ones(32, np.float32)}


def init(key: jax.Array) -> Any:
    table, out, *layers = jax.random.split(key, 6)
    return {
        "table": 0.02 * jax.random.normal(table, (6, WIDTH)),
        "blocks": [{"w": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5} for key in layers],
        "out": jax.random.normal(out, (WIDTH,)),
    }


def normed(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6).astype(x.dtype)


MODEL = Functions(
    init=init,
    before=lambda params, batch: params["table"][batch["x"]],
    block=lambda layer, x: x + jnp.tanh(normed(x) @ layer["w"]),
    after=lambda params, x: normed(x).mean(axis=1) @ params["out"],
)


def loss(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return (batch["counts"] * (y.astype(jnp.float32) - 1) ** 2).sum(), jnp.float32(len(y))


PLAN = make_plan(
    MODEL,
    mesh=MeshSpec({"data": SHARDS}, batch="data", target="cpu:2"),
    rules=Rules((("**", None),)),
    optimizer=SGD,
    batch=BATCH,
    microbatches=MICROBATCHES,
    dtype="bfloat16",
)


@cache
def measured() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The compiled step, the gradients of the reference, and how far rounding takes them."""
    model = read_model(MODEL, BATCH, None)
    reference = ReferenceStep(model, loss, SGD, PLAN, 0)
    _, gradients = reference.gradients(BATCH)
    allowed = gradient_rounding(model, loss, PLAN)(reference.parameters, {}, BATCH, reference.key)
    return compile_train_step(MODEL, loss, SGD, PLAN, BATCH, prove=True), gradients, allowed


def over(of_batch: Callable[[Any], Any], of_gradients: Callable[[Any], Any]) -> tuple[float, str]:
    """`over_rounding` of a step whose batch and gradients were changed."""
    step, expected, allowed = measured()
    _, metrics = step(step.init(0), of_batch(BATCH))
    stored = {name: np.asarray(value) for name, value in of_gradients(metrics["gradients"]).items()}
    return over_rounding(users_own(PLAN, stored), expected, allowed)


def without_rows(batch: Any, rows: slice) -> Any:
    counts = batch["counts"].copy()
    counts[rows] = 0
    return {**batch, "counts": counts}


def times(name: str, factor: Any) -> Callable[[Any], Any]:
    return lambda gradients: {**gradients, name: gradients[name] * factor}


# What becomes of the batch, and of gradients.
SAME: Callable[[Any], Any] = lambda given: given  # noqa: E731
WRONG: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a microbatch of a shard is left out": (lambda batch: without_rows(batch, slice(4, 8)), SAME),
    "a sum over the shards is missing": (lambda batch: without_rows(batch, slice(16, None)), SAME),
    "a mean in place of the sum over shards": (SAME, lambda found: {name: g / SHARDS for name, g in found.items()}),
    "a layer's gradient is dropped": (SAME, times("blocks/*/w", np.array([1, 1, 0, 1])[:, None, None])),
    "the embedding's gradient is halved": (SAME, times("table", 0.5)),
    "a token's gradient is dropped": (SAME, times("table", np.array([1, 1, 1, 0, 1, 1])[:, None])),
}


def test_what_only_rounds_passes() -> None:
    assert 0.1 < over(SAME, SAME)[0] < 2


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_more_than_rounding(name: str) -> None:
    assert over(*WRONG[name])[0] > TOLERANCES["bfloat16"].rounding


def test_errors_over_rounding() -> None:
    expected = {"a": np.array([1.0, 0.5]), "b": np.array([1e-6, 0.0])}
    plenty = np.array([9.0, 9.0])

    def over(a: list[float], b: list[float], of_a: Any, of_b: Any) -> tuple[float, str]:
        return over_rounding({"a": np.array(a), "b": np.array(b)}, expected, {"a": of_a, "b": of_b})

    same = [1.0, 0.5], [1e-6, 0.0]
    assert over(*same, 0 * plenty, 0 * plenty) == (0.0, "b")
    assert over([1.0, 0.7], same[1], np.array([0.1, 9.0]), plenty) == (pytest.approx(2), "a")
    # All of it is half as large: an error of the length 0.56 along the gradient.
    assert over([0.5, 0.25], same[1], np.array([9.0, 0.1]), plenty) == (pytest.approx(5 * 1.25**0.5), "a")
    # Half a unit in the last place of bfloat16; what float32 is allowed, of the largest entry of all.
    assert over([1.0, 0.7], same[1], 0 * plenty, plenty) == (pytest.approx(0.2 * 2**8), "a")
    assert over(same[0], [1e-6, 3e-6], plenty, 0 * plenty) == (pytest.approx(3e-6 * 2**20), "b")
    assert over(same[0], [1e-6, np.nan], plenty, plenty) == (np.inf, "b")


@pytest.mark.slow
def test_rounding_through_ten_layers_is_no_fault() -> None:
    """It makes a fifth of the embedding's gradient, and more than half of what two steps make of the embedding."""
    declaration = {
        "subject": "decoder-10-layers",
        "axes": [["data", 4], ["stage", 1], ["tensor", 2]],
        "batch_axes": ["data"],
        "stage": "stage",
        "target": "cpu:8",
        "rules": [
            ["unembed/kernel", [None, "tensor"], False],
            ["tokens/embedding", [None, ["data", "tensor"]], True],
            ["blocks/*/attention/v/kernel", [None, None], False],
        ],
        "own": True,
        "optimizer": "sgd",
        "batch": 24,
        "options": {
            **{"schedule": "dualpipe_v", "virtual": None, "microbatches": 1, "zero": 3, "remat": "dots_saveable"},
            **{"head": "auto", "sends": "auto", "dtype": "bfloat16"},
        },
    }
    assert attempt(declaration) == "trained"
