"""Which blocks the stages of a plan hold, and what of them a device goes through: as `make_plan` has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from shardlab.pipeline.runs import stage_runs
from shardlab.pipeline.stages import stage_layers
from shardlab.search.subject import Subject

Counts = tuple[int, ...]
"""Blocks by their kind."""


@dataclass(frozen=True)
class Held:
    """Blocks of the stages.

    Attributes:
      layers: how many each stage holds, in order.
      rooms: the slots that every stage goes through.
      stages: the blocks that each stage has.
    """

    layers: tuple[int, ...]
    rooms: Counts
    stages: tuple[Counts, ...]

    def longest(self, seconds: list[float], *, skips: bool) -> float:
        """What the stage that takes longest takes, of blocks that take so long by kind.

        Args:
          seconds: by kind.
          skips: whether a stage leaves out the slots that it has no block for.
        """
        return max(_times(one, seconds) for one in self._different) if skips else _times(self.rooms, seconds)

    def mean(self, seconds: list[float]) -> float:
        """What the mean stage takes for its own blocks."""
        return _times(self._all, seconds) / len(self.stages)

    @cached_property
    def _different(self) -> frozenset[Counts]:
        return frozenset(self.stages)

    @cached_property
    def _all(self) -> Counts:
        return tuple(map(sum, zip(*self.stages, strict=True)))


def _times(counts: Counts, seconds: list[float]) -> float:
    return sum(count * one for count, one in zip(counts, seconds, strict=True))


def held_blocks(subject: Subject, stages: int, declared: str, remat: str, head: str) -> Held:
    """The blocks of so many stages, virtual ones too; by cost if `declared` is ``"balanced"``.

    What comes before and after the blocks counts only where one stage alone has it.
    """
    kinds = subject.kinds
    if not kinds:
        return Held((), (), ())
    costs = subject.balance(remat) if declared == "balanced" and stages > 1 else None
    if costs is not None and head != "last_stage":
        costs = replace(costs, before=0.0, after=0.0)
    layers = stage_layers(declared if stages > 1 else None, len(kinds), stages, costs, alike=max(kinds) == 0)
    every = range(max(kinds) + 1)
    runs = stage_runs(kinds, layers)[0]
    blocks = [kinds[end - count : end] for end, count in zip(accumulate(layers), layers, strict=True)]
    return Held(
        layers,
        tuple(sum(run.count(kind) for run in runs) for kind in every),
        tuple(tuple(mine.count(kind) for kind in every) for mine in blocks),
    )
