"""The mixer: parts compose, patches mix, images do not, every parameter has a rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardlab.models.mixer import Mixer, mixer_rules
from shardlab.models.mlp import label_loss


def example() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.normal(size=(3, 6, 8, 2))),
        "labels": jnp.asarray(rng.integers(0, 5, 3, np.int32)),
    }


def small(**changes: Any) -> Any:
    sizes = {
        "patch_size": 2,
        "num_layers": 2,
        "model_dim": 5,
        "token_dim": 3,
        "channel_dim": 7,
        "num_classes": 5,
    }
    return Mixer(**{**sizes, **changes})


def test_the_parts_compose_to_the_whole() -> None:
    model, batch = small(), example()
    variables = model.init(jax.random.key(0), batch)
    outside = {"params": {k: v for k, v in variables["params"].items() if not k.startswith("blocks_")}}
    x: Any = model.apply(outside, batch, method="embed")
    assert x.shape == (3, 3 * 4, 5)
    for index, block in enumerate(model.bind(variables).blocks):
        alone = block.clone(parent=None, name=None)
        before, x = x, alone.apply({"params": variables["params"][f"blocks_{index}"]}, x)
        assert not np.allclose(before, x)
    logits: Any = model.apply(variables, batch)
    assert logits.shape == (3, 5)
    np.testing.assert_allclose(model.apply(outside, x, method="head"), logits, rtol=1e-5, atol=1e-6)


def test_patches_mix_and_images_do_not() -> None:
    model, batch = small(), example()
    variables = model.init(jax.random.key(1), batch)
    x: Any = model.apply(variables, batch, method="embed")
    block = model.bind(variables).blocks[0].clone(parent=None, name=None)
    slope = jax.grad(lambda x: block.apply({"params": variables["params"]["blocks_0"]}, x)[0, 0, 0])(x)
    assert np.abs(slope[0]).sum(axis=-1).min() > 0
    assert not slope[1:].any()


def test_float64_is_float64_throughout() -> None:
    with jax.enable_x64(True):
        model, batch = small(), example()
        made = jax.eval_shape(model.init, jax.random.key(2), batch)
        variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), made)
        jaxpr = jax.make_jaxpr(lambda values: label_loss(model.apply(values, batch), batch))(variables)
        assert "f32[" not in str(jaxpr)
        assert {out.aval.dtype for out in jaxpr.jaxpr.outvars} == {jnp.dtype("float64")}


def test_dropout_draws_when_it_trains_and_only_then() -> None:
    model, batch = small(dropout=0.5), example()
    variables = model.init(jax.random.key(3), batch)
    quiet = model.apply(variables, batch)
    one, two = (model.apply(variables, batch, train=True, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert not np.allclose(one, two)
    assert not np.allclose(one, quiet)


def test_every_parameter_has_a_rule_and_every_rule_a_parameter() -> None:
    rules = mixer_rules("model")
    made = jax.eval_shape(small().init, jax.random.key(4), example())["params"]
    leaves = jax.tree_util.tree_flatten_with_path(made)[0]
    paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    matched = [rules.first(path) for path in paths]
    assert None not in matched
    assert set(matched) == set(rules.rules)
    assert {path.split("/")[-1] for path in paths} == {"kernel", "bias", "scale"}
