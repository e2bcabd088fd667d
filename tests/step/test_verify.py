"""`verify` passes what is right and names what is wrong."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step import cells, compile, region, verify
from shardlab.step.verify import TOLERANCES, Verification, relative_error, worst

WIDTH = 4
SGD = optax.sgd(0.1)
REPLICATED = Rules((("**", None),))
BATCH = {"x": np.linspace(-1, 1, 8 * WIDTH, dtype=np.float32).reshape(8, WIDTH)}


def init(key: jax.Array) -> Any:
    one, two, three = jax.random.split(key, 3)
    layers = [{"w": jax.random.normal(k, (WIDTH, WIDTH))} for k in (one, two)]
    return {"blocks": layers, "out": jax.random.normal(three, (WIDTH,))}


SMALL = Functions(
    init=init,
    before=lambda params, batch: batch["x"],
    block=lambda layer, x: jnp.tanh(x @ layer["w"]),
    after=lambda params, x: x @ params["out"],
)


def square(y: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return ((y - 1) ** 2).sum(), jnp.float32(len(y))


def verified(rules: Rules, **more: Any) -> Verification:
    sizes = {axis: more.pop(axis, 1) for axis in ("data", "stage", "tensor")}
    mesh = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    plan = make_plan(SMALL, mesh=mesh, rules=rules, optimizer=SGD, batch=BATCH, microbatches=2, **more)
    return verify.verify(SMALL, square, SGD, plan, [BATCH] * 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hybrid_passes(dtype: str) -> None:
    rules = Rules((Rule("blocks/*/w", P(None, "tensor")), Rule("out", P())))
    found = verified(rules, data=2, stage=2, tensor=2, zero=1, dtype=dtype)
    assert found.passed, str(found)
    assert (found.init_identical, found.worst_init, found.steps) == (True, "", 2)
    assert found.tolerances == TOLERANCES[dtype]
    assert found.optimizer == "SGD at 0.1 of gradients cut to norm 1, for rounding's sake"
    assert f"in {dtype}: passed" in str(found)
    if dtype == "bfloat16":
        # It was computed in bfloat16, whose rounding shows.
        assert found.max_rel_err_grad > TOLERANCES["float32"].grad


def missing_psum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(region, "_sum", lambda value, *_: value)


def scaled(patch: pytest.MonkeyPatch) -> None:
    """The sum over microbatches taken for their mean."""
    real = compile.make_gradients

    def wrong(model: Any, plan: Any, *rest: Any) -> Callable[..., Any]:
        inner = real(model, plan, *rest)

        def gradients(*args: Any) -> Any:
            gradient, *others = inner(*args)
            return {name: value * plan.num_microbatches for name, value in gradient.items()}, *others

        return gradients

    patch.setattr(compile, "make_gradients", wrong)


def changed(patch: pytest.MonkeyPatch) -> None:
    """One initial number, by its last bit."""
    real = compile.initial_values

    def wrong(*args: Any, **given: Any) -> Any:
        values = real(*args, **given)
        out = np.asarray(values["out"]).copy()
        out[1] = np.nextafter(out[1], np.float32(9))
        return values | {"out": jax.device_put(out, values["out"].sharding)}

    patch.setattr(compile, "initial_values", wrong)


def leaking(patch: pytest.MonkeyPatch) -> None:
    """What a bubble computes is added to the gradients."""
    real = cells.add
    patch.setattr(cells, "add", lambda total, new, place, keep: real(total, new, place, jnp.bool_(True)))


WRONG: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], str]] = {
    "a missing psum": (
        missing_psum,
        {"data": 2},
        r"gradients +\d\.\de[+-]\d\d  \(at most 1e-05\)  FAIL  (blocks/\d/w|out)",
    ),
    "scaled by microbatches": (
        scaled,
        {"data": 2},
        r"gradients +1\.0e\+00  \(at most 1e-05\)  FAIL  (blocks/\d/w|out)",
    ),
    "a changed initial value": (changed, {"data": 2}, r"initial parameters +FAIL  not identical at out"),
    "a bubble that leaks": (leaking, {"stage": 2}, r"gradients +inf  \(at most 1e-05\)  FAIL  blocks/\d/w"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, mesh, line = WRONG[name]
    break_it(monkeypatch)
    found = verified(REPLICATED, **mesh)
    assert not found.passed
    assert "in float32: FAILED" in str(found)
    assert re.search(line, str(found)), str(found)


@pytest.mark.slow  # what bfloat16 lets through is in test_verify_rounding
@pytest.mark.parametrize("name", ["a missing psum", "scaled by microbatches", "a bubble that leaks"])
def test_in_bfloat16_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, mesh, _ = WRONG[name]
    break_it(monkeypatch)
    found = verified(REPLICATED, dtype="bfloat16", **mesh)
    assert found.max_grad_rounding is not None
    assert found.max_grad_rounding > found.tolerances.rounding
    assert re.search(
        r"  over their rounding +(inf|\d\.\de[+-]\d\d)  \(at most 7e\+00\)  FAIL  (blocks/\d/w|out)", str(found)
    )


def test_an_update_that_is_a_little_short_is_caught_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compile.make_update

    def short(*args: Any) -> Callable[..., Any]:
        update = real(*args)

        def updated(gradient: Any, state: Any, parameters: Any, loss: Any) -> Any:
            new, state = update(gradient, state, parameters, loss)
            return jax.tree.map(lambda old, new: old + 0.99 * (new - old), parameters, new), state

        return updated

    monkeypatch.setattr(compile, "make_update", short)
    found = verified(REPLICATED, dtype="bfloat16", data=2)
    assert found.max_rel_err_params > found.tolerances.params
    assert found.max_grad_rounding is not None
    assert found.max_grad_rounding < 2


def test_no_batches() -> None:
    plan: Any = None
    with pytest.raises(DeclarationError) as error:
        verify.verify(SMALL, square, SGD, plan, [])
    assert str(error.value) == "verify: no batches; pass one global batch for every step to compare"


def test_relative_errors() -> None:
    assert relative_error([1.0, -3.0], [1.0, -4.0]) == 0.25
    assert relative_error([0.0], [0.0]) == 0
    assert relative_error([1e-30], [0.0]) == math.inf
    assert relative_error([math.nan], [1.0]) == relative_error([math.inf], [1.0]) == math.inf
    assert relative_error([0.5], [0.0], least=2.0) == 0.25


def test_the_worst_of_several() -> None:
    expected = {"a": np.array([1.0]), "b": np.array([100.0]), "tiny": np.array([1e-9])}
    assert worst({"a": [1.5], "b": [120.0], "tiny": [1e-9]}, expected) == (0.5, "a")
    # A thousandth of the largest is what something smaller is compared to: 0.02 of 0.1.
    error, path = worst({"a": [1.0], "b": [100.0], "tiny": [0.02]}, expected)
    assert (round(error, 6), path) == (0.2, "tiny")
    assert worst({"a": [1.0], "b": [math.nan], "tiny": [0.0]}, expected) == (math.inf, "b")


def test_what_passes() -> None:
    good = Verification(
        dtype="float64",
        steps=3,
        optimizer="the declared one",
        init_identical=True,
        worst_init="",
        max_rel_err_loss=1e-13,
        max_rel_err_grad=1e-13,
        worst_grad="a",
        max_rel_err_params=1e-9,
        worst_param="b/c",
        max_rel_err_composition=None,
        composition="not compared: so it is",
        tolerances=TOLERANCES["float64"],
    )
    assert good.passed
    assert str(good) == (
        "against the reference step on one device, in float64: passed\n"
        "  parts, against the whole    not compared: so it is\n"
        "  initial parameters          identical\n"
        "  loss                           1.0e-13  (at most 1e-12)  ok    over 3 steps\n"
        "  gradients                      1.0e-13  (at most 1e-12)  ok    a\n"
        "  parameters, 3 steps            1.0e-09  (at most 1e-08)  ok    b/c\n"
        "  (largest error over the largest entry; optimizer: the declared one)"
    )
    bad: list[dict[str, Any]] = [
        {"init_identical": False},
        {"max_rel_err_loss": 2e-12},
        {"max_rel_err_grad": 2e-12},
        {"max_rel_err_params": math.inf},
        {"max_rel_err_composition": 2e-12},
    ]
    for changes in bad:
        assert not dataclasses.replace(good, **changes).passed
