"""Layers on stages: the longest as short as can be, against brute force."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.stages import LayerCosts, Stages, assign_layers, stage_layers


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


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(1, 9), min_size=2, max_size=8), data=st.data())
def test_best_of_all_with_ends_and_a_limit(costs: list[int], data: st.DataObject) -> None:
    """What the first and the last stage take beside their layers counts, and no stage holds more than it may."""
    stages = data.draw(st.integers(1, len(costs)))
    before, after = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 12))
    at_most = data.draw(st.integers(-(-len(costs) // stages), len(costs)))

    def badness(assignment: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        spent = times(assignment, costs)
        spent[0] += before
        spent[-1] += after
        return max(spent), sum(t * t for t in spent), tuple(-count for count in assignment)

    allowed = [assignment for assignment in cuts(len(costs), stages) if max(assignment) <= at_most]
    found = assign_layers(len(costs), stages, costs, before=before, after=after, at_most=at_most)
    assert found == min(allowed, key=badness)


LISTS: dict[str, tuple[Stages, tuple[int, ...]]] = {
    "text": ("E t*2 | t*3 | t*3 | t*2 H", (2, 3, 3, 2)),
    "without ends, other spaces": ("t*2|t * 3|t t t|t*2", (2, 3, 3, 2)),
    "words": ("E dense*2 moe | moe*2 | moe*2 | moe*3", (3, 2, 2, 3)),
    "ends alone": ("E | t*5 | t*5 | H", (0, 5, 5, 0)),
    "none": ("t*5 | t*0 | t*0 | t*5", (5, 0, 0, 5)),
    "numbers": ((1, 4, 4, 1), (1, 4, 4, 1)),
    "numbers of NumPy": (np.array([1, 4, 4, 1]), (1, 4, 4, 1)),  # type: ignore[dict-item]
    "numbers as text": ("1, 4,4,1", (1, 4, 4, 1)),
    "nothing": (None, (3, 3, 2, 2)),
    "an empty text": ("", (3, 3, 2, 2)),
    "balanced, nothing known": ("balanced", (3, 3, 2, 2)),
    "costs": (LayerCosts((1,) * 10, before=1, after=1), (2, 3, 3, 2)),
}


@pytest.mark.parametrize("name", LISTS)
def test_stages_as_declared(name: str) -> None:
    stages, expected = LISTS[name]
    assert stage_layers(stages, 10, 4) == expected


def test_costs_of_blocks_that_differ_may_give_a_stage_more_of_them() -> None:
    """Alike, they fill slots that every stage has; of different kinds a stage may hold many that are cheap."""
    costs = LayerCosts((1, 1, 1, 1, 1, 1, 9, 9))
    assert stage_layers(costs, 8, 2, alike=False) == (7, 1)
    assert stage_layers(costs, 8, 2) == (4, 4)


MISLISTED: dict[str, tuple[Stages, str]] = {
    "a stage too few": (
        "t*5 | t*5 | t",
        "stages: 't*5 | t*5 | t' lists 3 stages, and there are 4, virtual stages counted; list 4, or leave them out: "
        "as even as can be",
    ),
    "blocks too many": (
        (3, 3, 3, 3),
        "stages: (3, 3, 3, 3) lists 12 blocks (3 + 3 + 3 + 3), and the model has 10; list 2 fewer",
    ),
    "blocks too few": (
        "t*3 | t*2 | t | t",
        "stages: 't*3 | t*2 | t | t' lists 7 blocks (3 + 2 + 1 + 1), and the model has 10; list 3 more",
    ),
    "fewer than none": ((5, -1, 3, 3), "stages: stage 1 of (5, -1, 3, 3) holds -1 blocks; give 0 or more"),
    "halves": (
        (2.5, 2.5, 2.5, 2.5),  # type: ignore[dict-item]
        "stages: (2.5, 2.5, 2.5, 2.5) is no list of stages; give a text as 'E t*2 | t*2 H', whole numbers as (2, 2), "
        "'balanced', or LayerCosts",
    ),
    "E elsewhere": (
        "t*5 | E t*5",
        "stages: E is what comes before all blocks; put it at the start of the first stage\n"
        "    t*5 | E t*5\n          ^",
    ),
    "H before the end": (
        "t*5 H | t*5",
        "stages: H is what comes after all blocks; put it at the end of the last stage\n    t*5 H | t*5\n        ^",
    ),
    "two of E": ("E*2 t | t", "stages: there is one E; write E alone\n    E*2 t | t\n    ^"),
    "a stage of nothing": (
        "t*5 | | t*5",
        "stages: nothing is said of stage 1; write t*0 if it is to hold no block\n    t*5 | | t*5\n         ^",
    ),
    "no word": (
        "t*5 | T*5",
        "stages: 'T' is no part of a stage; write blocks as t or t*8, any lower-case word for t, E and H for what is "
        "before and after, | between stages\n    t*5 | T*5\n          ^",
    ),
    "no count": (
        "t*5 | t*x",
        "stages: '*' is no part of a stage; write blocks as t or t*8, any lower-case word for t, E and H for what is "
        "before and after, | between stages\n    t*5 | t*x\n           ^",
    ),
}


@pytest.mark.parametrize("name", MISLISTED)
def test_a_list_is_refused_with(name: str) -> None:
    stages, message = MISLISTED[name]
    with pytest.raises(ScheduleError) as error:
        stage_layers(stages, 10, 4)
    assert str(error.value) == message


def test_costs_are_refused_with() -> None:
    with pytest.raises(ScheduleError) as error:
        LayerCosts((1, 1), before=-1)
    assert str(error.value) == "costs: before takes -1; give it a finite cost of at least 0"
    with pytest.raises(ScheduleError) as error:
        assign_layers(9, 2, at_most=4)
    assert str(error.value) == "9 layers on 2 stages: they hold at most 8, 4 each; use more stages"
