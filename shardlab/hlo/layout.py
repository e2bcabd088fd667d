"""Arrays as they lie in memory: dims in the layout's order, tiles and what they pad, the memory space.

    bf16[8,1000]{1,0:T(8,128)(2,1)S(1)}      minor dim first, tiles of 8 x 128 (pairs of rows packed), space 1

XLA:TPU pads the minor dims to whole tiles: 1000 columns are stored as 1024, a head dim of 64 as 128.  Of the spaces 0
is the device's memory; 1 and above are on the chip (VMEM, SMEM) or, 5, the host's memory.

Layouts: https://openxla.org/xla/tiled_layout
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from shardlab.hlo.parse import Shape, shapes

DEVICE, HOST = 0, 5
_LEAF = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?|[()]|,")
_TILES = re.compile(r"T((?:\([\d,*]+\))+)")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Stored:
    """One array as a program stores it.

    Attributes:
      shape: its type, without padding.
      stored: bytes with the padding of its tiles.
      space: the memory space, `DEVICE` for the device's memory.
    """

    shape: Shape
    stored: int
    space: int

    @property
    def padding(self) -> int:
        """Bytes that hold nothing."""
        return self.stored - self.shape.bytes


@functools.lru_cache(maxsize=8192)
def stored(type_text: str) -> tuple[Stored, ...]:
    """The arrays of a type, tuples flattened, tokens left out.

    >>> found = stored("(bf16[8,1000]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)})")
    >>> [(one.stored, one.padding, one.space) for one in found]
    [(16384, 384, 1), (512, 508, 0)]
    """
    return tuple(one for _, one in leaves(type_text) if one is not None)


@functools.lru_cache(maxsize=8192)
def leaves(type_text: str) -> tuple[tuple[tuple[int, ...], Stored | None], ...]:
    """The leaves of a type with their index in the tuple, `()` of an array; None for a token.

    >>> [index for index, _ in leaves("(f32[2], (s32[], token[]))")]
    [(0,), (1, 0), (1, 1)]
    """
    found: list[tuple[tuple[int, ...], Stored | None]] = []
    index: list[int] = []
    for match in _LEAF.finditer(type_text.replace("\n", " ")):
        if match[0] == "(":
            index.append(0)
        elif match[0] == ")":
            index.pop()
        elif match[0] == ",":
            if index:
                index[-1] += 1
        else:
            found.append((tuple(index), None if match[1] in ("token", "opaque") else _stored(match[0], match[3] or "")))
    return tuple(found)


def _stored(text: str, layout: str) -> Stored:
    (shape,) = shapes(text)
    order, _, rest = layout.partition(":")
    space = _SPACE.search(rest)
    tiles = _TILES.search(rest)
    size = shape.bytes
    if tiles:
        minor_to_major = [int(d) for d in order.split(",") if d.strip()] or list(range(len(shape.dims)))[::-1]
        dims = [shape.dims[d] for d in reversed(minor_to_major)]
        tile = [1 if t == "*" else int(t) for t in tiles[1][1:].partition(")")[0].split(",")]
        dims = [1] * (len(tile) - len(dims)) + dims
        for k, width in enumerate(reversed(tile), start=1):
            dims[-k] = -(-dims[-k] // width) * width
        size = -(-math.prod(dims) * shape.bits // 8)
    return Stored(shape, size, int(space[1]) if space else DEVICE)
