"""ZeRO's one move on a spec: put the batch axes on a dim that no axis splits, and take them off again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.sharding.rules import axes_of, canonical, entry

_LARGE = 2**20  # numbers, of which padding counts


def add_axes(spec: P, shape: Sequence[int], axes: Sequence[str], mesh: MeshSpec) -> tuple[P, int | None]:
    """The spec with `axes` on the largest dim that nothing splits and that divides by their product, and that dim.

    Of equally large dims the first is taken. Of a large array a dim comes before others if its pieces are whole tiles
    of XLA:TPU, 128 numbers of the last dim or 8 of another: else every piece is padded to them, in memory and, where
    gradients are reduce-scattered, on the wire. Where no dim fits, the spec as it was and None.

    Args:
      spec: the parameter's spec.
      shape: its global shape.
      axes: mesh axes, none of them in `spec`.
      mesh: gives their sizes.

    Raises:
      ValueError: `spec` already names one of the axes.

    >>> mesh = MeshSpec({"data": 4, "tensor": 2}, batch=("data",))
    >>> add_axes(P(None, "tensor"), (12, 64), ("data",), mesh)
    (P('data', 'tensor'), 0)
    >>> add_axes(P(), (4 * 2001, 1024), ("data",), mesh)
    (P(None, 'data'), 1)
    >>> add_axes(P(), (6, 10), ("data",), mesh)
    (P(), None)

    An axis of one device splits nothing, and keeps its place in the spec:

    >>> add_axes(P("tensor"), (8, 6), ("data",), MeshSpec({"data": 4, "tensor": 1}, batch="data", target="cpu:4"))
    (P(('tensor', 'data'),), 0)
    """
    held = {axis for entries in spec for axis in axes_of(entries)}
    if held & set(axes):
        raise ValueError(f"{spec} already names {sorted(held & set(axes))}")
    entries = [*spec, *([None] * (len(shape) - len(spec)))]
    product = math.prod(mesh.size(axis) for axis in axes)

    def split(dim: int) -> bool:
        return any(mesh.size(axis) > 1 for axis in axes_of(entries[dim]))

    fitting = [dim for dim, size in enumerate(shape) if not split(dim) and size >= product and size % product == 0]
    if not fitting or not axes:
        return spec, None

    def in_tiles(dim: int) -> bool:
        tile = 128 if dim == len(shape) - 1 else 8
        return math.prod(shape) >= _LARGE and shape[dim] // product % tile == 0

    dim = max(fitting, key=lambda dim: (in_tiles(dim), shape[dim], -dim))
    entries[dim] = entry((*axes_of(entries[dim]), *axes))
    return canonical(entries), dim


def without(spec: P, axes: Sequence[str]) -> P:
    """The spec with `axes` taken out of every dim; the same spec when it names none of them.

    >>> without(P(("data", "tensor"), "data"), ("data",))
    P('tensor', None)
    """
    drop = set(axes)
    if not any(drop & set(_names(entries)) for entries in spec.partitions):
        return spec
    kept = (
        entry([axis for axis in axes_of(entries) if axis not in drop]) if _names(entries) else entries
        for entries in spec.partitions
    )
    changed: P = spec.update(partitions=tuple(kept))
    return changed


def _names(entries: object) -> tuple[str, ...]:
    """The axes of a dim; none for None and UNCONSTRAINED, which constraints in user code may hold."""
    return axes_of(entries) if isinstance(entries, str | tuple) else ()
