"""Each finding on a program that has it and on one that has not."""

from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.hlo import Collective, parse
from shardlab.report.lint import Finding, _again, _Moved, involuntary, lint

AXES = {"data": 4, "tensor": 2}
OVER = {"data": "[2,4]<=[4,2]T(1,0)", "tensor": "[4,2]<=[8]"}
PATH = "state.parameters['blocks/*/up/kernel']"


def found(text: str, code: str, **options: Any) -> list[Finding]:
    return [one for one in lint(parse(text), AXES, smallest=1, **options) if one.code == code]


def program(*lines: str, computations: str = "") -> str:
    """A step over a weight of three layers [3, 64, 8], stored in pieces over `data`, and activations [16, 64]."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""
HloModule step, is_scheduled=true, num_partitions=8, input_output_alias={{ {{0}}: (0, {{}}, may-alias) }}
{computations}
ENTRY %main (w: f32[3,16,8], x: bf16[16,64], n: s32[]) -> (f32[3,16,8], bf16[16,64]) {{
  %w = f32[3,16,8]{{2,1,0}} parameter(0), metadata={{op_name="{PATH}"}}
  %x = bf16[16,64]{{1,0}} parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %h = bf16[16,64]{{1,0}} negate(%x)
{body}
}}
"""


def gather(name: str, of: str, to: str, over: str, dim: int, op_name: str = "jit(step)/dot_general") -> str:
    return (
        f"%{name} = {to} all-gather(%{of}), channel_id=1, replica_groups={OVER[over]}, dimensions={{{dim}}}, "
        f'metadata={{op_name="{op_name}" source_file="model.py" source_line=5}}'
    )


ROOT = "ROOT %out = (f32[3,16,8]{2,1,0}, bf16[16,64]{1,0}) tuple(%w, %h)"


# All-reduce, and a slice of it.
REDUCED = "%sum = bf16[16,64]{1,0} all-reduce(%h), channel_id=1, replica_groups=" + OVER["data"] + ", to_apply=%add"


def test_an_all_reduce_of_which_a_slice_is_kept() -> None:
    """2,048 B, of which 3/4 go round twice: 3,072 B where 1,536 would do."""
    part = "%part = bf16[4,64]{1,0} dynamic-slice(%sum, %n, %zero), dynamic_slice_sizes={4,64}"
    (one,) = found(program(REDUCED, part, ROOT), "SL001", seconds=lambda c: 2.0)
    assert (one.bytes, one.seconds, one.path) == (1536, 1.0, "sum")
    assert one.message == (
        "all-reduce of a value over data, of which every device keeps 1/4, 1 a step: 3.0 KiB on the wire, "
        "where a reduce-scatter sends half"
    )
    whole = "%part = bf16[16,64]{1,0} negate(%sum)"
    assert found(program(REDUCED, whole, ROOT), "SL001") == []


def gathering(trips: int) -> str:
    loop = f"""
%body (s: (s32[], f32[3,16,8])) -> (s32[], f32[3,16,8]) {{
  %s = (s32[], f32[3,16,8]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stored = f32[3,16,8]{{2,1,0}} get-tuple-element(%s), index=1
  %layer = f32[1,16,8]{{2,1,0}} dynamic-slice(%stored, %i, %i, %i), dynamic_slice_sizes={{1,16,8}}
  %half = bf16[1,16,8]{{2,1,0}} convert(%layer)
  {gather("whole", "half", "bf16[1,64,8]{2,1,0}", "data", 1)}
  ROOT %t = (s32[], f32[3,16,8]{{2,1,0}}) tuple(%i, %stored)
}}
%condition (c: (s32[], f32[3,16,8])) -> pred[] {{
  %c = (s32[], f32[3,16,8]{{2,1,0}}) parameter(0)
  ROOT %true = pred[] constant(true)
}}"""
    state = "%state = (s32[], f32[3,16,8]{2,1,0}) tuple(%n, %w)"
    run = (
        "%loop = (s32[], f32[3,16,8]{2,1,0}) while(%state), condition=%condition, body=%body, "
        f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    )
    return program(state, run, ROOT, computations=loop)


