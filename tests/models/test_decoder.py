"""The decoder: its parts compose, it is causal, and its parameters decide what it computes in."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardlab.models.decoder import (
    Decoder,
    DecoderConfig,
    causal_attention,
    decoder_rules,
    next_byte_loss,
    rotary_angles,
    rotate,
)

pytestmark = pytest.mark.versions

SMALL = DecoderConfig(vocab_size=11, num_layers=2, model_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=10)


def tokens(seed: int = 0, shape: tuple[int, int] = (3, 7)) -> dict[str, jax.Array]:
    drawn = np.random.default_rng(seed).integers(0, 11, (2, *shape), dtype=np.int32)
    return {"tokens": jnp.asarray(drawn[0]), "targets": jnp.asarray(drawn[1])}


def abstract(config: DecoderConfig) -> Decoder:
    """The decoder with shapes for parameters; nothing is computed."""
    return nnx.eval_shape(lambda: config(nnx.Rngs(0)))


def cast(model: Decoder, dtype: Any) -> Decoder:
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(model, nnx.Param)))
    return model


def paths(model: nnx.Module) -> list[str]:
    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]


@pytest.mark.parametrize("tied", [False, True])
def test_shapes(tied: bool) -> None:
    model, batch = abstract(dataclasses.replace(SMALL, tied=tied)), tokens()
    graph, shapes = nnx.split(model)

    def run(values: Any) -> Any:
        model = nnx.merge(graph, values)
        return model.embed(batch), model.context(batch), model(batch)

    x, c, logits = jax.eval_shape(run, shapes)
    assert x.shape == (3, 7, 12)
    assert [angle.shape for angle in c] == [(1, 7, 3)] * 2
    assert logits.shape == (3, 7, 11)
    assert model.blocks[0].attention.k.kernel.shape == (12, 2 * 6)
    assert hasattr(model, "unembed") != tied


@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_compose_to_the_whole(tied: bool) -> None:
    model = dataclasses.replace(SMALL, tied=tied)(nnx.Rngs(1))
    batch = tokens()
    x, c = model.embed(batch), model.context(batch)
    for block in model.blocks:
        before, x = x, block(x, c)
        assert not np.allclose(before, x)
    np.testing.assert_array_equal(model.head(x, batch), model(batch))


def test_a_later_token_changes_no_earlier_logits() -> None:
    model = SMALL(nnx.Rngs(2))
    batch = tokens()
    changed = batch | {"tokens": batch["tokens"].at[:, 4].add(1) % 11}
    here, there = model(batch), model(changed)
    np.testing.assert_array_equal(here[:, :4], there[:, :4])
    assert not np.allclose(here[:, 4], there[:, 4])
    assert not np.allclose(here[:, 6], there[:, 6])


def test_rotary_scores_depend_on_the_distance_only() -> None:
    with jax.enable_x64(True):
        q, k = np.random.default_rng(3).normal(size=(2, 1, 1, 2, 6))

        def score(i: int, j: int) -> np.ndarray:
            at = [rotary_angles(jnp.full((1, 1), float(position)), 6, 10_000.0) for position in (i, j)]
            return np.einsum("bshk,bshk->h", rotate(jnp.asarray(q), at[0]), rotate(jnp.asarray(k), at[1]))

        np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-12)
        assert np.abs(score(9, 4) - score(9, 5)).min() > 1e-3


def test_grouped_queries_read_their_own_key_value_head() -> None:
    with jax.enable_x64(True):
        q, k, v = map(jnp.asarray, np.random.default_rng(4).normal(size=(3, 2, 5, 4, 6)))
        k, v = k[:, :, :2], v[:, :, :2]
        whole = causal_attention(q, k.repeat(2, axis=2), v.repeat(2, axis=2))
        np.testing.assert_allclose(causal_attention(q, k, v), whole, rtol=1e-12)
        in_two = causal_attention(q[:, :4], k[:, :4], v[:, :4], query_chunk=2)
        np.testing.assert_allclose(in_two, whole[:, :4], rtol=1e-12)
        by_jax = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        np.testing.assert_allclose(whole, by_jax, rtol=1e-4, atol=1e-6)


def test_uniform_logits_cost_log_v_for_every_counted_target() -> None:
    batch = {"targets": jnp.array([[1, 2, -1], [3, 10, 0]])}
    total, weight = next_byte_loss(jnp.full((2, 3, 11), 4.0, jnp.bfloat16), batch)
    assert (float(weight), total.dtype) == (5.0, jnp.float32)
    assert float(total / weight) == pytest.approx(math.log(11), rel=1e-6)


def test_the_loss_is_the_log_probability_of_the_target() -> None:
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(3, 7, 11)))
    batch = tokens()
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)
    np.testing.assert_allclose(next_byte_loss(logits, batch)[0], -picked.sum(), rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_parameters_decide_what_is_computed_in(dtype: str, tied: bool) -> None:
    with jax.enable_x64(dtype == "float64"):
        batch = tokens()

        def run() -> Any:
            model = cast(dataclasses.replace(SMALL, tied=tied)(nnx.Rngs(6)), dtype)
            logits = model(batch)
            return (model.embed(batch), logits), (model.context(batch), next_byte_loss(logits, batch))

        computed, wide = ({leaf.dtype.name for leaf in jax.tree.leaves(part)} for part in jax.eval_shape(run))
        assert computed == {dtype}
        assert wide == {"float64" if dtype == "float64" else "float32"}


def test_float64_is_float64_throughout() -> None:
    with jax.enable_x64(True):
        graph, values = nnx.split(abstract(SMALL))
        wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), values)
        batch = tokens()
        jaxpr = jax.make_jaxpr(lambda values: next_byte_loss(nnx.merge(graph, values)(batch), batch))(wide)
        assert "f64[" in str(jaxpr)
        assert "f32[" not in str(jaxpr)


def test_dropout_draws_when_it_trains_and_only_then() -> None:
    batch = tokens()
    model = dataclasses.replace(SMALL, dropout=0.5)(nnx.Rngs(8))
    assert not np.array_equal(model(batch), model(batch))
    model.eval()
    np.testing.assert_array_equal(model(batch), model(batch))
    assert not jax.tree.leaves(nnx.state(SMALL(nnx.Rngs(8)), nnx.RngState))


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(tied: bool) -> None:
    model = abstract(dataclasses.replace(SMALL, tied=tied))
    rules = decoder_rules("model", tied=tied)
    matched = {path: rules.first(path) for path in paths(model)}
    assert None not in matched.values()
    assert set(matched.values()) == set(rules.rules)
    shapes = {
        path: leaf.shape for path, leaf in zip(paths(model), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True)
    }
    split = {
        path: [shapes[path][dim] for dim, axis in enumerate(rule.spec) if axis]
        for path, rule in matched.items()
        if rule
    }
    assert split["blocks/0/attention/q/kernel"] == split["blocks/0/attention/o/kernel"] == [4 * 6]
    assert split["blocks/1/mlp/up/kernel"] == split["blocks/1/mlp/down/kernel"] == [10]
    assert split["tokens/embedding"] == [12]
    assert split["norm/scale"] == []


def test_no_axis_replicates_everything() -> None:
    assert all(axis is None for rule in decoder_rules(None).rules for axis in rule.spec)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "num_heads=4 is not divisible by num_kv_heads=3; "
            "every key-value head serves the same number of query heads",
        ),
        ({"head_dim": 5}, "head_dim=5 is odd; rotary positions turn pairs, so make it even"),
    ],
)
def test_sizes_that_make_no_decoder(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        DecoderConfig(**sizes)  # type: ignore[arg-type]


def test_it_learns_a_sequence() -> None:
    model = SMALL(nnx.Rngs(10))
    row = jnp.arange(8, dtype=jnp.int32)[None]
    batch = {"tokens": row, "targets": row + 1}
    graph, values = nnx.split(model)

    @jax.jit
    def step(values: Any) -> Any:
        def mean(values: Any) -> jax.Array:
            total, weight = next_byte_loss(nnx.merge(graph, values)(batch), batch)
            return total / weight

        loss, gradient = jax.value_and_grad(mean)(values)
        return loss, jax.tree.map(lambda value, slope: value - 0.3 * slope, values, gradient)

    first, values = step(values)
    for _ in range(60):
        last, values = step(values)
    assert float(first) == pytest.approx(math.log(11), abs=0.1)
    assert float(last) < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_in_chunks_is_the_loss(tied: bool) -> None:
    """And makes no array of tokens x vocabulary."""
    config = dataclasses.replace(SMALL, vocab_size=41, tied=tied)
    batch = tokens(shape=(3, 8))
    batch["targets"] = batch["targets"].at[0, 2].set(-1)
    whole, chunked = config(nnx.Rngs(0)), dataclasses.replace(config, loss_chunk=2)(nnx.Rngs(0))

    def mean(model: Decoder) -> Any:
        total, weight = next_byte_loss(model(batch), batch)
        return total / weight

    expected, found = (nnx.value_and_grad(mean)(model) for model in (whole, chunked))
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    graph, state = nnx.split(chunked)
    traced = str(jax.make_jaxpr(lambda state: jax.grad(lambda state: mean(nnx.merge(graph, state)))(state))(state))
    assert "[2,41]" in traced
    assert "8,41]" not in traced


@pytest.mark.parametrize(("axis", "heads", "whole"), [("tensor", 4 * SMALL.num_layers, 1), (None, 0, 0)])
def test_the_heads_axis_is_said_of_heads_and_of_tokens_in_chunks(axis: str | None, heads: int, whole: int) -> None:
    """Of q, k, v and what attention gives in every layer; and once that no token of a chunk lies in parts."""
    config = dataclasses.replace(SMALL, heads_axis=axis, loss_chunk=7)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        traced = str(jax.make_jaxpr(lambda batch: config(nnx.Rngs(0))(batch))(tokens()))
    assert traced.count("spec=P(UNCONSTRAINED, None, 'tensor', None)") == heads
    assert traced.count("spec=P(UNCONSTRAINED, None, None)") == whole
