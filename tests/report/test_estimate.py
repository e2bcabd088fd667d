"""An estimate's parts add up, and what binds is the largest of them; numbers by hand on a small program for a TPU."""

from __future__ import annotations

from typing import Any

import pytest

from shardlab.hlo.collectives import collectives
from shardlab.hlo.parse import HloModule, parse
from shardlab.mesh.chips import chip_of
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.topology import collective_seconds, lay_out
from shardlab.report.estimate import estimate_facts, seconds_on, step_overlaps, wire_by_axes
from tests.run.tiny import tiny

# v5e: 1.5 GHz, so 3,000 cycles are 2 us; a kernel that states no cost.
STEP = """
HloModule step, is_scheduled=true, num_partitions=4
%fused (a: f32[512,512], b: f32[512,512]) -> f32[512,512] {
  %a = f32[512,512]{1,0} parameter(0)
  %b = f32[512,512]{1,0} parameter(1)
  ROOT %product = f32[512,512]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (x: f32[512,512], y: f32[512,512]) -> f32[512,512] {
  %x = f32[512,512]{1,0} parameter(0)
  %y = f32[512,512]{1,0} parameter(1)
  %matmul = f32[512,512]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"3000"}
  %kernel.3 = f32[512,512]{1,0} custom-call(%matmul), custom_call_target="tpu_custom_call"
  %kernel.4 = f32[512,512]{1,0} custom-call(%kernel.3), custom_call_target="tpu_custom_call"
  ROOT %sum = f32[512,512]{1,0} all-reduce(%kernel.4), channel_id=1, replica_groups=GROUPS, to_apply=%add
}
"""
SPEC = MeshSpec({"data": 4}, batch="data", target="tpu:v5e:2x2")


def module(groups: str = "{{0,1,2,3}}") -> HloModule:
    return parse(STEP.replace("GROUPS", groups))


def facts(flops: int = 10**6, **changes: Any) -> dict[str, Any]:
    layout, chip, program = lay_out(SPEC), chip_of(SPEC.machine), module()
    compute, beside = step_overlaps(program, collectives(program, SPEC.sizes), layout, chip)
    plan = tiny("data=4", **changes).plan()
    return estimate_facts(plan, compute, beside, layout, chip, flops)


def test_cycles_and_links_by_hand() -> None:
    found = facts()
    parts = {part["name"]: part["seconds"] for part in found["estimate"]["parts"]}
    assert parts["matrix products"] == pytest.approx(2e-6)
    wire = 2 * 3 / 4 * 512 * 512 * 4
    on_links = collective_seconds(lay_out(SPEC), "all-reduce", ["data"], wire)
    assert parts["all-reduce over data, exposed"] == pytest.approx(on_links)
    assert found["estimate_seconds"] == pytest.approx(sum(parts.values()))
    assert found["bound_by"] == "ICI over data"
    assert found["estimate"]["basis"] == "the compiler's cycle estimates"


def test_mfu_is_of_all_devices_and_of_the_peak_that_is_published() -> None:
    found = facts(flops=10**9)
    peak = chip_of(SPEC.machine).flops["bfloat16"]
    assert found["mfu"] == pytest.approx(10**9 / (4 * peak) / found["estimate_seconds"])


def test_kernels_of_one_kind_are_left_out_in_one_line() -> None:
    kernels = [line for line in facts()["estimate"]["left_out"] if "kernel" in line]
    assert kernels == ["a kernel, tpu_custom_call: bytes alone (kernel)"]


