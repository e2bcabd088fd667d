"""Seconds of a step's compute, worked out by hand."""

import pytest

from shardlab.hlo import Rates, parse, times

# A peak of 100 FLOP/s and 10 bytes a second, all of them reached.
PLAIN = Rates({"float32": 100.0}, 10.0, compute_efficiency=1.0, memory_efficiency=1.0)

# As XLA:TPU prints it: cycles on what it has estimated, also inside fusions, and none on some.
TPU = """
HloModule step, is_scheduled=true

FileNames
1 "/home/user/model.py"
2 "/env/site-packages/flax/linear.py"

FunctionNames
1 "MLP.__call__"
2 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=2 end_column=9}
2 {file_name_id=2 function_name_id=2 line=400 end_line=400 column=2 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%inner (p: bf16[8,4], q: bf16[4,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = bf16[4,4]{1,0} parameter(1)
  ROOT %product = bf16[8,4]{1,0} convolution(%p, %q), dim_labels=bf_io->bf, backend_config={"window_config":{"estimated_cycles":"900"}}
}

%outer (p.1: bf16[8,4], q.1: bf16[4,4]) -> bf16[8,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %q.1 = bf16[4,4]{1,0} parameter(1)
  ROOT %nested = bf16[8,4]{1,0} fusion(%p.1, %q.1), kind=kOutput, calls=%inner, backend_config={"window_config":{"estimated_cycles":"500"}}
}

%body (s: (s32[], bf16[8,4], bf16[4,4])) -> (s32[], bf16[8,4], bf16[4,4]) {
  %s = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), backend_config={"window_config":{"estimated_cycles":"3"}}
  %x = bf16[8,4]{1,0} get-tuple-element(%s), index=1
  %w = bf16[4,4]{1,0} get-tuple-element(%s), index=2
  %y = bf16[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%outer, metadata={op_name="jit(step)/transpose(jvp())/dot_general" stack_frame_id=2}, backend_config={"window_config":{"kernel_window_bounds":[],"estimated_cycles":"200","iteration_bounds":["1"]}}
  ROOT %t = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) tuple(%next, %y, %w)
}

%condition (c: (s32[], bf16[8,4], bf16[4,4])) -> pred[] {
  %c = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT, backend_config={"window_config":{"estimated_cycles":"1"}}
}

ENTRY %main (a: bf16[8,4], b: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %copy-start.1 = (bf16[4,4]{1,0:S(1)}, bf16[4,4]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %copy-done.1 = bf16[4,4]{1,0:S(1)} copy-done(%copy-start.1)
  %space = bf16[8,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %kernel = bf16[8,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention"}
  %state = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) tuple(%zero, %kernel, %copy-done.1)
  %loop = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) while(%state), condition=%condition, body=%body
  %z = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = bf16[8,4]{1,0} all-reduce(%z), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
"""  # noqa: E501
CLOCKED = Rates({"bfloat16": 100.0}, 10.0, 100.0, compute_efficiency=1.0, memory_efficiency=1.0)


def test_cycles_of_the_outermost_fusion_times_its_trips() -> None:
    """Five trips of 200 + 3 cycles, six questions of one: at 100 Hz; neither the collective nor what is inside counts.

    The kernel, of which only the bytes are known (64 in, 64 out at 10 a second), adds 12.8 s.
    """
    found = times(parse(TPU), CLOCKED)
    assert found.seconds == pytest.approx((5 * 203 + 6) / 100 + 12.8)
    assert sum(piece.seconds for piece in found.pieces if piece.estimated) == pytest.approx(10.21)
    assert found.flops == 5 * 2 * 8 * 4 * 4
    assert [(one.name, one.reason, one.executions) for one in found.left_out] == [
        ("copy-start.1", "an asynchronous copy, beside the compute", 1),
        ("kernel", "a kernel, tpu_custom_call: bytes alone", 1),
    ]


def test_where_the_time_goes() -> None:
    """The product of 256 FLOPs (2.56 s) and 64 + 32 + 64 bytes (16 s) is bound by memory."""
    found = times(parse(TPU), CLOCKED)
    assert found.by(lambda piece: f"{piece.part} {piece.phase}") == pytest.approx(
        {" forward": 12.8 + (5 * 3 + 6) / 100, "MLP backward": 10.0}
    )
    (product,) = (piece for piece in found.pieces if piece.name == "y")
    assert (product.bound, product.source, product.executions) == ("memory", "/home/user/model.py:7", 5)
    assert product.bytes == 5 * (64 + 32 + 64)
    assert found.bound("memory") == found.seconds


def test_cycles_without_a_clock_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the compiler estimates \d+ cycles and no clock was given; give the clock"):
        times(parse(TPU), PLAIN)


GPU = """
HloModule step, is_scheduled=true

%gemm (p: f32[40,40], q: f32[40,40]) -> f32[40,40] {
  %p = f32[40,40]{1,0} parameter(0)
  %q = f32[40,40]{1,0} parameter(1)
  ROOT %dot = f32[40,40]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inside (r: f32[10]) -> f32[10] {
  %r = f32[10]{0} parameter(0)
  ROOT %minus = f32[10]{0} negate(%r)
}

%wrapped (r.1: f32[10]) -> f32[10] {
  %r.1 = f32[10]{0} parameter(0)
  ROOT %run = f32[10]{0} fusion(%r.1), kind=kLoop, calls=%inside
}

ENTRY %main (a: f32[40,40], v: f32[10]) -> f32[40,40] {
  %a = f32[40,40]{1,0} parameter(0)
  %v = f32[10]{0} parameter(1)
  %start = ((f32[10]{0}), f32[10]{0}) async-start(%v), calls=%wrapped
  %b = f32[40,40]{1,0} fusion(%a, %a), kind=kCustom, calls=%gemm
  %end = f32[10]{0} async-done(%start)
  ROOT %c = f32[40,40]{1,0} add(%a, %b)
}
"""


def test_a_roofline_where_no_cycles_are_printed() -> None:
    """The product: 128,000 FLOPs at 1000 a second, against 1.92 s.  The sum: 19,200 bytes.  Beside them: 80."""
    rates = Rates({"float32": 1000.0}, 10_000.0, compute_efficiency=1.0, memory_efficiency=1.0)
    found = times(parse(GPU), rates)
    assert {piece.name: (piece.seconds, piece.bound) for piece in found.pieces} == {
        "b": (pytest.approx(128.0), "compute"),
        "c": (pytest.approx(1.92), "memory"),
        "run": (pytest.approx(0.008), "memory"),
    }
    assert (found.bound("compute"), found.flops, found.bytes) == (pytest.approx(128.0), 128_000, 19_200 * 2 + 80)
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("dtype", "peak"), [("bf16", 50.0), ("f32", 5.0), ("f8e4m3fn", 100.0), ("f64", 5.0), ("s8", 5.0)]
)
def test_the_peak_of_a_dtype(dtype: str, peak: float) -> None:
    """Half of the published; of a dtype that has none float32's."""
    rates = Rates({"bfloat16": 100.0, "float32": 10.0, "float8": 200.0}, 1.0, compute_efficiency=0.5)
    assert rates.peak(dtype) == peak
