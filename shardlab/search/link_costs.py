"""What the compiler makes of a plan's collectives on the links that their axes lie on, and what these take.

Rules of XLA:TPU are those of libtpu 0.0.42, seen in the programs of `benchmarks/predicted.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from shardlab.mesh.link_time import link_seconds
from shardlab.mesh.physical import Part, merged
from shardlab.mesh.spec import MeshSpec, Pairs
from shardlab.mesh.topology import Layout, collective_seconds, lay_out
from shardlab.search.choice import Placed
from shardlab.search.places import slices_over
from shardlab.search.storage import Axes
from shardlab.search.subject import Subject

_WIDE = 64
"""Devices of a torus of two dims, over all of which XLA:TPU gathers what is small by an all-reduce: of v5e 8x8 and
16x16 and v6e 8x8 it does, of 4x4 it does not."""
_AT_ONCE = 2  # dims of the torus that a reduce-scatter goes over at once


class LinkCosts:
    """The links of the plans of one subject; what several plans share is found once."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.mesh = functools.cache(self._mesh)
        self.layout = functools.cache(self._layout)
        self.pace = functools.cache(self._pace)
        self.doubled = functools.cache(self._doubled)

    def _mesh(self, axes: Pairs, dcn: Pairs = (), links: Any = ()) -> MeshSpec:
        """The mesh of a plan; where nothing is said of slices, for sizes alone, over whichever axes they divide."""
        mesh, target = self.subject.config.mesh, self.subject.target
        if target.slices > 1 and not dcn:
            dcn = next(slices_over(dict(axes), mesh.names, target.slices))
        return MeshSpec(axes, batch=mesh.batch, stage=mesh.stage, target=target.text, dcn=dcn, links=links)

    def _layout(self, placed: Placed) -> Layout:
        return lay_out(self.mesh(*placed))

    def _pace(self, placed: Placed, kind: str, axes: Axes) -> tuple[float, float]:
        """Seconds that a byte on the wire takes, and a collective of none; of emulated devices nothing is known."""
        if self.subject.chip is None:
            return 0.0, 0.0
        parts = self._torus(placed, axes)
        if kind == "reduce-scatter" and _dims(parts) > _AT_ONCE:
            seconds = functools.partial(_in_two, parts)
        else:
            seconds = functools.partial(collective_seconds, self.layout(placed), kind, axes)
        start = seconds(0.0)
        return (seconds(1e9) - start) / 1e9, start

    def made(self, placed: Placed, kind: str, axes: Axes) -> str:
        """What the compiler makes of a collective."""
        return "all-reduce" if kind == "reduce-scatter" and self.doubled(placed, axes) else kind

    def _doubled(self, placed: Placed, axes: Axes) -> bool:
        """Whether XLA:TPU makes an all-reduce of a reduce-scatter over these axes.

        It does over all dims of a torus (4x4, 8x8 and 16x16 of v5e and v6e, every v4 and v5p), but for a dim of 2, for
        a part of two dims (32 of 8x8 of v6e) and for dims of which one alone is a ring; of three dims `scatter="auto"`
        makes two steps. Of axes that go over slices too it always does within a slice (2 of v5e, 2x4 and 4x4).
        """
        parts, shape = self._torus(placed, axes), self.subject.target.shape
        if parts and self.over_slices(placed, axes):
            return True
        if not parts or _dims(parts) < len(shape):
            return False
        if _dims(parts) > _AT_ONCE:
            return self.subject.config.scatter == "whole"
        if math.prod(part.size for part in parts) < math.prod(shape):
            return False
        return len({part.wrap for part in parts}) == 1 and min(part.size for part in parts) > 2

    def over_slices(self, placed: Placed, axes: Axes) -> bool:
        """Whether these axes go over the network between slices."""
        return any(part.dim.tier == "dcn" for axis in axes for part in self.layout(placed).links(axis).dims)

    def by_reducing(self, placed: Placed, axes: Axes) -> bool:
        """Whether XLA:TPU gathers what is small over these axes by an all-reduce."""
        size = math.prod(part.size for part in self._torus(placed, axes))
        return size >= _WIDE and len(self.subject.target.shape) == 2 and self.doubled(placed, axes)

    def _torus(self, placed: Placed, axes: Axes) -> list[Part]:
        """The parts of a TPU's torus that these axes lie on, merged by dim."""
        if self.subject.target.platform != "tpu":
            return []
        return merged([part for axis in axes for part in self.layout(placed).links(axis).dims if part.dim.torus])


def _dims(parts: Sequence[Part]) -> int:
    return len({part.name for part in parts})


def _in_two(parts: Sequence[Part], wire_bytes: float) -> float:
    """Seconds of a reduce-scatter over a part of the places and then over the others (`shardlab.step.scatter`)."""
    places = math.prod(part.size for part in parts)
    whole, found = wire_bytes * places / (places - 1), []
    for cut in range(1, len(parts)):
        inner, outer = parts[:cut], parts[cut:]
        n, m = (math.prod(part.size for part in some) for some in (outer, inner))
        first = link_seconds(outer, "reduce-scatter", whole * (n - 1) / n)
        found.append(first + link_seconds(inner, "reduce-scatter", whole / n * (m - 1) / m))
    return min(found)
