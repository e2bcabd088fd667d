"""Where the examples lie along the dim of an array that follows their number.

Most often one after another, each with as many entries as any other. Arrays joined along that dim lie block after
block, each block with an entry of every example, and may be taken apart there again: the two views of a contrastive
model, real and generated images.

    x [B, D]                      (B,)      e0 e1 e2
    concatenate([x, y])           (B, B)    e0 e1 e2 | e0 e1 e2
    z [S, B, D] as [S B, D]       (B,) * S

Blocks are the lengths of these blocks, at the number of examples that was traced. Functions give None where the result
would have some examples of a device and not others.
"""

from __future__ import annotations

import math
from typing import Any

Blocks = tuple[int, ...]
Shape = tuple[int, ...]


def following(here: Any, there: Any) -> int | None:
    """The dim in which two traces of one value differ, the number of examples being another."""
    return next((dim for dim, (a, b) in enumerate(zip(here.shape, there.shape, strict=True)) if a != b), None)


def reshaped(blocks: Blocks, given: Shape, dim: int, new: Shape, new_dim: int) -> Blocks | None:
    """Blocks along `new_dim` of an array of shape `given`, with `blocks` along `dim`, after a reshape to `new`.

    >>> reshaped((4,), (4, 6), 0, (8, 3), 0), reshaped((4,), (3, 4), 1, (12,), 0)
    ((8,), (4, 4, 4))
    >>> reshaped((4, 4, 4), (12,), 0, (3, 4), 1)
    (4,)
    >>> reshaped((4,), (4,), 0, (2, 2), 1)
    """
    before, new_before = math.prod(given[:dim]), math.prod(new[:new_dim])
    if before == new_before:
        scaled = [length * new[new_dim] for length in blocks]
        return None if any(one % given[dim] for one in scaled) else tuple(one // given[dim] for one in scaled)
    count, rest = divmod(before * len(blocks), new_before)
    if len(set(blocks)) > 1 or rest or not count or new[new_dim] % count:
        return None
    return (new[new_dim] // count,) * count


def sliced(blocks: Blocks, start: int, stop: int, stride: int = 1) -> Blocks | None:
    """Blocks of ``[start:stop:stride]``.

    >>> sliced((4, 4, 8), 4, 16), sliced((8,), 1, 8, 2), sliced((4, 4), 2, 6), sliced((8,), 4, 8)
    ((4, 8), (4,), None, None)
    """
    if stride > 1:
        size = sum(blocks)
        every = len(blocks) == 1 and size % stride == 0 and start < stride and stop > size - stride
        return (size // stride,) if every else None
    kept, first = [], 0
    for length in blocks:
        if start <= first and first + length <= stop:
            kept.append(length)
        elif start < first + length and first < stop:
            return None
        first += length
    return tuple(kept) or None
