"""Stand-in for `shardlab.mesh.chips` and `shardlab.mesh.topology`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.targets import Target


@dataclass(frozen=True)
class Chip:
    platform: str
    kind: str
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bandwidth: float
    flops: Mapping[str, float]
    ici_bandwidth: float = 0.0
    ici_links: int = 0
    dims: int = 0
    nvlink_bandwidth: float = 0.0
    island: int = 1
    network_bandwidth: float = 0.0


_G = 2**30
_TPU = {
    "v4": (32, 1.228e12, 275e12, 45e9, 3),
    "v5e": (16, 8.1e11, 197e12, 45e9, 2),
    "v5p": (95, 2.765e12, 459e12, 90e9, 3),
}
_TPU["v6e"] = (32, 1.64e12, 918e12, 90e9, 2)
_GPU = {"a100": (80, 2.0e12, 312e12, 300e9, 25e9), "h100": (80, 3.35e12, 989e12, 450e9, 50e9)}
_GPU |= {
    "h200": (141, 4.8e12, 989e12, 450e9, 50e9),
    "l4": (24, 3e11, 121e12, 32e9, 3e9),
    "a6000": (48, 7.68e11, 155e12, 28e9, 3e9),
}


def chip_of(target: Target) -> Chip:
    if target.platform == "tpu":
        size, bandwidth, flops, link, dims = _TPU[target.kind]
        return Chip(
            "tpu",
            target.kind,
            size * _G,
            size * _G,
            bandwidth,
            {"bfloat16": flops, "float32": flops / 6},
            link,
            2 * dims,
            dims,
        )
    if target.platform == "gpu":
        size, bandwidth, flops, nvlink, net = _GPU[target.kind]
        return Chip(
            "gpu",
            target.kind,
            size * 10**9,
            size * 10**9,
            bandwidth,
            {"bfloat16": flops, "float32": flops / 15},
            nvlink_bandwidth=nvlink,
            island=8,
            network_bandwidth=net,
        )
    return Chip("cpu", "", 16 * _G, 16 * _G, 2e10, {"bfloat16": 5e10, "float32": 5e10}, network_bandwidth=1e10)


@dataclass(frozen=True)
class Layout:
    spec: MeshSpec


def lay_out(spec: MeshSpec, *, traffic: Mapping[str, float] | None = None) -> Layout:
    return Layout(spec)


def collective_seconds(layout: Layout, kind: str, axes: Iterable[str], wire_bytes: float) -> float:
    spec = layout.spec
    chip = chip_of(spec.machine)
    if chip.platform == "tpu":
        return wire_bytes / (2 * chip.ici_bandwidth * (chip.dims if math.prod(spec.sizes[a] for a in axes) > 16 else 1))
    names = list(spec.names)
    inner = math.prod(spec.sizes[name] for name in names[names.index(next(iter(axes))) :])
    island = spec.machine.shape[-1] if chip.platform == "gpu" else 0
    return wire_bytes / (chip.nvlink_bandwidth if inner <= island else chip.network_bandwidth)
