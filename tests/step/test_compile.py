"""The compiled step as an object: what it takes, gives, donates and refuses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.compile import CompiledStep, _same_as_declared, compile_train_step
from shardlab.step.state import initial_values

WIDTH = 6
ADAM = optax.adam(0.1)
SPLIT = Rule("w", P(None, "tensor"))
BATCH = {"x": np.linspace(-1, 1, 8 * WIDTH, dtype=np.float32).reshape(8, WIDTH), "y": np.arange(8.0, dtype=np.float32)}


def linear(width: int = WIDTH, *names: str) -> Functions:
    """y = sum over features of tanh(x @ w), and scalars that do nothing."""
    return Functions(
        init=lambda key: {"w": jax.random.normal(key, (width, 4)), **{name: jnp.ones(()) for name in names}},
        apply=lambda params, batch: jnp.tanh(batch["x"] @ params["w"]).sum(-1),
    )


def square(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return ((y - batch["y"]) ** 2).sum(), jnp.float32(len(y))


def planned(model: Any = None, *, optimizer: Any = ADAM, batch: Any = None, **more: Any) -> Plan:
    mesh = MeshSpec({"data": 2, "tensor": 2}, batch="data", target="cpu:4")
    given = {"rules": Rules((SPLIT,)), "zero": 1, **more}
    return make_plan(model or linear(), mesh=mesh, optimizer=optimizer, batch=batch or BATCH, **given)


@functools.cache
def compiled() -> CompiledStep:
    return compile_train_step(linear(), square, ADAM, planned(), BATCH)


def bytes_of(tree: Any) -> int:
    """On one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_the_state_is_donated() -> None:
    step = compiled()
    state = step.init(0)
    placed = jax.device_put(BATCH, step.batch_shardings)
    # Everything but `key`, `step` and such is the memory of the old state, to the byte.
    assert step.compiled.memory_analysis().alias_size_in_bytes == bytes_of(state)
    new, _ = step(state, placed)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, placed)))


def test_a_step_as_in_plain_jax() -> None:
    step = compiled()
    state = step.init(0)
    w = jnp.asarray(np.asarray(state.parameters["w"]))

    def loss(w: jax.Array) -> jax.Array:
        return ((jnp.tanh(BATCH["x"] @ w).sum(-1) - BATCH["y"]) ** 2).mean()

    expected, gradient = jax.value_and_grad(loss)(w)
    new, metrics = step(state, BATCH)
    assert set(metrics) == {"loss", "grad_norm", "weight"}
    assert {(value.shape, value.dtype) for value in metrics.values()} == {((), jnp.dtype("float32"))}
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(gradient), rtol=1e-6)
    assert metrics["weight"] == 8
    updates, _ = ADAM.update(gradient, ADAM.init(w), w)
    np.testing.assert_allclose(new.parameters["w"], w + updates, rtol=1e-5)


