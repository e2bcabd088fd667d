"""A step whose stages have parts of the vocabulary: what it sends and holds, evaluation, and narrow numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardlab
from shardlab.hlo import collectives
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.compile import CompiledStep, compile_train_step
from shardlab.step.forward import _for_batch, compile_forward
from shardlab.step.state import users_own

ADAM = optax.adam(1e-2)
WIDTH, CLASSES = 16, 1022
CONFIG = mlp.MLPConfig(num_classes=CLASSES)
MODEL = Functions(init=functools.partial(mlp.init, config=CONFIG), before=mlp.before, block=mlp.block, after=mlp.after)
SPLIT = (
    Rule("outputs/kernel", P(None, ("stage", "tensor")), pad=True),
    Rule("outputs/bias", P(("stage", "tensor")), pad=True),
)
RULES = Rules((*SPLIT, *mlp.mlp_rules("tensor").rules[:-1]))
KERNEL = 4 * WIDTH * 1024 // 2  # bytes beside tensor=2


def batch_of(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(size, 12)).astype(np.float32)
    return {"features": features, "labels": rng.integers(0, CLASSES, size).astype(np.int32)}


def loss(logits: jax.Array, batch: Any) -> tuple[jax.Array, int]:
    return shardlab.cross_entropy(logits, batch["labels"]).sum(), len(logits)


def planned(**more: Any) -> Plan:
    mesh = MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage", target="cpu:8")
    given: dict[str, Any] = {"rules": RULES, "batch": batch_of(16), "microbatches": 2, "head": "vocab", "zero": 1}
    return make_plan(MODEL, mesh=mesh, optimizer=ADAM, **(given | more))


@functools.cache
def compiled(head: str, schedule: str = "1f1b") -> CompiledStep:
    return compile_train_step(MODEL, loss, ADAM, planned(head=head, schedule=schedule), batch_of(16))


def moved(step: CompiledStep) -> list[tuple[str, int]]:
    """What crosses the stage axis with a good part of the kernel's bytes: kind and bytes."""
    found = collectives(step.compiled.as_text(), step.plan.mesh.sizes, every_branch=True)
    return [(c.kind, c.payload_bytes) for c in found if "stage" in c.axes and c.payload_bytes >= KERNEL // 4]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_the_kernel_never_crosses_the_stages(schedule: str) -> None:
    assert moved(compiled("vocab", schedule)) == []


def test_with_another_head_it_is_gathered_and_its_gradient_summed() -> None:
    """The same spec is storage then."""
    assert {kind for kind, _ in moved(compiled("examples"))} >= {"collective-permute", "reduce-scatter"}


def test_a_stage_holds_its_part_alone() -> None:
    """Of kernel and accumulator each a half less, and of the logits of 4 examples too."""
    whole, parts = (compiled(head).compiled.memory_analysis().temp_size_in_bytes for head in ("examples", "vocab"))
    assert whole - parts >= KERNEL


@pytest.mark.parametrize("size", [16, 6])
def test_y_and_loss_of_any_batch(size: int) -> None:
    plan = planned()
    batch: Any = batch_of(size)
    assert _for_batch(plan, batch).head == "vocab"
    state = compiled("vocab").init(0)
    params = read(plan, state.parameters)
    x = mlp.before(params, batch)
    for layer in params["blocks"]:
        x = mlp.block(layer, x)
    expected = mlp.after(params, x)
    y = compile_forward(MODEL, plan, batch)(state.parameters, {}, batch)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    total, weight = compile_forward(MODEL, plan, batch, loss)(state.parameters, {}, batch)
    np.testing.assert_allclose(total, loss(expected, batch)[0], rtol=1e-6)
    assert weight == size


def read(plan: Plan, stored: Any) -> Any:
    """The model's own tree of stored parameters."""
    own = users_own(plan, {name: np.asarray(value) for name, value in stored.items()})
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(treedef, [own[jax.tree_util.keystr(k, simple=True, separator="/")] for k, _ in leaves])


@pytest.mark.slow
def test_in_bfloat16() -> None:
    """XLA's CPU backend aborts on a sum of bfloat16 over manual axes: y and its cotangent are summed in float32."""
    step = compile_train_step(MODEL, loss, ADAM, planned(dtype="bfloat16"), batch_of(16))
    assert step.verify([batch_of(16)] * 2).passed


def test_on_one_stage_it_is_plain() -> None:
    mesh = MeshSpec({"data": 2, "stage": 1, "tensor": 1}, batch="data", stage="stage", target="cpu:2")
    plan = make_plan(MODEL, mesh=mesh, optimizer=ADAM, rules=RULES, batch=batch_of(16), head="vocab", microbatches=2)
    step = compile_train_step(MODEL, loss, ADAM, plan, batch_of(16))
    assert step.verify([batch_of(16)]).passed
