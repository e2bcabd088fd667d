"""Blocks of different kinds: where a stage may leave out those it has none of, and what a step holds for them."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from shardlab.hlo.loops import is_branch
from shardlab.hlo.parse import parse
from shardlab.plan.plan import Plan
from shardlab.step.forward import compile_forward
from tests.equivalence.cases import Case, case, compiled, planned, subject_of

THEN: dict[str, Any] = {"stage": 2, "microbatches": 2}


def branches(step: Any) -> int:
    """How many loops of one trip at most the compiled program has."""
    module = parse(step.compiled.as_text())
    every = [one for computation in module.computations.values() for one in computation.instructions.values()]
    return sum(one.opcode == "while" and is_branch(module, one) for one in every)


@pytest.mark.parametrize(
    ("this", "skips"),
    [
        (case("dense-then-experts", data=2, **THEN), True),
        # An automatic axis inside: what XLA puts in for it must be in every stage's program.
        (case("dense-then-experts", tensor=2, **THEN), False),
        # Every stage has its share of each kind.
        (case("dense-and-experts", data=2, stage=3, microbatches=1), False),
        # Blocks of one kind: the longest stage is waited for.
        (case("mlp-5-layers", data=2, **THEN), False),
    ],
    ids=["one after another", "tensor", "in turn", "one kind"],
)
def test_a_stage_leaves_out_blocks_of_a_kind_that_it_has_none_of(this: Case, skips: bool) -> None:
    assert (branches(compiled(this)) > 0) == skips


def test_so_it_does_when_it_evaluates() -> None:
    this = case("dense-then-experts", data=2, **THEN)
    found, plan = subject_of(this), planned(this)
    batch = found.batch(8)
    forward = compile_forward(found.model, plan, batch)
    assert branches(forward) > 0
    step = compiled(this)
    state = step.init(0)
    alone = case("dense-then-experts")
    one = compile_forward(found.model, planned(alone), batch)
    there = compiled(alone).init(0)
    y = forward(state.parameters, state.buffers, batch)
    np.testing.assert_allclose(y, one(there.parameters, there.buffers, batch), rtol=1e-5, atol=1e-6)


def test_a_plan_tells_kinds_and_what_they_take() -> None:
    plan = planned(case("dense-then-experts", stage=3, microbatches=2))
    assert (plan.layers, plan.kinds) == ((2, 2, 2), (0, 0, 1, 1, 1, 1))
    assert "blocks are of 2 kinds, the first of each 0, 2; a stage has room for 4 and holds 2 at most" in plan.notes
    members = {stack.name: stack.members for stack in plan.stacks}
    assert members["blocks/*:0/up/kernel"] == (
        *("blocks/0/up/kernel", "blocks/1/up/kernel"),
        *(None,) * 4,
    )
    assert members["blocks/*:1/up/kernel"] == (
        *(None, None),
        *(f"blocks/{index}/up/kernel" for index in range(2, 6)),
    )
    dense, experts = 2 * 16 * 24 + 24 + 16, 16 * 3 + 2 * 3 * 16 * 8
    held = plan.bytes_per_device()
    # A device that pads one kind holds the other; most is padded where the larger one is.
    assert held["padding"] == 4 * 2 * max(dense, experts)
    assert Plan.from_json(plan.to_json()) == plan


def test_remat_by_stage_is_a_kind_for_each_policy() -> None:
    plan = planned(case("mlp-5-layers", stage=2, microbatches=2, remat="full | none"))
    assert (plan.layers, plan.kinds, plan.remat) == ((3, 2), (0, 0, 0, 1, 1), ("full", "none"))
    assert Plan.from_json(plan.to_json()) == plan
    assert "remat full | none" in str(plan)


def test_what_a_stages_input_alone_holds() -> None:
    """float32: x of 2 rows of 16 for each microbatch in flight, and once what two blocks keep of one."""
    plan = planned(case("mlp", stage=2, microbatches=4, remat="stage"))
    everything = planned(case("mlp", stage=2, microbatches=4))
    assert plan.activation_bytes == 4 * 2 * 16
    assert plan.recomputed_bytes == everything.activation_bytes
    held = plan.bytes_per_device()["activations"]
    assert held == 3 * plan.activation_bytes + plan.recomputed_bytes
    assert everything.bytes_per_device()["activations"] == 3 * everything.activation_bytes


def test_what_waits_for_the_gradients_of_weights_is_counted() -> None:
    """float32: of each of two blocks, 2 rows of dy, of the cotangent of tanh, and of tanh where it was computed again.

    Two microbatches are in flight, and two wait between I and W.
    """
    given: dict[str, Any] = {"stage": 2, "microbatches": 4, "schedule": "zb_h1"}
    none, full, stage = (planned(case("mlp", remat=remat, **given)) for remat in ("none", "full", "stage"))
    assert none.cut_bytes == stage.cut_bytes == 2 * 4 * 2 * (16 + 24)
    assert full.cut_bytes == 2 * 4 * 2 * (16 + 24 + 24)
    for plan in (none, full, stage):
        held = 2 * plan.activation_bytes + plan.recomputed_bytes + 2 * (plan.recomputed_bytes + plan.cut_bytes)
        assert plan.bytes_per_device()["activations"] == held
    assert planned(case("mlp", stage=2, microbatches=4, remat="full")).cut_bytes == 0


def test_a_split_backward_holds_what_its_plan_says() -> None:
    """Of what the lowered loop carries, [slots, blocks, rows, width]: residuals and cuts."""
    this = case("mlp", stage=2, microbatches=4, schedule="zb_h1")
    plan, text = planned(this), compiled(this).lowered.as_text()
    loop = max((line for line in text.splitlines() if "stablehlo.while" in line), key=len)
    widths = re.findall(r"tensor<2x2x2x(\d+)xf32>", loop.rpartition(" : ")[2])
    assert sum(4 * 2 * 2 * 2 * int(width) for width in widths) == plan.bytes_per_device()["activations"]


@pytest.mark.slow
def test_buffers_hold_a_stages_input_alone() -> None:
    """In the lowered step no buffer of several slots holds what the blocks keep."""

    def held(remat: str) -> set[str]:
        this = case("decoder", stage=2, data=2, microbatches=4, remat=remat)
        with jax.default_matmul_precision("float32"):
            text = compiled(this).lowered.as_text()
        # [slots, blocks of a stage, rows, tokens, ...]
        return set(re.findall(r"tensor<3x2x1x6x\d+[x\df]*>", text))

    assert held("none")
    assert not held("stage")
