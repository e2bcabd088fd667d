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
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.step.compile import CompiledStep, compile_train_step
from tests.equivalence.cases import tokens

MODEL = DecoderConfig(vocab_size=16, num_layers=4, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


def compiled(microbatches: int, zero: int = 0, **sizes: int) -> CompiledStep:
    axes = {axis: sizes.get(axis, 1) for axis in ("data", "stage", "tensor")}
    mesh = MeshSpec(axes, batch="data", stage="stage", target=f"cpu:{math.prod(axes.values())}")
    batch, optimizer = tokens(32), optax.adamw(1e-2)
    plan = make_plan(
        MODEL,
        mesh=mesh,
        rules=decoder_rules("tensor"),
        optimizer=optimizer,
        batch=batch,
        pipeline=PARTS,
        microbatches=microbatches,
        zero=zero,
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
