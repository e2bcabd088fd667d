"""What is live at the peak: by hand, and of compiled programs beside what the compiler assigns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.hlo import Live, live, parse
from tests.tpu import printed_by

Row = tuple[str, str, int]  # name, kind, bytes


def rows(found: Live) -> list[Row]:
    return [(one.name, one.kind, one.bytes) for one in found.buffers]


LOOP = """
HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%body (s: (s32[], f32[100], f32[40])) -> (s32[], f32[100], f32[40]) {
  %s = (s32[], f32[100]{0}, f32[40]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %sum = f32[100]{0} get-tuple-element(%s), index=1
  %w = f32[40]{0} get-tuple-element(%s), index=2
  %wide = f32[200]{0} broadcast(%w), dimensions={}, metadata={op_name="jit(step)/while/body/wide" source_file="model.py" source_line=3}
  %part = f32[100]{0} slice(%wide), slice={[0:100]}
  %next = f32[100]{0} add(%sum, %part)
  ROOT %t = (s32[], f32[100]{0}, f32[40]{0}) tuple(%i, %next, %w)
}

%condition (c: (s32[], f32[100], f32[40])) -> pred[] {
  %c = (s32[], f32[100]{0}, f32[40]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: f32[100], w0: f32[40]) -> (f32[100], f32[7]) {
  %x = f32[100]{0} parameter(0), metadata={op_name="state.parameters['x']"}
  %w0 = f32[40]{0} parameter(1), metadata={op_name="batch['w']"}
  %n = s32[] parameter(2)
  %zeros = f32[100]{0} broadcast(%n), dimensions={}, metadata={op_name="jit(step)/zeros"}
  %weights = f32[40]{0} negate(%w0), metadata={op_name="jit(step)/neg"}
  %state = (s32[], f32[100]{0}, f32[40]{0}) tuple(%n, %zeros, %weights)
  %loop = (s32[], f32[100]{0}, f32[40]{0}) while(%state), condition=%condition, body=%body
  %total = f32[100]{0} get-tuple-element(%loop), index=1
  %after = f32[100]{0} add(%x, %total)
  %some = f32[7]{0} slice(%total), slice={[0:7]}
  ROOT %out = (f32[100]{0}, f32[7]{0}) tuple(%after, %some)
}
"""  # noqa: E501


def test_a_loop_carries_its_buffers_and_a_donated_argument_is_given_back() -> None:
    """At the peak, inside the loop: the carry (400 + 160 B), what the trip makes (800 + 400 B), and all arguments.

    The output of 28 B has no argument's place; the sum goes into the carry's own buffer.
    """
    found = live(parse(LOOP))
    assert rows(found) == [
        ("wide", "temporary", 800),
        ("x", "argument", 400),
        ("zeros", "temporary", 400),
        ("part", "temporary", 400),
        ("w0", "argument", 160),
        ("weights", "temporary", 160),
        ("some", "output", 28),
        ("n", "argument", 4),
    ]
    assert (found.peak_bytes, found.argument_bytes, found.output_bytes, found.temporary_bytes) == (2352, 564, 28, 1760)
    assert found.at == "part"
    wide = found.buffers[0]
    assert (wide.op_name, wide.source, wide.computation) == ("jit(step)/while/body/wide", "model.py:3", "body")
    x = found.buffers[1]
    assert (x.op_name, x.parameter, x.shape) == ("state.parameters['x']", 0, "f32[100]{0}")


TPU = """
HloModule step, is_scheduled=true

%update (p: f32[4,8,128], q: f32[1,8,128], r: s32[]) -> f32[4,8,128] {
  %p = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %q = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %r = s32[]{:T(128)} parameter(2)
  ROOT %into = f32[4,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p, %q, %r, %r, %r)
}

ENTRY %main (x: f32[8,100], i: s32[]) -> f32[8,128] {
  %x = f32[8,100]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %stack = f32[4,8,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %row = f32[1,8,128]{2,1,0:T(8,128)} pad(%x, %i), padding=0_0x0_28
  %copy-start.1 = (f32[8,100]{1,0:T(8,128)S(1)}, f32[8,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %slice-start.1 = ((f32[8,100]{1,0:T(8,128)}), f32[8,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:4]}
  %stacked = f32[4,8,128]{2,1,0:T(8,128)} fusion(%stack, %row, %i), kind=kLoop, calls=%update, backend_config={"flag_configs":[],"aliasing_operands":{"lists":[{"indices":["0","3"]}]}}
  %copy-done.1 = f32[8,100]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %slice-done.1 = f32[8,4]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %twice = f32[8,100]{1,0:T(8,128)S(1)} add(%copy-done.1, %copy-done.1)
  %first = f32[8,128]{1,0:T(8,128)} slice(%stacked), slice={[0:1], [0:8], [0:128]}
  ROOT %end = f32[8,128]{1,0:T(8,128)} negate(%first), backend_config={"aliasing_operands":{"lists":[]}}
}
"""  # noqa: E501


def test_tpu_pads_aliases_what_it_says_and_keeps_on_the_chip_what_is_there() -> None:
    """A tile is 4,096 B: x and the row one, the stack four, updated in place; what is in space 1 is not counted."""
    found = live(parse(TPU))
    assert rows(found) == [
        ("stack", "temporary", 16384),
        ("x", "argument", 4096),
        ("row", "temporary", 4096),
        ("end", "output", 4096),
        ("i", "argument", 512),
    ]
    assert [(one.name, one.padding) for one in found.buffers if one.padding] == [("x", 8 * 28 * 4), ("i", 508)]


PLACES = """
HloModule step, is_scheduled=true
%minus (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %m = f32[100]{0} negate(%p)
}
ENTRY %main (n: s32[], u: f32[1]) -> f32[10] {
  %n = s32[] parameter(0)
  %u = f32[1]{0} parameter(1)
  %a = f32[100]{0} broadcast(%n), dimensions={}
  %b = f32[100]{0} dynamic-update-slice(%a, %u, %n)
  %c = f32[100]{0} fusion(%b), kind=kLoop, calls=%minus
  READ
  ROOT %d = f32[10]{0} slice(%c), slice={[0:10]}
}
"""


@pytest.mark.parametrize(
    ("read", "most"),
    [("%e = f32[1]{0} slice(%c), slice={[0:1]}", 404), ("%e = f32[1]{0} slice(%b), slice={[0:1]}", 804)],
)
def test_a_result_takes_the_place_of_what_is_not_read_again(read: str, most: int) -> None:
    """One buffer of 400 B for an array, the same updated, and its negative: two where the updated is read later."""
    assert live(parse(PLACES.replace("READ", read))).temporary_bytes == most


BRANCHES = """
HloModule step, is_scheduled=true
%yes (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %big = f32[1000]{0} broadcast(%p), dimensions={}
  ROOT %y = f32[10]{0} slice(%big), slice={[0:10]}
}
%no (q: f32[10]) -> f32[10] {
  %q = f32[10]{0} parameter(0)
  %less = f32[500]{0} broadcast(%q), dimensions={}
  ROOT %z = f32[10]{0} slice(%less), slice={[0:10]}
}
ENTRY %main (x: f32[10], which: pred[]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %which = pred[] parameter(1)
  %a = f32[10]{0} negate(%x)
  %b = f32[10]{0} conditional(%which, %a, %a), true_computation=%yes, false_computation=%no
  %c = f32[20]{0} concatenate(%b, %a), dimensions={0}
  ROOT %d = f32[10]{0} slice(%c), slice={[0:10]}
}
"""


def test_of_branches_the_larger_one() -> None:
    """4,000 B of the first branch, the value before and after, and the result of the branch."""
    assert rows(live(parse(BRANCHES))) == [
        ("big", "temporary", 4000),
        ("x", "argument", 40),
        ("a", "temporary", 40),
        ("y", "temporary", 40),
        ("d", "output", 40),
        ("which", "argument", 1),
    ]


def scanned(w: Any, x: Any) -> Any:
    return lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0].sum()


def sharded(mesh: Mesh) -> Callable[..., Any]:
    def step(w: Any, x: Any) -> Any:
        x = lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", None)))
        loss, grad = jax.value_and_grad(scanned)(w, x)
        return w - 0.1 * grad, loss

    return step


PROGRAMS: dict[str, Callable[[], Any]] = {
    "a scan": lambda: jax.jit(scanned).lower(jnp.zeros((6, 64, 64)), jnp.zeros((128, 64))),
    "its gradient": lambda: jax.jit(jax.grad(scanned)).lower(jnp.zeros((6, 64, 64)), jnp.zeros((128, 64))),
    "a step that gives its weights back": lambda: jax.jit(
        lambda w, x: (w - 0.1 * jax.grad(scanned)(w, x), jnp.ones(5)), donate_argnums=0
    ).lower(jnp.zeros((6, 64, 64)), jnp.zeros((128, 64))),
    "a sharded step": lambda: jax.jit(
        sharded(mesh := Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))),
        in_shardings=(NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P("data"))),
        donate_argnums=0,
    ).lower(jnp.zeros((6, 64, 64)), jnp.zeros((256, 64))),
    "branches": lambda: jax.jit(
        lambda i, x: lax.switch(i, [lambda x: (x @ x).sum(), lambda x: jnp.tanh(x @ x @ x).sum()], x)
    ).lower(0, jnp.zeros((200, 200))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs_beside_the_compilers_assignment(name: str) -> None:
    """Arguments and outputs to the byte; temporaries never more, and all but the gaps and the tables of pointers."""
    compiled = PROGRAMS[name]().compile()
    found, said = live(parse(compiled.as_text())), compiled.memory_analysis()
    assert found.argument_bytes == said.argument_size_in_bytes
    assert found.output_bytes == pytest.approx(said.output_size_in_bytes - said.alias_size_in_bytes, abs=64)
    assert 0.95 * said.temp_size_in_bytes - 1024 <= found.temporary_bytes <= said.temp_size_in_bytes
    assert found.peak_bytes == sum(one.bytes for one in found.buffers)


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from shardlab.hlo import live, parse

devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
place = lambda *spec: NamedSharding(mesh, P(*spec))

def loss(w, x):
    def layer(h, one):
        one = lax.with_sharding_constraint(one, place())
        return jnp.tanh(h @ one), None
    return lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

def step(w, x):
    return w - 0.1 * jax.grad(loss)(w, x)

w, x = jax.ShapeDtypeStruct((6, 2048, 2048), jnp.float32), jax.ShapeDtypeStruct((65536, 2048), jnp.bfloat16)
compiled = jax.jit(
    lambda w, x: step(w.astype(jnp.bfloat16), x).astype(jnp.float32),
    in_shardings=(place(None, "data"), place("data")), out_shardings=place(None, "data"), donate_argnums=0,
).lower(w, x).compile()
print(live(parse(compiled.as_text())).peak_bytes, compiled.memory_analysis().peak_memory_in_bytes)
"""


@pytest.mark.tpu
def test_the_peak_of_a_tpu_program_is_the_compilers() -> None:
    """Needs libtpu, and no TPU."""
    printed = printed_by(PROGRAM)
    ours, theirs = map(int, printed.split())
    assert math.isclose(ours, theirs, rel_tol=0.01)