def test_weights_gathered_in_every_microbatch() -> None:
    """Three layers in each of 8 microbatches: 24 gathers of 1,024 B, 3/4 on the wire; 5 of the 8 are too many."""
    (one,) = found(gathering(3 * 8), "SL002", seconds=lambda c: 8.0)
    assert one.message == "gathered 8 times a step over data: 18.0 KiB on the wire"
    assert (one.path, one.bytes, one.seconds) == ("blocks/*/up/kernel", 24 * 768 * 5 // 8, pytest.approx(5.0))
    assert found(gathering(3 * 3), "SL002") == []  # forward, recomputed, backward


def reducing(trips: int) -> str:
    groups = f"replica_groups={OVER['data']}"
    loop = f"""
%body (s: (s32[], f32[3,16,8], bf16[1,64,8])) -> (s32[], f32[3,16,8], bf16[1,64,8]) {{
  %s = (s32[], f32[3,16,8]{{2,1,0}}, bf16[1,64,8]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %sums = f32[3,16,8]{{2,1,0}} get-tuple-element(%s), index=1
  %gradient = bf16[1,64,8]{{2,1,0}} get-tuple-element(%s), index=2
  %piece = bf16[1,16,8]{{2,1,0}} reduce-scatter(%gradient), channel_id=1, {groups}, dimensions={{1}}, to_apply=%add
  %wide = f32[1,16,8]{{2,1,0}} convert(%piece)
  %more = f32[3,16,8]{{2,1,0}} dynamic-update-slice(%sums, %wide, %i, %i, %i)
  ROOT %t = (s32[], f32[3,16,8]{{2,1,0}}, bf16[1,64,8]{{2,1,0}}) tuple(%i, %more, %gradient)
}}
%condition (c: (s32[], f32[3,16,8], bf16[1,64,8])) -> pred[] {{
  %c = (s32[], f32[3,16,8]{{2,1,0}}, bf16[1,64,8]{{2,1,0}}) parameter(0)
  ROOT %true = pred[] constant(true)
}}"""
    lines = (
        "%zeros = f32[3,16,8]{2,1,0} broadcast(%n), dimensions={}",
        "%some = bf16[1,64,8]{2,1,0} broadcast(%n), dimensions={}",
        "%state = (s32[], f32[3,16,8]{2,1,0}, bf16[1,64,8]{2,1,0}) tuple(%n, %zeros, %some)",
        "%loop = (s32[], f32[3,16,8]{2,1,0}, bf16[1,64,8]{2,1,0}) while(%state), condition=%condition, body=%body, "
        f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}',
        "%total = f32[3,16,8]{2,1,0} get-tuple-element(%loop), index=1",
        "%after = f32[3,16,8]{2,1,0} subtract(%w, %total)",
        "ROOT %out = (f32[3,16,8]{2,1,0}, bf16[16,64]{1,0}) tuple(%after, %h)",
    )
    return program(*lines, computations=loop)


