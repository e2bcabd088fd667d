"""A config whose run starts from weights that transformers wrote, for the tests of runs and of the command line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import next_byte_loss
from shardlab.run.config import Config
from tests.checkpoint.families import FAMILIES, GOLDEN, tokens


@dataclass(frozen=True)
class Same:
    """The golden tokens and themselves as targets, in every batch."""

    def abstract_batch(self, batch_size: int) -> dict[str, Any]:
        return {name: jax.ShapeDtypeStruct((batch_size, 9), np.int32) for name in ("tokens", "targets")}

    def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
        return itertools.repeat({"tokens": tokens(), "targets": tokens()})

    def held_out(self, batch_size: int, num_batches: int) -> list[dict[str, np.ndarray]]:
        return list(itertools.islice(self.train(batch_size), num_batches))


def config() -> Config:
    family = FAMILIES["llama"]
    return Config(
        model=family.config,
        loss=next_byte_loss,
        optimizer=optax.sgd(0.1),
        data=Same(),
        mesh=MeshSpec({"data": 2, "tensor": 1}, batch="data", target="cpu:2"),
        rules=family.rules,
        batch_size=2,
        steps=1,
        eval_batches=1,
        weights=str(GOLDEN / "llama"),
        names="llama",
    )
