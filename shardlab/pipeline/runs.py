"""Blocks of different kinds in one order of work that every stage can follow.

One program runs on all devices, so all stages go through the same *runs*, one after another: a run repeats a pattern of
kinds, a stage uses as much of each run as it holds of it. Blocks of one kind make one run, dense and expert blocks in
turn one run of a pattern of two, an encoder and a decoder two runs.

    blocks   E E E | E D D | D D        kinds   0 0 0   0 1 1   1 1
    runs     E x 3, D x 2               stage 0 uses E E E - -, stage 1 E - - D D, stage 2 - - - D D
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Slots = tuple[tuple[tuple[int | None, ...], ...], ...]
"""Of a stage: run, repeat, place in the pattern -> a block, or None where the stage holds none."""


@dataclass(frozen=True)
class Run:
    """A pattern of kinds, and how often a stage goes through it at most.

    >>> Run((0, 1), 3).count(1)
    3
    """

    kinds: tuple[int, ...]
    repeats: int

    def count(self, kind: int) -> int:
        """How many blocks of a kind it has room for."""
        return self.kinds.count(kind) * self.repeats


def runs_of(kinds: Sequence[int]) -> tuple[Run, ...]:
    """The blocks of a model as runs: from the first on, each time the pattern that covers most, the shortest of equals.

    >>> runs_of((0, 0, 0, 1, 1)), runs_of((0, 1, 0, 1, 0, 1))
    ((Run(kinds=(0,), repeats=3), Run(kinds=(1,), repeats=2)), (Run(kinds=(0, 1), repeats=3),))
    """
    runs, at = [], 0
    while at < len(kinds):
        best = Run((kinds[at],), 1)
        for width in range(1, (len(kinds) - at) // 2 + 1):
            pattern, repeats = tuple(kinds[at : at + width]), 1
            while tuple(kinds[at + repeats * width : at + (repeats + 1) * width]) == pattern:
                repeats += 1
            if repeats > 1 and width * repeats > len(best.kinds) * best.repeats:
                best = Run(pattern, repeats)
        runs.append(best)
        at += len(best.kinds) * best.repeats
    return tuple(runs)


def stage_runs(kinds: Sequence[int], layers: Sequence[int]) -> tuple[tuple[Run, ...], tuple[Slots, ...]]:
    """The runs that all stages go through, as long as the longest of each, and by stage the block in every slot.

    Args:
        kinds: of each block.
        layers: how many blocks each stage holds, in order.

    >>> runs, slots = stage_runs((0, 0, 0, 1, 1), (2, 2, 1))
    >>> runs
    (Run(kinds=(0,), repeats=2), Run(kinds=(1,), repeats=1))
    >>> slots
    ((((0,), (1,)), ((None,),)), (((2,), (None,)), ((3,),)), (((None,), (None,)), ((4,),)))
    """
    ends = list(accumulate(layers))
    held = [range(end - count, end) for end, count in zip(ends, layers, strict=True)]
    runs, stages, start = [], [list[tuple[tuple[int | None, ...], ...]]() for _ in layers], 0
    for run in runs_of(kinds):
        width = len(run.kinds)
        stop = start + width * run.repeats
        # By stage, the repeats of the run that it has a block of.
        mine = [
            range((max(blocks.start, start) - start) // width, -((start - min(blocks.stop, stop)) // width))
            if max(blocks.start, start) < min(blocks.stop, stop)
            else range(0)
            for blocks in held
        ]
        repeats = max(map(len, mine))
        runs.append(Run(run.kinds, repeats))
        for stage, (blocks, first) in enumerate(zip(held, (one.start for one in mine), strict=True)):
            at = [[start + (first + i) * width + place for place in range(width)] for i in range(repeats)]
            used = len(mine[stage])
            stages[stage].append(
                tuple(
                    tuple(block if i < used and block in blocks else None for block in row) for i, row in enumerate(at)
                )
            )
        start = stop
    return tuple(runs), tuple(map(tuple, stages))
