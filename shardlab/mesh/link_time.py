"""How long a collective takes on the links its axes cover, were nothing else running.

Legend: b bytes of the operand of an all-to-all, V of the gathered result or the reduced operand, on P devices; W bytes
a second that one device sends over the links of one level (`shardlab.mesh.physical`), n places on the level, N on the
faster levels together, M on the slower ones.

    all-gather, reduce-scatter   on TPU V (n-1) / (n N W), summed over the levels; on GPU V (P-1) / P over the least N W
    all-reduce                   twice that
    all-to-all, on a torus       b/M floor(n^2/4) / (n W) on every dim, the slowest counts: a message goes a quarter of
                                 the way round a ring on average
    all-to-all, on a switch      b/M (n-1) / (n W)
    collective-permute           the payload over one link, of the slowest dim

Which links W sums depends on what XLA:TPU makes of a collective over several dims of a torus (from the
`collective_algorithm_config` of its HLO, libtpu 0.0.42.1):

    all-reduce       whole dims: all at once
    all-gather       whole dims of a 3-D torus: all at once; of a 2-D torus: one ring
    reduce-scatter   whole dims of one size: all at once; of different sizes: one ring
    any              a dim of which only a part is covered: one ring

To that is added what the hops take, and on GPUs the launch. The bandwidths are the links' own; protocols reach less.

Sources: ring costs, Chan et al. 2007, "Collective communication: theory, practice, and experience"; tori, all-to-all
and 1 us a hop, https://jax-ml.github.io/scaling-book/sharding; hierarchies, https://jax-ml.github.io/scaling-book/gpus;
hops on GPUs, NCCL's src/graph/tuning.cc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardlab.mesh.faults import DeclarationError, suggestion
from shardlab.mesh.physical import Part, all_links, gather_share, levels, merged, one_ring

# Seconds a hop adds. ICI: the scaling book's "typically around 1us". Others: NCCL's ring with its low-latency protocol;
# DCN is taken to be like NCCL's network.
_HOP = {"ici": 1e-6, "nvlink": 0.47e-6, "host": 1e-6, "network": 2.7e-6, "dcn": 2.7e-6}
_LAUNCH = {"nvlink": 3.6e-6, "host": 3.6e-6, "network": 3.6e-6}  # NCCL's base latency; TPUs start by themselves.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


def link_seconds(parts: Sequence[Part], kind: str, wire_bytes: float, *, count: int = 1) -> float:
    """Seconds of `count` collectives over parts of physical dims.

    Args:
      parts: that the group's axes cover; their sizes multiply to the group's.
      kind: one of `KINDS`.
      wire_bytes: that one device sends in all of them, as `shardlab.hlo.collectives` counts.
      count: how many there are, for the latency.

    Raises:
      DeclarationError: a kind that is not known, or links without a speed (emulated devices).

    >>> from shardlab.mesh.physical import Dim
    >>> x = Dim("x", 16, "ici", 1, 45e9, torus=2, wrap=True)
    >>> round(link_seconds([Part(x, 16)], "all-gather", 90e9), 4)
    1.0
    """
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise DeclarationError(f"collective {kind!r}: is not one of {known}; {suggestion(kind, KINDS)}name one of them")
    parts = merged(parts)
    places = math.prod(part.size for part in parts)
    if places == 1:
        return 0.0
    if not all(part.one_way for part in parts):
        raise DeclarationError(
            "links: of emulated and local devices none are known, so no time can be told; name a TPU or GPU target"
        )
    latency = count * _latency(parts, kind)
    if kind in ("collective-permute", "collective-broadcast"):
        return wire_bytes / min(part.one_way for part in parts) + latency
    whole = wire_bytes * places / (places - 1)
    if kind == "all-to-all":
        return whole * _exchange_share(parts) + latency
    speed = {"all-gather": _gathering, "reduce-scatter": _scattering, "all-reduce": all_links}[kind]
    return whole * gather_share(parts, speed) + latency


def _gathering(level: Sequence[Part]) -> float:
    return one_ring(level) if level[0].dim.torus == 2 else all_links(level)


def _scattering(level: Sequence[Part]) -> float:
    return all_links(level) if len({part.size for part in level}) == 1 else one_ring(level)


def _exchange_share(parts: Sequence[Part]) -> float:
    """Seconds that a byte of an all-to-all's operand takes."""
    slowest, outside = 0.0, 1
    for level in reversed(levels(parts)):
        for part in level:
            distance = (part.size**2 // 4) / part.size if part.dim.torus else (part.size - 1) / part.size
            slowest = max(slowest, distance / (outside * part.bandwidth))
        outside *= math.prod(part.size for part in level)
    return slowest


def _latency(parts: Sequence[Part], kind: str) -> float:
    launch = max(_LAUNCH.get(part.dim.tier, 0.0) for part in parts)
    if kind in ("collective-permute", "collective-broadcast"):
        return launch + max(_HOP[part.dim.tier] * (part.stride if part.dim.torus else 1) for part in parts)
    hops = sum(_HOP[part.dim.tier] * _steps(part) for part in parts)
    return launch + hops * (2 if kind == "all-reduce" else 1)


def _steps(part: Part) -> int:
    """Hops from the farthest place: half way round a ring, the length of a line, every peer in turn on a switch."""
    if not part.dim.torus:
        return part.size - 1
    return part.stride * (part.size // 2 if part.wrap else part.size - 1)
