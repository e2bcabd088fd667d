"""Configs of small models to search plans of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardlab.mesh.spec import MeshSpec
from shardlab.models import mixer, mlp
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.module.pipeline import Pipeline
from shardlab.run.config import Config

SHAPE = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Shapes:
    """A data set of which only the shapes are asked."""

    of: Callable[[int], Any]

    def abstract_batch(self, batch_size: int) -> Any:
        return self.of(batch_size)

    def train(self, batch_size: int, *, seed: int = 0) -> Any:
        raise NotImplementedError

    def held_out(self, batch_size: int, num_batches: int) -> Any:
        raise NotImplementedError


def decoder(axes: dict[str, int], target: str = "cpu:8", *, seq: int = 16, model: Any = None, **options: Any) -> Config:
    made = DecoderConfig(num_layers=4, model_dim=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64, vocab_size=64)
    return Config(
        model=model or made,
        loss=next_byte_loss,
        optimizer=optax.adamw(1e-3),
        data=Shapes(lambda n: {name: SHAPE((n, seq), jnp.int32) for name in ("tokens", "targets")}),
        mesh=MeshSpec(axes, batch="data", stage="stage", target=target),
        rules=decoder_rules("tensor"),
        pipeline=Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        **{"batch_size": 16, **options},
    )


def whole_mlp(axes: dict[str, int], target: str, **options: Any) -> Config:
    return Config(
        model=mlp.MLPConfig(num_layers=2, model_dim=16, hidden_dim=32),
        loss=mlp.label_loss,
        optimizer=optax.adamw(1e-3),
        data=Shapes(lambda n: {"features": SHAPE((n, 12), jnp.float32), "labels": SHAPE((n,), jnp.int32)}),
        mesh=MeshSpec(axes, batch="data", stage="stage", target=target),
        rules=mlp.mlp_rules("tensor"),
        pipeline=options.pop("pipeline", Pipeline(before="embed", blocks="blocks", after="head")),
        **{"batch_size": 16, **options},
    )


def image_mixer(axes: dict[str, int], target: str, **options: Any) -> Config:
    return Config(
        model=mixer.Mixer(num_layers=2),
        loss=mlp.label_loss,
        optimizer=optax.adamw(1e-3),
        data=Shapes(lambda n: {"image": SHAPE((n, 12, 12, 3), jnp.float32), "labels": SHAPE((n,), jnp.int32)}),
        mesh=MeshSpec(axes, batch="data", stage="stage", target=target),
        rules=mixer.mixer_rules("tensor"),
        pipeline=Pipeline(before="embed", blocks="blocks", after="head"),
        **{"batch_size": 16, **options},
    )
