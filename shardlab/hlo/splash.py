"""The arithmetic of JAX's splash attention on TPU, whose calls state no cost: by the kernel's name, from its shapes.

A kernel works through blocks of queries x keys, head by head, and leaves out those that its mask leaves empty. In each
it makes, with K the width of queries and keys and V that of values,

    fwd   2 products   q k' (K), p v (V)
    dq    3            q k' (K), do v' (V), ds k (K)
    dkv   4            k q' (K), p do (V), v do' (V), ds q (K)
          5            and ds' k (K), where it makes dq as well

as `flash_attention_kernel`, `_flash_attention_dq_kernel` and `_flash_attention_dkv_kernel` do in
https://github.com/jax-ml/jax/blob/main/jax/experimental/pallas/ops/tpu/splash_attention/splash_attention_kernel.py.

Which blocks are empty stands in an operand whose values XLA does not print. So it is an estimate: a mask that the
kernel computes from the queries' positions (its last operand then) is taken for a causal one, of which the blocks on
and below the diagonal run; of a grid that is smaller than the scores (a window) all of it runs, and so it does of any
other mask.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from shardlab.hlo.layout import Stored
from shardlab.hlo.parse import Instruction, Shape

_NAME = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)(_segmented)?_(?:no_)?residuals")
_FLOATS = frozenset({"bf16", "f16", "f32"})


def splash_products(instruction: Instruction, operands: Sequence[Stored]) -> list[tuple[str, int]]:
    """The dtype of the queries and the FLOPs of a call of a splash kernel; none of any other call.

    Args:
      instruction: a custom call.
      operands: its arrays, in order: two or three of the mask's grid, queries [..., H, S, K], keys, values, and more.
    """
    name = _NAME.match(instruction.name) or _NAME.search(instruction.op_name)
    arrays = [one.shape for one in operands]
    first = next((n for n, one in enumerate(arrays) if one.dtype in _FLOATS), len(arrays))
    if name is None or len(arrays) < first + 3:
        return []
    phase, q = name[1], arrays[first]
    queries, width = _lying(instruction, "q", q)
    keys, _ = _lying(instruction, "k", arrays[first + 1])
    _, values = _lying(instruction, "v", arrays[first + 2])
    makes_dq = phase == "dkv" and any(len(made.dims) > len(q.dims) for made in instruction.shapes)
    per_score = {"fwd": width + values, "dq": 2 * width + values, "dkv": (3 if makes_dq else 2) * width + 2 * values}

    suffix = "" if phase == "fwd" else f"_{phase}"
    block = _number(instruction, f"block_q{suffix}", queries), _number(instruction, f"block_kv{suffix}", keys)
    rows, columns = queries // block[0], keys // block[1]
    blocks = rows * columns
    if first:
        blocks = min(blocks, math.prod(arrays[0].dims[-2:]))
    # Positions of the queries [S, lanes] or [sublanes, S]; segments come in a pair of the same.
    positions = sum(one.dtype == "s32" and len(one.dims) == 2 for one in arrays[first + 3 :]) - 2 * bool(name[2])
    if positions > 0 and arrays[-1].dtype == "s32" and queries == keys:
        blocks = min(blocks, sum(math.ceil((row + 1) * block[0] / block[1]) for row in range(rows)))
    heads = math.prod(q.dims[:-2])
    return [(q.dtype, 2 * heads * blocks * math.prod(block) * per_score[phase])]


def _lying(instruction: Instruction, which: str, shape: Shape) -> tuple[int, int]:
    """Length and width of queries, keys or values, either of which may be the last dim."""
    length, width = shape.dims[-2:]
    return (width, length) if _number(instruction, f"{which}_layout", 1) == 2 else (length, width)


def _number(instruction: Instruction, name: str, default: int) -> int:
    """What JAX writes of a kernel's blocks into what a profiler shows of it, its quotes escaped."""
    found = re.search(rf'"{name}\\?": (\d+)', instruction.attributes.get("frontend_attributes", ""))
    return int(found[1]) if found else default
