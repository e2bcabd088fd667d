"""Published records of the chips that can be compiled for: memory, speed, links, each number with its source.

Units: bytes, bytes a second, floating-point operations a second, hertz. Every number is of one JAX device and, for a
link, of one direction. A TPU v4 or v5p chip is one device (its two cores are joined: "megacore"), a v7x chip is two,
which share the chip's links. Peaks are dense, and at the vendor's boost clock.

>>> from shardlab.mesh.targets import parse_target
>>> chip = chip_of(parse_target("tpu:v5p:4x8x8"))
>>> chip.flops["bfloat16"], chip.ici_bandwidth, chip.ici_links
(459000000000000.0, 90000000000.0, 6)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.targets import Target

GIB = 2**30
_T, _G = 1e12, 1e9

_BOOK = "https://jax-ml.github.io/scaling-book/tpus: ICI bandwidth of a link, one direction; DCN 25 GB/s a host"
_COMPILER = "usable HBM: libtpu 0.0.42.1, from its refusal of a program that cannot fit"
_CLOCK = "clock: peak bf16 / the operations a cycle that libtpu's estimated_cycles assume of a large product"
_XLA = (
    "https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs: usable HBM, what its compiler asks"
)


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """What XLA's GPU compiler asks of a chip, after the fields of its `GpuTargetConfigProto`.

    Attributes:
      name: as the driver gives it.
      capability: CUDA compute capability, (major, minor).
      accelerated: whether the compiler may use what only this capability has ("sm_90a").
      cores: streaming multiprocessors.
      fpus: fp32 units of a core.
      threads: most threads resident on a core.
      shared_memory: bytes of a core.
      shared_memory_optin: bytes that one block may ask for.
      l2: bytes of the second-level cache.
    """

    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    fpus: int
    threads: int
    shared_memory: int
    shared_memory_optin: int
    l2: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What is published of one kind of device.

    Attributes:
      platform: "tpu" or "gpu".
      kind: as a target names it.
      names: what JAX calls the device (`device_kind`).
      hbm_bytes: the vendor's capacity.
      usable_hbm_bytes: what XLA lets a program have of it.
      hbm_bandwidth: bytes a second.
      flops: dense peak operations a second by dtype; "float32" on GPU is without tensor cores, "tf32" with them; a
        dtype that is not there has no published peak.
      clock_hz: of the compiler's estimated cycles (TPU), or the boost clock (GPU).
      host: the most devices of one host.
      dims: of the torus (TPU), else 0.
      devices_per_chip: JAX devices of a chip.
      ici_bandwidth: bytes a second of one link of the chip, in one direction (TPU).
      ici_links: of a chip: two a dim.
      core_bandwidth: bytes a second between the two devices of a chip, where there are two.
      dcn_bandwidth: bytes a second that a device can send between slices.
      nvlink_bandwidth: bytes a second that a device can send inside its island; over PCIe where `island_tier` is
        "host".
      island: devices of an NVLink domain, or of a PCIe host; 0 on TPU.
      island_tier: "nvlink", or "host" where the devices of a host meet over PCIe.
      network_bandwidth: bytes a second that a device can send between islands, with the network of the vendor's own
        systems.
      gpu: what the GPU compiler asks, None on TPU.
      sources: where each number is from.
    """

    platform: str
    kind: str
    names: tuple[str, ...]
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bandwidth: float
    flops: Mapping[str, float]
    clock_hz: float
    host: int
    dims: int = 0
    devices_per_chip: int = 1
    ici_bandwidth: float = 0.0
    ici_links: int = 0
    core_bandwidth: float = 0.0
    dcn_bandwidth: float = 0.0
    nvlink_bandwidth: float = 0.0
    island: int = 0
    island_tier: str = "nvlink"
    network_bandwidth: float = 0.0
    gpu: GpuConfig | None = None
    sources: tuple[str, ...] = ()


_HOPPER = {
    "bfloat16": 989 * _T,
    "float16": 989 * _T,
    "tf32": 494 * _T,
    "float32": 67 * _T,
    "float8": 1979 * _T,
    "int8": 1979 * _T,
}

