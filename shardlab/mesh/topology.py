"""Which links each mesh axis runs over: logical axes laid on the physical dims, the chattiest on the fastest.

>>> from shardlab.mesh.spec import MeshSpec
>>> layout = lay_out(MeshSpec({"data": 64, "tensor": 4}, batch="data", target="tpu:v5p:4x8x8"))
>>> print(layout.explanation)
data (64) lies on dims y and z of the torus: 8 x 8 chips, both with wrap-around; a device sends 360 GB/s
tensor (4) lies on dim x of the torus: 4 chips with wrap-around; a device sends 180 GB/s
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from shardlab.mesh.faults import Fault, raise_faults
from shardlab.mesh.physical import GPU_LAUNCH, Dim, Part, dims_of, merged, ring_bandwidth, ring_share
from shardlab.mesh.spec import MeshSpec


@dataclasses.dataclass(frozen=True)
class AxisLinks:
    """The links of one mesh axis.

    Attributes:
      axis: its name.
      size: its size.
      tier: of its slowest links: "ici", "dcn", "nvlink", "network" or "host".
      dims: the parts of physical dims it covers, fastest first; each has a name, size and wrap.
      bandwidth: bytes a second that one device can send in a ring collective over this axis, over all its links and
        both directions together; 0 on emulated devices and for an axis of size 1.
      words: one sentence.
    """

    axis: str
    size: int
    tier: str
    dims: tuple[Part, ...]
    bandwidth: float
    words: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh laid on its target.

    Attributes:
      spec: the mesh.
      dims: the target's physical dims, fastest first.
      axes: the links of every axis, in mesh order.
      order: for every mesh position, row-major, the place of its device among the target's devices. Places count the
        slowest dim first: slice, z, y, x, core on TPU; host, then GPU of the host on GPU.
      explanation: a sentence an axis.
    """

    spec: MeshSpec
    dims: tuple[Dim, ...]
    axes: tuple[AxisLinks, ...]
    order: tuple[int, ...]
    explanation: str

    def links(self, axis: str) -> AxisLinks:
        """The links of one axis."""
        return self.axes[self.spec.names.index(axis)]


def lay_out(spec: MeshSpec, *, traffic: Mapping[str, float] | None = None) -> Layout:
    """The mesh's axes laid on the target's links.

    The chattiest axis is served first: the automatic axes, last one first, then the batch axes, last one first, then
    the stage axis; or the axes by `traffic`. A dim of a torus is cut only where no axes fit whole dims; of the layouts
    with the fewest cuts the one is taken that gives the chattiest axis most bandwidth, then the next; with `traffic`,
    the one in which the bytes take least time. Axes of `spec.dcn` lie outermost, over slices or NVLink islands.

    Args:
      spec: the mesh.
      traffic: bytes each axis moves, per device and step; an axis not named moves none.

    Raises:
      DeclarationError: `spec.dcn` is not how the target is split.
    """
    dims = dims_of(spec.machine)
    taken = _assign(spec, dims, traffic)
    axes = tuple(_links(axis, spec.sizes[axis], taken[axis]) for axis in spec.names)
    order = tuple(_order(spec, dims, taken))
    return Layout(spec, dims, axes, order, "\n".join(links.words for links in axes if links.size > 1))


def _chatty(spec: MeshSpec, traffic: Mapping[str, float] | None) -> list[str]:
    """The axes, chattiest first."""
    automatic = [axis for axis in spec.names if axis not in spec.batch and axis != spec.stage]
    default = [*reversed(automatic), *reversed(spec.batch), *([spec.stage] if spec.stage else [])]
    return sorted(default, key=lambda axis: -(traffic or {}).get(axis, 0.0))


