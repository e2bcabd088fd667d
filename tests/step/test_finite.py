"""A step whose loss or gradients are not finite changes nothing, and says of which parameters."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from shardlab.step.compile import compile_train_step
from shardlab.step.finite import not_finite
from tests.equivalence.cases import OPTIMIZERS, Case, case, planned, subject_of

PLANS = {
    "one device": case("mlp-7-layers"),
    "fsdp": case("mlp-7-layers", data=4, zero=3),
    "stages": case("mlp-7-layers", stage=2, data=2, microbatches=2, zero=1),
}


def step_of(this: Case, *, skip: bool) -> Any:
    found = subject_of(this)
    return compile_train_step(
        found.model, found.loss, OPTIMIZERS["adamw"](), planned(this), found.batch(8), skip_nonfinite=skip
    )


@pytest.mark.parametrize("name", list(PLANS))
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(name: str) -> None:
    step, batch = step_of(PLANS[name], skip=True), subject_of(PLANS[name]).batch(8)
    state, metrics = step(step.init(0), batch)
    assert not_finite(metrics["finite"], step.plan) == []
    before = jax.tree.map(np.asarray, state)
    bad = {**batch, "features": np.where(np.arange(12) == 3, np.inf, batch["features"]).astype(np.float32)}
    state, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    after = jax.tree.map(np.asarray, state)
    assert int(after.step) == int(before.step) + 1
    for a, b in zip(jax.tree.leaves(after)[1:], jax.tree.leaves(before)[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    paths = not_finite(metrics["finite"], step.plan)
    assert "blocks/6/up/kernel" in paths
    state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True))


@pytest.mark.parametrize("name", list(PLANS))
def test_where_all_is_finite_it_is_the_step_that_skips_none(name: str) -> None:
    batch = subject_of(PLANS[name]).batch(8)
    found = []
    for skip in (True, False):
        step = step_of(PLANS[name], skip=skip)
        state, metrics = step(step.init(0), batch)
        found.append((jax.tree.map(np.asarray, state), float(metrics["loss"]), float(metrics["grad_norm"])))
    (a, *numbers), (b, *others) = found
    assert numbers == others
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_only_the_layers_that_are_not_finite_are_named() -> None:
    plan = planned(PLANS["stages"])
    (stack, *_) = plan.stacks
    layers: dict[str, Any] = {one.name: [True] * len(one.members) for one in plan.stacks} | {"inputs/kernel": True}
    layers[stack.name][1] = False
    assert not_finite(layers, plan) == [stack.members[1]]
