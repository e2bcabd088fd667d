"""FLOPs and bytes of instructions: by hand, and of compiled programs beside XLA's own count."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from shardlab.hlo import parse, visits
from shardlab.hlo.work import flops, moved, scheduled

# Of TPU: a dot is a convolution, and a batch of them one with the batch as a dim of the window.
PRODUCTS: dict[str, tuple[str, str, str, int]] = {
    "plain": (
        "f32[8,4]{1,0}",
        "f32[4,2]{1,0}",
        "f32[8,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        2 * 8 * 2 * 4,
    ),
    "two dims contracted, a batch": (
        "f32[3,8,4,5]{3,2,1,0}",
        "f32[3,4,5,2]{3,2,1,0}",
        "f32[3,8,2]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2,3}, rhs_batch_dims={0}, "
        "rhs_contracting_dims={1,2}",
        2 * 3 * 8 * 2 * 20,
    ),
    "TPU": (
        "bf16[8,4]{1,0}",
        "bf16[4,2]{1,0}",
        "bf16[8,2]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
        2 * 8 * 2 * 4,
    ),
    # window of 3 over a base spread out by 3: one place of the window meets an element in each place of the result
    "TPU, a batch": (
        "bf16[3,8,4]{2,1,0}",
        "bf16[3,4,2]{2,1,0}",
        "bf16[3,8,2]{2,1,0} convolution(%a, %b), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
        2 * 3 * 8 * 2 * 4,
    ),
    # three taps, padded by one at each end: the outermost places of the result meet two elements
    "padding does not multiply": (
        "f32[1,5,4]{2,1,0}",
        "f32[3,4,2]{2,1,0}",
        "f32[1,5,2]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
        2 * (3 * 5 - 2) * 4 * 2,
    ),
    # four channels in two groups: two of them meet
    "groups of features": (
        "f32[1,5,4]{2,1,0}",
        "f32[1,2,4]{2,1,0}",
        "f32[1,5,4]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=2",
        2 * 5 * 2 * 4,
    ),
    "cuBLAS": (
        "bf16[8,4]{1,0}",
        "bf16[4,2]{1,0}",
        '(bf16[8,2]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
        '{"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}',
        2 * 8 * 2 * 4,
    ),
    "cuDNN attention, causal": (
        "bf16[2,16,4,8]{3,2,1,0}",
        "bf16[2,16,4,8]{3,2,1,0}",
        '(bf16[2,16,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b, %b), custom_call_target="__cudnn$fmhaSoftmax", '
        'backend_config={"cudnn_fmha_backend_config":{"mask_type":"CAUSAL","intermediate_tensor_shape":'
        '{"element_type":"BF16","dimensions":["2","4","16","16"],"tuple_shapes":[]}}}',
        2 * 2 * (2 * 4 * 16 * 16) * 8 // 2,
    ),
    "a kernel that says its cost": (
        "bf16[8]{0}",
        "bf16[8]{0}",
        'bf16[8]{0} custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
        '{"body":"AA==","cost_estimate":{"flops":"12345","bytes_accessed":"7"}}}',
        12345,
    ),
    "no product": ("f32[8]{0}", "f32[8]{0}", "f32[8]{0} add(%a, %b)", 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_one_instruction(name: str) -> None:
    a, b, line, expected = PRODUCTS[name]
    module = parse(
        f"HloModule one\nENTRY %main (a: f32[], b: f32[]) -> f32[] {{\n"
        f"  %a = {a} parameter(0)\n  %b = {b} parameter(1)\n  ROOT %root = {line}\n}}"
    )
    main = module.computations[module.entry]
    assert flops(module, main, main.root) == expected


def attention(x: Any, w: Any) -> Any:
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, w[n]) for n in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
    return jnp.einsum("bhts,bshe->bthe", scores, v)


def convolved(x: Any, w: Any) -> Any:
    return lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


COMPILED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "product": (lambda a, b: a @ b, ((24, 32), (32, 40))),
    "attention and its gradient": (
        jax.grad(lambda w, x: attention(x, w).sum()),
        (dict.fromkeys("qkv", (16, 4, 8)), (2, 24, 16)),
    ),
    "convolution": (convolved, ((2, 17, 9, 4), (3, 3, 4, 8))),
}


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and isinstance(x[0], int)


@pytest.mark.parametrize("name", COMPILED)
def test_flops_of_a_compiled_program_beside_xlas_count(name: str) -> None:
    """XLA counts elementwise operations too: ours is all but a few percent of its."""
    f, shapes = COMPILED[name]
    arguments = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=is_shape)
    compiled = jax.jit(f).lower(*arguments).compile()
    module = parse(compiled.as_text() or "")
    ours = sum(flops(module, c, i) for c in scheduled(module) for i in c.instructions.values())
    cost = compiled.cost_analysis()
    assert cost is not None
    assert 0.9 * cost["flops"] <= ours <= cost["flops"]


def test_flops_in_loops_count_with_their_trips() -> None:
    step = jax.jit(lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0])
    text = step.lower(jnp.zeros((4, 8)), jnp.zeros((8, 8))).compile().as_text()
    module = parse(text or "")
    runs = visits(module, lambda where, i: 0.0)
    total = sum(
        runs[c.name].executions * flops(module, c, i) for c in scheduled(module) for i in c.instructions.values()
    )
    assert total == 7 * 2 * 4 * 8 * 8


BYTES = """
HloModule bytes
%sliced (p: f32[100,4], q: s32[]) -> f32[1,4] {
  %p = f32[100,4]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %view = f32[100,4]{1,0} bitcast(%p)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%view, %q, %q), dynamic_slice_sizes={1,4}
}
%updated (p.1: f32[100,4], q.1: f32[1,4], r.1: s32[]) -> f32[100,4] {
  %p.1 = f32[100,4]{1,0} parameter(0)
  %q.1 = f32[1,4]{1,0} parameter(1)
  %r.1 = s32[] parameter(2)
  ROOT %into = f32[100,4]{1,0} dynamic-update-slice(%p.1, %q.1, %r.1, %r.1)
}
%two (p.2: f32[100,4]) -> (f32[100,4], f32[4]) {
  %p.2 = f32[100,4]{1,0} parameter(0)
  %sum = f32[4]{0} slice(%p.2), slice={[0:1]}
  %minus = f32[100,4]{1,0} negate(%p.2)
  ROOT %both = (f32[100,4]{1,0}, f32[4]{0}) tuple(%minus, %sum)
}
ENTRY %main (x: f32[100,4], i: s32[], u: f32[1,4], v: f32[100,4]) -> f32[100,4] {
  %x = f32[100,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[1,4]{1,0} parameter(2)
  %v = f32[100,4]{1,0:S(1)} parameter(3)
  %add = f32[100,4]{1,0} add(%x, %x)
  %slice = f32[1,4]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,4}
  %update = f32[100,4]{1,0} dynamic-update-slice(%x, %u, %i, %i)
  %fused_slice = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  %fused_update = f32[100,4]{1,0} fusion(%x, %u, %i), kind=kLoop, calls=%updated
  %fused_pair = (f32[100,4]{1,0}, f32[4]{0}) fusion(%x), kind=kLoop, calls=%two
  %near = f32[100,4]{1,0} negate(%v)
  ROOT %root = f32[100,4]{1,0} copy(%x)
}
"""
# 1,600 bytes a matrix, 16 a row, 4 an index.
MOVED = {
    "add": 3 * 1600,
    "slice": 2 * 16,
    "update": 2 * 16,
    "fused_slice": 16 + 4 + 16,
    "fused_update": 16 + 4 + 16,
    "fused_pair": 1600 + 1600 + 16,
    "near": 1600,  # its operand is on the chip
    "root": 2 * 1600,
}


@pytest.mark.parametrize("name", MOVED)
def test_bytes_moved(name: str) -> None:
    module = parse(BYTES)
    main = module.computations[module.entry]
    assert moved(module, main, main.instructions[name]) == MOVED[name]


def test_bytes_of_a_compiled_program_beside_xlas_count() -> None:
    compiled = jax.jit(lambda a, b: jnp.tanh(a @ b) * 2).lower(jnp.zeros((64, 128)), jnp.zeros((128, 32))).compile()
    module = parse(compiled.as_text() or "")
    ours = sum(
        moved(module, c, i)
        for c in scheduled(module)
        for i in c.instructions.values()
        if i.opcode not in ("parameter", "call", "bitcast")
    )
    cost = compiled.cost_analysis()
    assert cost is not None
    assert math.isclose(ours, cost["bytes accessed"], rel_tol=0.05)
