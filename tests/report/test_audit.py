"""An audit adds up: memory by category, collectives merged, and the facts that a command prints."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import shardlab
from shardlab.hlo import collectives
from shardlab.mesh.spec import MeshSpec
from shardlab.report.audit import Audit, _held, audit_refused, audit_step
from shardlab.report.estimate import model_flops
from shardlab.report.memory import memory
from shardlab.step.compile import CompiledStep, compile_train_step
from shardlab.step.refusals import OutOfMemory, refusals
from tests.run.tiny import tiny

SIZES = "data=2,stage=2,tensor=2"


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    config = tiny(SIZES, microbatches=4, zero=1)
    return compile_train_step(
        config.model, config.loss, config.make_optimizer(), config.plan(), config.abstract_batch()
    )


@pytest.fixture(scope="module")
def audit(step: CompiledStep) -> Audit:
    return audit_step(step)


def test_the_package_of_reports_may_be_called(step: CompiledStep, audit: Audit) -> None:
    called = shardlab.report(step)  # type: ignore[operator]
    assert isinstance(called, Audit)
    assert called.facts["collectives"] == audit.facts["collectives"]


def test_the_memory_by_category_is_all_of_it(step: CompiledStep, audit: Audit) -> None:
    total = memory(step.compiled).total_bytes
    assert audit.facts["hbm_bytes"] == total
    assert sum(audit.facts["categories"].values()) == total
    assert audit.facts["categories"]["parameters"] == step.plan.bytes_per_device()["parameters"]


def test_rows_of_collectives_merge_what_the_program_has_and_lose_nothing(step: CompiledStep, audit: Audit) -> None:
    found, rows = collectives(step.text, step.plan.mesh.sizes), audit.facts["collectives"]
    for name in ("count", "payload_bytes", "wire_bytes"):
        assert sum(row[name] for row in rows) == sum(getattr(one, name) for one in found) > 0
    assert audit.facts["wire_bytes"] == sum(audit.facts["wire_bytes_by_axis"].values())
    numbers = ("count", "payload_bytes", "wire_bytes", "seconds", "exposed_seconds")
    kinds = [json.dumps({name: value for name, value in row.items() if name not in numbers}) for row in rows]
    assert len(set(kinds)) == len(kinds) < len(found)
    assert [row["wire_bytes"] for row in rows] == sorted((row["wire_bytes"] for row in rows), reverse=True)


def test_gradients_are_told_by_the_parameter_they_belong_to(step: CompiledStep, audit: Audit) -> None:
    sums = [row for row in audit.facts["collectives"] if row["axes"] == ["data"] and row["path"]]
    named = {row["path"] for row in sums}
    assert named
    assert named <= {sibling.name for sibling in step.plan.stacks} | {one.path for one in step.plan.parameters}


def test_emulated_devices_have_no_capacity_and_no_estimate(audit: Audit) -> None:
    nothing = ("hbm_capacity_bytes", "estimate_seconds", "mfu", "bound_by", "estimate", "layout")
    assert [audit.facts[name] for name in nothing] == [None] * len(nothing)
    assert audit.fits


def test_the_facts_are_plain_and_whole(audit: Audit) -> None:
    assert json.loads(json.dumps(audit.facts, allow_nan=False)) == audit.facts
    assert audit.facts["plan"]["schedule"] == "1f1b"
    assert str(audit).strip()


@pytest.mark.parametrize("sizes", ["", SIZES])
def test_the_mathematics_takes_as_many_operations_under_every_plan(sizes: str) -> None:
    """Of the MLP by hand: 2 blocks of 8 -> 16 -> 8, an embedding 12 -> 8 (no gradient of its input), a head 8 -> 10."""
    config = tiny(sizes, microbatches=4 if sizes else 1)
    step = compile_train_step(
        config.model, config.loss, config.make_optimizer(), config.plan(), config.abstract_batch()
    )
    by_hand = 16 * 2 * (3 * 2 * (8 * 16 + 16 * 8) + 2 * 12 * 8 + 3 * 8 * 10)
    assert model_flops(step.model, step.plan, step.batch_shapes) == by_hand


def refusal(text: str) -> OutOfMemory:
    plan = tiny("data=8").plan()
    with pytest.raises(OutOfMemory) as caught, refusals(plan):
        raise jax.errors.JaxRuntimeError(text)
    return caught.value


def test_a_refusal_for_memory_names_the_sizes_and_what_the_plan_counts() -> None:
    found = refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (32.50G) exceeds "
        "available HBM (15.75G)."
    )
    assert found.capacity_bytes == round(15.75 * 2**30)
    # The arguments are in what the compiler calls temporaries.
    assert found.needed_bytes == round(32.5 * 2**30)
    assert "does not fit in a device's memory: it needs 32.5 GiB, 16.8 GiB more than the 15.8 GiB" in str(found)
    assert "parameters" in str(found)


def test_what_the_compiler_refuses_for_something_else_is_said_in_its_words() -> None:
    config = tiny("data=8", compiler_options="xla_no_such_option=1")
    with pytest.raises(shardlab.DeclarationError) as caught:
        compile_train_step(
            config.model,
            config.loss,
            config.make_optimizer(),
            config.plan(),
            config.abstract_batch(),
            compiler_options=config.options_of_xla(),
        )
    assert not isinstance(caught.value, OutOfMemory)
    assert str(caught.value).startswith(
        "plan on data=8 (batch) x stage=1 (stage) x tensor=1 on cpu:8: the compiler refuses"
    )
    assert "xla_no_such_option" in str(caught.value)


@pytest.mark.parametrize(("target", "fits"), [("tpu:v5e:2x2", True), ("gpu:h100:1x4", False)])
def test_what_xla_tpu_takes_fits_whatever_it_reports(target: str, fits: bool) -> None:
    plan: Any = SimpleNamespace(mesh=MeshSpec({"data": 4}, batch="data", target=target))
    held = _held(plan, 2**40, 2**33)
    assert held["hbm_capacity_bytes"] < held["hbm_bytes"] == 2**40
    assert (held["fits"], held["hbm_peak_bytes"]) == (fits, 2**33)


def test_what_was_refused_is_audited_as_far_as_it_is_known(step: CompiledStep, audit: Audit) -> None:
    found = refusal("RESOURCE_EXHAUSTED: Used 17.00G of 15.75G hbm. Exceeded hbm capacity by 1.25G.")
    known: dict[str, Any] = {"flops": 1, "seconds": 2.0}
    left = audit_refused(step.plan, found, text=step.text, **known).facts
    assert (left["fits"], left["hbm_bytes"], left["memory"]) == (False, 17 * 2**30, None)
    assert left["collectives"] == audit.facts["collectives"]
    assert set(left) == set(audit.facts)
    unread = audit_refused(step.plan, found, text=None, **known).facts
    assert set(unread) == set(audit.facts)
    assert unread["collectives"] == []
