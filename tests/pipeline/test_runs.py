"""Runs: every block once and in order, in every stage's slots, of the right kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.pipeline.runs import Run, runs_of, stage_runs


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ("aaaa", (Run((0,), 4),)),
        ("abab", (Run((0, 1), 2),)),
        ("abbbb", (Run((0,), 1), Run((1,), 4))),
        ("aaabb", (Run((0,), 3), Run((1,), 2))),
        ("aabaabaa", (Run((0, 0, 1), 2), Run((0,), 2))),
        ("abc", (Run((0,), 1), Run((1,), 1), Run((2,), 1))),
    ],
)
def test_runs_of(kinds: str, runs: tuple[Run, ...]) -> None:
    assert runs_of([ord(kind) - ord("a") for kind in kinds]) == runs


@given(st.data())
def test_every_block_is_in_one_slot_of_its_stage(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=14))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(kinds) - 1, 1)), max_size=min(5, len(kinds) - 1))))
    ends = [*cuts, len(kinds)]
    layers = [end - start for start, end in zip([0, *cuts], ends, strict=True)]
    runs, stages = stage_runs(kinds, layers)
    assert len(stages) == len(layers)
    for index, slots in enumerate(stages):
        assert [(len(run), {len(row) for row in run}) for run in slots] == [
            (run.repeats, {len(run.kinds)}) for run in runs
        ]
        held = [
            (block, kind)
            for run, repeats in zip(runs, slots, strict=True)
            for row in repeats
            for block, kind in zip(row, run.kinds, strict=True)
            if block is not None
        ]
        start = sum(layers[:index])
        assert held == [(block, kinds[block]) for block in range(start, start + layers[index])]


@given(st.integers(1, 12), st.integers(1, 4))
def test_blocks_of_one_kind_are_one_run_as_long_as_the_longest_stage(count: int, stages: int) -> None:
    layers = [count, *[max(count - 1, 1)] * (stages - 1)]
    assert stage_runs((0,) * sum(layers), layers)[0] == (Run((0,), count),)
