"""Seconds of collectives on links, counted by hand."""

import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.link_time import link_seconds
from shardlab.mesh.physical import Dim, Part

G = 1e9
RING = Part(Dim("x", 16, "ici", 1, 45 * G, torus=2, wrap=True), 16)
LINE = Part(Dim("y", 8, "ici", 1, 45 * G, torus=2), 8)
RING3 = [
    Part(Dim(name, size, "ici", 1, 90 * G, torus=3, wrap=True), size) for name, size in (("x", 4), ("y", 8), ("z", 8))
]
GPU = Part(Dim("gpu", 8, "nvlink", 0, 450 * G), 8)
ISLAND = Part(Dim("island", 4, "network", 1, 50 * G), 4)
SLICE = Part(Dim("slice", 2, "dcn", 2, 3 * G), 2)


def seconds(parts: list[Part], kind: str, wire: float) -> float:
    """Of wire bytes, without what the hops take."""
    return link_seconds(parts, kind, wire) - link_seconds(parts, kind, 0.0)


@pytest.mark.parametrize(
    ("parts", "kind", "wire", "expected"),
    [
        ([RING], "all-gather", 90 * G, 1),
        ([RING], "reduce-scatter", 90 * G, 1),
        ([RING], "all-reduce", 180 * G, 2),
        ([LINE], "all-gather", 90 * G, 2),
        # Over a 3-D torus all links work at once; equal dims for a reduce-scatter, whole ones for the others.
        (RING3, "all-gather", 540 * G, 1),
        (RING3, "all-reduce", 540 * G, 1),
        (RING3[1:], "reduce-scatter", 360 * G, 1),
        (RING3[:2], "reduce-scatter", 180 * G, 1),
        # Over a 2-D torus an all-gather is one ring.
        ([RING, LINE], "all-gather", 90 * G, 1),
        ([RING, LINE], "all-reduce", 135 * G, 1),
        # A permute uses one link; the slowest of them counts.
        ([RING], "collective-permute", 45 * G, 1),
        ([GPU, ISLAND], "collective-permute", 50 * G, 1),
        ([RING, SLICE], "collective-permute", 3 * G, 1),
        # 16 places of b = 16 bytes each: 15 wire; every byte goes 4 places of a ring on average, over 2 links of 16.
        ([RING], "all-to-all", 15 * G, 16 * 4 / 2 / 45),
        # Half of 8 b crosses the middle of the line, half of that each way: 4 places x 4 bytes, one link.
        ([LINE], "all-to-all", 7 * G, 4 * 4 / 45),
        ([GPU], "all-to-all", 7 * G, 7 / 450),
        # Of 32 bytes 24 leave the island.
        ([GPU, ISLAND], "all-to-all", 31 * G, 24 / 50),
        # Of 32 bytes 16 leave the slice, at 3 GB/s; the others stay on the ring.
        ([RING, SLICE], "all-to-all", 31 * G, 16 / 3),
        # Over faster DCN the ring takes longer: 16 bytes that stay, 4 places each, over 2 links.
        ([RING, Part(Dim("slice", 2, "dcn", 2, 100 * G), 2)], "all-to-all", 31 * G, 16 * 4 / 2 / 45),
        # Rings through all GPUs: 31 bytes of 32 leave the island over its 8 adapters, or 2 where two GPUs take part.
        ([GPU, ISLAND], "all-gather", 31 * G, 31 / 400),
        ([GPU, ISLAND], "all-reduce", 62 * G, 62 / 400),
        ([Part(GPU.dim, 2), ISLAND], "all-gather", 7 * G, 7 / 100),
        # Gathering 32 bytes: one comes into the slice through each chip, then 30 round the ring.
        ([RING, SLICE], "all-gather", 31 * G, 1 / 3 + 30 / 90),
    ],
)
def test_bytes(parts: list[Part], kind: str, wire: float, expected: float) -> None:
    assert seconds(parts, kind, wire) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("parts", "kind", "microseconds"),
    [
        ([RING], "all-gather", 8),  # half way round
        ([LINE], "all-gather", 7),
        ([RING], "all-reduce", 16),
        ([RING], "collective-permute", 1),
        ([Part(RING.dim, 4, stride=4)], "collective-permute", 4),
        ([GPU], "all-gather", 3.6 + 7 * 0.47),
        ([GPU, ISLAND], "all-gather", 3.6 + 7 * 0.47 + 3 * 2.7),
    ],
)
def test_latency(parts: list[Part], kind: str, microseconds: float) -> None:
    assert link_seconds(parts, kind, 0.0) * 1e6 == pytest.approx(microseconds)
    assert link_seconds(parts, kind, 0.0, count=5) * 1e6 == pytest.approx(5 * microseconds)


def test_a_group_of_one_takes_no_time() -> None:
    assert link_seconds([], "all-reduce", 0.0) == 0.0


def test_a_kind_that_is_not_known() -> None:
    with pytest.raises(DeclarationError) as error:
        link_seconds([RING], "all-gathr", 1.0)
    assert str(error.value) == (
        "collective 'all-gathr': is not one of all-gather, all-reduce, reduce-scatter, all-to-all, "
        "collective-permute, collective-broadcast; did you mean 'all-gather'? name one of them"
    )


def test_links_of_emulated_devices() -> None:
    with pytest.raises(DeclarationError) as error:
        link_seconds([Part(Dim("device", 8, "host", 0, 0.0), 8)], "all-gather", 1.0)
    assert str(error.value) == (
        "links: of emulated and local devices none are known, so no time can be told; name a TPU or GPU target"
    )
