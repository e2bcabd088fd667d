"""A state saved on one plan is the same on any other: every leaf, and the step that follows.

All pairs, those of plans of two processes too, take minutes: pytest -m slow tests/checkpoint/test_canonical.py
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from shardlab.checkpoint import Checkpoints
from shardlab.mesh.faults import DeclarationError
from shardlab.step.reference import ReferenceStep
from shardlab.step.state import users_own
from tests.checkpoint.plans import FEW, PLANS, TWO, Planned, batch, canonical_of, planned
from tests.checkpoint.two_processes import Found
from tests.equivalence.cases import case, compiled, subject_of

ROOT = Path(__file__).parents[2]
# What two processes may take for all pairs of plans that they have a part in.
LONG = 1200


@functools.cache
def ready(this: str) -> Planned:
    return planned(PLANS[this])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every plan saves, each in a directory of its name."""
    return tmp_path_factory.mktemp("saved")


Saved = Callable[[str], tuple[Checkpoints, dict[str, np.ndarray], float]]


@pytest.fixture(scope="module")
def saved(root: Path) -> Saved:
    """What a plan saved after two steps, its arrays, and the loss of its third step."""

    @functools.cache
    def of(this: str) -> tuple[Checkpoints, dict[str, np.ndarray], float]:
        return Checkpoints(root / this), *ready(this).save(root / this)

    return of


@pytest.fixture(scope="module")
def reference() -> float:
    """The loss of the third step of the reference."""
    this = ready("one device")
    step = ReferenceStep(this.step.model, subject_of(this.case).loss, this.step.optimizer, this.step.plan, 0)
    return [float(step(batch(this.case, number))[0]) for number in range(3)][-1]


def goes_on(this: Planned, store: Checkpoints, arrays: dict[str, np.ndarray]) -> float:
    """The loss of the step after what a plan saved, on another one, where it is the same arrays."""
    state = store.load(this.canonical, 2)
    assert int(state.step) == 2
    found = this.arrays(state)
    assert found.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(found[name], arrays[name], err_msg=name)
    # As where the state was made.
    for made, held in zip(jax.tree.leaves(this.step.init(0)), jax.tree.leaves(state), strict=True):
        assert (made.shape, made.dtype, made.sharding) == (held.shape, held.dtype, held.sharding)
    return this.next_loss(state, 2)


# Each of a few saves once and reads once.
ROUND = set(zip(FEW, (*FEW[1:], FEW[0]), strict=True))
PAIRS = [
    pytest.param(a, b, marks=() if (a, b) in ROUND else pytest.mark.slow) for a, b in itertools.product(PLANS, PLANS)
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_every_leaf_and_the_next_loss_are_those_of_the_plan_that_saved(
    saved: Saved, reference: float, a: str, b: str
) -> None:
    store, arrays, loss = saved(a)
    after = goes_on(ready(b), store, arrays)
    assert after == pytest.approx(reference, rel=1e-5)
    assert a != b or after == loss


@pytest.fixture(scope="module")
def two(root: Path, saved: Saved) -> list[Found]:
    """What each of two processes found, once every plan has saved."""
    for this in PLANS:
        arrays = saved(this)[1]
        np.savez(root / this / "arrays.npz", **arrays)  # type: ignore[arg-type]
    subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.two_processes", str(root)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=LONG,
        check=True,
    )
    return [Found(**json.loads((root / f"{number}.json").read_text())) for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), list(itertools.product((*PLANS, *TWO), TWO)))
def test_two_processes_go_on_with_what_any_plan_saved(two: list[Found], reference: float, a: str, b: str) -> None:
    for one in two:
        wrong, count, after = one.read[a][b]
        assert wrong == []
        assert count == len(ready("one device").canonical.leaves)
        assert after == pytest.approx(reference, rel=1e-5)
        assert a != b or after == one.losses[b]


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), list(itertools.product(TWO, PLANS)))
def test_any_plan_goes_on_with_what_two_processes_saved(
    two: list[Found], root: Path, reference: float, a: str, b: str
) -> None:
    with np.load(root / a / "arrays.npz") as arrays:
        after = goes_on(ready(b), Checkpoints(root / a), dict(arrays))
    assert after == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("this", FEW)
def test_canonical_names_are_the_users_own(this: str) -> None:
    """Of the first state: parameters as a run leaves them; Adam's moments as one step of the gradients makes them."""
    step = ready(this).step
    state, _ = step(step.init(0), batch(PLANS[this], 0))
    found = ready(this).arrays(state)
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
    piped = planned(case("mlp-7-layers", optimizer=optimizer, stage=2, data=2, microbatches=2, zero=1))
    alone = planned(case("mlp-7-layers", optimizer=optimizer))
    state, _ = piped.step(piped.step.init(0), batch(piped.case, 0))
    first = piped.arrays(state)
    store = Checkpoints(tmp_path)
    store.save(piped.canonical, state, {})
    store.wait()
    moved = store.load(alone.canonical, 1)
    store.save(alone.canonical, moved, {})
    store.wait()
    again = piped.arrays(store.load(piped.canonical, 1))
    assert again.keys() == first.keys()
    for name in first:
        np.testing.assert_array_equal(again[name], first[name], err_msg=name)


def test_another_model_or_optimizer_is_refused_by_path(saved: Saved) -> None:
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
    saved: Saved, shape: tuple[int, ...], dtype: str, said: str
) -> None:
    store, arrays, _ = saved("one device")
    canonical = canonical_of(ready("one device").step)
    name = next(name for name, array in arrays.items() if array.shape == (10,) and name.startswith("parameters"))
    sharding = canonical.leaves[name].sharding
    canonical.leaves[name] = jax.ShapeDtypeStruct(shape, np.dtype(jax.numpy.dtype(dtype)), sharding=sharding)
    with pytest.raises(DeclarationError, match=f"{name}: {said}"):
        store.load(canonical, 2)
