"""A config whose model asks for a change of sharding that XLA makes by way of the whole array on every device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.models.mlp import label_loss
from shardlab.run.config import Config
from shardlab.sharding.rules import Rule, Rules
from tests.run import tiny


class Recut(nnx.Module):
    """Features into squares, which are cut by rows and then by columns over one axis more."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.square = nnx.Linear(12, 32 * 32, rngs=rngs)
        self.outputs = nnx.Linear(32 * 32, 10, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        x = self.square(batch["features"]).reshape(-1, 32, 32)
        x = jnp.sin(jax.lax.with_sharding_constraint(x, P(None, "rows", None)))
        x = jnp.cos(jax.lax.with_sharding_constraint(x, P(None, None, ("rows", "columns"))))
        return self.outputs(x.reshape(-1, 32 * 32))


def config() -> Config:
    """On eight devices of three axes."""
    return dataclasses.replace(
        tiny.config(),
        model=Recut,
        pipeline=None,
        loss=label_loss,
        mesh=MeshSpec({"data": 2, "rows": 2, "columns": 2}, batch="data", target="cpu:8"),
        rules=Rules((Rule("**", P()),)),
    )
