"""How fast a chip does what a plan asks of it.

Of the published peak and bandwidth what XLA reaches. On GPUs it is what an audit's roofline takes; the compiler of TPUs
estimates large products at 0.81 to 0.93 of the peak in the steps of `benchmarks/predicted.py` (libtpu 0.0.42.1).
"""

from __future__ import annotations

from shardlab.hlo.time import COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY
from shardlab.mesh.chips import Chip

_TPU_COMPUTE, _TPU_MEMORY = 0.85, 0.8


def peak(chip: Chip, dtype: str) -> float:
    """Operations a second of products in a dtype; XLA:TPU multiplies float32 in bfloat16 unless it is told not to.

    >>> from shardlab.mesh.chips import chip_of
    >>> from shardlab.mesh.targets import parse_target
    >>> f"{peak(chip_of(parse_target('tpu:v5p:4x4x4')), 'bfloat16'):.3g}"
    '3.9e+14'
    """
    published = chip.flops.get(dtype, chip.flops["bfloat16"])
    return published * (_TPU_COMPUTE if chip.platform == "tpu" else COMPUTE_EFFICIENCY)


def bandwidth(chip: Chip) -> float:
    """Bytes a second of the chip's memory."""
    return chip.hbm_bandwidth * (_TPU_MEMORY if chip.platform == "tpu" else MEMORY_EFFICIENCY)


def ridge(chip: Chip | None, dtype: str) -> float:
    """Operations that a byte must take part in for products to wait for nothing; of an unknown chip none."""
    return 0.0 if chip is None else peak(chip, dtype) / bandwidth(chip)
