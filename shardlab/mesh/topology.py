"""Which links each mesh axis runs over: logical axes laid on the physical dims, the chattiest on the fastest.

>>> from shardlab.mesh.spec import MeshSpec
>>> layout = lay_out(MeshSpec({"data": 64, "tensor": 4}, batch="data", target="tpu:v5p:4x8x8"))
>>> print(layout.explanation)
tpu:v5p:4x8x8: a slice of 4 x 8 x 8 chips, with wrap-around on x, y and z. Served in the order tensor, data.
data (64) lies on dims y and z, rings of 8 and 8 chips: 360 GB/s a device.
tensor (4) lies on dim x, a ring of 4 chips: 180 GB/s a device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from shardlab.mesh.drawing import draw
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.mesh.link_time import link_seconds
from shardlab.mesh.physical import Dim, Part, dims_of, ring_bandwidth
from shardlab.mesh.spec import MeshSpec

_Cost = tuple[float, int, tuple[float, ...]]  # Seconds of the traffic, cuts, bandwidths of the axes (negative).


@dataclasses.dataclass(frozen=True)
class AxisLinks:
    """The links of one mesh axis.

    Attributes:
      axis: its name.
      size: its size.
      tier: of its slowest links: "ici", "dcn", "nvlink", "network" or "host".
      dims: the parts of physical dims it covers, fastest first; each has a name, size, stride and wrap.
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
      explanation: the target in a sentence, then one for every axis.
    """

    spec: MeshSpec
    dims: tuple[Dim, ...]
    axes: tuple[AxisLinks, ...]
    explanation: str

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """For every mesh position, row-major, the place of its device among the target's devices.

        Places count in the order slice, z, y, x, core on TPU (core and x change first), host, GPU of the host on GPU.
        """
        return tuple(_order(self))

    def links(self, axis: str) -> AxisLinks:
        """The links of one axis."""
        self.spec.size(axis)
        return self.axes[self.spec.names.index(axis)]

    def draw(self) -> str:
        """The pod or cluster as text: in every cell the mesh position of its device."""
        return draw(self.spec, self.dims, self.order)


def lay_out(spec: MeshSpec, *, traffic: Mapping[str, float] | None = None) -> Layout:
    """The mesh's axes laid on the target's links.

    The chattiest axis is served first: the automatic axes, the last one first, then the batch axes, the last one first,
    then the stage axis; or the axes by `traffic`. With `traffic` it is the layout in which those bytes take least time.
    Without, dims of a torus are cut only where the axes do not fit whole dims, and of the layouts with fewest cuts it
    is the one that gives the chattiest axis most bandwidth, then the next one. Of a dim that is cut, the chattiest axis
    gets neighbours. Axes of `spec.dcn` lie over slices or islands outermost; those of `spec.links` lie where it says.

    Args:
      spec: the mesh.
      traffic: bytes that a device sends over each axis in a step; an axis not named sends none.

    Raises:
      DeclarationError: `spec.dcn` is not how the target is split, or the axes do not fit where `spec.links` says.
    """
    for axis in traffic or ():
        spec.size(axis)
    dims = dims_of(spec.machine)
    raise_faults(_dcn_faults(spec, dims))
    served = _served(spec, traffic or {})
    taken = _assign(spec, dims, served, traffic or {})
    axes = tuple(_links(axis, spec.sizes[axis], taken[axis]) for axis in spec.names)
    words = [links.words for links in axes if links.size > 1]
    words.insert(0, f"{_target_words(spec, dims)} Served in the order {', '.join(served)}.")
    return Layout(spec, dims, axes, "\n".join(words))


def collective_seconds(layout: Layout, kind: str, axes: Sequence[str], wire_bytes: float, *, count: int = 1) -> float:
    """Seconds that collectives take on the links of their axes, were nothing else running.

    The model and its sources are in `shardlab.mesh.link_time`: a collective drives the links of several dims at once
    where XLA does; over links of different tiers each tier takes what must cross it.

    Args:
      layout: of the mesh.
      kind: as in `shardlab.hlo.collectives`: "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
        "collective-permute".
      axes: the mesh axes it crosses; where one is not the mesh's ("?"), all are taken to be crossed.
      wire_bytes: that one device sends, in all `count` runs together.
      count: how often it runs, for what every run takes to start.

    Raises:
      DeclarationError: emulated devices, which have no links, or a kind that is not known.

    >>> layout = lay_out(MeshSpec({"data": 64, "tensor": 4}, batch="data", target="tpu:v5p:4x8x8"))
    >>> round(collective_seconds(layout, "all-gather", ["data"], 360e9), 3)
    1.0
    """
    if not all(axis in layout.spec.names for axis in axes):
        axes = layout.spec.names
    try:
        parts = [part for axis in axes for part in layout.links(axis).dims]
        return link_seconds(parts, kind, wire_bytes, count=count)
    except DeclarationError as error:
        raise DeclarationError(f"mesh {layout.spec}: {error}") from None


def group_seconds(
    layout: Layout, kind: str, group: Sequence[int], wire_bytes: float, *, count: int = 1
) -> float | None:
    """`collective_seconds` of a group of mesh positions that covers a part of its axes; None where it is no block.

    Args:
      group: the mesh positions, row-major, as a program numbers its devices.

    >>> layout = lay_out(MeshSpec({"data": 256}, batch="data", target="tpu:v5p:4x8x8"))
    >>> round(group_seconds(layout, "all-gather", range(4), 180e9), 3)  # a ring of dim x
    1.0
    """
    places = [layout.order[position] for position in group]
    parts, weight = [], 1
    for dim in layout.dims:
        found = sorted({place // weight % dim.size for place in places})
        weight *= dim.size
        if len(found) == 1:
            continue
        stride = found[1] - found[0]
        if any(after - before != stride for before, after in itertools.pairwise(found)):
            return None
        parts.append(Part(dim, len(found), stride))
    if math.prod(part.size for part in parts) != len(places):
        return None
    return link_seconds(parts, kind, wire_bytes, count=count)


def _served(spec: MeshSpec, traffic: Mapping[str, float]) -> list[str]:
    """The axes, chattiest first."""
    automatic = [axis for axis in spec.names if axis not in spec.batch and axis != spec.stage]
    axes = [*reversed(automatic), *reversed(spec.batch), *([spec.stage] if spec.stage else [])]
    return sorted((axis for axis in axes if spec.sizes[axis] > 1), key=lambda axis: -traffic.get(axis, 0.0))


def _assign(
    spec: MeshSpec, dims: Sequence[Dim], served: Sequence[str], traffic: Mapping[str, float]
) -> dict[str, tuple[Part, ...]]:
    """The parts of every axis, fastest dim first.

    The state of the search is what is still free of every dim: an axis's stride on a dim is what went before it.
    """

    @functools.cache
    def best(place: int, free: tuple[int, ...]) -> tuple[_Cost, tuple[tuple[Part, ...], ...]] | None:
        """The cheapest way to lay served[place:] on what is free: what it costs, and the parts of each axis."""
        if place == len(served):
            return (0.0, 0, ()), ()
        axis, found = served[place], None
        for taken in factors(spec.sizes[axis], free):
            if not _allowed(spec, dims, axis, taken):
                continue
            rest = best(place + 1, tuple(have // take for have, take in zip(free, taken, strict=True)))
            if rest is None:
                continue
            parts = tuple(
                Part(dim, take, dim.size // have) for dim, have, take in zip(dims, free, taken, strict=True) if take > 1
            )
            (seconds, cuts, speeds), others = rest
            cuts += sum(part.dim.torus > 0 and part.size < part.dim.size for part in parts)
            speed = ring_bandwidth(parts)
            seconds += traffic.get(axis, 0.0) / speed if speed else 0.0
            cost = (seconds, cuts, (-speed, *speeds))
            if found is None or cost < found[0]:
                found = cost, (parts, *others)
        return found

    found = best(0, tuple(dim.size for dim in dims))
    if found is None:
        raise_faults([_misfit(spec, dims)])
    assert found is not None
    return dict.fromkeys(spec.names, ()) | dict(zip(served, found[1], strict=True))


def _allowed(spec: MeshSpec, dims: Sequence[Dim], axis: str, factors: Sequence[int]) -> bool:
    """Whether `spec.dcn` and `spec.links` let the axis cover that much of every dim."""
    if spec.dcn and dims[-1].tier in ("dcn", "network") and factors[-1] != dict(spec.dcn).get(axis, 1):
        return False
    wanted = dict(spec.links).get(axis)
    # Where dcn speaks of the slow dim, links speaks of the others.
    return wanted is None or all(
        take == 1 or dim.name in wanted or (spec.dcn and dim.tier in ("dcn", "network"))
        for dim, take in zip(dims, factors, strict=True)
    )


def _dcn_faults(spec: MeshSpec, dims: Sequence[Dim]) -> list[Fault]:
    """`spec.dcn` splits the mesh as the target's slow links do; emulated devices have none."""
    slow = dims[-1].size if dims[-1].tier in ("dcn", "network") else 1
    if not spec.dcn or dims[-1].name == "device" or slow == math.prod(count for _, count in spec.dcn):
        return []
    split = ", ".join(f"{axis}={count}" for axis, count in spec.dcn)
    tpu = spec.machine.platform == "tpu"
    has = f"{slow} {'slice' if tpu else dims[-1].name if slow > 1 else 'island'}{'' if slow == 1 else 's'}"
    way_out = f"declare parts that multiply to {slow}" if slow > 1 else "declare no dcn"
    way_out += ", or a target of several slices, like 2*tpu:v5e:16x16" if tpu else ""
    return [Fault(f"mesh {spec}", f"dcn ({split}) is not how {spec.target} is split: it has {has}", way_out)]


