"""Which blocks a stage holds: listed, balanced, and told in the plan."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.module.pipeline import Pipeline
from shardlab.pipeline.stages import LayerCosts
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rules
from tests.equivalence import kinds
from tests.equivalence.cases import features

ANYWHERE = Rules((("**", None),))
CONFIG = mlp.MLPConfig(num_layers=10, num_classes=10)


def planned(model: Any = None, rules: Rules | None = None, stage: int = 4, batch: int = 8, **given: Any) -> Plan:
    functions = model or Functions(
        init=functools.partial(mlp.init, config=CONFIG), before=mlp.before, block=mlp.block, after=mlp.after
    )
    return make_plan(
        functions,
        mesh=MeshSpec({"stage": stage}, stage="stage", target=f"cpu:{stage}"),
        rules=rules or mlp.mlp_rules(None),
        optimizer=optax.sgd(0.1),
        batch=features(batch),
        microbatches=2,
        **given,
    )


def heavy() -> Functions:
    """A head of 19 products of [16, 10], to a block's 2 of [16, 24]; before is one of [12, 16]."""

    def after(params: Any, x: jax.Array, batch: Any) -> jax.Array:
        for _ in range(9):
            x = jnp.tanh(x @ params["outputs"]["kernel"] @ params["outputs"]["kernel"].T)
        return mlp.after(params, x)

    return Functions(init=functools.partial(mlp.init, config=CONFIG), before=mlp.before, block=mlp.block, after=after)


def test_balanced_by_estimated_cost() -> None:
    """A head on the last stage counts there; shared by example it counts nowhere."""
    last = planned(heavy(), stages="balanced", head="last_stage")
    shared = planned(heavy(), stages="balanced", head="examples")
    assert last.layers[-1] < 2
    assert (sum(last.layers), max(last.layers)) == (10, 3)
    assert shared.layers == (3, 3, 2, 2)
    assert shared.notes[0] == (
        "stages balanced by estimated cost (before and after are spread over all stages): 3, 3, 2, 2 blocks; slowest "
        "stage 1.20 x the mean"
    )


