"""Which parameter or layer an instruction belongs to: in small programs, and in ones that JAX has compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.hlo import Cause, HloModule, cause, collectives, parse
from shardlab.hlo.origin import parts, path_of

GATHERED = """
HloModule step, num_partitions=2

%slice_of (p: bf16[3,8], k: s32[]) -> bf16[1,8] {
  %p = bf16[3,8]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %layer = bf16[1,8]{1,0} dynamic-slice(%p, %k, %k), dynamic_slice_sizes={1,8}
}

%body (s: (s32[], bf16[3,8], bf16[1,16], bf16[1,8])) -> (s32[], bf16[3,8], bf16[1,16], bf16[1,8]) {
  %s = (s32[], bf16[3,8]{1,0}, bf16[1,16]{1,0}, bf16[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %weights = bf16[3,8]{1,0} get-tuple-element(%s), index=1
  %x = bf16[1,16]{1,0} get-tuple-element(%s), index=2
  %h = bf16[1,8]{1,0} get-tuple-element(%s), index=3
  %one = bf16[1,8]{1,0} fusion(%weights, %i), kind=kLoop, calls=%slice_of
  %gathered = bf16[1,16]{1,0} all-gather(%one), channel_id=1, replica_groups={{0,1}}, dimensions={1}
  %activations = bf16[1,16]{1,0} all-gather(%h), channel_id=2, replica_groups={{0,1}}, dimensions={1}, metadata={op_name="jit(step)/transpose(jvp(mlp))/dot_general" source_file="/home/user/model.py" source_line=9}
  %y = bf16[1,16]{1,0} multiply(%x, %gathered)
  %less = bf16[1,8]{1,0} slice(%y), slice={[0:1], [0:8]}
  ROOT %t = (s32[], bf16[3,8]{1,0}, bf16[1,16]{1,0}, bf16[1,8]{1,0}) tuple(%i, %weights, %y, %less)
}

%condition (c: (s32[], bf16[3,8], bf16[1,16], bf16[1,8])) -> pred[] {
  %c = (s32[], bf16[3,8]{1,0}, bf16[1,16]{1,0}, bf16[1,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (w: f32[3,8], x0: bf16[1,16], h0: bf16[1,8]) -> bf16[1,16] {
  %w = f32[3,8]{1,0} parameter(0), metadata={op_name="state.parameters[\\'blocks/*/up/kernel\\']"}
  %x0 = bf16[1,16]{1,0} parameter(1), metadata={op_name="batch[\\'x\\']"}
  %h0 = bf16[1,8]{1,0} parameter(2), metadata={op_name="state.parameters[\\'h\\']"}
  %n = s32[] constant(0)
  %half = bf16[3,8]{1,0} convert(%w)
  %state = (s32[], bf16[3,8]{1,0}, bf16[1,16]{1,0}, bf16[1,8]{1,0}) tuple(%n, %half, %x0, %h0)
  %loop = (s32[], bf16[3,8]{1,0}, bf16[1,16]{1,0}, bf16[1,8]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %last = bf16[1,16]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def of(text: str, name: str) -> Cause:
    module = parse(text)
    return cause(module, module.home[name].instructions[name])


def test_back_through_fusions_converts_and_what_a_loop_keeps() -> None:
    found = of(GATHERED, "gathered")
    assert found.what == "all-gather of blocks/*/up/kernel (weights)"
    assert (found.role, found.path) == ("weights", "blocks/*/up/kernel")


def test_what_a_loop_changes_is_no_parameter_although_it_starts_as_one() -> None:
    found = of(GATHERED, "activations")
    assert (found.what, found.role, found.path) == ("all-gather of dot_general (backward)", "activation", None)
    assert found.source == "/home/user/model.py:9"


REDUCED = """
HloModule step, num_partitions=2, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias) }

%adam (p: f32[8], m: f32[8], g: f32[8]) -> (f32[8], f32[8]) {
  %p = f32[8]{0} parameter(0)
  %m = f32[8]{0} parameter(1)
  %g = f32[8]{0} parameter(2)
  %moment = f32[8]{0} add(%m, %g)
  %after = f32[8]{0} subtract(%p, %moment)
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%after, %moment)
}

%body (s: (s32[], f32[8], bf16[16])) -> (s32[], f32[8], bf16[16]) {
  %s = (s32[], f32[8]{0}, bf16[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %sum = f32[8]{0} get-tuple-element(%s), index=1
  %x = bf16[16]{0} get-tuple-element(%s), index=2
  %scattered = bf16[8]{0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}, to_apply=%plus
  %wide = f32[8]{0} convert(%scattered)
  %next = f32[8]{0} add(%sum, %wide)
  ROOT %t = (s32[], f32[8]{0}, bf16[16]{0}) tuple(%i, %next, %x)
}

%condition (c: (s32[], f32[8], bf16[16])) -> pred[] {
  %c = (s32[], f32[8]{0}, bf16[16]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (w: f32[8], mu: f32[8], x0: bf16[16]) -> (f32[8], f32[8], bf16[16], bf16[4]) {
  %w = f32[8]{0} parameter(0), metadata={op_name="state.parameters['head/kernel']"}
  %mu = f32[8]{0} parameter(1), metadata={op_name="state.optimizer[0].mu['head']['kernel']"}
  %x0 = bf16[16]{0} parameter(2)
  %n = s32[] constant(0)
  %zeros = f32[8]{0} broadcast(%n), dimensions={}
  %state = (s32[], f32[8]{0}, bf16[16]{0}) tuple(%n, %zeros, %x0)
  %loop = (s32[], f32[8]{0}, bf16[16]{0}) while(%state), condition=%condition, body=%body
  %total = f32[8]{0} get-tuple-element(%loop), index=1
  %update = (f32[8]{0}, f32[8]{0}) fusion(%w, %mu, %total), kind=kLoop, calls=%adam
  %w1 = f32[8]{0} get-tuple-element(%update), index=0
  %mu1 = f32[8]{0} get-tuple-element(%update), index=1
  %again = bf16[8]{0} convert(%w1)
  %pieces = bf16[8]{0} negate(%again)
  %back = bf16[16]{0} all-gather(%pieces), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %small = bf16[4]{0} slice(%x0), slice={[0:4]}
  %mixed = (f32[8]{0}, bf16[4]{0}) all-reduce(%total, %small), channel_id=3, replica_groups={{0,1}}, to_apply=%plus
  %one = bf16[4]{0} get-tuple-element(%mixed), index=1
  ROOT %out = (f32[8]{0}, f32[8]{0}, bf16[16]{0}, bf16[4]{0}) tuple(%w1, %mu1, %back, %one)
}
"""


def test_on_through_the_carry_of_a_loop_and_the_optimizer() -> None:
    found = of(REDUCED, "scattered")
    assert found.what == "reduce-scatter of the gradient of head/kernel"
    assert (found.role, found.paths) == ("gradient", ("head/kernel",))
    assert of(REDUCED, "zeros").what == "the gradient of head/kernel"  # where its sum is begun
    assert of(REDUCED, "w").what == "head/kernel (weights)"
    assert of(REDUCED, "mu").what == "head/kernel (optimizer state)"


def test_the_parts_of_a_combined_collective() -> None:
    """The first operand's result is dropped, so it goes nowhere; the second is handed back, in no argument's place."""
    module = parse(REDUCED)
    made_of = parts(module, module.home["mixed"].instructions["mixed"])
    assert [(part.role, part.bytes) for part in made_of] == [("activation", 32), ("activation", 8)]
    swapped = REDUCED.replace("tuple(%w1, %mu1, %back, %one)", "tuple(%w1, %first, %back, %one)").replace(
        "  %one = bf16[4]", "  %first = f32[8]{0} get-tuple-element(%mixed), index=0\n  %one = bf16[4]"
    )
    module = parse(swapped)
    mixed = module.home["mixed"].instructions["mixed"]
    assert [(part.role, part.paths) for part in parts(module, mixed)] == [
        ("gradient", ("head/kernel",)),
        ("activation", ()),
    ]
    assert cause(module, mixed).what == "all-reduce of the gradient of head/kernel and others"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("state.parameters['blocks/*/mlp/up/kernel']", "blocks/*/mlp/up/kernel"),
        ("state.parameters[\\'tokens/embedding\\']", "tokens/embedding"),
        ("state.optimizer[0].nu['blocks'][3]['up']", "blocks/3/up"),
        ("state.optimizer[0].count", "count"),
        ("batch['tokens']", "tokens"),
        ("x", "x"),
    ],
)
def test_paths(name: str, path: str) -> None:
    assert path_of(name) == path


STACKED = """
HloModule step, num_partitions=2

FileNames
1 "/home/user/train.py"
2 "/home/user/model.py"
3 "/env/lib/site-packages/flax/linear.py"
4 "/env/lib/site-packages/shardlab/step/cells.py"
5 "/env/lib/site-packages/shardlab/models/decoder.py"

FunctionNames
1 "main"
2 "Attention.__call__.<locals>.heads"
3 "Linear.__call__"
4 "Cells.head"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=4 function_name_id=4 line=20 end_line=20 column=1 end_column=2}
3 {file_name_id=2 function_name_id=2 line=30 end_line=30 column=1 end_column=2}
4 {file_name_id=3 function_name_id=3 line=40 end_line=40 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %v = f32[4]{0} negate(%x)
  %inner = f32[4]{0} all-reduce(%v), channel_id=1, replica_groups={{0,1}}, to_apply=%add, metadata={op_name="jit(step)/checkpoint/rematted_computation/dot_general" stack_frame_id=4}
  ROOT %outer = f32[4]{0} all-reduce(%inner), channel_id=2, replica_groups={{0,1}}, to_apply=%add, metadata={op_name="jit(step)/psum" stack_frame_id=2}
}
"""  # noqa: E501


def test_the_line_of_the_users_model_is_the_innermost_that_is_no_librarys() -> None:
    module = parse(STACKED)
    inner = module.computations["main"].instructions["inner"]
    assert [place for place, _ in module.stack(inner)] == [
        "/env/lib/site-packages/flax/linear.py:40",
        "/home/user/model.py:30",
        "/env/lib/site-packages/shardlab/step/cells.py:20",
        "/home/user/train.py:10",
    ]
    found = cause(module, inner)
    assert (found.what, found.source) == (
        "all-reduce of dot_general in Attention (recomputed)",
        "/home/user/model.py:30",
    )


def test_what_shardlab_does_is_not_put_on_the_line_that_called_it() -> None:
    found = of(STACKED, "outer")
    assert found.source == "/env/lib/site-packages/shardlab/step/cells.py:20"
    assert found.what == "all-reduce of psum in shardlab.step.cells"


# What JAX compiles for the emulated devices: an MLP, its weights stored in pieces over `data`, and its update.


def compiled() -> HloModule:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    stored = {"up": P("data", "tensor"), "down": P("tensor", "data")}

    def loss(w: Any, x: Any) -> Any:
        whole = {"up": P(None, "tensor"), "down": P("tensor", None)}
        w = {name: lax.with_sharding_constraint(one, NamedSharding(mesh, whole[name])) for name, one in w.items()}
        return ((jnp.tanh(x @ w["up"]) @ w["down"]) ** 2).sum()

    def step(state: Any, x: Any) -> Any:
        gradients = jax.grad(loss)(state.parameters, x)
        update = {n: p - 0.1 * gradients[n] for n, p in state.parameters.items()}
        return type(state)(update)

    from collections import namedtuple

    State = namedtuple("State", ["parameters"])
    sharding = State({name: NamedSharding(mesh, spec) for name, spec in stored.items()})
    shapes = State(
        {"up": jax.ShapeDtypeStruct((64, 32), jnp.float32), "down": jax.ShapeDtypeStruct((32, 64), jnp.float32)}
    )
    lowered = jax.jit(
        step, in_shardings=(sharding, NamedSharding(mesh, P("data"))), out_shardings=sharding, donate_argnums=0
    ).lower(shapes, jax.ShapeDtypeStruct((16, 64), jnp.float32))
    return parse(lowered.compile().as_text() or "")


def test_of_a_compiled_program() -> None:
    module = compiled()
    found = collectives(module, {"data": 4, "tensor": 2})
    told = {cause(module, module.home[one.name].instructions[one.name]).what: one.axes for one in found}
    assert told["all-gather of up (weights)"] == ("data",)
    assert told["all-gather of down (weights)"] == ("data",)
    gradients = [what for what in told if "the gradient of" in what]
    assert sorted(", ".join(what.rpartition("gradient of ")[2] for what in gradients).split(", ")) == ["down", "up"]
    assert any(axes == ("tensor",) and "dot_general" in what for what, axes in told.items())
