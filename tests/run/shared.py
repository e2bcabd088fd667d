"""The tiny config with data of which a process can make its own rows alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from shardlab.run.config import Config
from tests.run import tiny


@dataclasses.dataclass(frozen=True)
class Shared(tiny.Points):
    """Points in shares: the batches of `Points`, cut."""

    def train(
        self, batch_size: int, *, seed: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, Any]]:
        rows = batch_size // process_count
        mine = slice(process_index * rows, (process_index + 1) * rows)
        for batch in super().train(batch_size, seed=seed):
            yield {name: array[mine] for name, array in batch.items()}


def config() -> Config:
    return dataclasses.replace(tiny.config(), data=Shared())
