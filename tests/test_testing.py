"""What a user's own tests call: it passes for a right plan, and says what is wrong with a model whose parts differ."""

import dataclasses
from typing import Any

import jax
import optax
import pytest
from flax import nnx

import shardlab.testing
from shardlab.mesh.emulate import emulate
from shardlab.mesh.faults import DeclarationError
from shardlab.models.mlp import MLP, MLPConfig
from shardlab.run.config import Config
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


def test_a_faulty_declaration_is_no_assertion() -> None:
    with pytest.raises(DeclarationError, match=r"^zero=4: "):
        checked(tiny("data=1"), zero=4)


def test_emulate_is_at_hand() -> None:
    assert shardlab.testing.emulate is emulate
