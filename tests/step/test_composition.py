"""The parts that a pipeline names, called one after another, against the model called whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rules
from shardlab.step.verify import Verification, verify

BATCH = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)}
PARTS = Pipeline(before="embed", blocks="blocks", after="head")


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.up(x))


class Residual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def embed(self, batch: Any) -> jax.Array:
        return batch["x"]

    def head(self, x: jax.Array) -> jax.Array:
        return x.sum(-1)

    def __call__(self, batch: Any) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Backwards(Residual):
    def __call__(self, batch: Any) -> jax.Array:
        x = self.embed(batch)
        for block in reversed(list(self.blocks)):
            x = block(x)
        return self.head(x)


class OfAnArray(Residual):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__({"x": x + 0})


class OneMore(Residual):
    def __call__(self, batch: Any) -> Any:
        return super().__call__(batch)[:, None]


def square(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return (y**2).sum(), jnp.float32(len(y))


def verified(model: Any, pipeline: Pipeline | None = PARTS) -> Verification:
    mesh, optimizer = MeshSpec({"data": 1}, batch="data", target="cpu:1"), optax.sgd(0.1)
    plan = make_plan(
        model, mesh=mesh, rules=Rules((("**", None),)), optimizer=optimizer, batch=BATCH, pipeline=pipeline
    )
    return verify(model, square, optimizer, plan, [BATCH])


def test_parts_that_are_the_model_pass() -> None:
    found = verified(Residual)
    assert (found.passed, found.composition) == (True, "y")
    assert found.max_rel_err_composition is not None
    assert found.max_rel_err_composition < 1e-6
    assert "parts, against the whole" in str(found)


def test_parts_that_are_another_model_fail() -> None:
    found = verified(Backwards)
    assert not found.passed
    assert found.max_rel_err_composition is not None
    assert found.max_rel_err_composition > found.tolerances.grad > found.max_rel_err_grad
    assert "FAIL  y" in str(found)


def no_apply() -> Functions:
    return Functions(
        init=lambda key: {"blocks": [{"w": jax.random.normal(key, (4, 4))}]},
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: x @ layer["w"],
        after=lambda params, x: x.sum(-1),
    )


@pytest.mark.parametrize(
    ("model", "pipeline", "why"),
    [
        (Residual, None, "the plan takes the model whole"),
        (
            OfAnArray,
            PARTS,
            "OfAnArray called with the batch raises TypeError: unsupported operand type(s) for +: 'dict' and 'int'",
        ),
        (OneMore, PARTS, "OneMore called whole gives (4, 1), its parts (4,)"),
        (
            no_apply(),
            None,
            "no_apply.<locals>.<lambda> called with the batch raises DeclarationError: model: these Functions have "
            "parts and no apply=; add it to call the model whole",
        ),
    ],
    ids=["whole", "other argument", "other shape", "functions"],
)
def test_what_is_not_compared_is_said(model: Any, pipeline: Pipeline | None, why: str) -> None:
    found = verified(model, pipeline)
    assert found.passed
    assert (found.max_rel_err_composition, found.composition) == (None, f"not compared: {why}")
    assert f"parts, against the whole    not compared: {why}" in str(found)
