"""Experts: each token adds up what its own few make, in the parts that the router says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.models.experts import Experts
from shardlab.module.pipeline import Pipeline
from shardlab.testing import assert_matches_reference

CONFIG = DecoderConfig(
    vocab_size=12,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=6,
    num_experts=4,
    qkv_bias=True,
    qk_norm=True,
)


def test_a_token_is_what_its_experts_make_of_it() -> None:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Experts(5, 2, 6, 7, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    made = np.asarray(jax.jit(lambda values, x: nnx.merge(graph, values)(x))(values, x))
    gate, up, down, router = (
        np.asarray(one[...]) for one in (values.gate, values.up, values.down, values.router.kernel)
    )
    chosen = set()
    for place in np.ndindex(2, 3):
        logits = x[place] @ router
        best = np.argsort(logits)[-2:]
        chosen |= set(best.tolist())
        parts = np.exp(logits[best]) / np.exp(logits[best]).sum()
        hidden = [np.asarray(jax.nn.silu(x[place] @ gate[e])) * (x[place] @ up[e]) for e in best]
        expected = sum(part * (one @ down[e]) for part, one, e in zip(parts, hidden, best, strict=True))
        np.testing.assert_allclose(made[place], expected, rtol=1e-4, atol=1e-6)
    assert len(chosen) > 2


def test_the_dtype_of_the_parameters_is_computed_in() -> None:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Experts(4, 2, 8, 6, rngs=nnx.Rngs(0))))
    for dtype in ("bfloat16", "float32"):
        narrow = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)
        x = jax.ShapeDtypeStruct((1, 2, 8), jnp.dtype(dtype))
        made = jax.eval_shape(lambda values, x: nnx.merge(graph, values)(x), narrow, x)
        assert (made.shape, made.dtype.name) == ((1, 2, 8), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, "tensor"])
def test_experts_may_be_spread_over_an_axis_and_so_may_their_width(axis: str | None) -> None:
    batch = {"tokens": np.random.default_rng(0).integers(0, 12, (8, 5)).astype(np.int32)}
    assert_matches_reference(
        CONFIG,
        next_byte_loss,
        optax.adamw(1e-2),
        {**batch, "targets": batch["tokens"]},
        mesh=MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage", target="cpu:8"),
        rules=decoder_rules(None if axis else "tensor", qkv_bias=True, experts=True, experts_axis=axis),
        pipeline=Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        microbatches=2,
    )
