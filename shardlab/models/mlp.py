"""A residual MLP classifier, twice: as plain functions over a pytree, and as a Flax NNX module.

Shapes: B examples, F features, D model dim, W hidden width, N classes.
A batch is ``{"features": [B, F] floating point, "labels": [B] int32}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.sharding.rules import Rule, Rules

Params = dict[str, Any]


@dataclass(frozen=True)
class MLPConfig:
    """The sizes of an MLP; called with `nnx.Rngs` it makes the NNX module.

    >>> MLPConfig(num_layers=2)(nnx.Rngs(0))({"features": jnp.zeros((5, 12))}).shape
    (5, 10)
    """

    num_features: int = 12
    num_layers: int = 4
    model_dim: int = 16
    hidden_dim: int = 24
    num_classes: int = 10
    dropout: float = 0.0

    def __call__(self, rngs: nnx.Rngs) -> MLP:
        return MLP(self, rngs=rngs)


def init(key: jax.Array, config: MLPConfig = MLPConfig()) -> Params:
    """Parameters: ``inputs`` and ``outputs``, and under ``blocks`` a list of one tree a layer.

    >>> params = init(jax.random.key(0))
    >>> after(params, before(params, {"features": jnp.zeros((5, 12))})).shape
    (5, 10)
    """
    first, last, *keys = jax.random.split(key, 2 + config.num_layers)
    return {
        "inputs": dense(first, config.num_features, config.model_dim),
        "blocks": [
            {
                "up": dense(jax.random.fold_in(key, 0), config.model_dim, config.hidden_dim),
                "down": dense(jax.random.fold_in(key, 1), config.hidden_dim, config.model_dim),
            }
            for key in keys
        ],
        "outputs": dense(last, config.model_dim, config.num_classes),
    }


def dense(key: jax.Array, inputs: int, outputs: int) -> Params:
    """A kernel [inputs, outputs] that keeps the variance of what it multiplies, and a bias."""
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def affine(layer: Params, x: jax.Array) -> jax.Array:
    """``x @ kernel + bias``."""
    return x @ layer["kernel"] + layer["bias"]


def before(params: Params, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
    """The features as x, [B, D], in the dtype of the parameters."""
    features = batch["features"].astype(params["inputs"]["kernel"].dtype)
    return affine(params["inputs"], features)


def block(
    layer: Params,
    x: jax.Array,
    key: jax.Array | None = None,
    train: bool = False,
    *,
    config: MLPConfig = MLPConfig(),
) -> jax.Array:
    """One layer, ``x + down(tanh(up(x)))``; when it trains, with the config's dropout of what it adds."""
    rate = config.dropout
    added = affine(layer["down"], jnp.tanh(affine(layer["up"], x)))
    if train and rate:
        assert key is not None, "dropout draws from a key"
        added = jnp.where(jax.random.bernoulli(key, 1 - rate, added.shape), added / (1 - rate), 0)
    return x + added


def after(
    params: Params, x: jax.Array, batch: Mapping[str, jax.Array] | None = None, key: jax.Array | None = None
) -> jax.Array:
    """The logits, [B, N]."""
    return affine(params["outputs"], x)


class MLP(nnx.Module):
    """``model(batch) -> logits`` [B, N]; in parts, ``embed(batch)``, ``blocks[i](x)``, ``head(x)``."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs) -> None:
        self.inputs = nnx.Linear(config.num_features, config.model_dim, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.outputs = nnx.Linear(config.model_dim, config.num_classes, rngs=rngs)

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def embed(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The features as x, [B, D], in the dtype of the parameters."""
        return self.inputs(batch["features"].astype(self.inputs.kernel.dtype))

    def head(self, x: jax.Array) -> jax.Array:
        """The logits, [B, N]."""
        return self.outputs(x)


class Block(nnx.Module):
    """``block(x) -> x``: one residual layer."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(config.model_dim, config.hidden_dim, rngs=rngs)
        self.down = nnx.Linear(config.hidden_dim, config.model_dim, rngs=rngs)
        self.drop = nnx.Dropout(config.dropout, rngs=rngs if config.dropout else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(self.down(jnp.tanh(self.up(x))))


def label_loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy in nats against ``batch["labels"]`` [B], and the number of examples.

    Computed in float32 or wider.

    >>> total, weight = label_loss(jnp.zeros((2, 10)), {"labels": jnp.array([3, 4])})
    >>> f"{total / weight:.4f} nats over {weight:.0f} examples"
    '2.3026 nats over 2 examples'
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = batch["labels"]
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.where(classes == labels[..., None], logits, 0).sum(axis=-1)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked), jnp.full((), labels.size, logits.dtype)


def mlp_rules(axis: str | None = "tensor") -> Rules:
    """Each layer's hidden width over one mesh axis, for both forms of the model; None replicates all.

    >>> mlp_rules("tensor").rules[0]
    Rule(pattern='blocks/*/up/kernel', spec=P(None, 'tensor'), pad=False)
    """
    return Rules(
        rules=(
            Rule("blocks/*/up/kernel", P(None, axis)),
            Rule("blocks/*/up/bias", P(axis)),
            Rule("blocks/*/down/kernel", P(axis, None)),
            Rule("blocks/*/down/bias", P()),
            Rule("inputs/*", P()),
            Rule("outputs/*", P()),
        )
    )
