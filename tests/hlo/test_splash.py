"""FLOPs of splash attention's kernels, by hand, from calls as XLA:TPU prints them (jax 0.10.2, libtpu 0.0.42.1)."""

import pytest

from shardlab.hlo import Rates, parse, times
from shardlab.hlo.work import products

# 4 heads over 2 of keys, 4 x 4 blocks of 512: causal, ten of them run.
MASK, Q, K = "s8[1,4,4]{2,1,0}", "bf16[4,2048,128]{2,1,0}", "bf16[2,2048,128]{2,1,0}"
ROW, STATS = "s32[2048,128]{1,0}", "f32[4,1,2048]{2,1,0}"
ONE = 2 * 4 * 512 * 512 * 128  # one product in one block of every head
FORWARD = [MASK, MASK, Q, K, K, ROW]
BACKWARD = [MASK, MASK, Q, K, K, STATS, Q, STATS, "s32[8,2048]{1,0}"]
SCRATCH = "f32[512,128]{1,0}"

CALLS: dict[str, tuple[str, str, list[str], dict[str, int], int]] = {
    "forward": ("mha_fwd_residuals", f"({SCRATCH}, {Q}, f32[4,2048,128])", FORWARD, {}, 10 * 2),
    "forward, nothing kept": ("mha_fwd_no_residuals", f"({SCRATCH}, {Q})", FORWARD, {}, 10 * 2),
    "gradient of queries": ("mha_dq_no_residuals", f"({SCRATCH}, {Q})", BACKWARD, {}, 10 * 3),
    "gradient of keys and values": ("mha_dkv_no_residuals", f"({SCRATCH}, {K}, {K})", BACKWARD, {}, 10 * 4),
    "gradient of all three": (
        "mha_dkv_no_residuals",
        f"({SCRATCH}, bf16[4,4,2048,128], {K}, {K})",
        BACKWARD,
        {},
        10 * 5,
    ),
    "a batch": (
        "mha_fwd_residuals",
        f"({SCRATCH})",
        [MASK, MASK, "bf16[3,4,2048,128]", "bf16[3,2,2048,128]", "bf16[3,2,2048,128]", ROW],
        {},
        3 * 10 * 2,
    ),
    "values of twice the width": (
        "mha_fwd_residuals",
        f"({SCRATCH})",
        [MASK, MASK, Q, K, "bf16[2,2048,256]", ROW],
        {},
        10 * 3,
    ),
    "one head of keys": (
        "mqa_fwd_residuals",
        f"({SCRATCH})",
        [MASK, MASK, Q, "bf16[2048,128]", "bf16[2048,128]", ROW],
        {},
        10 * 2,
    ),
    "queries in the last dim": (
        "mha_fwd_residuals",
        f"({SCRATCH})",
        [MASK, MASK, "bf16[4,128,2048]", K, K, ROW],
        {"q_layout": 2},
        10 * 2,
    ),
    "keys in wide blocks": (  # rows of two blocks, of which one, one, two and two run: twelve of 512
        "mha_fwd_residuals",
        f"({SCRATCH})",
        ["s8[1,4,2]", "s8[1,4,2]", Q, K, K, ROW],
        {"block_kv": 1024},
        12 * 2,
    ),
    "all of it": ("mha_fwd_residuals", f"({SCRATCH})", [MASK, MASK, Q, K, K], {}, 16 * 2),
    "a mask of the user's": (
        "mha_fwd_residuals",
        f"({SCRATCH})",
        [MASK, MASK, MASK, Q, K, K, "s32[3,512,512]"],
        {},
        16 * 2,
    ),
    "a window, its grid two blocks wide": (
        "mha_fwd_residuals",
        f"({SCRATCH})",
        ["s8[1,4,2]", "s8[1,4,2]", Q, K, K, ROW],
        {},
        8 * 2,
    ),
    "segments": ("mha_fwd_segmented_residuals", f"({SCRATCH})", [*FORWARD[:5], ROW, "s32[8,2048]"], {}, 16 * 2),
    "segments, causal": (
        "mha_fwd_segmented_residuals",
        f"({SCRATCH})",
        [*FORWARD[:5], ROW, "s32[8,2048]", ROW],
        {},
        10 * 2,
    ),
    "queries of a part of the sequence": (
        "mha_fwd_residuals",
        f"({SCRATCH})",
        ["s8[1,2,4]", "s8[1,2,4]", "bf16[4,1024,128]", K, K, ROW],
        {},
        8 * 2,
    ),
}


def call(name: str, made: str, operands: list[str], blocks: dict[str, int], more: str = "") -> str:
    suffix = {"dq": "_dq", "dkv": "_dkv"}.get(name.split("_")[1], "")
    sizes = {f"block_q{suffix}": 512, f"block_kv{suffix}": 512, "q_layout": 1, **blocks}
    said = ", ".join(rf"\"{key}\": {value}" for key, value in sizes.items())
    given = "".join(f"  %p{n} = {text} parameter({n})\n" for n, text in enumerate(operands))
    return (
        f"HloModule one\nENTRY %main () -> f32[] {{\n{given}  ROOT %splash_{name}.7 = {made} custom-call("
        f'{", ".join(f"%p{n}" for n in range(len(operands)))}), custom_call_target="tpu_custom_call", '
        f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{{{said}}}"\n}}}}{more}\n}}'
    )


@pytest.mark.parametrize("case", CALLS)
def test_products_of_the_blocks_that_run(case: str) -> None:
    name, made, operands, blocks, count = CALLS[case]
    module = parse(call(name, made, operands, blocks))
    main = module.computations[module.entry]
    assert products(module, main, main.root) == [("bf16", count * ONE)]


def test_a_roofline_unless_the_compiler_knows_better() -> None:
    """The forward kernel's FLOPs are what is counted; its seconds are the compiler's where it gives cycles."""
    rates = Rates({"bfloat16": 1e12}, 1e15, 1e9, compute_efficiency=1.0, memory_efficiency=1.0)
    name, made, operands, blocks, count = CALLS["forward"]
    (alone,) = times(parse(call(name, made, operands, blocks)), rates).pieces
    assert (alone.flops, alone.seconds, alone.estimated) == (count * ONE, pytest.approx(count * ONE / 1e12), False)
    cycles = ', backend_config={"window_config":{"estimated_cycles":"4000"}}'
    (known,) = times(parse(call(name, made, operands, blocks, cycles)), rates).pieces
    assert (known.flops, known.seconds, known.estimated) == (count * ONE, pytest.approx(4e-6), True)


def test_other_kernels_have_none() -> None:
    text = call(*CALLS["forward"][:4]).replace("splash_mha", "paged_mha")
    module = parse(text)
    main = module.computations[module.entry]
    assert products(module, main, main.root) == []