_CHIPS = (
    Chip(
        platform="tpu",
        kind="v4",
        names=("TPU v4",),
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(30.75 * GIB),
        hbm_bandwidth=1200 * _G,
        flops={"bfloat16": 275 * _T, "int8": 275 * _T},
        clock_hz=1.05 * _G,
        host=4,
        dims=3,
        ici_bandwidth=45 * _G,
        ici_links=6,
        dcn_bandwidth=25 / 4 * _G,
        sources=("https://cloud.google.com/tpu/docs/v4: HBM, peak", _BOOK, _COMPILER, _CLOCK),
    ),
    Chip(
        platform="tpu",
        kind="v5e",
        names=("TPU v5 lite", "TPU v5e"),
        hbm_bytes=16 * GIB,
        usable_hbm_bytes=int(15.75 * GIB),
        hbm_bandwidth=819 * _G,
        flops={"bfloat16": 197 * _T, "int8": 393 * _T},
        clock_hz=1.5 * _G,
        host=8,
        dims=2,
        ici_bandwidth=45 * _G,
        ici_links=4,
        dcn_bandwidth=25 / 8 * _G,
        sources=(
            "https://cloud.google.com/tpu/docs/v5e: HBM, peak; DCN 6.4 Tb/s a pod of 256",
            _BOOK,
            _COMPILER,
            _CLOCK,
        ),
    ),
    Chip(
        platform="tpu",
        kind="v5p",
        names=("TPU v5", "TPU v5p"),
        hbm_bytes=96 * GIB,
        usable_hbm_bytes=int(95.74 * GIB),
        hbm_bandwidth=2765 * _G,
        flops={"bfloat16": 459 * _T, "int8": 918 * _T},
        clock_hz=1.75 * _G,
        host=4,
        dims=3,
        ici_bandwidth=90 * _G,
        ici_links=6,
        dcn_bandwidth=50 / 8 * _G,
        sources=(
            "https://cloud.google.com/tpu/docs/v5p: HBM (96 GiB physical), peak, DCN 50 Gb/s a chip",
            "https://jax-ml.github.io/scaling-book/tpus: int8 peak",
            _BOOK,
            _COMPILER,
            _CLOCK,
        ),
    ),
    Chip(
        platform="tpu",
        kind="v6e",
        names=("TPU v6 lite", "TPU v6e"),
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(31.25 * GIB),
        hbm_bandwidth=1638 * _G,
        flops={"bfloat16": 918 * _T, "int8": 1836 * _T, "float8": 918 * _T},
        clock_hz=1.75 * _G,
        host=8,
        dims=2,
        ici_bandwidth=90 * _G,
        ici_links=4,
        dcn_bandwidth=100 / 8 * _G,
        sources=(
            "https://cloud.google.com/tpu/docs/v6e: HBM, peak bf16 and int8",
            "https://cloud.google.com/tpu/docs/tpu7x: peak fp8, DCN 100 Gb/s a chip",
            _BOOK,
            _COMPILER,
            _CLOCK,
        ),
    ),
    Chip(
        platform="tpu",
        kind="v7x",
        names=("TPU7x",),
        hbm_bytes=96 * GIB,
        usable_hbm_bytes=int(94.75 * GIB),
        hbm_bandwidth=7380 / 2 * _G,
        flops={"bfloat16": 2307 / 2 * _T, "float8": 4614 / 2 * _T},
        clock_hz=2.2 * _G,
        host=8,
        dims=3,
        devices_per_chip=2,
        ici_bandwidth=90 * _G,
        ici_links=6,
        core_bandwidth=6 * 90 * _G,
        dcn_bandwidth=100 / 8 / 2 * _G,
        sources=(
            "https://cloud.google.com/tpu/docs/tpu7x: HBM, peak, DCN 100 Gb/s, all of a chip, which is two devices",
            "ICI: the same page gives 1200 GB/s a chip as for v5p, whose link the scaling book puts at 90 GB/s",
            "between the devices of a chip: the same page, about six times one ICI link",
            _COMPILER,
            _CLOCK,
        ),
    ),
    Chip(
        platform="gpu",
        kind="a100",
        names=("NVIDIA A100-SXM4-80GB",),
        hbm_bytes=80 * GIB,
        usable_hbm_bytes=85100068864,
        hbm_bandwidth=2039 * _G,
        flops={"bfloat16": 312 * _T, "float16": 312 * _T, "tf32": 156 * _T, "float32": 19.5 * _T, "int8": 624 * _T},
        clock_hz=1.41 * _G,
        host=8,
        nvlink_bandwidth=600 / 2 * _G,
        island=8,
        network_bandwidth=200 / 8 * _G,
        gpu=GpuConfig("NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 2048, 167936, 166912, 41943040),
        sources=(
            "NVIDIA A100 data sheet (A100 80GB SXM): HBM, peak, NVLink 600 GB/s both directions",
            "NVIDIA DGX A100 data sheet: 8 GPUs, a 200 Gb/s adapter each",
            _XLA,
        ),
    ),
    Chip(
        platform="gpu",
        kind="h100",
        names=("NVIDIA H100 80GB HBM3",),
        hbm_bytes=80 * GIB,
        usable_hbm_bytes=84942979072,
        hbm_bandwidth=3350 * _G,
        flops=_HOPPER,
        clock_hz=1.98 * _G,
        host=8,
        nvlink_bandwidth=900 / 2 * _G,
        island=8,
        network_bandwidth=400 / 8 * _G,
        gpu=GpuConfig("NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 2048, 233472, 232448, 52428800),
        sources=(
            "NVIDIA H100 data sheet (H100 SXM; halves of the sparse peaks): HBM, peak, NVLink 900 GB/s both directions",
            "NVIDIA DGX H100 data sheet: 8 GPUs, a 400 Gb/s adapter each",
            _XLA,
        ),
    ),
    Chip(
        platform="gpu",
        kind="h200",
        names=("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
        hbm_bytes=141 * GIB,
        usable_hbm_bytes=151397597184,
        hbm_bandwidth=4800 * _G,
        flops=_HOPPER,
        clock_hz=1.98 * _G,
        host=8,
        nvlink_bandwidth=900 / 2 * _G,
        island=8,
        network_bandwidth=400 / 8 * _G,
        gpu=GpuConfig("NVIDIA H200 141GB HBM3e", (9, 0), True, 132, 128, 2048, 233472, 232448, 52428800),
        sources=(
            "NVIDIA H200 data sheet (H200 SXM; halves of the sparse peaks): HBM, peak, NVLink 900 GB/s both directions",
            "NVIDIA DGX H200 data sheet: 8 GPUs, a 400 Gb/s adapter each",
            _XLA,
        ),
    ),
    Chip(
        platform="gpu",
        kind="b200",
        names=("NVIDIA B200",),
        hbm_bytes=180 * GIB,
        usable_hbm_bytes=191514411008,
        hbm_bandwidth=7672 * _G,
        flops={
            "bfloat16": 2250 * _T,
            "float16": 2250 * _T,
            "tf32": 1125 * _T,
            "float32": 75 * _T,
            "float8": 4500 * _T,
            "int8": 4500 * _T,
        },
        clock_hz=1.965 * _G,
        host=8,
        nvlink_bandwidth=1800 / 2 * _G,
        island=8,
        network_bandwidth=400 / 8 * _G,
        gpu=GpuConfig("NVIDIA B200", (10, 0), True, 148, 128, 2048, 233472, 232448, 132644864),
        sources=(
            "NVIDIA HGX B200 data sheet (an eighth of 8 GPUs; halves of the sparse peaks): peak, NVLink 1.8 TB/s",
            "NVIDIA DGX B200 data sheet: 8 GPUs of 180 GB, a 400 Gb/s adapter each",
            f"{_XLA}; HBM bandwidth (the data sheet's 8 TB/s rounds it up)",
        ),
    ),
    Chip(
        platform="gpu",
        kind="gb200",
        names=("NVIDIA GB200",),
        hbm_bytes=186 * GIB,
        usable_hbm_bytes=197897748480,
        hbm_bandwidth=7928 * _G,
        flops={
            "bfloat16": 2500 * _T,
            "float16": 2500 * _T,
            "tf32": 1250 * _T,
            "float32": 80 * _T,
            "float8": 5000 * _T,
            "int8": 5000 * _T,
        },
        clock_hz=2.062 * _G,
        host=4,
        nvlink_bandwidth=1800 / 2 * _G,
        island=72,
        network_bandwidth=400 / 8 * _G,
        gpu=GpuConfig("NVIDIA GB200", (10, 0), True, 152, 128, 2048, 233472, 232448, 135528448),
        sources=(
            "NVIDIA GB200 NVL72 data sheet (a 72nd of it; halves of the sparse peaks): HBM, peak, NVLink 1.8 TB/s",
            "NVIDIA DGX GB200 data sheet: 18 hosts of 4 GPUs, a 400 Gb/s adapter for each GPU",
            f"{_XLA}; HBM bandwidth (the data sheet's 8 TB/s rounds it up)",
        ),
    ),
    Chip(
        platform="gpu",
        kind="a6000",
        names=("NVIDIA RTX A6000",),
        hbm_bytes=48 * GIB,
        usable_hbm_bytes=51041271808,
        hbm_bandwidth=768 * _G,
        flops={"bfloat16": 154.8 * _T, "float16": 154.8 * _T, "tf32": 77.4 * _T, "float32": 38.7 * _T},
        clock_hz=1.8 * _G,
        host=8,
        nvlink_bandwidth=64 / 2 * _G,
        island=8,
        island_tier="host",
        network_bandwidth=100 / 8 * _G,
        gpu=GpuConfig("NVIDIA RTX A6000", (8, 6), False, 84, 128, 1536, 102400, 101376, 6291456),
        sources=(
            "NVIDIA RTX A6000 data sheet (halves of the sparse peaks): memory, peak; PCIe 4.0 x16, 64 GB/s both ways",
            "network: assumed, a 100 Gb/s adapter for each GPU; no system of the vendor's sets one",
            _XLA,
        ),
    ),
)

CHIPS: Mapping[tuple[str, str], Chip] = MappingProxyType({(chip.platform, chip.kind): chip for chip in _CHIPS})


def chip_of(target: Target) -> Chip:
    """The record of the target's chip; of `local`, that of the device JAX finds.

    Raises:
      DeclarationError: the target is emulated, or a local device that no record names.
    """
    chip = CHIPS.get((target.platform, target.kind))
    if target.text == "local" and target.platform != "cpu":
        import jax

        found = jax.devices()[0].device_kind
        chip = next((chip for chip in CHIPS.values() if found in chip.names), None)
    if chip is None:
        raise DeclarationError(
            f"target {target}: a CPU has no published record; its emulated devices show structure, not speed"
            if target.platform == "cpu"
            else f"target {target}: no record names this device; there are {', '.join(sorted({k for _, k in CHIPS}))}"
        )
    return chip
