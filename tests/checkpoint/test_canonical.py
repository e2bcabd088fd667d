"""A state saved on one plan is the same on any other: every leaf, and the step that follows."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from shardlab.checkpoint import Canonical, Checkpoints
from shardlab.mesh.faults import DeclarationError
from shardlab.step.compile import CompiledStep
from shardlab.step.state import users_own
from tests.checkpoint.plans import FEW, PLANS
from tests.equivalence.cases import Case, case, compiled, subject_of

BATCHES = 3


@functools.cache
def step_of(this: str) -> tuple[CompiledStep, Canonical]:
    step = compiled(PLANS[this])
    return step, canonical_of(step)


def canonical_of(step: CompiledStep) -> Canonical:
    return Canonical(step.model, step.plan, step.optimizer, step.mesh)


def batch(this: Case, number: int) -> Any:
    whole = subject_of(this).batch(this.batch_size * BATCHES)
    return jax.tree.map(lambda leaf: leaf[number * this.batch_size : (number + 1) * this.batch_size], whole)


def names_and_arrays(canonical: Canonical, state: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in canonical.arrays_of(state)[0].items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a plan saved after two steps, its arrays, and the loss of its third step."""

    @functools.cache
    def of(this: str) -> tuple[Checkpoints, dict[str, np.ndarray], float]:
        step, canonical = step_of(this)
        state = step.init(0)
        for number in range(2):
            state, _ = step(state, batch(PLANS[this], number))
        store = Checkpoints(tmp_path_factory.mktemp("run"))
        store.save(canonical, state, {"data": 2})
        store.wait()
        arrays = names_and_arrays(canonical, state)
        return store, arrays, float(step(state, batch(PLANS[this], 2))[1]["loss"])

    return of


PAIRS = [
    pytest.param(a, b, marks=() if a in FEW and b in FEW else pytest.mark.slow)
    for a, b in itertools.product(PLANS, PLANS)
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_every_leaf_and_the_next_loss_are_those_of_the_plan_that_saved(saved: Any, a: str, b: str) -> None:
    store, arrays, loss = saved(a)
    step, canonical = step_of(b)
    state = store.load(canonical, 2)
    assert int(state.step) == 2
    found = names_and_arrays(canonical, state)
    assert found.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(found[name], arrays[name], err_msg=name)
    # What lies in pad slots and padding is zeros, as where the state was made.
    for made, held in zip(jax.tree.leaves(step.init(0)), jax.tree.leaves(state), strict=True):
        assert (made.shape, made.dtype, made.sharding) == (held.shape, held.dtype, held.sharding)
    after = float(step(state, batch(PLANS[b], 2))[1]["loss"])
    assert after == pytest.approx(loss, rel=1e-5)
    assert a != b or after == loss


@pytest.mark.parametrize("this", FEW)
def test_canonical_names_are_the_users_own(this: str) -> None:
    """Of the first state: parameters as a run leaves them; Adam's moments as one step of the gradients makes them."""
    step, canonical = step_of(this)
    state, _ = step(step.init(0), batch(PLANS[this], 0))
    found = names_and_arrays(canonical, state)
    own = users_own(step.plan, {**state.parameters, **state.buffers})
    parameters = {name.partition("/")[2]: array for name, array in found.items() if name.startswith("parameters/")}
    assert parameters.keys() == own.keys()
    for path, array in own.items():
        np.testing.assert_array_equal(parameters[path], array, err_msg=path)
        assert found[f"optimizer/0/mu/{path}"].shape == found[f"optimizer/0/nu/{path}"].shape == array.shape
        # Both moments are of one gradient: mu is 0.1 of it, nu 0.001 of its square.
        np.testing.assert_allclose(
            found[f"optimizer/0/nu/{path}"], found[f"optimizer/0/mu/{path}"] ** 2 / 10, rtol=1e-4, atol=1e-12
        )


OPTIMIZERS = ("adafactor", "muon", "masked", "multi", "multisteps", "block-clipped", "sgd")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizers_state_goes_from_stages_to_one_device_and_back(optimizer: str, tmp_path: Path) -> None:
    piped = compiled(case("mlp-7-layers", optimizer=optimizer, stage=2, data=2, microbatches=2, zero=1))
    alone = compiled(case("mlp-7-layers", optimizer=optimizer))
    state = piped.init(0)
    here, there = canonical_of(piped), canonical_of(alone)
    this = case("mlp-7-layers")
    state, _ = piped(state, batch(this, 0))
    first = names_and_arrays(here, state)
    store = Checkpoints(tmp_path)
    store.save(here, state, {})
    store.wait()
    moved = store.load(there, 1)
    store.save(there, moved, {})
    store.wait()
    again = names_and_arrays(here, store.load(here, 1))
    assert again.keys() == first.keys()
    for name in first:
        np.testing.assert_array_equal(again[name], first[name], err_msg=name)


def test_another_model_or_optimizer_is_refused_by_path(saved: Any) -> None:
    store, *_ = saved("one device")
    fewer = canonical_of(compiled(case("mlp-5-layers")))
    with pytest.raises(
        DeclarationError, match=r"parameters/blocks/5/up/kernel: is in the checkpoint .*not in this model"
    ):
        store.load(fewer, 2)
    other = canonical_of(compiled(case("mlp-7-layers", optimizer="sgd")))
    with pytest.raises(DeclarationError, match="optimizer/0/mu/blocks/0/up/kernel: is in the checkpoint"):
        store.load(other, 2)


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((10,), "bfloat16", r"has dtype bfloat16 here and float32 in the checkpoint"),
        ((20,), "float32", r"has shape \(20,\) here and \(10,\) in the checkpoint"),
    ],
)
def test_another_shape_or_dtype_is_refused_and_never_cast(
    saved: Any, shape: tuple[int, ...], dtype: str, said: str
) -> None:
    store, arrays, _ = saved("one device")
    canonical = canonical_of(step_of("one device")[0])
    name = next(name for name, array in arrays.items() if array.shape == (10,) and name.startswith("parameters"))
    sharding = canonical.leaves[name].sharding
    canonical.leaves[name] = jax.ShapeDtypeStruct(shape, np.dtype(jax.numpy.dtype(dtype)), sharding=sharding)
    with pytest.raises(DeclarationError, match=f"{name}: {said}"):
        store.load(canonical, 2)
