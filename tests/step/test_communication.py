"""What crosses each mesh axis in the compiled step, counted by hand and read from the optimized HLO."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import optax
import pytest

from shardlab.hlo.collectives import collectives
from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.module.pipeline import Pipeline
from shardlab.pipeline.schedules import Schedule, from_table
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.report.collectives import collective_rows, collectives_table
from shardlab.step.compile import CompiledStep, compile_train_step
from tests.equivalence.cases import tokens

MODEL = DecoderConfig(vocab_size=16, num_layers=4, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


def compiled(
    microbatches: int, zero: int = 0, *, schedule: str | Schedule = "1f1b", size: int = 32, **sizes: int
) -> CompiledStep:
    axes = {axis: sizes.get(axis, 1) for axis in ("data", "stage", "tensor")}
    mesh = MeshSpec(axes, batch="data", stage="stage", target=f"cpu:{math.prod(axes.values())}")
    batch, optimizer = tokens(size), optax.adamw(1e-2)
    plan = make_plan(
        MODEL,
        mesh=mesh,
        rules=decoder_rules("tensor"),
        optimizer=optimizer,
        batch=batch,
        pipeline=PARTS,
        microbatches=microbatches,
        zero=zero,
        schedule=schedule,
    )
    return compile_train_step(MODEL, next_byte_loss, optimizer, plan, batch)


def payload_by_axes(step: CompiledStep) -> dict[tuple[str, ...], int]:
    totals: dict[tuple[str, ...], int] = defaultdict(int)
    for found in collectives(step.compiled.as_text(), step.plan.mesh.sizes):
        totals[found.axes] += found.payload_bytes
    return totals


def gradient_bytes(plan: Plan) -> int:
    """Bytes of the gradients that one device reduces over the batch: of its stage's blocks, and its share of the rest.

    What every stage uses is reduce-scattered over the stages before it crosses the batch axes.
    """
    sizes = plan.mesh.sizes
    return sum(
        math.prod(p.shape)
        * 4
        // plan.num_stages
        // math.prod(sizes[axis] for entry in p.compute for axis in _axes(entry))
        for p in plan.parameters
    )


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("microbatches", [2, 8])
def test_one_gradient_reduction_a_step_whatever_the_microbatches(microbatches: int, zero: int) -> None:
    step = compiled(microbatches, zero, data=2, stage=2, tensor=2)
    batch_bytes = sum(size for axes, size in payload_by_axes(step).items() if "data" in axes)
    expected = gradient_bytes(step.plan)
    # With ZeRO 1 a reduce-scatter of the gradients and a gather of the parameters that were updated in shares: on the
    # wire what an all-reduce is. The few bytes beside are the loss, its weight and the squared norm.
    assert batch_bytes - (1 + zero) * expected in range(129)


def test_the_tensor_axis_carries_what_megatrons_scheme_needs() -> None:
    """In a block, one all-reduce of x after each row-parallel matmul forward and each column-parallel one backward.

    XLA:CPU leaves the sums of gate + up and of q + k + v apart, which XLA:GPU and XLA:TPU merge. In a pipeline the
    masked ticks do it too.
    """
    microbatches, stages = 4, 2
    step = compiled(microbatches, data=2, stage=stages, tensor=2)
    ticks = microbatches + stages - 1
    x = step.plan.microbatch_rows * 6 * MODEL.model_dim * 4
    row_parallel, column_parallel = 2, 5
    expected = (row_parallel + column_parallel) * MODEL.num_layers // stages * ticks * x
    found = [c for c in collectives(step.compiled.as_text(), step.plan.mesh.sizes) if c.axes == ("tensor",)]
    # A block runs in the scan over a stage's blocks, whose trip count is last; a tick has no such factor.
    in_blocks = [c for c in found if c.loop and c.loop.endswith(f"*{MODEL.num_layers // stages}")]
    assert {c.kind for c in in_blocks} == {"all-reduce"}
    assert sum(c.payload_bytes for c in in_blocks) == expected
    # Outside the blocks: x from its feature-split embedding, and the sums of the vocabulary-split loss.
    outside = sum(c.payload_bytes for c in found if c not in in_blocks)
    assert outside <= 3 * ticks * x


def test_a_step_on_one_device_communicates_nothing() -> None:
    assert payload_by_axes(compiled(2)) == {}


STAGES, MICROBATCHES = 2, 6
BLOCKS = MODEL.num_layers // STAGES  # a device's
WHERE_DUE = {"before": MICROBATCHES, "head": MICROBATCHES, "finish": MICROBATCHES}
CELLS = {"F": MICROBATCHES * BLOCKS, "I": MICROBATCHES * BLOCKS}


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        # One stage a device: before and finish are done in every iteration that has an F, or a B, and masked.
        ("1f1b", {"before": MICROBATCHES + STAGES - 1, "head": MICROBATCHES, "finish": MICROBATCHES + STAGES - 1}),
        ("interleaved_1f1b", WHERE_DUE),
        ("zb_v", WHERE_DUE | CELLS),
    ],
)
def test_a_branch_counts_as_often_as_the_table_takes_it(schedule: str, due: dict[str, int]) -> None:
    step = compiled(MICROBATCHES, schedule=schedule, size=24, stage=STAGES, tensor=2)
    text, sizes = step.compiled.as_text(), step.plan.mesh.sizes
    found = collectives(text, sizes)
    # x of each microbatch is gathered over the stages, y and its cotangent dealt out and gathered, dx dealt out.
    for name, collective, expected in (
        ("all_gather", "all-gather", due["before"] + due["head"]),
        ("all_to_all", "all-to-all", due["head"] + due["finish"]),
    ):
        over_stages = [c for c in found if c.axes == ("stage",) and c.op_name.endswith(f"/{name}")]
        assert {c.kind for c in over_stages} == {collective}
        assert sum(c.count for c in over_stages) == expected
    for kind in set(due) & set(CELLS):
        in_cells = [c for c in found if f"/{kind}_taken_" in c.op_name]
        assert {(c.kind, c.axes, c.count) for c in in_cells} == {("all-reduce", ("tensor",), due[kind])}
    assert any(c.in_branch for c in found) == (schedule != "1f1b")
    rows = collective_rows(text, sizes)
    assert not any(row["in_branch"] for row in rows)
    assert "<=" not in collectives_table(rows)


def test_branches_that_devices_take_differently_often_are_upper_bounds() -> None:
    """A table in which one device's backward is whole and the other's split: B and I are said of neither."""
    ticks = ["0F0 .", "0F1 1F0", ". 1I0", "0B0 1W0", ". 1F1", ". 1I1", "0B1 1W1"]
    table = from_table([[None if a == "." else a for a in tick.split()] for tick in ticks], microbatches=2)
    step = compiled(2, schedule=table, size=8, stage=STAGES, tensor=2)
    found = collectives(step.compiled.as_text(), step.plan.mesh.sizes)
    in_cells = [c for c in found if c.axes == ("tensor",) and (c.loop or "").count("*") == 2]
    assert {(c.count, c.assumed, "/F_taken_2_of_7/" in c.op_name) for c in in_cells} == {
        (2 * BLOCKS, False, True),
        (7 * BLOCKS, True, False),
    }
    assert "<=" in collectives_table(collective_rows(step.compiled.as_text(), step.plan.mesh.sizes))
