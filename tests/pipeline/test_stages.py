"""Layers on stages: the longest as short as can be, against brute force."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.stages import LayerCosts, Stages, assign_layers, read_stages, stage_layers


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


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    before=st.integers(0, 20),
    after=st.integers(0, 20),
    data=st.data(),
)
def test_best_of_all_assignments(costs: list[int], before: int, after: int, data: st.DataObject) -> None:
    """Least longest stage, then least sum of squares, then more layers on earlier stages."""
    stages = data.draw(st.integers(1, len(costs)))
    at_most = data.draw(st.integers(-(-len(costs) // stages), len(costs)))

    def badness(assignment: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        spent = times(assignment, costs)
        spent[0] += before
        spent[-1] += after
        return max(spent), sum(t * t for t in spent), tuple(-count for count in assignment)

    allowed = [cut for cut in cuts(len(costs), stages) if max(cut) <= at_most]
    found = assign_layers(len(costs), stages, costs, before=before, after=after, at_most=at_most)
    assert found == min(allowed, key=badness)
    if at_most == len(costs):
        assert found == assign_layers(len(costs), stages, costs, before=before, after=after)


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


def test_stages_that_hold_too_few_are_refused() -> None:
    with pytest.raises(ScheduleError) as error:
        assign_layers(7, 2, at_most=3)
    assert str(error.value) == "7 layers on 2 stages: they hold at most 6, 3 each; use more stages"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"before": -1.0}, "costs: before takes -1.0; give it a finite cost of at least 0"),
        ({"after": float("inf")}, "costs: after takes inf; give it a finite cost of at least 0"),
    ],
)
def test_costs_of_what_is_no_layer_are_checked(given: dict[str, float], message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        LayerCosts((1, 1), **given)
    assert str(error.value) == message


# Lists of stages.


@pytest.mark.parametrize(
    ("stages", "layers"),
    [
        ("E t*2 | t*3 | t*3 | t*2 H", (2, 3, 3, 2)),
        ("t*2|t*3|t *3|t* 2", (2, 3, 3, 2)),
        ("E | t*5 | t*5\n| H", (0, 5, 5, 0)),
        ("E dense | dense*2 moe | t*0 | a b c d e f H", (1, 3, 0, 6)),
        ("2, 3,3,2", (2, 3, 3, 2)),
        ([2, 3, 3, 2], (2, 3, 3, 2)),
        (range(1, 5), (1, 2, 3, 4)),
        ("", (3, 3, 2, 2)),
        (None, (3, 3, 2, 2)),
        ("balanced", (3, 3, 2, 2)),
    ],
)
def test_stages_as_declared(stages: Stages, layers: tuple[int, ...]) -> None:
    assert stage_layers(stages, 10, 4) == layers


def test_stages_by_cost() -> None:
    """Before and after pull their stages short, and no stage is longer than the longest of even ones."""
    costs = LayerCosts(blocks=(1,) * 10, before=0.5, after=9)
    assert stage_layers(costs, 10, 4) == stage_layers("balanced", 10, 4, costs) == (3, 3, 3, 1)
    assert costs.of_stages((3, 3, 3, 1)) == (3.5, 3, 3, 10)
    dear = LayerCosts(blocks=(1, 1, 1, 5, 1, 1, 1, 1))
    assert stage_layers(dear, 8, 2) == (4, 4)


WORDS = "write blocks as t or t*8, any lower-case word for t, E and H for what is before and after, | between stages"
NO_LIST = "is no list of stages; give a text as 'E t*2 | t*2 H', whole numbers as (2, 2), 'balanced', or LayerCosts"

# stages of a model of 10 layers on 4: message
UNREADABLE: list[tuple[Any, str]] = [
    (
        "E t*5 | t*5 H",
        "stages: 'E t*5 | t*5 H' lists 2 stages, and there are 4, virtual stages counted; list 4, or leave them out: "
        "as even as can be",
    ),
    (
        (10,),
        "stages: (10,) lists 1 stage, and there are 4, virtual stages counted; list 4, or leave them out: as even as "
        "can be",
    ),
    (
        "t*2 | t*3 | t*3 | t",
        "stages: 't*2 | t*3 | t*3 | t' lists 9 blocks (2 + 3 + 3 + 1), and the model has 10; list 1 more",
    ),
    ((3, 3, 3, 3), "stages: (3, 3, 3, 3) lists 12 blocks (3 + 3 + 3 + 3), and the model has 10; list 2 fewer"),
    (
        "E t*5 | | t*5 | H",
        "stages: nothing is said of stage 1; write t*0 if it is to hold no block\n    E t*5 | | t*5 | H\n           ^",
    ),
    ("t*5 | t*5 ? t", f"stages: '?' is no part of a stage; {WORDS}\n    t*5 | t*5 ? t\n              ^"),
    ("t*5 |  X", f"stages: 'X' is no part of a stage; {WORDS}\n    t*5 | X\n          ^"),
    ("t*5x | t", f"stages: '*' is no part of a stage; {WORDS}\n    t*5x | t\n     ^"),
    (
        "t | E t",
        "stages: E is what comes before all blocks; put it at the start of the first stage\n    t | E t\n        ^",
    ),
    ("t H | t", "stages: H is what comes after all blocks; put it at the end of the last stage\n    t H | t\n      ^"),
    ("E*2 t", "stages: there is one E; write E alone\n    E*2 t\n    ^"),
    ((5, -1, 3, 3), "stages: stage 1 of (5, -1, 3, 3) holds -1 blocks; give 0 or more"),
    ((2.5, 2.5, 2.5, 2.5), f"stages: (2.5, 2.5, 2.5, 2.5) {NO_LIST}"),
    (4, f"stages: 4 {NO_LIST}"),
    ("2,,3", f"stages: '2,,3' {NO_LIST}"),
    (LayerCosts((1,) * 9), "costs: 9 for 10 layers; give one cost per layer"),
]


@pytest.mark.parametrize(("stages", "message"), UNREADABLE, ids=[str(stages) for stages, _ in UNREADABLE])
def test_stages_that_are_refused(stages: Any, message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        stage_layers(stages, 10, 4)
    assert str(error.value) == message


def test_costs_of_blocks_that_differ_may_give_a_stage_more_of_them() -> None:
    """Alike, they fill slots that every stage has; of different kinds a stage may hold many that are cheap."""
    costs = LayerCosts((1, 1, 1, 1, 1, 1, 9, 9))
    assert stage_layers(costs, 8, 2, alike=False) == (7, 1)
    assert stage_layers(costs, 8, 2) == (4, 4)


def test_the_costs_of_stages() -> None:
    """A stage takes its blocks' time; the first what is before them, the last what is after them, one stage both."""
    costs = LayerCosts(blocks=(1, 2, 4), before=10, after=20)
    assert costs.of_stages((1, 2)) == (11, 26)
    assert costs.of_stages((0, 3, 0)) == (10, 7, 20)
    assert costs.of_stages((3,)) == (37,)
    given: dict[str, Any] = {"blocks": np.array([1, 2, 4]), "before": np.float32(10), "after": 20}
    same = LayerCosts(**given)
    assert same == costs
    assert all(type(value) is float for value in same.blocks)


