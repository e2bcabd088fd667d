"""Same initial parameters, loss, gradients and parameters after five steps as the reference, for every named case.

In float64, so that a wrong mean or a missing psum cannot hide; unused pipeline buffers are filled with NaN.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from shardlab.pipeline.schedules import SCHEDULES
from shardlab.plan.make import make_plan
from shardlab.step.compile import compile_train_step
from shardlab.step.state import users_own
from shardlab.step.verify import TOLERANCES, relative_error, worst
from tests.equivalence import pipelines
from tests.equivalence.cases import CASES, DAILY, OPTIMIZERS, Case, case, run_of_reference, subject_of

STEPS = 5


@cache
def reference(subject: str, optimizer: str, batch_size: int) -> Any:
    """Initial parameters, losses, first gradients and last parameters of the reference, for many cases."""
    this = case(subject, optimizer=optimizer, batch=batch_size)
    found = subject_of(this)
    batch = found.batch(batch_size)
    plan = make_plan(
        found.model,
        mesh=this.spec,
        rules=found.rules,
        optimizer=OPTIMIZERS[optimizer](),
        batch=batch,
        pipeline=found.pipeline,
        dtype="float64",
    )
    return run_of_reference(found, OPTIMIZERS[optimizer](), plan, batch, STEPS)


def check(this: Case) -> None:
    with jax.enable_x64(True):
        found = subject_of(this)
        batch = found.batch(this.batch_size)
        optimizer = OPTIMIZERS[this.optimizer]()
        plan = make_plan(
            found.model,
            mesh=this.spec,
            rules=found.rules,
            optimizer=optimizer,
            batch=batch,
            pipeline=found.pipeline,
            dtype="float64",
            **this.options,
        )
        initial, losses, gradients, last = reference(this.subject, this.optimizer, this.batch_size)
        step = compile_train_step(found.model, found.loss, optimizer, plan, batch, prove=True)
        state = step.init(0)
        mine = users_own(plan, state.parameters)
        for path, value in initial.items():
            np.testing.assert_array_equal(np.asarray(mine[path]), value, err_msg=path)
        for index, expected in enumerate(losses):
            state, metrics = step(state, batch)
            error = relative_error(metrics["loss"], expected)
            assert error <= TOLERANCES["float64"].loss, f"loss of step {index}: {error:.1e}"
            if index == 0:
                found_gradients = {name: np.asarray(value) for name, value in metrics["gradients"].items()}
                error, path = worst(users_own(plan, found_gradients), gradients)
                assert error <= TOLERANCES["float64"].grad, f"gradient of {path}: {error:.1e}"
        error, path = worst(users_own(plan, {k: np.asarray(v) for k, v in state.parameters.items()}), last)
        assert error <= TOLERANCES["float64"].params, f"{path} after {STEPS} steps: {error:.1e}"


# Repeated on the newest JAX: one of each kind of program.
NEWEST = (
    *("hybrid", "hybrid-uneven-zero-3", "dropout-hybrid", "tied-hybrid", "constraints", "batch-sum-stages", "muon"),
    *("interleaved-hybrid", "split", "zb-h1-hybrid", "zb-v", "vocab", "vocab-zb-v"),
)


def marked(name: str) -> Any:
    marks = [pytest.mark.versions] if name in NEWEST else []
    return pytest.param(name, marks=[*marks, *([] if name in DAILY else [pytest.mark.slow])])


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_equals_the_reference(name: str) -> None:
    check(CASES[name])


TOGETHER = pipelines.cases()


@pytest.mark.parametrize("name", TOGETHER)
def test_every_two_choices_together(name: str) -> None:
    check(TOGETHER[name])


def test_the_default_run_is_short() -> None:
    assert set(DAILY) <= set(CASES)
    assert len(DAILY) + len(TOGETHER) <= 90


def test_every_two_choices_meet() -> None:
    """Said of the features themselves, not of what made the cases."""
    met = {
        pair
        for this in TOGETHER.values()
        for pair in itertools.combinations(
            [
                ("subject", this.subject),
                ("mesh", tuple(this.mesh.items())),
                *((name, this.options[name]) for name in ("zero", "remat", "head", "sends", "microbatches")),
                ("schedule", (this.options["schedule"], this.options["virtual"])),
            ],
            2,
        )
    }
    # Some that a plan refuses: more stages than layers, examples that stages do not share.
    assert (("subject", "linen-dropout"), ("schedule", ("zb_v", 2))) in met
    for one, two in itertools.combinations(("zero", "remat", "head", "sends"), 2):
        for a, b in itertools.product(pipelines.FEATURES[one], pipelines.FEATURES[two]):
            assert ((one, a), (two, b)) in met, f"{one}={a} with {two}={b}"
    for schedule in pipelines.FEATURES["schedule"]:
        for remat in pipelines.FEATURES["remat"]:
            assert (("remat", remat), ("schedule", schedule)) in met, f"{schedule} with remat={remat}"


GRID = [
    (data, stage, tensor, schedule, zero, subject)
    for data, stage, tensor in itertools.product((1, 2, 4), repeat=3)
    if data * stage * tensor <= 8
    for schedule in ("gpipe", "1f1b")
    for zero in (0, 1, 2, 3)
    for subject in ("decoder", "linen-dropout", "mixer", "mlp-5-layers")
    if stage > 1 or schedule == "1f1b"
]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "stage", "tensor", "schedule", "zero", "subject"), GRID)
def test_grid(data: int, stage: int, tensor: int, schedule: str, zero: int, subject: str) -> None:
    check(
        case(
            subject,
            optimizer="adamw-eps" if subject == "mixer" else "adamw",
            data=data,
            stage=stage,
            tensor=tensor,
            schedule=schedule,
            zero=zero,
            microbatches=2,
        )
    )


PIPELINES = [
    (schedule, virtual, stages, microbatches, more, subject, remat, sends)
    for schedule, published in SCHEDULES.items()
    for virtual in ((1, 2, 3) if published.any_virtual else (published.virtual,))
    for stages, microbatches, more in (
        *(
            (2, 1, {}),
            (2, 5, {"data": 2}),
            (2, 7, {}),
            (2, 4, {"data": 2, "tensor": 2, "zero": 1}),
            (3, 4, {}),
            (3, 7, {"data": 2}),
        ),
        *(
            (4, 3, {"data": 2, "zero": 3}),
            (4, 8, {"tensor": 2}),
            (5, 6, {}),
            (6, 7, {}),
            (8, 5, {}),
            (8, 8, {"zero": 1}),
        ),
    )
    for subject, remat, sends in (
        ("mlp-24-layers", "none", "direct"),
        ("decoder-24-layers-dropout", "full", "direct"),
        ("mlp-24-layers", "none", "delayed"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "virtual", "stages", "microbatches", "more", "subject", "remat", "sends"), PIPELINES
)
def test_pipelines(
    schedule: str,
    virtual: int,
    stages: int,
    microbatches: int,
    more: dict[str, Any],
    subject: str,
    remat: str,
    sends: str,
) -> None:
    """Every schedule on 2 to 8 devices; 24 layers divide by some numbers of stages, by 5 and 10 and 16 not."""
    batch = stages * microbatches * more.get("data", 1)
    check(
        case(
            subject,
            batch=batch,
            stage=stages,
            microbatches=microbatches,
            schedule=schedule,
            virtual=virtual,
            remat=remat,
            sends=sends,
            **more,
        )
    )


VOCABULARIES = [
    (schedule, stages, microbatches, more)
    for schedule in SCHEDULES
    for stages, microbatches, more in (
        *((2, 3, {"data": 2, "zero": 1}), (2, 4, {"data": 2, "tensor": 2, "zero": 3}), (3, 3, {"remat": "full"})),
        *((4, 4, {"tensor": 2}), (6, 6, {})),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "stages", "microbatches", "more"), VOCABULARIES)
def test_vocabularies(schedule: str, stages: int, microbatches: int, more: dict[str, Any]) -> None:
    """Every schedule with the vocabulary over the stages; `before` is spread by example, or whole in the second."""
    rows = 1 if stages == 2 and more.get("tensor") else stages
    check(
        case(
            "decoder-vocab-24-layers-dropout",
            batch=rows * microbatches * more.get("data", 1),
            stage=stages,
            microbatches=microbatches,
            schedule=schedule,
            head="vocab",
            **more,
        )
    )