def test_a_kernel_whose_products_are_known_is_counted_and_named() -> None:
    """Causal splash attention: 3 of 4 blocks of 256 x 256, two products, as fast as the program's other product."""
    call = (
        '"tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        r'"xprof_metadata":"{\"block_q\": 256, \"block_kv\": 256}"' + "\n}}"
    )
    text = """
HloModule step, is_scheduled=true, num_partitions=4
ENTRY %main (m: s8[1,2,2], q: bf16[64,512,128], p: s32[512,128], w: bf16[4096,4096]) -> bf16[64,512,128] {
  %m = s8[1,2,2]{2,1,0} parameter(0)
  %q = bf16[64,512,128]{2,1,0} parameter(1)
  %p = s32[512,128]{1,0} parameter(2)
  %twice = bf16[64,512,128]{2,1,0} add(%q, %q), backend_config={"estimated_cycles":"3000"}
  %w = bf16[4096,4096]{1,0} parameter(3)
  %product = bf16[4096,4096]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
backend_config={"estimated_cycles":"3000000"}
  ROOT %splash_mha_fwd_no_residuals.1 = bf16[64,512,128]{2,1,0} custom-call(%m, %m, %q, %twice, %twice, %p), \
custom_call_target=CALL
}
""".replace("CALL", call)
    layout, chip, program = lay_out(SPEC), chip_of(SPEC.machine), parse(text)
    found = estimate_facts(tiny("data=4").plan(), *step_overlaps(program, [], layout, chip), layout, chip, 1)[
        "estimate"
    ]
    parts = {part["name"]: part["seconds"] for part in found["parts"]}
    count = 3 * 2 * 2 * 64 * 256 * 256 * 128
    other = 3_000_000 / chip.clock_hz
    assert parts["matrix products"] == pytest.approx(other * (1 + count / (2 * 4096**3)))
    assert found["basis"] == (
        "the compiler's cycle estimates; kernels it has none for at the pace of its products "
        "(splash_mha_fwd_no_residuals)"
    )
    assert not [line for line in found["left_out"] if "kernel" in line]


def test_the_idle_part_of_a_pipeline_is_a_part_of_the_compute() -> None:
    """Of one stage none; of two with four microbatches one tick in five."""
    layout, chip, program = lay_out(SPEC), chip_of(SPEC.machine), module()
    compute, beside = step_overlaps(program, collectives(program, SPEC.sizes), layout, chip)
    piped = tiny("data=2,stage=2", microbatches=4).plan()
    flat = facts()["estimate"]
    found = estimate_facts(piped, compute, beside, layout, chip, 1)["estimate"]
    parts = {part["name"]: part["seconds"] for part in found["parts"]}
    assert parts["pipeline bubble"] == pytest.approx(compute.seconds / 5)
    assert parts["matrix products"] == pytest.approx(2e-6 * 4 / 5)
    assert found["seconds"] == pytest.approx(flat["seconds"])
    assert "pipeline bubble" not in {part["name"] for part in flat["parts"]}


def test_a_group_that_is_a_part_of_its_axis_takes_the_links_of_that_part() -> None:
    """Pairs of neighbours on dim x: half of the bytes of all four, over one link and not two dims'."""
    layout = lay_out(SPEC)
    (pairs,) = collectives(module("{{0,1},{2,3}}"), SPEC.sizes)
    (whole,) = collectives(module(), SPEC.sizes)
    assert (pairs.axes, pairs.group_size) == (("data",), 2)
    x = layout.links("data").dims[0]
    alone = seconds_on(layout, module("{{0,1},{2,3}}"))(pairs)
    assert alone == pytest.approx(pairs.wire_bytes / x.one_way, rel=0.1)
    assert seconds_on(layout, module())(whole) == pytest.approx(
        collective_seconds(layout, "all-reduce", ["data"], whole.wire_bytes)
    )


def test_what_goes_between_slices_takes_the_network_between_them() -> None:
    spec = MeshSpec({"data": 8}, batch="data", target="2*tpu:v5e:2x2", dcn={"data": 2})
    text = """
HloModule step, is_scheduled=true, num_partitions=4
ENTRY %main (x: f32[1024,1024]) -> token[] {
  %x = f32[1024,1024]{1,0} parameter(0)
  %after = token[] after-all()
  %send = (f32[1024,1024]{1,0}, u32[], token[]) send(%x, %after), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %done = token[] send-done(%send), channel_id=1, is_host_transfer=true
}
"""
    (one,) = collectives(text, spec.sizes, slices=spec.slices)
    assert (one.kind, one.axes, one.group_size, one.over_slices) == ("all-reduce", ("data",), 2, True)
    assert one.wire_bytes == 4 * 2**20
    found = seconds_on(lay_out(spec), parse(text))(one)
    assert found == pytest.approx(one.wire_bytes / chip_of(spec.machine).dcn_bandwidth, rel=0.05)


def test_bytes_by_axes_are_merged_and_sorted() -> None:
    rows = [
        {"axes": ["data"], "wire_bytes": 3},
        {"axes": ["data", "tensor"], "wire_bytes": 9},
        {"axes": ["data"], "wire_bytes": 4},
    ]
    assert list(wire_by_axes(rows).items()) == [("data x tensor", 9), ("data", 7)]
