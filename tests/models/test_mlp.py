"""The MLP in both forms: parts compose, examples are independent, every parameter has a rule."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardlab.models import mlp
from shardlab.models.mlp import MLPConfig, label_loss, mlp_rules

CONFIG = MLPConfig(num_features=5, num_layers=3, model_dim=6, hidden_dim=7, num_classes=4)


def example(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "features": jnp.asarray(rng.normal(size=(8, 5))),
        "labels": jnp.asarray(rng.integers(0, 4, 8, dtype=np.int32)),
    }


def functional(params: mlp.Params, batch: Any, **options: Any) -> jax.Array:
    x = mlp.before(params, batch)
    for index, layer in enumerate(params["blocks"]):
        key = jax.random.fold_in(jax.random.key(1), index)
        x = mlp.block(layer, x, key, **options)
    return mlp.after(params, x, batch)


def nnx_paths(model: nnx.Module) -> list[str]:
    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def test_both_forms_hold_the_same_parameters_and_compute_the_same() -> None:
    params, model, batch = mlp.init(jax.random.key(0), CONFIG), CONFIG(nnx.Rngs(0)), example()
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}
    held = nnx.state(model, nnx.Param)
    assert sorted(named) == sorted(nnx_paths(model))
    values = [("/".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(held)]
    for path, variable in values:
        assert variable.shape == named[path].shape
        variable.set_value(named[path])
    nnx.update(model, held)
    np.testing.assert_allclose(model(batch), functional(params, batch), rtol=1e-5)


def test_the_parts_of_the_module_compose_to_the_whole() -> None:
    model, batch = CONFIG(nnx.Rngs(1)), example()
    x = model.embed(batch)
    for block in model.blocks:
        x = block(x)
    np.testing.assert_array_equal(model.head(x), model(batch))


def test_layers_differ_and_blocks_add() -> None:
    params, batch = mlp.init(jax.random.key(2), CONFIG), example()
    kernels = [layer["up"]["kernel"] for layer in params["blocks"]]
    assert not np.allclose(kernels[0], kernels[1])
    x = mlp.before(params, batch)
    silent = jax.tree.map(jnp.zeros_like, params["blocks"][0])
    np.testing.assert_array_equal(mlp.block(silent, x), x)


def test_dropout_keeps_the_mean_and_draws_only_when_it_trains() -> None:
    params, batch = mlp.init(jax.random.key(3), CONFIG), example()
    quiet = functional(params, batch)
    half, quarter = (dataclasses.replace(CONFIG, dropout=rate) for rate in (0.5, 0.25))
    np.testing.assert_array_equal(functional(params, batch, config=half), quiet)
    assert not np.allclose(functional(params, batch, config=half, train=True), quiet)
    layer, x = params["blocks"][0], jnp.ones((20_000, 6))
    added = mlp.block(layer, x, jax.random.key(4), True, config=quarter) - x
    np.testing.assert_allclose(added.mean(0), (mlp.block(layer, x) - x)[0], atol=0.02)
    model = MLPConfig(dropout=0.5)(nnx.Rngs(5))
    wide = {"features": jnp.ones((2, 12))}
    assert not np.allclose(model(wide), model(wide))
    model.eval()
    np.testing.assert_array_equal(model(wide), model(wide))


def test_uniform_logits_cost_log_n() -> None:
    total, weight = label_loss(jnp.ones((8, 4), jnp.bfloat16), example())
    assert (float(weight), total.dtype) == (8.0, jnp.float32)
    assert float(total / weight) == pytest.approx(math.log(4), rel=1e-6)


def test_float64_is_float64_throughout() -> None:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), mlp.init(jax.random.key(6), CONFIG))
        batch = example()
        assert "f32[" not in str(jax.make_jaxpr(lambda p: label_loss(functional(p, batch), batch))(params))
        assert label_loss(functional(params, batch), batch)[0].dtype == jnp.float64


def test_every_parameter_has_a_rule_and_every_rule_a_parameter() -> None:
    rules = mlp_rules("model")
    matched = [rules.first(path) for path in nnx_paths(nnx.eval_shape(lambda: CONFIG(nnx.Rngs(7))))]
    assert None not in matched
    assert set(matched) == set(rules.rules)
