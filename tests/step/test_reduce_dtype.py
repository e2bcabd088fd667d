"""Gradients summed over the batch axes in bfloat16: each shard's part is rounded, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optax
import pytest

from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.step.compile import compile_train_step
from shardlab.step.verify import TOLERANCES, verify
from tests.equivalence.cases import features

MODEL = Functions(init=mlp.init, before=mlp.before, block=mlp.block, after=mlp.after)
SGD = optax.sgd(0.1)


def planned(reduce_dtype: str, **sizes: int) -> Any:
    axes = {"data": 1, "stage": 1, "tensor": 1} | sizes
    mesh = MeshSpec(axes, batch="data", stage="stage", target=f"cpu:{math.prod(axes.values())}")
    return make_plan(
        MODEL,
        mesh=mesh,
        rules=mlp.mlp_rules("tensor"),
        optimizer=SGD,
        batch=features(16),
        reduce_dtype=reduce_dtype,
        microbatches=2,
    )


def gradients(reduce_dtype: str, **sizes: int) -> dict[str, np.ndarray]:
    step = compile_train_step(MODEL, mlp.label_loss, SGD, planned(reduce_dtype, **sizes), features(16), prove=True)
    _, metrics = step(step.init(0), features(16))
    return {path: np.asarray(value) for path, value in metrics["gradients"].items()}


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 2, "stage": 2, "tensor": 2}], ids=["data", "hybrid"])
def test_each_shard_is_rounded_once(sizes: dict[str, int]) -> None:
    exact, rounded = gradients("auto", **sizes), gradients("bfloat16", **sizes)
    errors = {path: np.max(np.abs(rounded[path] - exact[path])) / np.max(np.abs(exact[path])) for path in exact}
    assert all(value.dtype == np.float32 for value in rounded.values())
    # Half a unit in the eighth bit of each of two parts, which may be larger than their sum.
    assert 2**-13 < max(errors.values()) < 2**-6


def test_verify_allows_what_the_rounding_costs() -> None:
    plan = planned("bfloat16", data=2)
    found = verify(MODEL, mlp.label_loss, SGD, plan, [features(16)])
    assert found.tolerances == TOLERANCES["bfloat16"]
    assert found.passed
    assert found.max_rel_err_grad > TOLERANCES["float32"].grad
