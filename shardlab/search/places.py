"""Where a plan's mesh may lie on a target: the axes that run over its slices, and the links that axes are given.

`shardlab.mesh.topology.lay_out` serves the axes in a fixed order, the automatic ones first, and gives the first the
fastest links. What is best depends on what a plan sends over each, so other layouts are tried, each named by the dims
that every axis lies on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.physical import Dim
from shardlab.mesh.spec import MeshSpec, Pairs
from shardlab.mesh.topology import Layout, factors, lay_out

Links = tuple[tuple[str, tuple[str, ...]], ...]
MOST = 12
"""Layouts of a mesh that are tried, those that cut the fewest dims first."""


def slices_over(sizes: Mapping[str, int], axes: Sequence[str], slices: int) -> Iterator[Pairs]:
    """Every way to run some of the axes over all slices, whole shares of each axis on every slice.

    >>> list(slices_over({"data": 8, "stage": 4}, ("data", "stage"), 4))
    [(('data', 4),), (('data', 2), ('stage', 2)), (('stage', 4),)]
    """
    if not axes:
        if slices == 1:
            yield ()
        return
    first, *rest = axes
    most = math.gcd(sizes[first], slices)
    for parts in range(most, 0, -1):
        if most % parts == 0:
            mine = ((first, parts),) if parts > 1 else ()
            yield from (mine + others for others in slices_over(sizes, rest, slices // parts))


def other_links(spec: MeshSpec) -> tuple[Links, ...]:
    """The links of the layouts that a mesh may have beside its own; of equal ones, as where dims are alike, the first.

    >>> other_links(MeshSpec({"data": 8, "tensor": 8}, batch="data", target="gpu:h200:8x8"))
    ((('data', ('gpu',)), ('tensor', ('island',))),)
    """
    plain = replace(spec, links=())
    own = lay_out(plain)
    dims, axes = own.dims, tuple(axis for axis in spec.names if spec.sizes[axis] > 1)
    ways: dict[Links, int] = {}
    for taken in _ways([spec.sizes[axis] for axis in axes], [dim.size for dim in dims]):
        links = tuple(
            (axis, tuple(dim.name for dim, take in zip(dims, row, strict=True) if take > 1 and dim.tier != "dcn"))
            for axis, row in zip(axes, taken, strict=True)
        )
        cuts = sum(1 < take < dim.size for row in taken for dim, take in zip(dims, row, strict=True))
        ways[links] = min(cuts, ways.get(links, cuts))
    known, found = {_shape(own)}, list[Links]()
    for links in sorted(ways, key=lambda links: ways[links]):
        try:
            shape = _shape(lay_out(replace(plain, links=tuple((axis, dims) for axis, dims in links if dims))))
        except DeclarationError:  # its axes over the slices are others
            continue
        if shape not in known:
            known.add(shape)
            found.append(tuple((axis, dims) for axis, dims in links if dims))
        if len(found) == MOST:
            break
    return tuple(found)


def _ways(sizes: Sequence[int], free: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """How much of every dim each axis may take.

    >>> list(_ways([2, 4], [2, 4]))
    [((2, 1), (1, 4)), ((1, 2), (2, 2))]
    """
    if not sizes:
        yield ()
        return
    for row in factors(sizes[0], free):
        left = [have // take for have, take in zip(free, row, strict=True)]
        yield from ((row, *others) for others in _ways(sizes[1:], left))


def _shape(layout: Layout) -> frozenset[tuple[tuple[Dim, tuple[tuple[str, int, int], ...]], int]]:
    """What lies on each dim; dims that are alike may change places."""
    on: dict[str, list[tuple[str, int, int]]] = {}
    for links in layout.axes:
        for part in links.dims:
            on.setdefault(part.name, []).append((links.axis, part.size, part.stride))
    nameless = [(replace(dim, name=""), tuple(on.get(dim.name, ()))) for dim in layout.dims]
    return frozenset((one, nameless.count(one)) for one in nameless)