def _misfit(spec: MeshSpec, dims: Sequence[Dim]) -> Fault:
    said = [f"{axis} on {', '.join(names)}" for axis, names in spec.links]
    said += [f"{axis} in {count} parts" for axis, count in spec.dcn]
    sizes = ", ".join(f"{dim.name} {dim.size}" for dim in dims)
    problem = f"what is declared ({'; '.join(said)}) leaves no way to lay the axes on the dims ({sizes})"
    return Fault(f"mesh {spec}", problem, "name more dims for an axis, or leave it out of links")


def factors(size: int, free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to make `size` a product of divisors of what is free, most of the fast dims first."""
    if not free:
        if size == 1:
            yield ()
        return
    common = math.gcd(size, free[0])
    for take in range(common, 0, -1):
        if common % take == 0:
            yield from ((take, *rest) for rest in factors(size // take, free[1:]))


def _order(layout: Layout) -> list[int]:
    sizes = [dim.size for dim in layout.dims]
    weight = {dim.name: math.prod(sizes[:number]) for number, dim in enumerate(layout.dims)}
    places = [0]
    for links in layout.axes:
        steps = [weight[part.name] * part.stride for part in links.dims]
        digits = _digits([part.size for part in links.dims], snake=links.axis == layout.spec.stage)
        offsets = [sum(digit * step for digit, step in zip(row, steps, strict=True)) for row in digits]
        places = [place + offset for place in places for offset in offsets]
    return places


def _digits(sizes: Sequence[int], *, snake: bool) -> list[tuple[int, ...]]:
    """The digits of 0, 1, ... in a mixed radix, the first digit changing first; in a snake, neighbours differ in one.

        sizes (3, 2)   00 10 20 01 11 21     as a snake   00 10 20 21 11 01

    The stage axis is a snake: it carries permutes to the next position, which is then a neighbour. For other
    collectives XLA:TPU makes a single ring of a snake where it drives both dims at once otherwise (`StrategyRing`
    against `StrategySubgroupND` for a reduce-scatter over 8 x 8 chips of a v5p, libtpu 0.0.42.1).
    """
    out: list[tuple[int, ...]] = [()]
    for size in reversed(sizes):
        rows = ((number, digits) for number, digits in enumerate(out))
        out = [
            (digit, *digits)
            for number, digits in rows
            for digit in (range(size - 1, -1, -1) if snake and number % 2 else range(size))
        ]
    return out


def _links(axis: str, size: int, parts: tuple[Part, ...]) -> AxisLinks:
    tier = parts[-1].dim.tier if parts else "host"
    bandwidth = ring_bandwidth(parts)
    return AxisLinks(axis, size, tier, parts, bandwidth, _words(axis, size, parts, bandwidth))


def _words(axis: str, size: int, parts: Sequence[Part], bandwidth: float) -> str:
    if not parts:
        return f"{axis} (1) needs no links."
    said = [_switch_words(part) for part in parts if not part.dim.torus]
    torus = [part for part in parts if part.dim.torus]
    if torus:
        said.insert(0, _torus_words(torus))
    speed = f": {_rate(bandwidth)} a device" if bandwidth else ""
    return f"{axis} ({size}) lies on {_and(said)}{speed}."


def _torus_words(parts: Sequence[Part]) -> str:
    where = f"dim{'s' if len(parts) > 1 else ''} {_and([part.name for part in parts])}"
    if all(part.size == part.dim.size and part.wrap == parts[0].wrap for part in parts):
        shape = "ring" if parts[0].wrap else "line"
        sizes = _and([str(part.size) for part in parts])
        return f"{where}, {f'a {shape}' if len(parts) == 1 else f'{shape}s'} of {sizes} chips"
    return f"{where}, {_and([_cut_words(part) for part in parts])}{', as one ring' if len(parts) > 1 else ''}"


def _cut_words(part: Part) -> str:
    if part.size == part.dim.size:
        return f"a {'ring' if part.wrap else 'line'} of {part.size} chips"
    if part.stride == 1:
        return f"{part.size} neighbours of {part.dim.size} chips"
    return f"every {_ordinal(part.stride)} of {part.dim.size} chips"


def _switch_words(part: Part) -> str:
    if part.dim.tier == "host":
        return f"{part.size} devices" if part.name == "device" else f"{part.size} GPUs of a host (PCIe)"
    if part.dim.tier == "nvlink":
        whole = part.size == part.dim.size
        return f"{'the' if whole else f'{part.size} of the'} {part.dim.size} GPUs of an NVLink island"
    if part.name == "core":
        return "the two devices of a chip"
    return f"{part.size} {part.name}s ({'DCN' if part.dim.tier == 'dcn' else 'network'})"


def _target_words(spec: MeshSpec, dims: Sequence[Dim]) -> str:
    torus = [dim for dim in dims if dim.torus]
    if dims[0].name == "device":
        emulated = spec.machine.platform == "cpu"
        return f"{spec.target}: {'emulated devices' if emulated else 'devices'}, in JAX's order."
    if not torus:
        name = "NVLink islands" if dims[0].tier == "nvlink" else "hosts"
        if len(dims) == 1:
            return f"{spec.target}: one {name[:-1]} of {dims[0].size} GPUs."
        return f"{spec.target}: {dims[1].size} {name} of {dims[0].size} GPUs, joined by the network."
    wraps = [dim.name for dim in torus if dim.wrap]
    sizes = " x ".join(str(dim.size) for dim in torus)
    what = f"{dims[-1].size} slices joined by DCN, each" if dims[-1].tier == "dcn" else "a slice"
    chips = "chips of two devices" if dims[0].name == "core" else "chips"
    around = f"with wrap-around on {_and(wraps)}" if wraps else "without wrap-around"
    return f"{spec.target}: {what} of {sizes} {chips}, {around}."


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.4g} GB/s"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
