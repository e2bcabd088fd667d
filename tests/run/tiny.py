"""A config whose run takes a second or two, for the tests of runs and of the command line."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from shardlab.mesh.spec import MeshSpec
from shardlab.models.mlp import MLPConfig, label_loss, mlp_rules
from shardlab.module.pipeline import Pipeline
from shardlab.run.config import Config


@dataclass(frozen=True)
class SGD:
    """Gradient descent; unlike Adam it turns no rounding into a whole step.

    Attributes:
      learning_rate: the same at every step.
    """

    learning_rate: float = 0.1

    def __call__(self) -> optax.GradientTransformation:
        return optax.sgd(self.learning_rate)


@dataclass(frozen=True)
class Points:
    """Random features, labelled by which of the first ten is largest: something that can be learnt.

    Attributes:
      scale: of the features.
    """

    scale: float = 1.0

    def abstract_batch(self, batch_size: int) -> dict[str, Any]:
        return {
            "features": jax.ShapeDtypeStruct((batch_size, 12), np.float32),
            "labels": jax.ShapeDtypeStruct((batch_size,), np.int32),
        }

    def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng((1, seed))
        while True:
            yield self._draw(rng, batch_size)

    def held_out(self, batch_size: int, num_batches: int) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(2)
        return [self._draw(rng, batch_size) for _ in range(num_batches)]

    def _draw(self, rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        features = rng.normal(size=(size, 12)).astype(np.float32)
        labels = features[:, :10].argmax(axis=1).astype(np.int32)
        return {"features": features * np.float32(self.scale), "labels": labels}


def config() -> Config:
    """On eight devices, since that is how many the tests have and the command line asks for the target's."""
    return Config(
        model=MLPConfig(num_layers=2, model_dim=8, hidden_dim=16),
        pipeline=Pipeline(before="embed", blocks="blocks", after="head"),
        loss=label_loss,
        optimizer=SGD(),
        data=Points(),
        mesh=MeshSpec({"data": 8, "stage": 1, "tensor": 1}, batch="data", stage="stage", target="cpu:8"),
        rules=mlp_rules("tensor"),
        batch_size=16,
        steps=4,
        eval_batches=2,
    )


def tiny(sizes: str = "", **changes: Any) -> Config:
    """The config with other fields, on as many of the tests' devices as the sizes of its axes multiply to.

    `sizes` are as on the command line; without any, on one device.
    """
    this = config()
    pairs = dict(part.split("=") for part in sizes.split(",") if part)
    count = int(np.prod([int(size) for size in pairs.values()]))
    mesh = this.mesh.override(sizes or "data=1", target=f"cpu:{count}")
    return dataclasses.replace(this, mesh=mesh, **changes)