def _assign(spec: MeshSpec, dims: Sequence[Dim], traffic: Mapping[str, float] | None) -> dict[str, tuple[Part, ...]]:
    """For every axis its parts, fastest dim first."""
    axes = _chatty(spec, traffic)
    slow = dict(spec.dcn)

    @functools.cache
    def best(
        place: int, free: tuple[int, ...]
    ) -> tuple[tuple[int, float, tuple[float, ...]], tuple[tuple[Part, ...], ...]] | None:
        """The best way to lay axes[place:] on what is free of every dim: its cost, and the parts of each axis."""
        if place == len(axes):
            return (0, 0.0, ()), ()
        axis = axes[place]
        found = None
        for factors in _factors(spec.sizes[axis], free):
            if spec.dcn and dims[-1].tier in ("dcn", "network") and factors[-1] != slow.get(axis, 1):
                continue
            rest = best(place + 1, tuple(have // take for have, take in zip(free, factors, strict=True)))
            if rest is None:
                continue
            parts = tuple(
                Part(dim, take, dim.size // have)
                for dim, have, take in zip(dims, free, factors, strict=True)
                if take > 1
            )
            speed = ring_bandwidth(parts)
            (cuts, seconds, speeds), others = rest
            cuts += sum(part.dim.torus and part.size < part.dim.size for part in parts)
            if traffic and speed:
                seconds += traffic.get(axis, 0.0) / speed
            cost = (cuts, seconds, (-speed, *speeds))
            if found is None or cost < found[0]:
                found = cost, (parts, *others)
        return found

    found = best(0, tuple(dim.size for dim in dims))
    if found is None:
        raise_faults([_misfit(spec, dims)])
    assert found is not None
    return dict(zip(axes, found[1], strict=True))


def _misfit(spec: MeshSpec, dims: Sequence[Dim]) -> Fault:
    split = ", ".join(f"{axis}={count}" for axis, count in spec.dcn)
    what = "slices" if dims[-1].tier == "dcn" else "NVLink islands"
    problem = f"dcn ({split}) is not how {spec.target} is split: {dims[-1].size} {what}"
    return Fault(f"mesh {spec}", problem, f"declare parts that multiply to {dims[-1].size}")


def _factors(size: int, free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to make `size` a product of divisors of what is free, most of the fast dims first."""
    if not free:
        if size == 1:
            yield ()
        return
    common = math.gcd(size, free[0])
    for take in range(common, 0, -1):
        if common % take == 0:
            yield from ((take, *rest) for rest in _factors(size // take, free[1:]))


def _order(spec: MeshSpec, dims: Sequence[Dim], taken: Mapping[str, Sequence[Part]]) -> list[int]:
    """For every mesh position the place of its device."""
    weights = {}
    for dim in dims:
        weights[dim.name] = math.prod(weights_size for weights_size in [d.size for d in dims[: dims.index(dim)]])
    places = [0]
    for axis in spec.names:
        steps = [
            sum(digit * part.stride * weights[part.name] for digit, part in zip(digits, taken[axis], strict=True))
            for digits in _digits([part.size for part in taken[axis]], snake=axis == spec.stage)
        ]
        places = [place + step for place in places for step in steps]
    return places


def _digits(sizes: Sequence[int], *, snake: bool) -> list[tuple[int, ...]]:
    """The digits of 0, 1, ... in a mixed radix, the first digit the fastest; as a snake, neighbours differ by one step.

    Collectives need the plain order: of a snake XLA:TPU makes a single ring (`StrategyRing`), of the plain order one
    that drives every dim at once (`StrategySubgroupND`). A stage axis carries permutes, to the next place only.
    """
    out: list[tuple[int, ...]] = [()]
    for size in reversed(sizes):
        grown = []
        for number, digits in enumerate(out):
            turn = range(size - 1, -1, -1) if snake and number % 2 else range(size)
            grown += [(digit, *digits) for digit in turn]
        out = grown
    return out


def _links(axis: str, size: int, parts: tuple[Part, ...]) -> AxisLinks:
    tier = max(parts, key=lambda part: part.dim.level).dim.tier if parts else "host"
    bandwidth = ring_bandwidth(parts)
    return AxisLinks(axis, size, tier, parts, bandwidth, _words(axis, size, parts, bandwidth))


def _words(axis: str, size: int, parts: Sequence[Part], bandwidth: float) -> str:
    if not parts:
        return f"{axis} (1) needs no links"
    speed = f"; a device sends {bandwidth / 1e9:.4g} GB/s" if bandwidth else ""
    torus = [part for part in parts if part.dim.torus]
    said = []
    if torus:
        names = " and ".join(part.name for part in torus)
        sizes = " x ".join(str(part.size) for part in torus)
        wrap = ["with" if part.wrap else "without" for part in torus]
        both = "" if len(torus) == 1 else "both " if len(torus) == 2 else "all "
        said.append(
            f"dim{'s' if len(torus) > 1 else ''} {names} of the torus: {sizes} chips, {both}{wrap[0]} wrap-around"
        )
    said += [f"{part.name} ({part.size})" for part in parts if not part.dim.torus]
    return f"{axis} ({size}) lies on {', '.join(said)}{speed}"


def collective_seconds(layout: Layout, kind: str, axes: Sequence[str], wire_bytes: float, *, count: int = 1) -> float:
    """Seconds a collective takes on the links of its axes, were nothing else running.

    Args:
      layout: of the mesh.
      kind: as in `shardlab.hlo.collectives`: "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
        "collective-permute".
      axes: the mesh axes it crosses; one that the mesh has not ("?") stands for all of them.
      wire_bytes: that a device sends, of all `count` runs.
      count: how often it runs.
    """
    known = all(axis in layout.spec.names for axis in axes)
    parts = merged(part for links in layout.axes if not known or links.axis in axes for part in links.dims)
    places = math.prod(part.size for part in parts)
    if places == 1:
        return 0.0
    latency = sum(part.seconds_of_latency for part in parts)
    latency += GPU_LAUNCH if layout.spec.machine.platform == "gpu" else 0.0
    if kind == "collective-permute":
        return wire_bytes / min(part.one_way for part in parts) + count * latency
    whole = wire_bytes * places / (places - 1)
    return whole * ring_share(parts) + count * latency
