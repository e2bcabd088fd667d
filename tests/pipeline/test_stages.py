"""Layers on stages: the longest as short as can be, against brute force."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.stages import assign_layers


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [(8, 4, (2, 2, 2, 2)), (10, 4, (3, 3, 2, 2)), (5, 1, (5,)), (3, 3, (1, 1, 1)), (30, 4, (8, 8, 7, 7))],
)
def test_layers_alike(layers: int, stages: int, expected: tuple[int, ...]) -> None:
    assert assign_layers(layers, stages) == expected
    assert assign_layers(layers, stages, costs=[2] * layers) == expected


def cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, layers), stages - 1):
        bounds = (0, *inner, layers)
        yield tuple(b - a for a, b in itertools.pairwise(bounds))


def times(assignment: Sequence[int], costs: Sequence[int]) -> list[int]:
    layers = iter(costs)
    return [sum(itertools.islice(layers, count)) for count in assignment]


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=9), data=st.data())
def test_best_of_all_assignments(costs: list[int], data: st.DataObject) -> None:
    """Least longest stage, then least sum of squares, then more layers on earlier stages."""
    stages = data.draw(st.integers(1, len(costs)))

    def badness(assignment: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        spent = times(assignment, costs)
        return max(spent), sum(t * t for t in spent), tuple(-count for count in assignment)

    assert assign_layers(len(costs), stages, costs) == min(cuts(len(costs), stages), key=badness)


def test_costs_that_are_fractions() -> None:
    assert assign_layers(4, 2, costs=[0.1, 0.1, 0.1, 0.3]) == (3, 1)


def test_as_many_layers_as_a_large_model_has() -> None:
    """126 layers of which one is dear, on 16 stages: the dear one pulls its stage short."""
    assignment = assign_layers(126, 16, costs=[4] + [1] * 125)
    assert sum(assignment) == 126
    assert assignment[0] == 6
    assert max(assignment) == 8


REFUSED = {
    "fewer layers than stages": (
        (3, 4, None),
        "3 layers on 4 stages: a stage holds at least 1 layer; use 3 stages or fewer, or more layers",
    ),
    "one layer": ((1, 2, None), "1 layer on 2 stages: a stage holds at least 1 layer; use 1 stage, or more layers"),
    "no stages": ((3, 0, None), "3 layers on 0 stages; there must be at least 1 stage"),
    "one cost too few": ((3, 2, [1.0, 2.0]), "costs: 2 for 3 layers; give one cost per layer"),
    "a cost of nothing": (
        (3, 2, [1.0, 0.0, 2.0]),
        "costs: layer 1 takes 0.0; give every layer a positive, finite cost",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ScheduleError) as error:
        assign_layers(*arguments)
    assert str(error.value) == message
