"""What `verify` tells apart: rounding from an error, the model's own dtypes from the plan's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rules
from shardlab.step.verify import TOLERANCES, Verification, relative_error, verify, worst

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(8, 6)).astype(np.float32), "labels": RNG.integers(0, 4, 8).astype(np.int32)}
ALL = Rules((("**", None),))


def verified(model: Any, *, dtype: str = "float32", steps: int = 2, **more: Any) -> Verification:
    mesh = MeshSpec({"data": 4}, batch="data", target="cpu:4")
    optimizer = optax.adam(1e-2, eps=1e-4)
    with jax.enable_x64(dtype == "float64"):
        plan = make_plan(model, mesh=mesh, rules=ALL, optimizer=optimizer, batch=BATCH, dtype=dtype, **more)
        return verify(model, mlp.label_loss, optimizer, plan, [BATCH] * steps)


class BiasBeforeNorm(nnx.Module):
    """The gradient of `first/bias` is zero but for rounding."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.last(nnx.relu(self.norm(self.first(batch["x"]))))


def test_rounding_alone_is_no_error() -> None:
    found = verified(BiasBeforeNorm)
    assert found.passed, str(found)


class OwnPrecision(nnx.Module):
    """Flax's own mixed precision: one layer computes in bfloat16 whatever it is given."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 8, dtype=jnp.bfloat16, rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.last(jnp.tanh(self.first(batch["x"])))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_models_own_dtype_sets_the_tolerances(dtype: str) -> None:
    found = verified(OwnPrecision, dtype=dtype)
    assert (found.narrowest, found.tolerances, found.optimizer) == (
        "bfloat16",
        TOLERANCES["bfloat16"],
        "SGD at 0.1 of gradients cut to norm 1, for rounding's sake",
    )
    assert found.passed, str(found)
    assert str(found).splitlines()[0] == (
        f"against the reference step on one device, in {dtype}, the model in part in bfloat16: passed"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_without_one_the_plans_dtype_does(dtype: str) -> None:
    model = Functions(
        init=lambda key: {"w": jax.random.normal(key, (6, 4))}, apply=lambda params, batch: batch["x"] @ params["w"]
    )
    found = verified(model, dtype=dtype)
    assert (found.narrowest, found.tolerances) == (None, TOLERANCES[dtype])
    assert found.passed, str(found)
    assert str(found).startswith(f"against the reference step on one device, in {dtype}: passed")


class Recurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cells = nnx.RNN(nnx.LSTMCell(1, 8, rngs=rngs), rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.last(self.cells(batch["x"][..., None])[:, -1])


class Staged(Recurrent):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def embed(self, batch: Any) -> jax.Array:
        return self.cells(batch["x"][..., None])[:, -1]

    def head(self, x: jax.Array) -> jax.Array:
        return self.last(x)


@pytest.mark.parametrize(
    ("model", "pipeline"),
    [(Recurrent, None), (Staged, Pipeline(before="embed", blocks="blocks", after="head"))],
    ids=["whole", "parts"],
)
def test_a_loop_that_keeps_to_a_dtype_of_its_own_is_named(model: Any, pipeline: Pipeline | None) -> None:
    with pytest.raises(DeclarationError) as error:
        verified(model, dtype="float64", pipeline=pipeline)
    assert str(error.value).startswith(
        "dtype='float64': a loop of the model starts in a dtype of its own and goes on in that of its parameters (the "
        "input carry component "
    )
    assert str(error.value).endswith("); start it in the dtype of its input, or use dtype='float32'")


def test_errors_of_complex_numbers_have_two_parts() -> None:
    assert relative_error(np.array([1 + 3j]), np.array([1 + 4j])) == pytest.approx(1 / np.sqrt(17))


def test_no_array_is_compared_to_less_than_a_share_of_the_largest() -> None:
    found, expected = {"a": np.array([100.0]), "b": np.array([1e-6])}, {"a": np.array([100.0]), "b": np.array([0.0])}
    assert worst(found, expected) == (pytest.approx(1e-5), "b")
    assert worst(found, expected, 0.1) == (pytest.approx(1e-7), "b")
