"""The tiny config with data that one process is slow to read, or never reads; the environment says which and when.

UNEVEN=1:3:sleep 0.2    process 1 sleeps so long before every batch from the third on
UNEVEN=1:0:sleep 1000   ... while the step is traced
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardlab.mesh import processes
from shardlab.models.mlp import label_loss
from shardlab.run.config import Config
from tests.run import tiny


@dataclass(frozen=True)
class Uneven(tiny.Points):
    """Points that some process waits for, or cannot read."""

    def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, Any]]:
        which, first, what = os.environ["UNEVEN"].split(":")
        for number, batch in enumerate(super().train(batch_size, seed=seed), start=1):
            if processes.index() == int(which) and number >= int(first) > 0:
                verb, _, seconds = what.partition(" ")
                if verb == "fail":
                    raise OSError("the disk is gone")
                time.sleep(float(seconds))
            yield batch


def loss(logits: Any, batch: Any) -> Any:
    """The tiny config's, traced slowly."""
    which, first, what = os.environ["UNEVEN"].split(":")
    if processes.index() == int(which) and first == "0":
        time.sleep(float(what.partition(" ")[2]))
    return label_loss(logits, batch)


def config() -> Config:
    return dataclasses.replace(tiny.config(), data=Uneven(), loss=loss)
