"""How gradients are scattered over a batch axis: at once, or over parts of the axis one after another.

XLA:TPU makes an all-reduce of a reduce-scatter over three dims of the torus, which sends twice the bytes. Over one or
two dims it stays what it is, and so does one after another. The places of an axis are cut in an outer and an inner
part, and the outer is scattered first: what is left of it are the same pieces, in the same order.

    axis of 8, pieces 0 to 7     outer 4: places 0 2 4 6 and 1 3 5 7     inner 2: 0 1, 2 3, 4 5, 6 7
    place 5                      holds 45 of its outer group             holds 5

Time is what decides: a collective over d dims drives the links of d dims at once. In units of the time in which the
links of one dim carry the whole gradient, n places of an axis over d dims take

    all-reduce       2 (n-1)/n / d
    reduce-scatter     (n-1)/n / d          an outer part first: n of that part, and then as much less is left

so that on 4 x 8 x 8 chips one after another (32 over two dims, then 8) takes 0.51 and an all-reduce 0.66.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from shardlab.plan.scatter import read_parts

_LANES = 128  # of a tile in a TPU's memory
_FEW = 4  # rows of a tile that XLA:TPU does not scatter; as a table it does, for the copy that is made of it
_MOST_DIMS = 2  # of the torus, over which XLA:TPU reduce-scatters


@dataclass(frozen=True)
class Scatter:
    """How gradients are scattered over one batch axis.

    Attributes:
      axis: its name.
      parts: sizes of its parts, outermost and first scattered first; one is the axis itself.
      why: in words.
    """

    axis: str
    parts: tuple[int, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.axis} {'x'.join(map(str, self.parts))}: {self.why}"


def scatters(mesh: Mesh, axes: tuple[str, ...], asked: str) -> tuple[Scatter, ...]:
    """What is done for each of `axes` on the devices of `mesh`.

    Args:
      asked: ``"auto"``, ``"whole"``, or parts by axis: ``"data=32x8"``; an axis that is not named is whole.
    """
    if asked == "auto":
        return tuple(_fastest(mesh, axis) for axis in axes)
    given = read_parts(asked)
    return tuple(Scatter(axis, given.get(axis, (mesh.shape[axis],)), "as declared") for axis in axes)


def scattered(value: jax.Array, axis: str, parts: tuple[int, ...], dim: int, *, on_tpu: bool = False) -> jax.Array:
    """The sum over `axis` of what each device holds, of which each keeps its piece of `dim`; in a manual region."""
    if not on_tpu or value.ndim == 1:
        return _in_parts(value, axis, parts, dim)
    others = tuple(place for place in range(value.ndim) if place != dim)
    if len(others) > 1 and value.shape[others[-2]] <= _FEW:
        rows = jnp.moveaxis(value, dim, 0)
        pieces = scattered(rows.reshape(len(rows), -1), axis, parts, 0, on_tpu=True)
        return jnp.moveaxis(pieces.reshape(-1, *rows.shape[1:]), 0, dim)
    # XLA:TPU makes an all-reduce of it too where the dim lies innermost in memory, before or after, and where what does
    # is of an awkward number of tiles.
    layout, inner, size = Layout((dim, *others)), others[-1], value.shape[others[-1]]
    wide = jnp.pad(value, [(0, wider(size) - size if place == inner else 0) for place in range(value.ndim)])
    pieces = _in_parts(with_layout_constraint(wide, layout), axis, parts, dim)
    return jax.lax.slice_in_dim(with_layout_constraint(pieces, layout), 0, size, axis=inner)


def _in_parts(value: jax.Array, axis: str, parts: tuple[int, ...], dim: int) -> jax.Array:
    if len(parts) == 1:
        return jax.lax.psum_scatter(value, axis, scatter_dimension=dim, tiled=True)
    for part in range(len(parts)):
        groups = _groups(parts, part)
        value = jax.lax.psum_scatter(value, axis, scatter_dimension=dim, axis_index_groups=groups, tiled=True)
    return value


def wider(size: int) -> int:
    """At least `size`: in so many lanes XLA:TPU reduce-scatters.

    It does where no prime factor of the number of tiles is above 13 (libtpu 0.0.42), and else makes an all-reduce.

    >>> wider(28672), wider(128256), wider(100)
    (28672, 129024, 100)
    """
    tiles = -(-size // _LANES)
    if _smooth(tiles):
        return size
    return next(more for more in itertools.count(tiles) if _smooth(more)) * _LANES


def _smooth(number: int) -> bool:
    for prime in (2, 3, 5, 7, 11, 13):
        while number % prime == 0:
            number //= prime
    return number == 1


def _groups(parts: tuple[int, ...], part: int) -> list[list[int]]:
    """The places of an axis that differ in one part alone.

    >>> _groups((4, 2), 0), _groups((4, 2), 1)
    ([[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]])
    """
    places = np.arange(math.prod(parts)).reshape(parts)
    found: list[list[int]] = np.moveaxis(places, part, -1).reshape(-1, parts[part]).tolist()
    return found


def _fastest(mesh: Mesh, axis: str) -> Scatter:
    size = mesh.shape[axis]
    whole = Scatter(axis, (size,), "one reduce-scatter")
    coords = _coords(mesh, axis)
    if coords is None:
        return whole
    dims = _dims(coords)
    if len(dims) <= _MOST_DIMS:
        return Scatter(axis, (size,), f"one reduce-scatter, over {_words(dims)} of the torus")
    reduced = 2 * (size - 1) / size / len(dims)
    found = min(_in_two(coords), default=None)
    if found is None or found[0] >= reduced:
        return Scatter(axis, (size,), f"one sum over {len(dims)} dims of the torus, which XLA:TPU makes an all-reduce")
    time, parts, (outer, inner) = found
    why = (
        f"reduce-scatters over {_words(outer)} and then {_words(inner)} of the torus, in {time / reduced:.2f} of the "
        "time of the all-reduce that XLA:TPU makes of one over all"
    )
    return Scatter(axis, parts, why)


def _coords(mesh: Mesh, axis: str) -> np.ndarray | None:
    """Where in the torus the devices of an axis lie, [n, dims]; None if they do not say, or are of several slices."""
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    slices = {getattr(device, "slice_index", 0) for device in line}
    if line[0].platform != "tpu" or len(slices) > 1:
        return None
    return np.array([device.coords for device in line])


def _dims(coords: np.ndarray) -> tuple[int, ...]:
    """The dims of the torus along which places differ."""
    return tuple(int(dim) for dim in np.flatnonzero((coords != coords[:1]).any(axis=0)))


def _in_two(coords: np.ndarray) -> Iterator[tuple[float, tuple[int, int], tuple[Any, Any]]]:
    """Time, sizes and dims of every cut in an outer and an inner part of which each covers few dims."""
    size = len(coords)
    for inner in (n for n in range(2, size) if size % n == 0):
        outer = size // inner
        blocks = coords.reshape(outer, inner, -1)
        along = _dims(blocks[:, 0]), _dims(blocks[0])
        # Every group is a part of the torus in the same dims, and no dim is in both.
        moved = blocks - blocks[:, :1] - blocks[:1] + blocks[:1, :1]
        if moved.any() or set(along[0]) & set(along[1]) or max(map(len, along)) > _MOST_DIMS:
            continue
        time = (outer - 1) / outer / len(along[0]) + (inner - 1) / inner / len(along[1]) / outer
        yield time, (outer, inner), along


def _words(dims: tuple[int, ...]) -> str:
    return f"dim{'s' if len(dims) > 1 else ''} {' and '.join('xyz'[dim] for dim in dims)}"
