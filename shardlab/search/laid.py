"""How a value lies: the axes that split each of its dims, and those over which it is still to be summed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardlab.search.program import Value

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Laid:
    """How a value lies.

    Attributes:
      dims: the axes that split each dim.
      partial: the axes over whose devices it is still to be summed.
      itemsize: bytes of a number in which that sum is taken.
      weight: whether it is a parameter, or one in another form.
    """

    dims: Dims
    partial: tuple[str, ...] = ()
    itemsize: int = 0
    weight: bool = False


def laid(ndim: int, dims: Mapping[int, tuple[str, ...]], *, weight: bool = False) -> Laid:
    """A value of `ndim` dims, some of them split.

    >>> laid(2, {1: ("tensor",)}).dims
    ((), ('tensor',))
    """
    return Laid(tuple(tuple(dims.get(dim, ())) for dim in range(ndim)), weight=weight)


def local_bytes(value: Value, dims: Dims, sizes: Mapping[str, int]) -> float:
    """Bytes that one device holds of a value."""
    return value.bytes / math.prod(sizes[axis] for axes in dims for axis in axes)