READ: dict[str, Any] = {
    "E t*7 | d m*2 H": ((("E", 1), ("t", 7)), (("d", 1), ("m", 2), ("H", 1))),
    "t": ((("t", 1),),),
    "E|t|H": ((("E", 1),), (("t", 1),), (("H", 1),)),
    " E  t * 2\n|\tt *3|t* 1 H ": ((("E", 1), ("t", 2)), (("t", 3),), (("t", 1), ("H", 1))),
    "t*0 | t*4": ((("t", 0),), (("t", 4),)),
    "e h | h*2 e": ((("e", 1), ("h", 1)), (("h", 2), ("e", 1))),
    "encoder_1*2 | dEcoder*12": ((("encoder_1", 2),), (("dEcoder", 12),)),
    "E H": ((("E", 1), ("H", 1)),),
}


@pytest.mark.parametrize("text", READ)
def test_a_text_is_read(text: str) -> None:
    assert read_stages(text) == READ[text]


def test_balanced_goes_by_the_estimate() -> None:
    heavy = LayerCosts((1,) * 10, after=2)
    assert stage_layers("balanced", 10, 4, heavy) == (3, 3, 3, 1)
    # A list and costs of one's own go before it.
    assert stage_layers((1, 2, 3, 4), 10, 4, heavy) == (1, 2, 3, 4)
    assert stage_layers(LayerCosts((1,) * 10, before=2), 10, 4, heavy) == (1, 3, 3, 3)
    assert stage_layers(None, 10, 4, heavy) == (3, 3, 2, 2)


