"""What a step's seconds are made of: the pace of a chip, what the engine itself moves, and sums in two steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shardlab.mesh.chips import chip_of
from shardlab.mesh.targets import parse_target
from shardlab.models.decoder import DecoderConfig
from shardlab.search.choice import Choice
from shardlab.search.costs import Cost
from shardlab.search.estimate import Estimator, Planned
from shardlab.search.link_costs import LinkCosts
from shardlab.search.pace import bandwidth, keeping_moves, peak
from shardlab.search.subject import Subject
from tests.search.subjects import decoder

MODEL = DecoderConfig(
    num_layers=4, model_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, mlp_dim=4096, vocab_size=8192
)
FSDP: dict[str, Any] = {"zero": 3, "gather": "layer", "accumulate": "sharded"}


EIGHT = {"data": 8, "stage": 1, "tensor": 1}
POD = ((("data", 256), ("stage", 1), ("tensor", 1)), (), ())


def subject(target: str, **options: Any) -> Subject:
    return Subject(decoder(EIGHT, model=MODEL, seq=256, dtype="bfloat16", batch_size=256, **options), target)


def planned(target: str, **options: Any) -> Planned:
    return Planned(Estimator(subject(target)), Choice(mesh=tuple(EIGHT.items()), **{"remat": "full", **options}))


def test_a_scatter_over_three_dims_is_paced_as_its_two_steps() -> None:
    """256 over 4 x 8 x 8: 64 over the two dims of 8, 360 GB/s, then 4 over the last one, 180 GB/s."""
    costs, whole = LinkCosts(subject("tpu:v5p:4x8x8")), 256 / 255
    pace, start = costs.pace(POD, "reduce-scatter", ("data",))
    assert pace == pytest.approx(whole * 63 / 64 / 360e9 + whole / 64 * 3 / 4 / 180e9)
    assert start > 0
    assert costs.made(POD, "reduce-scatter", ("data",)) == "reduce-scatter"


def test_in_one_it_is_the_all_reduce_that_the_compiler_makes_of_it() -> None:
    costs = LinkCosts(subject("tpu:v5p:4x8x8", scatter="whole"))
    assert costs.made(POD, "reduce-scatter", ("data",)) == "all-reduce"


@pytest.mark.parametrize("target", ["tpu:v5e:2x4", "gpu:h100:1x8"])
def test_what_is_kept_costs_memory_traffic_and_on_a_tpu_slower_products(target: str) -> None:
    plan, chip = planned(target, remat="dots_saveable"), chip_of(parse_target(target))
    (cost,) = plan.of.cells(plan.split, "dots_saveable")
    kept, flops, moved = (one.at(plan.rows) for one in (cost.kept, cost.forward.flops["bfloat16"], cost.forward.moved))
    slow = flops / peak(chip, "bfloat16", keeping=True) + (moved + keeping_moves(chip, kept) / 2) / bandwidth(chip)
    assert plan.of.busy(cost.forward, plan.rows, kept) == pytest.approx(slow)
    assert plan.of.busy(cost.forward, plan.rows) < slow
    slower = peak(chip, "bfloat16") / peak(chip, "bfloat16", keeping=True)
    assert slower == (1.0 if chip.platform == "gpu" else pytest.approx(0.82 / 0.76))


def test_what_a_kernel_keeps_of_its_mask_slows_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the splash kernels do, under "full" too."""
    model = dataclasses.replace(MODEL, splash=True)
    config = decoder(EIGHT, model=model, seq=1024, dtype="bfloat16", batch_size=8)
    of = Estimator(Subject(config, "tpu:v5e:2x4"))
    (cost,) = of.cells(Planned(of, Choice(mesh=tuple(EIGHT.items()))).split, "full")
    assert 0 < cost.kept.at(1) < cost.kept_x.at(1) / 100
    said, busy = [], of.busy

    def watched(cost: Cost, rows: float, kept: float = 0.0) -> float:
        said.append(kept)
        return busy(cost, rows, kept)

    monkeypatch.setattr(of, "busy", watched)
    of.estimate(Choice(mesh=tuple(EIGHT.items()), remat="full"))
    assert not any(said)
    of.estimate(Choice(mesh=tuple(EIGHT.items()), remat="dots_saveable"))
    assert any(said)


def test_a_stack_of_weights_and_one_of_gradients_is_moved_on_gpus_alone() -> None:
    """By step, bfloat16 weights are copied out of their stack for either pass, and 18 bytes a gradient moved."""
    on_gpu, on_tpu = planned("gpu:h100:1x8"), planned("tpu:v5e:2x4")
    (group,) = on_gpu.held.blocks
    numbers = group.whole / 2
    assert on_gpu.stacked(group, "F") == 4 * numbers
    assert on_gpu.stacked(group, "B") == 4 * numbers + 18 * numbers
    assert on_tpu.stacked(group, "B") == 0.0
    by_layer = planned("gpu:h100:1x8", **FSDP)
    (pieces,) = by_layer.held.blocks
    assert by_layer.stacked(pieces, "F") == 0.0
    assert by_layer.stacked(pieces, "B") == pytest.approx(18 * numbers / 8, rel=0.01)


def test_fsdp_in_pieces_is_estimated_to_compute_less_than_zero_1_on_one_host() -> None:
    """As compiled (`benchmarks/search_quality.py`, nvlink): whole gradients are moved more often."""
    fsdp, zero = (planned("gpu:h100:1x8", **options).estimate() for options in (FSDP, {"zero": 1}))
    assert fsdp.seconds["compute"] < zero.seconds["compute"]
