"""What weights and gradients send and hold, as planned and as the compiled step does it.

XLA:CPU shows an all-reduce and a slice where a GPU or TPU has a reduce-scatter: they are counted as one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import optax
import pytest

from shardlab.hlo.collectives import collectives
from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.module.pipeline import Pipeline
from shardlab.plan.communication import Choice, choices, gradient_wire_bytes, weight_wire_bytes
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.step.compile import compile_train_step
from tests.equivalence.cases import tokens

MODEL = DecoderConfig(vocab_size=16, num_layers=4, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


def planned(sizes: dict[str, int], **given: Any) -> Plan:
    axes = {axis: sizes.get(axis, 1) for axis in ("replica", "data", "stage", "tensor")}
    target = f"cpu:{math.prod(axes.values())}"
    mesh = MeshSpec(axes, batch=("replica", "data"), stage="stage", target=target)
    choice = {"microbatches": 4, "rules": decoder_rules("tensor"), **given}
    return make_plan(MODEL, mesh=mesh, optimizer=optax.adamw(1e-2), batch=tokens(32), pipeline=PARTS, **choice)


CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "nothing sharded": ({"data": 4}, {}),
    "ZeRO 1": ({"data": 2, "stage": 2}, {"zero": 1}),
    "ZeRO 2, sharded gradients": ({"data": 4, "stage": 2}, {"zero": 2, "accumulate": "sharded"}),
    "ZeRO 3": ({"data": 2, "stage": 2, "tensor": 2}, {"zero": 3}),
    "ZeRO 3, two batch axes": ({"replica": 2, "data": 2, "stage": 2}, {"zero": 3}),
    "ZeRO 3 by layer": ({"data": 4, "stage": 2}, {"zero": 3, "gather": "layer"}),
    "ZeRO 3 by layer, sharded gradients": (
        {"data": 2, "stage": 2, "tensor": 2},
        {"zero": 3, "gather": "layer", "accumulate": "sharded"},
    ),
    "all by layer on one stage": ({"data": 4}, {"zero": 3, "gather": "layer", "accumulate": "sharded"}),
    "split backwards": (
        {"data": 2, "stage": 2},
        {"zero": 3, "gather": "layer", "accumulate": "sharded", "schedule": "1f1b_split"},
    ),
    "virtual stages": ({"data": 2, "stage": 2}, {"zero": 3, "gather": "layer", "schedule": "interleaved_1f1b"}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_was_planned(name: str) -> None:
    sizes, given = CASES[name]
    plan = planned(sizes, head="last_stage", remat="full", **given)
    step = compile_train_step(MODEL, next_byte_loss, optax.adamw(1e-2), plan, tokens(32))
    weights = gradients = 0
    for one in collectives(step.compiled.as_text(), plan.mesh.sizes):
        wire = one.wire_bytes // 2 if one.as_reduce_scatter else one.wire_bytes
        if "tensor" in one.axes or one.kind == "collective-permute":
            continue  # what blocks and stages send
        if one.kind == "all-gather":
            weights += wire
        else:
            gradients += wire
    assert weights == weight_wire_bytes(plan)
    # Beside them the loss, its weight and the squared norm of the gradient are summed.
    assert 0 <= gradients - gradient_wire_bytes(plan) < 150


def test_by_hand() -> None:
    """Four layers on two stages, data=4, ZeRO 3, four microbatches: an F and a B cell run in 5 ticks each.

    A block has 16 (16 + 8 + 8 + 16) + 3 x 16 x 24 numbers in kernels and 32 in norms. Outside are two tables of 16 x 16
    and a norm, which stages share too: they are cut in 8.
    """
    block, outside = 16 * 48 + 3 * 16 * 24 + 32, 2 * 16 * 16 + 16
    found = choices(planned({"data": 4, "stage": 2}, zero=3))
    rest = 4 * outside * 7 / 8
    assert [(one.option, one.value, one.chosen) for one in found] == [
        ("gather", "step", True),
        ("gather", "layer", False),
        ("accumulate", "full", True),
        ("accumulate", "sharded", False),
    ]
    assert [one.wire_bytes for one in found] == [
        2 * 4 * block * 3 / 4 + rest,
        2 * 10 * 4 * block * 3 / 4 + rest,
        2 * 4 * block * 3 / 4 + rest,
        # The head runs in 4 ticks, with each microbatch; the vjp of the embedding in the 5 that have a B cell.
        2 * 5 * 4 * block * 3 / 4 + 4 * (4 * (16 * 16 + 16) + 5 * 16 * 16) * 7 / 8,
    ]
    assert [one.held_bytes for one in found] == [
        4 * (2 * block + outside),
        4 * (block + outside),
        4 * (2 * block + outside),
        4 * (2 * block // 4 + outside // 8),
    ]
    assert found[0].total_bytes == found[2].total_bytes
    assert found[0].total_bytes - found[1].total_bytes == 4 * block


def test_what_stands_under_a_condition_is_counted_where_it_is_due() -> None:
    """Two of four stages on a device: a B cell of one layer in 9 ticks, the head and the embedding's vjp in 4 each."""
    plan = planned({"data": 2, "stage": 2}, zero=2, accumulate="sharded", schedule="interleaved_1f1b")
    block, outside = 16 * 48 + 3 * 16 * 24 + 32, 2 * 16 * 16 + 16
    assert gradient_wire_bytes(plan) == 9 * 4 * block / 2 + 4 * 4 * outside * 3 / 4


