"""The batches of a run: read whole or this process's share of each, checked, and placed as the step takes them.

The batch of a step is the same however many processes there are. Data whose `train` takes `process_index` and
`process_count` makes the rows that this process's devices hold and no others; of other data every process makes the
whole batch, and hands over those rows.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.processes import count
from shardlab.plan.plan import Plan
from shardlab.run.config import Config
from shardlab.run.resume import Start
from shardlab.step.compile import check_batch
from shardlab.step.placed import placed_rows, rows_here


class Source:
    """What `config.data.train` gives for a plan.

    Attributes:
      data: an iterator over batches, or over this process's shares.
      share: which of how many shares those are, (0, 1) for whole batches.
      left_out: how many batches the run has left out so far.
    """

    def __init__(self, config: Config, plan: Plan, mesh: Mesh) -> None:
        self._plan, self._sharding = plan, NamedSharding(mesh, PartitionSpec(plan.mesh.batch or None))
        self.share, self.left_out = (0, 1), 0
        given = {}
        if count() > 1 and _gives_shares(config.data):
            self.share = rows_here(self._sharding, (config.batch_size,))
            given = dict(zip(("process_index", "process_count"), self.share, strict=True))
        self.data = config.data.train(config.batch_size, seed=config.seed, **given)

    def position(self) -> Any:
        """Where it stands, where the data can say that."""
        return self.data.get_state() if hasattr(self.data, "get_state") else None

    def batches(self, steps: int, start: Start | None = None, skip: int = 0) -> Iterator[Any]:
        """As many batches, from the beginning or from those after `start` and `skip` more; the first is looked at now.

        Raises:
          DeclarationError: the first batch is not as planned, or the position is one in other data; later, there are
            no more batches.
        """
        iterator = iter(self.data)
        if start is not None:
            self.left_out = (start.about or {}).get("left_out", 0) + skip
            iterator = itertools.islice(batches_after(self.data, start), skip, None)
        first = list(itertools.islice(iterator, 1))
        shares = self.share[1]
        planned = [(path, (shape[0] // shares, *shape[1:]), dtype) for path, shape, dtype in self._plan.batch]
        for batch in first:
            check_batch(batch, planned, "make data.abstract_batch say what data.train gives")

        def counted() -> Iterator[Any]:
            number = 0
            for batch in itertools.chain(first, iterator):
                yield self._placed(batch)
                number += 1
            raise DeclarationError(
                f"data: train gives {number} batches, and the run has {steps} steps; make it endless, or give fewer "
                "steps"
            )

        return counted()

    def _placed(self, batch: Any) -> Any:
        if count() == 1:
            return batch  # the step places it
        share, shares = self.share

        def placed(leaf: Any) -> jax.Array:
            rows, *rest = leaf.shape
            return placed_rows(leaf, self._sharding, (rows * shares, *rest), share * rows)

        return jax.tree.map(placed, batch)


def batches_after(data: Any, start: Start) -> Iterator[Any]:
    """The batches that follow those of the steps done.

    Raises:
      DeclarationError: the position that was saved is one in other data, or none.
    """
    if start.about is None:
        return iter(data)
    position = start.about.get("data")
    if position is not None and hasattr(data, "set_state"):
        try:
            data.set_state(position)
        except DeclarationError:
            raise
        except Exception as error:
            raise DeclarationError(
                f"resume: the data cannot go on from the position in the checkpoint ({type(error).__name__}: {error}); "
                "give the data that saved it, or start anew without --resume"
            ) from error
        return iter(data)
    return itertools.islice(iter(data), start.step + start.about.get("left_out", 0), None)


def _gives_shares(data: Any) -> bool:
    return {"process_index", "process_count"} <= set(inspect.signature(data.train).parameters)
