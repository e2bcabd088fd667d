"""The facts of a plan and of its step: fit for JSON, and what the plan and the compiler themselves say."""

import json

import pytest

from shardlab.pipeline.schedules import make_schedule
from shardlab.report.collectives import collective_rows
from shardlab.report.memory import memory
from shardlab.report.summary import plan_facts, step_facts
from shardlab.step.compile import compile_train_step
from tests.run.tiny import tiny


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (2, 6)])
def test_the_facts_of_a_pipelined_plan(stages: int, microbatches: int) -> None:
    config = tiny(f"data=2,stage={stages},tensor=2", microbatches=microbatches, batch_size=24, zero=1, remat="full")
    plan = config.plan()
    facts = plan_facts(plan)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["mesh"] == {"data": 2, "stage": stages, "tensor": 2}
    assert (facts["batch_axes"], facts["stage_axis"], facts["target"]) == (["data"], "stage", "cpu:8")
    # in and out of 12 x 8 and 8 x 10, and two layers of 8 x 16 x 8, each with its biases
    assert facts["num_parameters"] == 12 * 8 + 8 + 8 * 10 + 10 + 2 * (8 * 16 + 16 + 16 * 8 + 8)
    assert (facts["dtype"], facts["zero"], facts["remat"]) == ("float32", 1, "full")
    assert (facts["batch_size"], facts["microbatches"]) == (24, microbatches)
    assert (facts["stages"], facts["layers"], facts["schedule"]) == (2, [1, 1], "1f1b")
    # GPipe, arXiv 1811.06965: (P - 1) / (M + P - 1) of the time; the first stage holds what the last one waits for.
    assert facts["bubble_fraction"] == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert facts["peak_in_flight"] == [2 * stages - 1, 1]
    assert facts["bytes_per_device"] == plan.bytes_per_device()
    assert facts["notes"] == list(plan.notes)
    assert plan.table() == make_schedule("1f1b", stages=stages, microbatches=microbatches)


def test_one_stage_has_no_bubble_and_a_note_is_a_fact() -> None:
    facts = plan_facts(tiny("data=2", microbatches=4, schedule="gpipe").plan())
    assert facts["bubble_fraction"] == 0.0
    assert facts["notes"] == ["schedule gpipe is ignored: one stage only accumulates its microbatches"]


def test_of_a_model_taken_whole_the_activations_are_unknown() -> None:
    plan = tiny("data=2", pipeline=None).plan()
    assert plan_facts(plan)["bytes_per_device"] == plan.bytes_per_device() | {"activations": None}


def test_the_facts_of_a_step_are_its_plans_and_what_was_compiled() -> None:
    config = tiny("data=2")
    plan = config.plan()
    step = compile_train_step(config.model, config.loss, config.optimizer(), plan, config.abstract_batch())
    facts = step_facts(step)
    assert json.loads(json.dumps(facts)) == facts
    assert {name: facts[name] for name in plan_facts(plan)} == plan_facts(plan)
    assert set(facts) == {*plan_facts(plan), "memory", "collectives"}
    assert facts["memory"] == memory(step.compiled).to_json()
    assert facts["collectives"] == collective_rows(step.compiled.as_text(), {"data": 2, "stage": 1, "tensor": 1})
    # Data parallelism sums every gradient once, and over two devices sends as much as that is.
    (row,) = facts["collectives"]
    assert (row["kind"], row["axes"], row["exact"]) == ("all-reduce", ["data"], True)
    assert row["payload_bytes"] == row["wire_bytes"]
    assert row["payload_bytes"] >= 4 * plan.num_parameters
