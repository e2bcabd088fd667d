"""The links of a target as dims: what joins the devices, how fast, and the part of a dim that a mesh axis covers.

A TPU slice is a torus: chips joined to their neighbours along dims x, y (and z); a dim is a ring where the slice has
wrap-around links, else a line. Slices are joined by DCN. GPUs are islands, inside which NVLink joins every pair,
joined by a network.

    target           dims, fastest first                                tier
    tpu:v5p:4x8x8    x 4, y 8, z 8, all rings                           ici
    2*tpu:v5e:8x16   x 8, a line; y 16, a ring; slice 2                 ici; dcn
    tpu:v7x:4x4x4    core 2, the two devices of a chip; x 4, y 4, z 4   ici
    gpu:h200:8x8     gpu 8; island 8                                    nvlink; network
    cpu:8            device 8                                           host, without a speed

Wrap-around: slices of v4, v5p and v7x made of whole 4x4x4 cubes have it on every dim, others on none (the optical
switches are on the cubes' faces); those of v5e and v6e have it on a dim of 16, the length of their pod. Twisted tori
are not modelled. Sources: https://cloud.google.com/tpu/docs/v5p ("all 4x4x4 and larger slices have full 3D torus
connectivity"); https://jax-ml.github.io/scaling-book/tpus ("smaller topologies can be requested without wraps on dims
< 16", "a TPU v5e 8x16 will have a wraparound on the longer axis").
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from shardlab.mesh.chips import Chip, chip_of
from shardlab.mesh.faults import Fault, raise_faults
from shardlab.mesh.targets import Target

_CUBE, _POD = 4, 16


@dataclasses.dataclass(frozen=True)
class Dim:
    """One physical dim of a target.

    Attributes:
      name: "x", "y", "z", "core", "slice"; "gpu", "island" or, of GPUs without NVLink, "host"; "device".
      size: devices (or slices, islands) along it.
      tier: "ici", "dcn", "nvlink", "network" or "host".
      level: 0 for the fastest links; a collective over dims of one level drives all of them at once.
      link: bytes a second that one device sends over one link in one direction; 0 where nothing is known.
      torus: how many dims the torus has of which this is one; 0 where a switch joins every pair.
      wrap: whether the last is the first's neighbour.
    """

    name: str
    size: int
    tier: str
    level: int
    link: float
    torus: int = 0
    wrap: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a dim a mesh axis covers: `size` places, `stride` apart.

    A part with a stride shares its links with the axis inside it: `stride` groups run over the same links at once.
    """

    dim: Dim
    size: int
    stride: int = 1

    @property
    def name(self) -> str:
        """The dim's name."""
        return self.dim.name

    @property
    def wrap(self) -> bool:
        """Whether its places close to a ring."""
        return self.dim.wrap and self.stride * self.size == self.dim.size

    @property
    def one_way(self) -> float:
        """Bytes a second that a device sends to the next place."""
        return self.dim.link / self.stride if self.dim.torus else self.dim.link

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a device sends in a ring collective: both ways round a ring; a line costs twice."""
        return self.one_way * (2 if self.wrap else 1)


def dims_of(target: Target) -> tuple[Dim, ...]:
    """The physical dims of a target, fastest first; their sizes multiply to its devices.

    Raises:
      DeclarationError: GPU hosts that no NVLink domain has, or that do not come in equal domains.

    >>> from shardlab.mesh.targets import parse_target
    >>> [(dim.name, dim.size, dim.wrap) for dim in dims_of(parse_target("2*tpu:v5e:8x16"))]
    [('x', 8, False), ('y', 16, True), ('slice', 2, False)]
    """
    if target.platform == "cpu" or target.text == "local":
        return (Dim("device", target.num_devices, "host", 0, 0.0),)
    chip = chip_of(target)
    if target.platform == "gpu":
        return _islands(target, chip)
    wraps = wraps_of(target)
    share = chip.ici_bandwidth / chip.devices_per_chip  # The devices of a chip share its links.
    dims = [
        Dim(name, size, "ici", 1, share, torus=chip.dims, wrap=wrap)
        for name, size, wrap in zip("xyz", target.shape, wraps, strict=False)
    ]
    if chip.devices_per_chip > 1:
        dims.insert(0, Dim("core", chip.devices_per_chip, "ici", 0, chip.core_bandwidth))
    if target.slices > 1:
        dims.append(Dim("slice", target.slices, "dcn", 2, chip.dcn_bandwidth))
    return tuple(dims)


def wraps_of(target: Target) -> tuple[bool, ...]:
    """For each dim of a TPU slice, whether it has wrap-around links; the rule is in the module's docstring.

    >>> from shardlab.mesh.targets import parse_target
    >>> wraps_of(parse_target("tpu:v5e:8x16")), wraps_of(parse_target("tpu:v5p:2x4x4"))
    ((False, True), (False, False, False))
    """
    if len(target.shape) == 2:
        return tuple(size == _POD for size in target.shape)
    cubes = all(size % _CUBE == 0 for size in target.shape)
    return (cubes,) * len(target.shape)


def _islands(target: Target, chip: Chip) -> tuple[Dim, ...]:
    hosts, gpus = target.shape
    if gpus > chip.host:
        problem = f"has {gpus} GPUs a host, a host of {chip.kind} has at most {chip.host}"
        raise_faults(
            [Fault(f"target {target}", problem, f"write gpu:{chip.kind}:{hosts * gpus // chip.host}x{chip.host}")]
        )
    together = max(1, chip.island // chip.host)  # Hosts that one NVLink domain may join.
    count = next(count for count in range(math.ceil(hosts / together), hosts + 1) if hosts % count == 0)
    size = hosts // count * gpus
    dims = [Dim("gpu", size, chip.island_tier, 0, chip.nvlink_bandwidth)]
    if count > 1:
        name = "island" if chip.island_tier == "nvlink" else "host"
        dims.append(Dim(name, count, "network", 1, chip.network_bandwidth))
    return tuple(dims)


def merged(parts: Iterable[Part]) -> list[Part]:
    """The parts with those that lie inside one another on one dim joined: together they may close a ring.

    >>> x = Dim("x", 16, "ici", 1, 45e9, torus=2, wrap=True)
    >>> merged([Part(x, 4, stride=4), Part(x, 4)]) == [Part(x, 16)]
    True
    """
    out: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.dim.level, part.name, part.stride)):
        if out and out[-1].dim == part.dim and out[-1].stride * out[-1].size == part.stride:
            out[-1] = Part(part.dim, out[-1].size * part.size, out[-1].stride)
        else:
            out.append(part)
    return out


def levels(parts: Iterable[Part]) -> list[list[Part]]:
    """The merged parts by level, the fastest first."""
    return [list(group) for _, group in itertools.groupby(merged(parts), key=lambda part: part.dim.level)]


def all_links(parts: Sequence[Part]) -> float:
    """Bytes a second that a device sends over parts of one level, all at once where the compiler does so.

    Whole dims of a torus are driven together. A collective over several parts of which one is cut runs as one ring
    through them all, which closes whether or not a dim does: XLA:TPU says so in its `collective_algorithm_config`
    (`StrategyND`, `2DAllGatherOnMajorDim` for whole dims, `StrategyRing`, `1DAllGather...` else; libtpu 0.0.42.1).
    """
    if all(part.size == part.dim.size for part in parts):
        return sum(part.bandwidth for part in parts)
    return one_ring(parts)


def one_ring(parts: Sequence[Part]) -> float:
    """Bytes a second that a device sends in a single ring through parts of one level."""
    if len(parts) == 1:
        return parts[0].bandwidth
    return 2 * max(part.one_way for part in parts)


def gather_share(parts: Iterable[Part], speed: Callable[[Sequence[Part]], float] = all_links) -> float:
    """Seconds that a byte of the result of a gather takes.

    Legend: n places on a level, N on the faster ones together, W its bytes a second, P places of the group.

    TPU: level after level, as XLA makes it of several slices: the sum of (n - 1) / (n N W), as the faster levels pass
    on what has come over a slower one. GPU: NCCL's rings through all the group's GPUs, every byte over every hop, with
    an adapter for each of an island's N GPUs: (P - 1) / P over the least of N W.
    """
    found = levels(parts)
    places = [math.prod(part.size for part in level) for level in found]
    inside = [math.prod(places[:number]) for number in range(len(places))]
    speeds = [speed(level) for level in found]
    if not all(speeds):
        return math.inf
    if any(level[0].dim.tier in ("nvlink", "host", "network") for level in found):
        group = math.prod(places)
        return (group - 1) / group / min(N * W for N, W in zip(inside, speeds, strict=True))
    return sum((n - 1) / (n * N * W) for n, N, W in zip(places, inside, speeds, strict=True))


def ring_bandwidth(parts: Iterable[Part]) -> float:
    """Bytes a second that one device can send in a ring collective over these parts; 0 where nothing is known.

    >>> x = Dim("x", 16, "ici", 1, 45e9, torus=2, wrap=True)
    >>> ring_bandwidth([Part(x, 16)]) / 1e9, ring_bandwidth([Part(x, 4)]) / 1e9  # a ring; a line of neighbours
    (90.0, 45.0)
    """
    parts = list(parts)
    places, share = math.prod(part.size for part in parts), gather_share(parts)
    return 0.0 if places == 1 or math.isinf(share) else (places - 1) / places / share
