"""Models whose blocks are of different kinds: dense and expert layers in turn, an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.sharding.rules import Rule, Rules

CONFIG = mlp.MLPConfig(dropout=0.25)
EXPERTS = 3


def experts(layer: Any, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Every expert on every example, weighed by a softmax; the auxiliary loss is the weights' sum of squares."""
    weights = jax.nn.softmax(x @ layer["gate"])
    hidden = jnp.tanh(jnp.einsum("bd,edh->beh", x, layer["up"]["kernel"]))
    out = jnp.einsum("beh,ehd->bed", hidden, layer["down"]["kernel"])
    return x + (weights[:, :, None] * out).sum(1), (1e-2 * jnp.sum(weights**2), x.shape[0])


def dense(layer: Any, x: jax.Array, key: jax.Array | None, train: bool) -> jax.Array:
    return mlp.block(layer, x, key, train, config=CONFIG)


def dense_and_experts(kinds: str) -> tuple[Functions, Rules]:
    """``d`` a dense layer, ``e`` one of experts, as many and in the order that `kinds` has them."""

    def init(key: jax.Array) -> Any:
        params = mlp.init(key, mlp.MLPConfig(num_layers=len(kinds)))
        for index, kind in enumerate(kinds):
            if kind == "e":
                draw = jax.random.split(jax.random.fold_in(key, index), 3)
                params["blocks"][index] = {
                    "gate": jax.random.normal(draw[0], (16, EXPERTS)),
                    "up": {"kernel": 0.3 * jax.random.normal(draw[1], (EXPERTS, 16, 8))},
                    "down": {"kernel": 0.3 * jax.random.normal(draw[2], (EXPERTS, 8, 16))},
                }
        return params

    model = Functions(
        init=init, before=mlp.before, block=[dense if kind == "d" else experts for kind in kinds], after=mlp.after
    )
    rules = [
        Rule(f"blocks/{index}/{path}/kernel", spec)
        for index, kind in enumerate(kinds)
        if kind == "e"
        for path, spec in (("up", P(None, None, "tensor")), ("down", P(None, "tensor")))
    ]
    return model, Rules((*rules, Rule("blocks/*/gate", P()), *mlp.mlp_rules("tensor").rules))


class EncoderDecoder(nnx.Module):
    """x is a pair; the encoder's blocks change the first, the decoder's the second, which they mix with the first."""

    def __init__(self, encoders: int, decoders: int, *, rngs: nnx.Rngs) -> None:
        self.source = nnx.Linear(12, 16, rngs=rngs)
        self.target = nnx.Linear(12, 8, rngs=rngs)
        blocks = [Encoder(rngs=rngs) for _ in range(encoders)]
        self.blocks = nnx.List([*blocks, *(Decoder(rngs=rngs) for _ in range(decoders))])
        self.outputs = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def embed(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        features = batch["features"].astype(self.source.kernel.dtype)
        return {"source": self.source(features), "target": self.target(features[:, ::-1])}

    def head(self, x: dict[str, jax.Array]) -> jax.Array:
        return self.outputs(x["target"])


class Encoder(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {**x, "source": x["source"] + self.down(jnp.tanh(self.up(x["source"])))}


class Decoder(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(24, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        both = jnp.concatenate([x["source"], x["target"]], axis=-1)
        return {**x, "target": x["target"] + self.drop(self.down(jnp.tanh(self.up(both))))}


ENCODER_DECODER_RULES = Rules((Rule("blocks/*/up/kernel", P(None, "tensor")), Rule("**", P())))


class LinenTwoWidths(nn.Module):
    """Linen blocks of one class and two widths, which makes two kinds of them."""

    widths: tuple[int, ...] = (24, 24, 8, 8, 8)

    def setup(self) -> None:
        self.inputs = nn.Dense(16)
        self.blocks = [LinenBlock(width) for width in self.widths]
        self.outputs = nn.Dense(10)

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def embed(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        return self.inputs(batch["features"])

    def head(self, x: jax.Array) -> jax.Array:
        return self.outputs(x)


class LinenBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.Dense(16, name="down")(jnp.tanh(nn.Dense(self.width, name="up")(x)))


LINEN_RULES = Rules((Rule("blocks_*/up/kernel", P(None, "tensor")), Rule("**", P())))
