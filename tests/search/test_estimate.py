"""The estimate's parts against the plan that `make_plan` makes, and the program of its schedule."""

from __future__ import annotations

from typing import Any

import pytest

from shardlab.pipeline.buffers import program
from shardlab.pipeline.schedules import SCHEDULES, make_schedule
from shardlab.plan.communication import gradient_wire_bytes, weight_wire_bytes
from shardlab.search.choice import choice_of
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.subject import Subject
from shardlab.search.ticks import ticks
from tests.search.subjects import decoder

PLANS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "data": ({"data": 8, "stage": 1, "tensor": 1}, {"zero": 0}),
    "zero 1": ({"data": 8, "stage": 1, "tensor": 1}, {"zero": 1, "microbatches": 2}),
    "fsdp": ({"data": 4, "stage": 1, "tensor": 2}, {"zero": 3}),
    "by layer": ({"data": 4, "stage": 1, "tensor": 2}, {"zero": 3, "gather": "layer", "accumulate": "sharded"}),
    "bfloat16": ({"data": 4, "stage": 1, "tensor": 2}, {"zero": 1, "dtype": "bfloat16", "reduce_dtype": "bfloat16"}),
    "stages": ({"data": 2, "stage": 4, "tensor": 1}, {"zero": 1, "microbatches": 4}),
    "interleaved": (
        {"data": 2, "stage": 2, "tensor": 2},
        {"zero": 3, "gather": "layer", "microbatches": 4, "schedule": "interleaved_1f1b", "accumulate": "sharded"},
    ),
    "divergent": ({"data": 2, "stage": 2, "tensor": 2}, {"zero": 1, "microbatches": 4, "schedule": "zb_v"}),
    "stage remat": ({"data": 2, "stage": 2, "tensor": 2}, {"zero": 3, "microbatches": 4, "remat": "stage/full"}),
}


def estimate(axes: dict[str, int], **options: Any) -> tuple[Estimate, Any]:
    config = decoder(axes, batch_size=16, **options)
    return Estimator(Subject(config, config.mesh.target)).estimate(choice_of(config)), config.plan()


def wire(found: Estimate, cause: str) -> float:
    return sum(size for (of, _), size in found.wire.items() if of == cause)


@pytest.mark.parametrize("name", list(PLANS))
def test_bytes_and_wire_of_parameters_are_the_plans(name: str) -> None:
    axes, options = PLANS[name]
    found, plan = estimate(axes, **options)
    held = plan.bytes_per_device()
    assert found.memory["parameters"] == held["parameters"]
    # The plan counts the optimizer's own step counter too.
    assert held["optimizer_state"] - found.memory["optimizer_state"] in range(9)
    assert found.memory["gradients"] == held["gradients"]
    assert wire(found, "weights") == pytest.approx(weight_wire_bytes(plan), abs=2)
    assert wire(found, "gradients") == pytest.approx(gradient_wire_bytes(plan), abs=2)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_schedule_is_counted_as_its_program_runs(name: str, stages: int) -> None:
    made = program(make_schedule(name, stages=stages, microbatches=2 * stages))
    found = ticks(name, stages, 2 * stages, 0)
    assert (found.mail, found.residuals, found.cuts) == (
        made.num_mail_slots,
        made.num_residual_slots,
        made.num_cut_slots,
    )
    uniform = not any(phase.divergent for phase in made.phases)
    if uniform:
        for kind in found.cells:
            assert found.cells[kind] == sum(phase.length for phase in made.phases if kind in phase.cell)
    assert sum(count for _, count in found.lasts) == sum(
        phase.length * (1 if phase.divergent else len(phase.cell)) for phase in made.phases
    )
    virtual = made.schedule.num_virtual
    assert found.work["F"] == 2 * stages * virtual
    for part, when in (("before", "before"), ("after", "head"), ("finish", "finish")):
        due = [getattr(phase, f"{when}_microbatch") for phase in made.phases]
        most = sum(len(rows) for rows in due if any(index >= 0 for index in rows))
        least = sum(index >= 0 for rows in due for index in rows)
        assert getattr(found, part) == (most if uniform and virtual == 1 else least)


def test_the_bubble_is_the_schedules() -> None:
    """On a chip, of 1F1B with P stages and M microbatches the part (P-1)/(M+P-1) of the ticks."""
    for microbatches in (4, 8):
        config = decoder(
            {"data": 1, "stage": 4, "tensor": 1}, "tpu:v5e:2x2", batch_size=16, seq=64, microbatches=microbatches
        )
        found = Estimator(Subject(config, "tpu:v5e:2x2")).estimate(choice_of(config))
        blocks = found.seconds["bubble"] * (microbatches + 3) / 3
        everything = sum(found.seconds[part] for part in ("compute", "collectives", "bubble"))
        assert found.seconds["bubble"] / blocks == pytest.approx(3 / (microbatches + 3))
        assert blocks <= everything


def test_what_xla_tpu_reports_is_more_than_what_has_to_fit() -> None:
    """By what is assigned but for what passes: the stack of what blocks keep, x and gradients are carried by loops."""
    sizes = {"data": 4, "stage": 1, "tensor": 1}
    found = {}
    for target in ("tpu:v5e:2x2", "gpu:a100:1x4"):
        config = decoder(sizes, target, batch_size=64, seq=64, zero=3, remat="full")
        found[target] = Estimator(Subject(config, target)).estimate(choice_of(config))
    on_tpu, on_gpu = found.values()
    assert on_gpu.needed_bytes == on_gpu.hbm_bytes
    assert on_tpu.hbm_bytes - on_tpu.needed_bytes == on_tpu.memory["counted_twice"]
    assert on_tpu.memory["counted_twice"] >= on_tpu.memory["activations"] > 0


def test_a_tighter_remat_keeps_less_and_computes_more() -> None:
    axes = {"data": 1, "stage": 1, "tensor": 1}
    kept, computed = [], []
    for remat in ("none", "full"):
        config = decoder(axes, "cpu:1", remat=remat)
        found = Estimator(Subject(config, "cpu:1")).estimate(choice_of(config))
        kept.append(found.memory["activations"])
        computed.append(found.flops)
    assert kept[0] > 4 * kept[1]
    # A block's forward once more, but for the product whose result no gradient needs.
    assert 1.2 < computed[1] / computed[0] < 4 / 3
