"""How fast a chip does what a plan asks of it, as the compiler's own estimates have it.

On GPUs that is what an audit's roofline takes. XLA:TPU prints cycles; in the steps of `benchmarks/predicted.py` and in
some that keep products (libtpu 0.0.42.1) these are, of the published peak and bandwidth:

    products                  0.82 of the peak (0.78 to 0.88)
    of blocks that keep more than x for the backward pass     0.76 (0.73 to 0.82): results go to stacks, and what is
                              made of them is made in every tile anew
    all else                  0.5 of the bandwidth: 0.55 to 0.6 of large fusions, 0.2 to 0.36 of copies and small ones
    a byte that is kept       as long as 8 others take, for it to be cleared, written and copied out
"""

from __future__ import annotations

from shardlab.hlo.time import COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY
from shardlab.mesh.chips import Chip

_TPU_COMPUTE, _TPU_KEEPING, _TPU_MEMORY, _TPU_KEPT = 0.82, 0.76, 0.5, 8.0


def peak(chip: Chip, dtype: str, *, keeping: bool = False) -> float:
    """Operations a second of products in a dtype; XLA:TPU multiplies float32 in bfloat16 unless it is told not to.

    Args:
      keeping: whether more than x is kept for the backward pass.

    >>> from shardlab.mesh.chips import chip_of
    >>> from shardlab.mesh.targets import parse_target
    >>> f"{peak(chip_of(parse_target('tpu:v5p:4x4x4')), 'bfloat16'):.3g}"
    '3.76e+14'
    """
    published = chip.flops.get(dtype, chip.flops["bfloat16"])
    if chip.platform != "tpu":
        return published * COMPUTE_EFFICIENCY
    return published * (_TPU_KEEPING if keeping else _TPU_COMPUTE)


def bandwidth(chip: Chip) -> float:
    """Bytes a second of the chip's memory."""
    return chip.hbm_bandwidth * (_TPU_MEMORY if chip.platform == "tpu" else MEMORY_EFFICIENCY)


def keeping_moves(chip: Chip, kept: float) -> float:
    """Bytes moved for what blocks keep: on GPUs it is written to its place and read from it."""
    return kept * (_TPU_KEPT if chip.platform == "tpu" else 2)


def ridge(chip: Chip | None, dtype: str) -> float:
    """Operations that a byte must take part in for products to wait for nothing; of an unknown chip none."""
    return 0.0 if chip is None else peak(chip, dtype) / chip.hbm_bandwidth