def test_what_the_context_reads_adds_up_whole() -> None:
    plan = planned({"data": 2, "stage": 2}, zero=2, accumulate="sharded")
    assert {p.path: p.read_by for p in plan.parameters if not p.path.startswith("blocks")} == {
        "norm/scale": ("after",),
        "tokens/embedding": ("before",),
        "unembed/kernel": ("after",),
    }
    other = tuple(dataclasses.replace(p, read_by=(*p.read_by, "context")) for p in plan.parameters)
    conditioned = dataclasses.replace(plan, parameters=other)
    more = conditioned.bytes_per_device()["gradients"] - plan.bytes_per_device()["gradients"]
    assert more == 4 * (2 * 16 * 16 + 16) * 3 // 4
    once = 4 * (2 * 16 * 16 + 16) * 3 / 4
    assert gradient_wire_bytes(plan) - gradient_wire_bytes(conditioned) == 4 * (4 * 272 + 5 * 256) * 3 / 4 - once


def test_a_cast_to_what_is_computed_in_is_a_copy() -> None:
    plan = planned({"data": 1}, dtype="bfloat16")
    assert plan.bytes_per_device()["working_copy"] == 2 * plan.num_parameters
    assert planned({"data": 1}).bytes_per_device()["working_copy"] == 0
    # By layer: every shard is cast, and of one block's shards the whole is made.
    block, outside = 16 * 48 + 3 * 16 * 24 + 32, 2 * 16 * 16 + 16
    by_layer = planned({"data": 4}, dtype="bfloat16", zero=3, gather="layer")
    assert by_layer.bytes_per_device()["working_copy"] == 2 * (4 * block // 4 + block + outside)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"zero": 1}, set()),
        ({"zero": 1, "dtype": "bfloat16"}, {"gather"}),
        ({"zero": 2}, {"accumulate"}),
        ({"zero": 3}, {"gather", "accumulate"}),
    ],
)
def test_only_what_may_be_chosen_is_priced(given: dict[str, Any], options: set[str]) -> None:
    found = choices(planned({"data": 2}, **given))
    assert {one.option for one in found} == options
    for one in found:
        assert isinstance(one, Choice)
        planned({"data": 2}, **{**given, one.option: one.value})  # is not refused


def test_a_device_of_a_divergent_schedule_gathers_for_its_own_cells_alone() -> None:
    """Four stages, two on each of two devices, four microbatches: 8 F, and 8 B or I, of a layer each."""
    plan = planned({"data": 2, "stage": 2}, zero=3, gather="layer", schedule="zb_v", microbatches=4)
    block, outside = 16 * 48 + 3 * 16 * 24 + 32, 2 * 16 * 16 + 16
    assert weight_wire_bytes(plan) == 16 * 4 * block / 2 + 4 * outside * 3 / 4