def test_kinds_are_balanced_each_by_its_own_cost() -> None:
    """More of the cheap ones in a stage than even stages would hold, which blocks of one kind never are."""
    model, _ = kinds.dense_and_experts("dddddeee")
    plan = planned(model, ANYWHERE, stage=2, stages=LayerCosts((1,) * 5 + (3,) * 3))
    assert plan.layers == (6, 2)
    assert planned(stage=2, stages=LayerCosts((1,) * 7 + (3,) * 3)).layers == (5, 5)
    # A block of experts has as many products as a dense one, and its gate's.
    estimated = planned(model, ANYWHERE, stage=2, stages="balanced")
    assert estimated.layers == (4, 4)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another number of stages": (
        {"stages": "t*5 | t*5"},
        "stages: 't*5 | t*5' lists 2 stages, and there are 4, virtual stages counted; list 4, or leave them out: as "
        "even as can be",
    ),
    "beside others": (
        {"stages": (1, 1, 1, 1), "zero": 7},
        "2 faults in the declaration:\n"
        "  1. zero=7: is not one of 0, 1, 2, 3; write one of them\n"
        "  2. stages: (1, 1, 1, 1) lists 4 blocks (1 + 1 + 1 + 1), and the model has 10; list 6 more",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_refused_with(name: str) -> None:
    given, message = FAULTS[name]
    with pytest.raises(DeclarationError) as error:
        planned(**given)
    assert str(error.value) == message


def test_a_word_stands_for_one_kind() -> None:
    model, rules = kinds.dense_and_experts("ddee")[0], ANYWHERE
    assert planned(model, rules, stage=2, stages="E d*2 | e*2 H").layers == (2, 2)
    assert planned(model, rules, stage=2, stages="t*2 | t*2").layers == (2, 2)
    with pytest.raises(DeclarationError) as error:
        planned(model, rules, stage=2, stages="d | d*2 e")
    assert str(error.value) == (
        "stages 'd | d*2 e': d stands for block 0 and for block 2, which are of different kinds; use a word for each "
        "kind, or one for all"
    )


def test_a_fault_comes_before_what_the_model_raises() -> None:
    """The model cannot be traced; what is known to be wrong with the declaration is said all the same."""

    def broken(params: Any, x: jax.Array, batch: Any) -> jax.Array:
        raise RuntimeError("never mind")

    model = Functions(
        init=functools.partial(mlp.init, config=CONFIG),
        before=broken,
        block=mlp.block,
        after=mlp.after,
    )
    with pytest.raises(DeclarationError) as error:
        planned(model, stages=(10,))
    assert str(error.value).startswith("stages: (10,) lists 1 stage, and there are 4")


def test_a_block_that_changes_shapes_is_refused_beside_other_faults() -> None:
    def narrowing(layer: Any, x: jax.Array) -> jax.Array:
        return mlp.block(layer, x)[:, :8]

    model = Functions(
        init=functools.partial(mlp.init, config=CONFIG), before=mlp.before, block=narrowing, after=mlp.after
    )
    with pytest.raises(DeclarationError) as error:
        planned(model, stages=(10,))
    assert "1. stages: (10,) lists 1 stage" in str(error.value)
    assert "2. block: x enters as [4, 16] and leaves as [4, 8]; every block keeps x's shapes" in str(error.value)


# Stages in the plan and its text.


def blocks_of(blocks: int, classes: int = 10) -> Functions:
    config = mlp.MLPConfig(num_layers=blocks, num_classes=classes)
    return Functions(init=lambda key: mlp.init(key, config), before=mlp.before, block=mlp.block, after=mlp.after)


def staged(what: Any, stages: Any, devices: int = 4, **more: Any) -> Plan:
    examples = {"features": np.zeros((16, 12), np.float32), "labels": np.zeros(16, np.int32)}
    given = {"rules": mlp.mlp_rules(None), "optimizer": optax.sgd(0.1), "microbatches": 2, **more}
    mesh = MeshSpec({"stage": devices, "tensor": 1}, stage="stage", target=f"cpu:{devices}")
    return make_plan(what, mesh=mesh, batch=examples, stages=stages, **given)


def line(plan: Plan, start: str) -> str:
    (found,) = [one for one in str(plan).splitlines() if one.startswith(start)]
    return found


@pytest.mark.parametrize("stages", ["E t*3 | t*2 | t*2 | t*3 H", "3,2,2,3", (3, 2, 2, 3), np.array([3, 2, 2, 3])])
def test_listed(stages: Any) -> None:
    """No longer than even ones would be, which is nothing to note."""
    plan = staged(blocks_of(10), stages)
    assert (plan.layers, plan.num_stages, plan.notes) == ((3, 2, 2, 3), 4, ())
    (stack,) = [one for one in plan.stacks if one.name == "blocks/*/up/bias"]
    blocks = (0, 1, 2, 3, 4, None, 5, 6, None, 7, 8, 9)
    assert stack.members == tuple(None if block is None else f"blocks/{block}/up/bias" for block in blocks)
    assert Plan.from_json(plan.to_json()) == plan
    assert staged(blocks_of(10), (2, 3, 3, 2)).diff(plan)[-1] == "layers: (2, 3, 3, 2) -> (3, 2, 2, 3)"


def test_virtual_stages_are_listed_in_the_order_of_a_microbatch() -> None:
    """zb_v: the first and the last of four stages are on the first of two devices."""
    plan = staged(blocks_of(5), "E | t*3 | t*0 | t*2 H", 2, schedule="zb_v")
    assert (plan.layers, plan.virtual, plan.num_stages) == ((0, 3, 0, 2), 2, 4)
    (stack,) = [one for one in plan.stacks if one.name == "blocks/*/up/bias"]
    assert [path and path[7] for path in stack.members] == [
        *(None, None, None, "3", "4", None),
        *("0", "1", "2", None, None, None),
    ]


@pytest.mark.parametrize(
    ("remat", "note"),
    [
        # A block has 6 products of 16 x 24, a third of them forward; the head 3 of 16 x 96, which are 12 of those. What
        # comes before has 2 of 12 x 16, for its input has no gradient: 1 of those.
        ("none", "before as 0.17 blocks, after as 2.00): 3, 3, 3, 1 blocks; slowest stage 1.04 x the mean"),
        # A block's backward runs the first of its products again, 7 in all: 22, 21, 21 and 19.
        ("full", "before as 0.14 blocks, after as 1.71): 3, 3, 3, 1 blocks; slowest stage 1.06 x the mean"),
        ("stage", "before as 0.14 blocks, after as 1.71): 3, 3, 3, 1 blocks; slowest stage 1.06 x the mean"),
    ],
)
def test_balanced_beside_a_head_of_two_blocks(remat: str, note: str) -> None:
    """With 96 classes the head takes as long as two blocks, and its stage holds one."""
    heavy = blocks_of(10, classes=96)
    plan = staged(heavy, "balanced", head="last_stage", remat=remat)
    assert plan.layers == (3, 3, 3, 1)
    assert plan.notes == (f"stages balanced by estimated cost ({note}",)
    assert staged(heavy, None, head="last_stage", remat=remat).layers == (3, 3, 2, 2)
    assert Plan.from_json(plan.to_json()) == plan


def test_balanced_by_given_costs() -> None:
    costs = LayerCosts((4, *(1,) * 9), before=0.65, after=2)
    plan = staged(blocks_of(10), costs, head="last_stage")
    assert plan.layers == (1, 3, 3, 3)
    assert plan.notes == (
        "stages balanced by given cost (before as 0.50 blocks, after as 1.54): 1, 3, 3, 3 blocks; slowest stage 1.28 x "
        "the mean",
    )
    with pytest.raises(DeclarationError, match=r"^costs: 10 for 9 layers; give one cost per layer$"):
        staged(blocks_of(9), costs)


@pytest.mark.parametrize("stages", ["E t*4 H", "t*2 | t*2", (9,), "balanced", LayerCosts((1, 1))])
def test_one_stage_holds_every_block(stages: Any) -> None:
    plan = staged(blocks_of(4), stages, 1)
    assert plan.layers == (4,)
    assert plan.notes == ("stages are ignored: one stage holds every block",)
    assert staged(blocks_of(4), "", 1).notes == staged(blocks_of(4), None, 1).notes == ()


@pytest.mark.parametrize(
    ("stages", "first", "second"),
    [
        # A forward of 1 and a backward of 2, three of each, on each of two devices: 2 of 3 x 3 + 2 x 3 are work.
        ((2, 2), "2 stages of 2 layers each, ", "6 ticks, idle 33.3% in lockstep"),
        # 9 x 2 devices x 3 slots are 54, of which 2 microbatches take 3 x 4 blocks each.
        (
            (1, 3),
            "2 stages of 1, 3 layers, ",
            "6 ticks, idle 55.6% in lockstep: a bubble of 33.3%, and slots of shorter stages",
        ),
        # 9 x 2 x 4 are 72.
        (
            (0, 4),
            "2 stages of 0, 4 layers, ",
            "6 ticks, idle 66.7% in lockstep: a bubble of 33.3%, and slots of shorter stages",
        ),
    ],
)
def test_what_a_plan_prints_of_its_stages(stages: tuple[int, int], first: str, second: str) -> None:
    plan = staged(blocks_of(4), stages, 2)
    assert line(plan, "2 stages") == f"{first}schedule 1f1b, head over examples"
    assert line(plan, "6 ticks") == second


@pytest.mark.parametrize("remat", ["stage", "full | none", ("none", "full")])
def test_a_stage_without_blocks_under_any_remat(remat: Any) -> None:
    """A policy for a stage that holds nothing is of no block: all blocks are of one kind."""
    plan = staged(blocks_of(4), "E | t*4 H", 2, remat=remat)
    assert (plan.layers, set(plan.kinds)) == ((0, 4), {0})
    assert Plan.from_json(plan.to_json()) == plan


# --- blocks of two kinds


def two_widths(stages: Any, *widths: int, **more: Any) -> Plan:
    """Of blocks whose cost is their width."""
    parts = Pipeline(before="embed", blocks="blocks", after="head")
    return staged(kinds.LinenTwoWidths(widths), stages, 2, rules=kinds.LINEN_RULES, pipeline=parts, **more)


def test_balanced_by_what_blocks_of_each_kind_take() -> None:
    """3, 3 | 1, 1, 1, 1: of one kind no stage would hold more than three."""
    plan = two_widths("balanced", 24, 24, 8, 8, 8, 8)
    assert plan.layers == (2, 4)
    assert plan.notes == (
        "stages balanced by estimated cost (before and after are spread over all stages): 2, 4 blocks; slowest stage "
        "1.20 x the mean",
        "blocks are of 2 kinds, the first of each 0, 2; a stage has room for 6 and holds 4 at most",
    )
    assert two_widths(None, 24, 24, 8, 8, 8, 8).layers == (3, 3)
    assert two_widths(LayerCosts((1, 1, 1, 1, 9, 9)), 24, 24, 8, 8, 8, 8).layers == (5, 1)


def test_a_plan_says_of_several_kinds_what_it_knows() -> None:
    """How many slots a tick has depends on where kinds stand; that each stage has as many as the longest is not so."""
    plan = two_widths((1, 5), 24, 24, 8, 8, 8, 8)
    assert plan.notes == ("blocks are of 2 kinds, the first of each 0, 2",)
    assert line(plan, "6 ticks") == "6 ticks, a bubble of 33.3% in lockstep, were all stages to take as long"


@pytest.mark.parametrize(
    "stages",
    [
        *("d*3 | e*3", "d*2 | d e*3", "E d*3 e | e*2 H"),
        # One word stands for any block, and two words may stand for one kind.
        *("t*4 | t*2", "a*2 b | e*3"),
    ],
)
def test_words_that_name_kinds(stages: str) -> None:
    what, rules = kinds.dense_and_experts("dddeee")
    plan = staged(what, stages, 2, rules=rules)
    assert plan.kinds == (0, 0, 0, 1, 1, 1)
    assert sum(plan.layers) == 6


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ("d*2 e | e*3", "e stands for block 2 and for block 3"),
        ("d*4 | e*2", "d stands for block 0 and for block 3"),
        ("E a d*3 | e*2 H", "d stands for block 1 and for block 3"),
    ],
)
def test_a_word_for_two_kinds_beside_another(stages: str, problem: str) -> None:
    what, rules = kinds.dense_and_experts("dddeee")
    with pytest.raises(DeclarationError) as error:
        staged(what, stages, 2, rules=rules)
    assert str(error.value) == (
        f"stages {stages!r}: {problem}, which are of different kinds; use a word for each kind, or one for all"
    )
