"""What a user's own tests call: it passes for a right plan, and says what is wrong with a model whose parts differ."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardlab.testing
from shardlab.mesh.emulate import emulate
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models.mlp import MLP, MLPConfig
from shardlab.module.functions import Functions
from shardlab.run.config import Config
from shardlab.sharding.rules import Rules
from shardlab.testing import assert_matches_reference
from tests.run.tiny import tiny


class Scaled(MLP):
    """Called whole it is another function than its parts called in turn."""

    def __call__(self, batch: Any) -> jax.Array:
        return 2 * super().__call__(batch)


@dataclasses.dataclass(frozen=True)
class ScaledConfig(MLPConfig):
    def __call__(self, rngs: nnx.Rngs) -> MLP:
        return Scaled(self, rngs=rngs)


def checked(config: Config, **changes: Any) -> Any:
    batch = next(config.data.train(config.batch_size))
    given = {"mesh": config.mesh, "rules": config.rules, "pipeline": config.pipeline, **changes}
    return assert_matches_reference(config.model, config.loss, optax.sgd(0.1), batch, **given)


def test_a_right_plan_passes_in_float64_and_leaves_jax_as_it_was() -> None:
    before = jax.config.read("jax_enable_x64")
    found = checked(tiny("data=2,stage=2"), microbatches=2, steps=2)
    assert found.passed
    assert (found.dtype, found.steps) == ("float64", 2)
    assert jax.config.read("jax_enable_x64") == before


def test_a_difference_is_an_assertion_with_the_table() -> None:
    model = ScaledConfig(num_layers=2, model_dim=8, hidden_dim=16)
    with pytest.raises(AssertionError) as error:
        checked(tiny("data=1", model=model), steps=1, dtype="float32")
    lines = str(error.value).splitlines()
    assert lines[0] == "against the reference step on one device, in float32: FAILED"
    # Twice as large: off by a half of what is largest.
    assert lines[1].split("  (")[0].split() == ["parts,", "against", "the", "whole", "5.0e-01"]
    assert "FAIL" in lines[1]


def steep(width: int = 16) -> Any:
    """A small network of plain functions under a squared error as large as a thousand."""

    def init(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(first, (8, width)) / 2, "bias": jnp.zeros(width)},
            "second": {"kernel": jax.random.normal(second, (width, 1)), "bias": jnp.zeros(1)},
        }

    def apply(params: Any, batch: Any) -> jax.Array:
        first, second = params["first"], params["second"]
        inner = jnp.tanh(batch["x"].astype(first["kernel"].dtype) @ first["kernel"] + first["bias"])
        return (inner @ second["kernel"] + second["bias"])[:, 0]

    def loss(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.sum((y - batch["y"]) ** 2), jnp.float32(len(y))

    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    return Functions(init, apply), loss, {"x": x, "y": 30 * x[:, 0]}


EIGHT: dict[str, Any] = {"mesh": MeshSpec({"data": 8}, batch="data", target="cpu:8"), "rules": Rules((("**", None),))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_steep_loss_makes_no_more_of_rounding(dtype: str) -> None:
    model, loss, batch = steep()
    found = assert_matches_reference(model, loss, optax.adam(1.0), batch, steps=5, dtype=dtype, **EIGHT)
    assert found.optimizer == "SGD at 0.1 of gradients cut to norm 1, for rounding's sake"
    assert 1e-8 < found.max_rel_err_params < (1e-6 if dtype == "float32" else 1e-2)


def test_parameters_that_did_not_move_are_said() -> None:
    model, loss, batch = steep(1)
    for rate, moved in ((0.0, False), (1e-3, True)):
        found = assert_matches_reference(model, loss, optax.sgd(rate), batch, steps=1, **EIGHT)
        assert (found.passed, found.moved) == (True, moved)
        said = "  no parameter moved in 1 step: this proves nothing of the update; give more steps"
        assert (said in str(found).splitlines()) is not moved
        assert "  parameters, 1 step  " in str(found)


def test_a_faulty_declaration_is_no_assertion() -> None:
    with pytest.raises(DeclarationError, match=r"^zero=4: "):
        checked(tiny("data=1"), zero=4)


def test_emulate_is_at_hand() -> None:
    assert shardlab.testing.emulate is emulate