# Of a declaration of 4 layers on 2 stages: the message, the caret under what is wrong.
IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "a sign that is none": ("E t*2 ; t*2 H", f"';' is no part of a stage; {WORDS}\n    E t*2 ; t*2 H\n          ^"),
    "a count first": ("2*t | t*2", f"'2' is no part of a stage; {WORDS}\n    2*t | t*2\n    ^"),
    "a star without a count": ("t*2 | t*", f"'*' is no part of a stage; {WORDS}\n    t*2 | t*\n           ^"),
    "a count below nothing": ("t*-1 | t*5", f"'*' is no part of a stage; {WORDS}\n    t*-1 | t*5\n     ^"),
    "a count that runs on": ("t*2x | t*2", f"'*' is no part of a stage; {WORDS}\n    t*2x | t*2\n     ^"),
    "a fraction": ("t*1.5 | t*2", f"'.' is no part of a stage; {WORDS}\n    t*1.5 | t*2\n       ^"),
    "an upper-case word": ("T*2 | t*2", f"'T' is no part of a stage; {WORDS}\n    T*2 | t*2\n    ^"),
    "E and H in one word": ("t*2 | t*2 EH", f"'EH' is no part of a stage; {WORDS}\n    t*2 | t*2 EH\n              ^"),
    "spaces, which are made one": (
        "E   t*2 |\n  t*2  X",
        f"'X' is no part of a stage; {WORDS}\n    E t*2 | t*2 X\n                ^",
    ),
    "two E": ("E*2 t*2 | t*2", "there is one E; write E alone\n    E*2 t*2 | t*2\n    ^"),
    "two H": ("t*2 | t*2 H * 2", "there is one H; write H alone\n    t*2 | t*2 H * 2\n              ^"),
    "E twice": (
        "E E t*2 | t*2",
        "E is what comes before all blocks; put it at the start of the first stage\n    E E t*2 | t*2\n      ^",
    ),
    "E on the second stage": (
        "t*2 | E t*2",
        "E is what comes before all blocks; put it at the start of the first stage\n    t*2 | E t*2\n          ^",
    ),
    "H before a block": (
        "t*2 | H t*2",
        "H is what comes after all blocks; put it at the end of the last stage\n    t*2 | H t*2\n          ^",
    ),
    "H on the first stage": (
        "t*2 H | t*2",
        "H is what comes after all blocks; put it at the end of the last stage\n    t*2 H | t*2\n        ^",
    ),
    "an empty stage": (
        "t*2 || t*2",
        "nothing is said of stage 1; write t*0 if it is to hold no block\n    t*2 || t*2\n         ^",
    ),
    "an empty first stage": (
        "| t*4",
        "nothing is said of stage 0; write t*0 if it is to hold no block\n    | t*4\n    ^",
    ),
    "an empty last stage": (
        "t*4 |",
        "nothing is said of stage 1; write t*0 if it is to hold no block\n    t*4 |\n         ^",
    ),
    "too few stages": (
        "E t*4 H",
        "'E t*4 H' lists 1 stage, and there are 2, virtual stages counted; list 2, or leave them out: as even as can "
        "be",
    ),
    "too many stages": (
        (2, 1, 1),
        "(2, 1, 1) lists 3 stages, and there are 2, virtual stages counted; list 2, or leave them out: as even as can "
        "be",
    ),
    "no stages": (
        (),
        "() lists 0 stages, and there are 2, virtual stages counted; list 2, or leave them out: as even as can be",
    ),
    "too few blocks": (
        "E t*2 | t H",
        "'E t*2 | t H' lists 3 blocks (2 + 1), and the model has 4; list 1 more",
    ),
    "too few blocks by far": ((0, 1), "(0, 1) lists 1 block (0 + 1), and the model has 4; list 3 more"),
    "too many blocks": ("4,2", "'4,2' lists 6 blocks (4 + 2), and the model has 4; list 2 fewer"),
    "a stage of less than nothing": ((-1, 5), "stage 0 of (-1, 5) holds -1 blocks; give 0 or more"),
    **{
        f"no list: {stages!r}": (
            stages,
            f"{stages!r} is no list of stages; give a text as 'E t*2 | t*2 H', whole numbers as (2, 2), 'balanced', or "
            "LayerCosts",
        )
        for stages in (4, (2.0, 2.0), ("2", "2"), "2,,2", "2 2", "2,2,", " ")
    },
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_declaration_that_cannot_be(case: str) -> None:
    stages, message = IMPOSSIBLE[case]
    with pytest.raises(ScheduleError) as error:
        stage_layers(stages, 4, 2)
    assert str(error.value) == f"stages: {message}"


def test_one_stage_is_no_plural() -> None:
    with pytest.raises(ScheduleError) as error:
        stage_layers("t*2 | t*2", 4, 1)
    assert str(error.value) == (
        "stages: 't*2 | t*2' lists 2 stages, and there is 1, virtual stages counted; list 1, or leave them out: as "
        "even as can be"
    )
