"""The links of a target as dims, and what a part of them can send."""

import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.physical import Dim, Part, dims_of, ring_bandwidth, wraps_of
from shardlab.mesh.targets import parse_target

G = 1e9


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("tpu:v5p:4x8x8", "x4o ici 90, y8o ici 90, z8o ici 90"),
        ("tpu:v5p:2x4x4", "x2 ici 90, y4 ici 90, z4 ici 90"),
        ("tpu:v4:4x4x4", "x4o ici 45, y4o ici 45, z4o ici 45"),
        ("tpu:v4:4x4x6", "x4 ici 45, y4 ici 45, z6 ici 45"),
        ("2*tpu:v5e:8x16", "x8 ici 45, y16o ici 45, slice2 dcn 3.125"),
        ("tpu:v6e:4x4", "x4 ici 90, y4 ici 90"),
        ("tpu:v7x:4x4x4", "core2 ici 540, x4o ici 45, y4o ici 45, z4o ici 45"),
        ("gpu:h200:1x8", "gpu8 nvlink 450"),
        ("gpu:h100:8x8", "gpu8 nvlink 450, island8 network 50"),
        ("gpu:h100:8x4", "gpu4 nvlink 450, island8 network 50"),
        ("gpu:gb200:18x4", "gpu72 nvlink 900"),
        ("gpu:gb200:36x4", "gpu72 nvlink 900, island2 network 50"),
        ("gpu:gb200:20x4", "gpu40 nvlink 900, island2 network 50"),
        ("gpu:gb200:64x4", "gpu64 nvlink 900, island4 network 50"),
        ("gpu:a6000:2x4", "gpu4 host 32, host2 network 12.5"),
        ("cpu:8", "device8 host 0"),
    ],
)
def test_dims(text: str, dims: str) -> None:
    found = dims_of(parse_target(text))
    said = [f"{dim.name}{dim.size}{'o' if dim.wrap else ''} {dim.tier} {dim.link / G:g}" for dim in found]
    assert ", ".join(said) == dims


def test_the_dims_of_every_target_multiply_to_its_devices() -> None:
    for text in ("3*tpu:v7x:2x4x4", "2*tpu:v5e:16x16", "gpu:gb200:36x4", "gpu:gb200:19x4", "cpu:6"):
        target = parse_target(text)
        devices = 1
        for dim in dims_of(target):
            devices *= dim.size
        assert devices == target.num_devices


def test_more_gpus_than_a_host_has() -> None:
    with pytest.raises(DeclarationError) as error:
        dims_of(parse_target("gpu:h100:4x16"))
    assert str(error.value) == (
        "target gpu:h100:4x16: has 16 GPUs a host, a host of h100 has at most 8; write gpu:h100:8x8"
    )


def test_a_pod_of_v5e_wraps_on_its_full_length_only() -> None:
    assert wraps_of(parse_target("tpu:v5e:16x16")) == (True, True)
    assert wraps_of(parse_target("tpu:v6e:16x8")) == (True, False)


X = Dim("x", 16, "ici", 1, 45 * G, torus=2, wrap=True)
Y = Dim("y", 8, "ici", 1, 45 * G, torus=2, wrap=False)
Z = Dim("z", 8, "ici", 1, 45 * G, torus=2, wrap=False)
GPU = Dim("gpu", 8, "nvlink", 0, 450 * G)
ISLAND = Dim("island", 4, "network", 1, 50 * G)
SLICE = Part(Dim("slice", 2, "dcn", 2, 3 * G), 2)


@pytest.mark.parametrize(
    ("parts", "bandwidth"),
    [
        ([Part(X, 16)], 90),  # a ring: both directions
        ([Part(Y, 8)], 45),  # a line: the ends have one link
        ([Part(X, 4)], 45),  # neighbours of a ring are a line
        ([Part(X, 4, stride=4)], 90 / 4),  # it closes, and shares its links with three others
        ([Part(X, 4), Part(X, 4, stride=4)], 90),  # together they are the ring
        ([Part(X, 16), Part(Y, 8)], 135),  # whole dims drive all links
        ([Part(X, 2), Part(X, 2, stride=2)], 45),  # or a longer line
        ([Part(X, 4), Part(Y, 2)], 90),  # cut: one ring through both, which closes
        ([Part(X, 4), Part(Y, 2), Part(Z, 2)], 90),  # no more than one
        ([Part(GPU, 4)], 450),
        ([Part(ISLAND, 4)], 50),
        # Every byte leaves an island through the adapters of the GPUs that take part.
        ([Part(GPU, 8), Part(ISLAND, 4)], 400),
        ([Part(GPU, 2), Part(ISLAND, 4)], 100),
        # Of the result 1/32 comes into the slice through each chip, and 15/16 round its ring.
        ([Part(X, 16), SLICE], 31 / 32 / (15 / 16 / 90 + 1 / 32 / 3)),
        ([], 0),
        ([Part(Dim("device", 8, "host", 0, 0.0), 8)], 0),
    ],
)
def test_bandwidth(parts: list[Part], bandwidth: float) -> None:
    assert ring_bandwidth(parts) / G == pytest.approx(bandwidth, rel=1e-12)
