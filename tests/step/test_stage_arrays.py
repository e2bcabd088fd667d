"""What each slot of a stage holds; one tick's garbage stays out of accumulators and buffers."""

from __future__ import annotations

import functools

import optax
import pytest

from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.plan.make import make_plan
from shardlab.step.stage_arrays import StageArrays
from tests.equivalence.cases import features


@pytest.mark.parametrize(
    ("layers", "stages", "blocks", "used"),
    [
        (4, 2, [[0, 1], [2, 3]], [[True, True], [True, True]]),
        (5, 2, [[0, 1, 2], [3, 4, 0]], [[True, True, True], [True, True, False]]),
        (3, 1, [[0, 1, 2]], [[True, True, True]]),
    ],
    ids=["even", "uneven", "one stage"],
)
def test_slots_of_stages(layers: int, stages: int, blocks: list[list[int]], used: list[list[bool]]) -> None:
    model = Functions(
        init=functools.partial(mlp.init, config=mlp.MLPConfig(num_layers=layers)),
        before=mlp.before,
        block=mlp.block,
        after=mlp.after,
    )
    mesh = MeshSpec({"stage": stages}, stage="stage", target=f"cpu:{stages}")
    plan = make_plan(model, mesh=mesh, rules=mlp.mlp_rules(None), optimizer=optax.sgd(0.1), batch=features(8))
    arrays = StageArrays(read_model(model, features(8)), plan)
    assert [run.reshape(stages, -1).tolist() for run in arrays.blocks] == [blocks]
    assert [run.reshape(stages, -1).tolist() for run in arrays.used] == [used]
    names = ("down/bias", "down/kernel", "up/bias", "up/kernel")
    assert arrays.inner == {f"blocks/*/{path}": (0, path) for path in names}
