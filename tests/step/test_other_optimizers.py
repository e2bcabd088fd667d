"""Optimizers whose stacked update would go wrong late, or that need more than gradients; parameters of every dtype."""

from __future__ import annotations

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
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rules
from shardlab.step.compile import compile_train_step
from shardlab.step.verify import verify

MODEL = Functions(init=mlp.init, before=mlp.before, block=mlp.block, after=mlp.after)
MESH = MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4")
RNG = np.random.default_rng(0)
BATCH = {
    "features": RNG.normal(size=(8, 12)).astype(np.float32),
    "labels": RNG.integers(0, 10, 8).astype(np.int32),
}
WARM = optax.linear_schedule(0.0, 0.1, 10)


def planned(optimizer: optax.GradientTransformation, **more: Any) -> Plan:
    return make_plan(MODEL, mesh=MESH, rules=mlp.mlp_rules(None), optimizer=optimizer, batch=BATCH, **more)


def of_layer_0(tree: Any) -> Any:
    def label(keys: Any, _: Any) -> str:
        return "frozen" if path_of(keys).startswith("blocks/0/") else "trained"

    return jax.tree_util.tree_map_with_path(label, tree)


# name: (optimizer, steps, the tree it runs on)
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, int, str]] = {
    "a frozen layer, warmed up": (
        optax.multi_transform({"trained": optax.adam(WARM, eps=1e-4), "frozen": optax.set_to_zero()}, of_layer_0),
        5,
        "per-layer",
    ),
    "muon every third step": (
        optax.MultiSteps(optax.contrib.muon(1e-2), 3).gradient_transformation(),
        4,
        "per-layer",
    ),
    "noise": (optax.chain(optax.add_noise(0.1, 0.55, 0), optax.sgd(0.1)), 3, "per-layer"),
    "MultiSteps as it is": (optax.MultiSteps(optax.sgd(0.1), 2), 3, "stacked"),
    "less on a plateau": (
        optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5)),
        5,
        "stacked",
    ),
    "polyak_sgd": (optax.polyak_sgd(), 3, "stacked"),
    "sam, which takes no argument by name": (
        optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))),
        4,
        "stacked",
    ),
}


# 10 to 16 s each.
LONG = ("noise", "muon every third step", "polyak_sgd")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in OPTIMIZERS]
)
def test_equals_the_reference(name: str) -> None:
    optimizer, steps, update = OPTIMIZERS[name]
    with jax.enable_x64(True):
        plan = planned(optimizer, microbatches=2, dtype="float64")
        assert plan.update == update
        found = verify(MODEL, mlp.label_loss, optimizer, plan, [BATCH] * steps)
    assert found.passed, str(found)


def test_another_optimizer_than_the_plans_is_refused() -> None:
    plan = planned(optax.adam(0.1))
    with pytest.raises(DeclarationError) as error:
        compile_train_step(MODEL, mlp.label_loss, optax.contrib.muon(0.1), plan, BATCH)
    assert str(error.value) == (
        "optimizer: the plan's runs on stacked layers, and this one may not: on stacked layers its state of "
        "blocks/*/down/kernel is not that of each layer; make the plan anew with this optimizer"
    )


def test_another_learning_rate_is_no_other_optimizer() -> None:
    compile_train_step(MODEL, mlp.label_loss, optax.adam(0.3), planned(optax.adam(0.1)), BATCH)


def test_parameters_declared_narrow_are_flaxs_own_cast_up() -> None:
    def init(key: jax.Array) -> Any:
        return {"w": jax.random.normal(key, (12, 10), jnp.bfloat16)}

    model = Functions(init=init, apply=lambda params, batch: batch["features"] @ params["w"])
    mesh = MeshSpec({"data": 2}, batch="data", target="cpu:2")
    optimizer = optax.adam(0.1)
    plan = make_plan(model, mesh=mesh, rules=Rules((("**", None),)), optimizer=optimizer, batch=BATCH)
    step = compile_train_step(model, mlp.label_loss, optimizer, plan, BATCH)
    state = step.init(3)
    own = init(jax.random.key(3))["w"]
    assert state.parameters["w"].dtype == state.optimizer[0].mu["w"].dtype == np.float32
    np.testing.assert_array_equal(np.asarray(state.parameters["w"]), np.asarray(own.astype(np.float32)))
    assert step.verify([BATCH] * 2).passed


def wave(key: jax.Array) -> Any:
    def numbers(index: int, *shape: int) -> jax.Array:
        real, imaginary = (jax.random.normal(jax.random.fold_in(key, index + n), shape) for n in (0, 1))
        return jax.lax.complex(real, imaginary) / 3

    blocks = [{"w": numbers(2 * index, 6, 6)} for index in range(3)]
    return {"into": numbers(10, 12, 6), "blocks": blocks, "out": jax.random.normal(key, (6, 10))}


def wave_block(layer: Any, x: jax.Array) -> jax.Array:
    h = x @ layer["w"]
    return x + h / (1 + jnp.abs(h))


def wave_whole(params: Any, batch: Any) -> jax.Array:
    x = batch["features"] @ params["into"]
    for layer in params["blocks"]:
        x = wave_block(layer, x)
    return jnp.abs(x) @ params["out"]


WAVE = Functions(
    init=wave,
    apply=wave_whole,
    before=lambda params, batch: batch["features"] @ params["into"],
    block=wave_block,
    after=lambda params, x: jnp.abs(x) @ params["out"],
)


@pytest.mark.parametrize(
    "dtype", ["float64", *(pytest.param(one, marks=pytest.mark.slow) for one in ("float32", "bfloat16"))]
)
@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ({"data": 2, "stage": 2, "tensor": 2}, {"microbatches": 2, "zero": 3}),
        ({"data": 2}, {"microbatches": 2, "zero": 1}),
    ],
    ids=["stages", "data"],
)
def test_complex_numbers_keep_both_parts(sizes: dict[str, int], more: Any, dtype: str) -> None:
    whole = {"data": 1, "stage": 1, "tensor": 1} | sizes
    mesh = MeshSpec(whole, batch="data", stage="stage", target=f"cpu:{np.prod(list(whole.values()))}")
    rules = Rules((("blocks/*/w", jax.sharding.PartitionSpec(None, "tensor")), ("**", None)))
    optimizer = optax.adam(1e-2, eps=1e-4)
    with jax.enable_x64(dtype == "float64"):
        plan = make_plan(WAVE, mesh=mesh, rules=rules, optimizer=optimizer, batch=BATCH, dtype=dtype, **more)
        step = compile_train_step(WAVE, mlp.label_loss, optimizer, plan, BATCH)
        found = step.verify([BATCH] * 2)
        _, metrics = step(step.init(0), BATCH)
        y = wave_whole(wave(jax.random.key(0)), BATCH)
        total, weight = mlp.label_loss(y, jax.tree.map(jnp.asarray, BATCH))
    assert found.passed, str(found)
    # Not only against the reference step: against the user's own functions, called in plain JAX.
    tolerance = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 1e-2}[dtype]
    assert float(metrics["loss"]) == pytest.approx(float(total / weight), rel=tolerance)
