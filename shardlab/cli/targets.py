"""The verb `targets`: the machines that can be compiled for, and how a mesh lies on one. Loads no compiler."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardlab.cli.options import Common, option, read, show

if TYPE_CHECKING:
    from shardlab.mesh.chips import Chip


@dataclass(frozen=True, kw_only=True)
class _Targets(Common):
    target: str = field(metadata={"help": "a machine, to see a mesh laid on it; none lists them", "metavar": "MACHINE"})
    mesh: str = option("", "axes and sizes, the chattiest last; over slices as data=2*16", "AXIS=N,...")


def targets(arguments: list[str], *, restart: bool) -> int:
    """The verb `targets`."""
    if not arguments or arguments[0].startswith("-"):
        arguments = ["", *arguments]
    about = "The machines that can be compiled for: published memory, speed and links. With one, how a mesh lies on it."
    options = read(_Targets, arguments, prog="shardlab targets", about=about)
    return _laid_out(options) if options.target else _list(options)


def _list(options: Any) -> int:
    from shardlab.mesh.chips import CHIPS
    from shardlab.mesh.offline import compiler_installed, extra_of
    from shardlab.plan.text import columns

    here = {platform: compiler_installed(platform) for platform in ("tpu", "gpu")}
    facts = [{**dataclasses.asdict(chip), "compiler_installed": here[chip.platform]} for chip in CHIPS.values()]
    rows = [
        (
            f"{chip.platform}:{chip.kind}",
            f"{chip.hbm_bytes / 2**30:.0f}",
            f"{chip.usable_hbm_bytes / 2**30:.2f}",
            f"{chip.hbm_bandwidth / 1e12:.2f}",
            f"{chip.flops['bfloat16'] / 1e12:.0f}",
            _links(chip),
            "yes" if here[chip.platform] else "no",
        )
        for chip in CHIPS.values()
    ]
    header = ("target", "HBM GiB", "usable", "TB/s", "bf16 TFLOP/s", "links of a device, GB/s one way", "compiler here")
    lines = columns(header, rows, right=(1, 2, 3, 4))
    lines += [
        "",
        "numbers are of one device as JAX counts them: a chip, of v7x half a chip; --json has all, with their sources",
        "write tpu:v5p:4x8x8 (chips of the torus), 2*tpu:v5e:16x16 (slices), gpu:h200:8x8 (hosts x GPUs), cpu:8, local",
    ]
    missing = [f"pip install '{extra_of(platform)}' for {platform}:" for platform, there in here.items() if not there]
    lines += [f"a compiler that is not here: {', '.join(missing)}"] if missing else []
    return show(options, {"targets": facts}, "\n".join(lines))


def _links(chip: Chip) -> str:
    def rate(bandwidth: float) -> str:
        return f"{bandwidth / 1e9:.4g}"

    if chip.platform == "tpu":
        share = f" for {chip.devices_per_chip} devices" if chip.devices_per_chip > 1 else ""
        return (
            f"ICI {chip.ici_links} x {rate(chip.ici_bandwidth)}{share} ({chip.dims}-D), DCN {rate(chip.dcn_bandwidth)}"
        )
    inside = "NVLink" if chip.island_tier == "nvlink" else "PCIe"
    return f"{inside} {rate(chip.nvlink_bandwidth)} ({chip.island} GPUs), network {rate(chip.network_bandwidth)}"


def _laid_out(options: Any) -> int:
    from shardlab.mesh.spec import MeshSpec
    from shardlab.mesh.targets import parse_target
    from shardlab.mesh.topology import lay_out

    machine = parse_target(options.target)
    spec = MeshSpec.from_text(options.mesh or f"device={machine.num_devices}", target=options.target)
    layout = lay_out(spec)
    axes = [
        {
            "axis": links.axis,
            "size": links.size,
            "tier": links.tier,
            "bandwidth": links.bandwidth,
            "dims": [
                {"name": part.name, "size": part.size, "stride": part.stride, "wrap": part.wrap} for part in links.dims
            ],
        }
        for links in layout.axes
    ]
    facts = {"mesh": spec.to_json(), "axes": axes, "order": list(layout.order), "explanation": layout.explanation}
    return show(options, facts, f"{layout.explanation}\n\n{layout.draw()}")