def test_gradients_reduced_in_every_microbatch() -> None:
    (one,) = found(reducing(3 * 8), "SL003")
    assert one.message == "its gradient is reduced 8 times a step over data: 18.0 KiB on the wire"
    assert (one.path, one.bytes, one.seconds) == ("blocks/*/up/kernel", 24 * 768 * 7 // 8, None)
    assert found(reducing(3), "SL003") == []


def test_an_all_gather_of_activations() -> None:
    """What the program asks for by name is not one, nor what tensor parallelism takes apart and puts together."""
    line = gather("all", "h", "bf16[16,128]{1,0}", "tensor", 1)
    (one,) = found(program(line, ROOT), "SL004", batch=("data",))
    assert (one.bytes, one.path, one.source) == (2048, "jit(step)/dot_general", "model.py:5")
    assert one.message == "all-gather of dot_general over tensor, 1 a step: 2.0 KiB on the wire"
    asked = gather("all", "h", "bf16[16,128]{1,0}", "tensor", 1, op_name="jit(step)/sharding_constraint")
    assert found(program(asked, ROOT), "SL004") == []
    scattered = (
        f"%scattered = bf16[8,64]{{1,0}} reduce-scatter(%h), channel_id=2, replica_groups={OVER['tensor']}, "
        "dimensions={0}, to_apply=%add"
    )
    assert found(program(line, scattered, ROOT), "SL004", batch=("data",)) == []
    assert len(found(program(line, scattered, ROOT), "SL004", batch=("tensor",))) == 1  # examples, made whole
    weights = gather("all", "w", "f32[3,64,8]{2,1,0}", "data", 1)
    assert found(program(weights, ROOT), "SL004") == []


SAID = (
    "W1125 13:44:12.952356   18550 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler "
    "cannot go from sharding {devices=[2,1,4]<=[4,2]T(1,0)} to {devices=[1,8,1]<=[8]} efficiently for HLO operation "
    "%add.2 = f32[8,16,4]{2,1,0} add(%param, %param), sharding={devices=[2,1,4]<=[4,2]T(1,0)}, metadata={op_name="
    '"jit(step)/add" stack_frame_id=2}. As the last resort, SPMD will replicate the tensor and then partition it.\n'
    "E0531 10:54:04.832741 2609008 spmd_partitioner.cc:569] [spmd] Involuntary full rematerialization. The compiler "
    "was not able to go from sharding {devices=[2,1,4]<=[4,2]T(1,0)} to {devices=[1,8,1]<=[8]} without doing a full "
    "rematerialization of the tensor. You probably want to enrich the sharding annotations to prevent this.\n"
)


def test_what_the_compiler_says_of_full_rematerializations() -> None:
    places = "{devices=[2,1,4]<=[4,2]T(1,0)}", "{devices=[1,8,1]<=[8]}"
    assert involuntary(SAID) == (("jit(step)/add", "", *places), ("an operation", "", *places))
    assert involuntary("W1125 spmd_partitioner.cc:656] all is well") == ()
    line = (
        '%other = bf16[16,64]{1,0} add(%h, %h), metadata={op_name="jit(step)/add" source_file="model.py" source_line=8}'
    )
    one, other = found(program(line, ROOT), "SL005", compiler_said=SAID)
    assert (one.path, one.source, one.bytes, one.seconds) == ("jit(step)/add", "model.py:8", 0, None)
    assert one.message.endswith(f"from {places[0]} to {places[1]}")
    assert other.path == "an operation"


def recut(change: bool) -> str:
    """The program of openxla/xla#15207, compiled: from (tensor, -, data) to one dim over both, or left as it is."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), tuple(AXES), axis_types=(AxisType.Auto,) * 2)
    before = NamedSharding(mesh, P("tensor", None, "data"))
    after = NamedSharding(mesh, P(None, ("data", "tensor"), None)) if change else before

    def f(a: Any, b: Any, c: Any) -> Any:
        return c + lax.with_sharding_constraint(a + b, after)

    x = jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)
    lowered = jax.jit(f, in_shardings=(before, before, after), out_shardings=after).lower(x, x, x)
    return lowered.compile().as_text() or ""


def test_an_activation_made_whole_and_cut_again() -> None:
    one, other = found(recut(True), "SL005", compiler_said=SAID.replace("jit(step)", "jit(f)"))
    assert other.path == "an operation"  # what the compiler says of the first is the first
    # 16 KiB made whole of two halves
    assert (one.bytes, one.path) == (16**3 * 4 // 2, "jit(f)/add")
    assert "of which every device keeps a slice, 1 a step: 8.0 KiB on the wire" in one.message
    assert one.source.rpartition("/")[2].startswith("test_lint.py:")
    assert found(recut(False), "SL005") == []
    codes = [each.code for each in lint(parse(recut(True)), AXES, smallest=1)]
    assert codes.count("SL005") == 1
    assert codes.count("SL004") == 1  # the gather before it is not cut again


def test_float32_where_bfloat16_was_declared() -> None:
    lines = (
        "%wide = f32[16,64]{1,0} convert(%h)",
        f"%sum = f32[16,64]{{1,0}} all-reduce(%wide), channel_id=1, replica_groups={OVER['tensor']}, to_apply=%add",
        "%product = f32[16,16]{1,0} dot(%sum, %sum), lhs_contracting_dims={1}, rhs_contracting_dims={1}, "
        'metadata={op_name="jit(step)/dot_general" source_file="model.py" source_line=4}',
        ROOT,
    )
    reduction, matmul = found(program(*lines), "SL006", dtype="bfloat16")
    assert reduction.message.startswith("all-reduce of dot_general over tensor in float32, 4.0 KiB on the wire")
    assert (reduction.bytes, matmul.bytes) == (2048, 512)
    assert matmul.message == "a matmul in float32, 3.28e-08 TFLOP a step, where bfloat16 was declared"
    assert (matmul.path, matmul.source) == ("jit(step)/dot_general", "model.py:4")
    assert found(program(*lines), "SL006") == []
    assert found(program(*lines), "SL006", dtype="float32") == []
    promoted = [line.replace("%add", "%add_promoted") for line in lines]
    assert len(found(program(*promoted), "SL006", dtype="bfloat16")) == 1  # the compiler's doing, not the program's
    assert found(program(REDUCED, ROOT), "SL006", dtype="bfloat16") == []


def test_reductions_of_gradients_are_judged_by_their_own_dtype() -> None:
    text = reducing(3).replace("bf16[1,", "f32[1,")
    assert found(text, "SL006", dtype="bfloat16") == []
    (one,) = found(text, "SL006", dtype="bfloat16", reduce_dtype="bfloat16")
    assert one.path == "blocks/*/up/kernel"


def test_padding() -> None:
    """Two arrays with 64 columns, in tiles of 128: half of 2 x 8,192 B; one with 128 columns has none."""
    lines = [
        f"%{name} = bf16[32,{columns}]{{1,0:T(8,128)(2,1)}} broadcast(%n), dimensions={{}}"
        for name, columns in (("one", 64), ("two", 64), ("three", 128))
    ]
    last = '%use = bf16[16,64]{1,0} custom-call(%one, %two, %three), custom_call_target="k"'
    (one,) = found(program(*lines, last, ROOT), "SL007")
    assert one.message == "2 of bf16[32,64]{1,0:T(8,128)(2,1)}, 8.0 KiB of 16.0 KiB are the layout's padding"
    assert one.bytes == 8192
    assert found(program(lines[2], last.replace("%one, %two, ", ""), ROOT), "SL007") == []


def test_small_findings_are_left_out_and_the_costliest_come_first() -> None:
    text = program(
        gather("all", "h", "bf16[16,128]{1,0}", "tensor", 1),
        gather("more", "h", "bf16[64,64]{1,0}", "data", 0, op_name="jit(step)/reduce_sum"),
        ROOT,
    )
    assert [one.bytes for one in lint(parse(text), AXES, smallest=1)] == [6144, 2048]
    assert [one.bytes for one in lint(parse(text), AXES, smallest=3000)] == [6144]
    assert lint(parse(text), AXES) == ()


def test_text() -> None:
    one = Finding("SL004", "gathered", "jit(f)/dot", "model.py:3", 7, None, "do not")
    assert str(one) == "SL004 jit(f)/dot (model.py:3): gathered; do not"


def test_a_step_that_has_none_of_them() -> None:
    """An MLP over batch and tensor, its gradients summed once: compiled, and clean."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), tuple(AXES), axis_types=(AxisType.Auto,) * 2)
    specs = {"up": P(None, "tensor"), "down": P("tensor", None)}
    State = namedtuple("State", ["parameters"])

    def step(state: Any, x: Any) -> Any:
        def loss(w: Any) -> Any:
            return (jnp.tanh(x @ w["up"]) @ w["down"]).sum()

        gradients = jax.grad(loss)(state.parameters)
        return State({name: one - 0.1 * gradients[name] for name, one in state.parameters.items()})

    sharding = State({name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    shapes = State({name: jax.ShapeDtypeStruct((64, 64), jnp.float32) for name in specs})
    lowered = jax.jit(
        step, in_shardings=(sharding, NamedSharding(mesh, P("data"))), out_shardings=sharding, donate_argnums=0
    ).lower(shapes, jax.ShapeDtypeStruct((16, 64), jnp.float32))
    module = parse(lowered.compile().as_text() or "")
    assert lint(module, AXES, batch=("data",), smallest=1) == ()


def seconds(one: Collective) -> float:
    return one.wire_bytes / 1e9


def test_seconds_are_those_of_the_caller() -> None:
    text = program(gather("all", "h", "bf16[16,128]{1,0}", "tensor", 1), ROOT)
    assert [one.seconds for one in lint(parse(text), AXES, smallest=1, seconds=seconds)] == [2048 / 1e9]


def test_parameters_that_are_moved_as_often_are_one_finding() -> None:
    """Two gathered 8 times over data, where 3 would do, and one 6 times: by what sends most, costs together."""

    def moved(path: str, times: float, wire: float) -> _Moved:
        return _Moved(path, ("data",), "model.py:1", times, wire, 1.0)

    moves = [moved("blocks/*/up", 8.0, 800.0), moved("blocks/*/down", 8.2, 1600.0), moved("head", 6.0, 60.0)]
    two, head = _again("SL002", [*moves, moved("norm", 3.0, 9.0)], 3, 3.5, "gathered", "gather once")
    assert (two.path, two.message) == (
        "blocks/*/down",
        "gathered 8 times a step over data, and that of 1 more: 2.3 KiB on the wire",
    )
    assert two.bytes == round(800 * 5 / 8 + 1600 * 5.2 / 8.2)
    assert two.seconds == pytest.approx(5 / 8 + 5.2 / 8.2)
    assert (head.path, head.bytes) == ("head", 30)