def test_steps_are_counted_and_leave_everything_in_its_place() -> None:
    step = compiled()
    state = step.init(3)
    key = np.asarray(state.key)
    for done in range(3):
        assert state.step == done
        state, _ = step(state, BATCH)
    np.testing.assert_array_equal(state.key, key)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(step.state_shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert {shard.data.shape for shard in state.parameters["w"].addressable_shards} == {(6, 2)}
    assert {shard.data.shape for shard in state.optimizer[0].mu["w"].addressable_shards} == {(3, 2)}


def test_parameters_that_are_given_are_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled()

    def nothing(*args: Any, **named: Any) -> dict[str, Any]:
        made = initial_values(*args, **named)
        assert not made  # a model that fits once need not fit twice
        return made

    monkeypatch.setattr("shardlab.step.compile.initial_values", nothing)
    w = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    state = step.init(0, {"w": jnp.asarray(w)})
    np.testing.assert_array_equal(state.parameters["w"], w)
    assert not np.asarray(state.optimizer[0].mu["w"]).any()
    step(state, BATCH)  # they lie as the plan says
    given = {"w": jnp.zeros((6, 4), jnp.bfloat16), "v": jnp.zeros(3)}
    with pytest.raises(DeclarationError) as error:
        step.init(0, given)
    assert "w: the plan stores float32[6, 4], and given is bfloat16[6, 4]; give what was" in str(error.value)
    assert "v: the plan stores no such array, and given is float32[3]" in str(error.value)


def test_the_same_twice() -> None:
    step = compiled()
    first, second = (step(step.init(1), batch) for batch in (BATCH, jax.device_put(BATCH, step.batch_shardings)))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_that_is_not_the_planned_one_is_refused_and_the_state_kept() -> None:
    step = compiled()
    state = step.init(0)
    way_out = "give every batch the shapes that were planned, or make the plan anew"
    for batch, problem in {
        "short": ({**BATCH, "y": BATCH["y"][:7]}, "batch y: the plan has float32[8], the batch float32[7]"),
        "whole": ({**BATCH, "y": np.arange(8)}, "batch y: the plan has float32[8], the batch int32[8]"),
        "none": ({"x": BATCH["x"]}, "batch y: the plan has float32[8], the batch no such array"),
        "more": ({**BATCH, "z": 1.0}, "batch z: the plan has no such array, the batch float32[]"),
        "array": (BATCH["x"], "batch: the plan has no such array, the batch float32[8, 6]"),
    }.values():
        with pytest.raises(DeclarationError) as error:
            step(state, batch)
        assert f"{problem}; {way_out}" in str(error.value)
    step(state, BATCH)


def refused(model: Any = None, plan: Plan | None = None, batch: Any = None, optimizer: Any = ADAM) -> str:
    with pytest.raises(DeclarationError) as error:
        compile_train_step(model or linear(), square, optimizer, plan or planned(), batch or BATCH)
    return str(error.value)


def test_another_batch_is_refused() -> None:
    half = {name: value[:4] for name, value in BATCH.items()}
    assert refused(batch=half) == (
        "2 faults in the declaration:\n"
        "  1. batch x: the plan has (8, 6), the batch (4, 6); make the plan anew\n"
        "  2. batch y: the plan has (8,), the batch (4,); make the plan anew"
    )
    other = {"x": BATCH["x"], "z": BATCH["y"]}
    assert refused(batch=other) == (
        "2 faults in the declaration:\n"
        "  1. batch y: the plan has (8,), the batch None; make the plan anew\n"
        "  2. batch z: the plan has None, the batch (8,); make the plan anew"
    )


def test_another_model_is_refused() -> None:
    assert refused(linear(7)) == "w: the plan has (6, 4), the model (7, 4); make the plan anew"
    assert refused(linear(6, "scale")) == "scale: the plan has no such parameter, the model (); make the plan anew"
    wide = planned(linear(6, "scale"), rules=Rules((SPLIT, ("scale", None))))
    assert refused(plan=wide) == "scale: the plan has (), the model none; make the plan anew"


def test_another_optimizer_is_refused() -> None:
    assert refused(optimizer=optax.lion(0.1)) == (
        "optimizer state 0/nu/w: the plan has float32[6, 4], this optimizer nothing; make the plan anew"
    )
    assert refused(optimizer=optax.sgd(0.1, momentum=0.9)) == (
        "4 faults in the declaration:\n"
        "  1. optimizer state 0/count: the plan has int32[], this optimizer nothing; make the plan anew\n"
        "  2. optimizer state 0/mu/w: the plan has float32[6, 4], this optimizer nothing; make the plan anew\n"
        "  3. optimizer state 0/nu/w: the plan has float32[6, 4], this optimizer nothing; make the plan anew\n"
        "  4. optimizer state 0/trace/w: the plan has nothing, this optimizer float32[6, 4]; make the plan anew"
    )


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What an executable says of its shardings."""

    input_shardings: Any
    output_shardings: Any


def test_a_sharding_that_xla_changed_is_refused() -> None:
    mesh = build_mesh(MeshSpec({"data": 2, "tensor": 2}, batch="data", target="cpu:4"))

    def laid(*entries: Any) -> NamedSharding:
        return NamedSharding(mesh, P(*entries))

    declared = {"w": laid(None, "tensor"), "b": laid()}, {"x": laid("data")}
    # The same pieces in the same places, written otherwise; b is not read by the step.
    same = StandIn((({"w": laid(None, ("tensor",)), "b": None}, {"x": laid("data", None)}), {}), [declared[0], None])
    _same_as_declared(same, declared)

    moved = StandIn((({"w": laid(None, "tensor"), "b": laid()}, {"x": laid()}), {}), [declared[0], None])
    with pytest.raises(DeclarationError) as error:
        _same_as_declared(moved, declared)
    assert str(error.value) == (f"1/x: declared {P('data')}, compiled as {laid()}; report it: XLA changed a sharding")
    lost = StandIn((declared, {}), [{"w": laid(), "b": laid("data")}, None])
    with pytest.raises(DeclarationError) as error:
        _same_as_declared(lost, declared)
    assert str(error.value) == (
        "2 faults in the declaration:\n"
        f"  1. b: declared {P()}, compiled as {laid('data')}; report it: XLA changed a sharding\n"
        f"  2. w: declared {P(None, 'tensor')}, compiled as {laid()}; report it: XLA changed a sharding"
    )


def test_what_a_proof_shows() -> None:
    step = compile_train_step(linear(), square, ADAM, planned(), BATCH, prove=True)
    _, metrics = step(step.init(0), BATCH)
    assert set(metrics) == {"loss", "grad_norm", "weight", "gradients"}
    np.testing.assert_allclose(jnp.linalg.norm(metrics["gradients"]["w"]), metrics["grad_norm"], rtol=1e-6)
    # Gradients lie as the optimizer's state.
    assert metrics["gradients"]["w"].sharding.is_equivalent_to(step.state_shardings.optimizer[0].mu["w"], 2)
