"""Which blocks a stage holds: listed, balanced, and told in the plan."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
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
