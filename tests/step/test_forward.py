"""The forward pass alone, on batches of any size that divides, against the model called on one device."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions, path_of
from shardlab.pipeline.schedules import make_schedule
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rules
from shardlab.step.compile import working_copy
from shardlab.step.forward import CompiledForward, _for_batch, compile_forward
from shardlab.step.state import shardings, storage_specs
from tests.equivalence.cases import features

CONFIG = mlp.MLPConfig(num_layers=3, dropout=0.5)
INIT = functools.partial(mlp.init, config=CONFIG)


def apply(params: Any, batch: Any, key: Any, train: bool) -> jax.Array:
    x = mlp.before(params, batch)
    for index, layer in enumerate(params["blocks"]):
        mine = jax.random.fold_in(key, index) if train else None
        x = mlp.block(layer, x, mine, train, config=CONFIG)
    return mlp.after(params, x)


BLOCK = functools.partial(mlp.block, config=CONFIG)
IN_PARTS = Functions(init=INIT, before=mlp.before, block=BLOCK, after=mlp.after)
WHOLE = Functions(init=INIT, apply=apply)


@functools.cache
def parameters() -> Any:
    return jax.jit(INIT)(jax.random.key(0))


def planned(model: Functions, **more: Any) -> Plan:
    sizes = {axis: more.pop(axis, 1) for axis in ("data", "stage", "tensor")}
    spec = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    given = {"rules": mlp.mlp_rules("tensor"), "optimizer": optax.sgd(0.1), "batch": features(16), **more}
    return make_plan(model, mesh=spec, **given)


def stored(plan: Plan, forward: CompiledForward) -> dict[str, Any]:
    """The parameters of seed 0 as the plan stores them."""
    flat = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(parameters())[0]}
    values = {p.path: flat[p.path] for p in plan.parameters}
    for stack in plan.stacks:
        first = next(path for path in stack.members if path)
        parts = [np.zeros_like(flat[first]) if path is None else values.pop(path) for path in stack.members]
        values[stack.name] = np.stack(parts)
    return jax.device_put(values, shardings(forward.mesh, storage_specs(plan)))


CASES: dict[str, tuple[Functions, dict[str, Any]]] = {
    "whole": (WHOLE, {"data": 2, "tensor": 2, "zero": 3, "microbatches": 4}),
    "stages, head over examples": (IN_PARTS, {"data": 2, "stage": 2, "microbatches": 2, "head": "examples"}),
    "stages, last-stage head": (IN_PARTS, {"stage": 2, "tensor": 2, "microbatches": 4, "head": "last_stage"}),
    "a table with delayed sends": (
        IN_PARTS,
        {"stage": 2, "microbatches": 4, "schedule": make_schedule("1f1b", stages=2, microbatches=4, delayed=True)},
    ),
}


@pytest.mark.parametrize(
    ("name", "size"), [("whole", 6), *((name, size) for name in list(CASES)[1:] for size in (16, 6))]
)
def test_y_and_loss_of_any_batch(name: str, size: int) -> None:
    """Dropout is off: the model has it, and y is the same without a key."""
    model, options = CASES[name]
    plan = planned(model, **options)
    batch: Any = features(size)
    expected = jax.jit(lambda params: apply(params, batch, None, False))(parameters())
    forward = compile_forward(model, plan, batch)
    values = stored(plan, forward)
    y = forward(values, {}, batch)
    assert y.shape == (size, 10)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    if size != 16:
        total, weight = compile_forward(model, plan, batch, mlp.label_loss)(values, {}, batch)
        np.testing.assert_allclose(total, mlp.label_loss(expected, batch)[0], rtol=1e-6)
        assert weight == size


def sized(plan: Plan, size: int) -> tuple[int, str, int]:
    shapes = {"features": jax.ShapeDtypeStruct((size, 12), jnp.float32)}
    found = _for_batch(plan, shapes)
    assert found.batch == (("features", (size, 12), "float32"),)
    return found.num_microbatches, found.head, found.microbatch_rows


def test_microbatches_of_another_batch() -> None:
    """As many as divide a shard's examples, at most the plan's; each dealt out over the stages if it divides."""
    plan = planned(IN_PARTS, data=2, stage=2, microbatches=4)
    assert (plan.head, plan.microbatch_rows) == ("examples", 2)
    assert sized(plan, 32) == (4, "examples", 4)
    assert sized(plan, 16) == (4, "examples", 2)
    assert sized(plan, 12) == (3, "examples", 2)  # 6 a shard: 4 do not divide them
    assert sized(plan, 10) == (1, "last_stage", 5)  # 5 a shard, which 2 stages do not divide
    assert sized(plan, 2) == (1, "last_stage", 1)
    automatic = planned(WHOLE, data=2, batch_axes="automatic")
    assert sized(automatic, 6) == (1, "last_stage", 6)


def test_a_size_that_does_not_divide_is_refused() -> None:
    plan = planned(WHOLE, data=4)
    with pytest.raises(DeclarationError) as error:
        compile_forward(WHOLE, plan, features(6))
    assert str(error.value) == "batch: 6 examples do not divide by 4 shards of the batch axes (data); use 8"


@pytest.mark.parametrize("stages", [1, 2])
def test_y_without_examples_is_refused(stages: int) -> None:
    """And taken where a loss is made of it."""
    parts = Functions(
        init=INIT, before=mlp.before, block=BLOCK, after=lambda params, x: {"y": x, "w": params["outputs"]["kernel"]}
    )
    plan = planned(parts, data=2, stage=stages, head="last_stage" if stages > 1 else "auto")
    message = (
        "y w: shape [16, 10] for 8 examples; give every array of y the examples as its leading dim, or pass a loss"
    )
    with pytest.raises(DeclarationError) as error:
        compile_forward(parts, plan, features(16))
    assert str(error.value) == message
    if stages == 1:
        compile_forward(parts, plan, features(16), lambda y, batch: (y["y"].sum(), len(y["y"])))


def test_the_working_copy_is_cast_before_it_is_gathered() -> None:
    plan = planned(WHOLE, data=4, zero=3, dtype="bfloat16", rules=Rules((("**", None),)))
    forward = compile_forward(WHOLE, plan, features(8))
    values = stored(plan, forward)
    assert {values["outputs/kernel"].dtype, values["outputs/kernel"].sharding.spec[0]} == {jnp.dtype("float32"), "data"}
    out = jax.jit(working_copy(plan, forward.mesh))(values)
    assert {value.dtype for value in out.values()} == {jnp.dtype("bfloat16")}
    assert all(value.sharding.is_fully_replicated for value in out.values())
