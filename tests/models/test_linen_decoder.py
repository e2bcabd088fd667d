"""The Linen decoder: the same claims as for the NNX one, and its parts run on their own parameters alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.models.decoder import next_byte_loss
from shardlab.models.linen_decoder import LinenDecoder, linen_decoder_rules

BATCH = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 7), dtype=np.int32))}


def small(**changes: Any) -> Any:
    return LinenDecoder(**{"vocab_size": 11, "num_layers": 2, "model_dim": 12, "mlp_dim": 10, **changes})


def paths(variables: Any) -> list[str]:
    leaves = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    return [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]


@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_compose_to_the_whole(tied: bool) -> None:
    model = small(tied=tied)
    variables = model.init(jax.random.key(0), BATCH)
    outside = {"params": {k: v for k, v in variables["params"].items() if not k.startswith("blocks_")}}
    x = model.apply(outside, BATCH, method="embed")
    c: Any = model.apply(outside, BATCH, method="context")
    for index, block in enumerate(model.bind(variables).blocks):
        alone = block.clone(parent=None, name=None)
        before, x = x, alone.apply({"params": variables["params"][f"blocks_{index}"]}, x, c)
        assert not np.allclose(before, x)
    logits = model.apply(variables, BATCH)
    assert logits.shape == (3, 7, 11)
    np.testing.assert_allclose(model.apply(outside, x, method="head"), logits, rtol=1e-6)


def test_a_later_token_changes_no_earlier_logits() -> None:
    model = small()
    variables = model.init(jax.random.key(1), BATCH)
    changed = {"tokens": BATCH["tokens"].at[:, 4].add(1) % 11}
    here, there = (model.apply(variables, batch) for batch in (BATCH, changed))
    np.testing.assert_array_equal(here[:, :4], there[:, :4])
    assert not np.allclose(here[:, 4:], there[:, 4:])


@pytest.mark.parametrize("tied", [False, True])
def test_float64_is_float64_throughout(tied: bool) -> None:
    with jax.enable_x64(True):
        model = small(tied=tied)
        shapes = jax.eval_shape(model.init, jax.random.key(2), BATCH)
        variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), shapes)
        batch = BATCH | {"targets": BATCH["tokens"]}
        jaxpr = jax.make_jaxpr(lambda values: next_byte_loss(model.apply(values, batch), batch))(variables)
        assert {out.aval.dtype for out in jaxpr.jaxpr.outvars} == {jnp.dtype("float64")}
        assert "f32[" not in str(jaxpr)


def test_bfloat16_parameters_give_bfloat16_logits() -> None:
    model = small(tied=True)
    shapes = jax.eval_shape(model.init, jax.random.key(3), BATCH)
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
    assert jax.eval_shape(model.apply, variables, BATCH).dtype == jnp.bfloat16


def test_dropout_draws_when_it_trains_and_only_then() -> None:
    model = small(dropout=0.5)
    variables = model.init(jax.random.key(4), BATCH)
    quiet = model.apply(variables, BATCH)
    one, two = (model.apply(variables, BATCH, train=True, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert not np.allclose(one, two)
    assert not np.allclose(one, quiet)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(tied: bool) -> None:
    rules = linen_decoder_rules("model", tied=tied)
    matched = [rules.first(path) for path in paths(jax.eval_shape(small(tied=tied).init, jax.random.key(5), BATCH))]
    assert None not in matched
    assert set(matched) == set(rules.rules)
