"""What the facts of an audit say, in words: the lines that a terminal, a page and a comparison have in common.

Facts are the plain data of `shardlab compile --json`: bytes and seconds are of one device and step. What is not known
is None there, and a sentence here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardlab.plan.text import human_bytes

TIERS = {"ici": "ICI", "dcn": "DCN", "nvlink": "NVLink", "network": "network", "host": "host"}


def subject(facts: Mapping[str, Any]) -> str:
    """What was compiled for what.

    >>> subject({"config": "configs/llama3_70b.py", "target": "tpu:v5p:4x8x8"})
    'llama3_70b on tpu:v5p:4x8x8'
    """
    return f"{Path(facts['config']).stem if facts['config'] else 'a train step'} on {facts['target']}"


def plan_words(facts: Mapping[str, Any]) -> str:
    """Size, mesh and plan in a line."""
    plan = facts["plan"]
    parts = [
        f"{count_text(plan['num_parameters'])} parameters",
        f"{facts['num_devices']:,} devices",
        mesh_text(facts["mesh"]),
        plan["dtype"],
        f"ZeRO {plan['zero']}",
        f"remat {plan['remat'] if isinstance(plan['remat'], str) else ' | '.join(plan['remat'])}",
        f"batch of {plan['batch_size']:,}",
    ]
    if plan["stages"] > 1:
        parts.append(f"{plan['stages']} stages, {plan['microbatches']} microbatches, schedule {plan['schedule']}")
    elif plan["microbatches"] > 1:
        parts.append(f"{plan['microbatches']} microbatches")
    return ", ".join(parts)


def mesh_text(mesh: Mapping[str, int]) -> str:
    """The mesh as it is declared.

    >>> mesh_text({"data": 64, "stage": 4})
    'mesh data=64 x stage=4'
    """
    return "mesh " + " x ".join(f"{axis}={size}" for axis, size in mesh.items())


def count_text(count: int) -> str:
    """A count with three digits.

    >>> count_text(70_553_706_496), count_text(8_030_261_248), count_text(999)
    ('70.6 B', '8.03 B', '999')
    """
    for size, unit in ((10**12, " T"), (10**9, " B"), (10**6, " M")):
        if count >= size:
            return _three(count / size) + unit
    return f"{count:,}"


def seconds_text(seconds: float) -> str:
    """A time with three digits.

    >>> seconds_text(11.84), seconds_text(0.0123), seconds_text(4.2e-5), seconds_text(0)
    ('11.8 s', '12.3 ms', '42.0 us', '0 s')
    """
    if not seconds:
        return "0 s"
    for size, unit in ((1, "s"), (1e-3, "ms")):
        if abs(seconds) >= 0.9995 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def room_words(remedy: Mapping[str, Any]) -> str:
    """Whether a change makes room, and how long a step takes then, where that was asked.

    >>> room_words({"fits": True, "seconds": 7.9}), room_words({"fits": False})
    ('fits, 7.90 s a step', 'still too much')
    """
    seconds = remedy.get("seconds")
    pace = "" if seconds is None else f", {seconds_text(seconds)} a step"
    return f"{'fits' if remedy['fits'] else 'still too much'}{pace}"


def bandwidth_text(bandwidth: float | None) -> str:
    """Bytes a second, in powers of 1000 as vendors write them.

    >>> bandwidth_text(180e9), bandwidth_text(None)
    ('180 GB/s', 'speed not known')
    """
    return "speed not known" if bandwidth is None else f"{bandwidth / 1e9:.3g} GB/s"


def share_text(part: float, whole: float) -> str:
    """A part of a whole in percent; what would print as nothing is said to be less than the least.

    >>> share_text(1, 3), share_text(1, 10_000), share_text(0, 3)
    ('33.3%', '<0.1%', '0.0%')
    """
    share = part / whole if whole else 0.0
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def at_once_words(facts: Mapping[str, Any]) -> str:
    """What is held at once of a step of which more is reported.

    >>> at_once_words({"hbm_bytes": 3 * 2**30, "hbm_peak_bytes": 2**31})
    '2.0 GiB at once (XLA reports 3.0 GiB, its gaps twice)'
    """
    peak, reported = facts.get("hbm_peak_bytes"), human_bytes(facts["hbm_bytes"])
    return (
        f"{human_bytes(peak)} at once (XLA reports {reported}, its gaps twice)" if peak else f"{reported} as reported"
    )


def verdict(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Whether it fits, in a word or two; and by how much.

    >>> verdict({"hbm_bytes": 3 * 2**30, "hbm_capacity_bytes": 2**32, "fits": True, "target": "tpu:v5e:4x4"})
    ('fits', '3.0 GiB of 4.0 GiB on a device (75.0%), 1.0 GiB left')
    """
    held, capacity = facts["hbm_bytes"], facts["hbm_capacity_bytes"]
    if capacity is not None and facts["fits"] and held > capacity:
        return "fits", f"{at_once_words(facts)} of {human_bytes(capacity)} on a device; the compiler takes it"
    if capacity is None:
        return "memory not limited", f"{human_bytes(held)} on a device; no capacity is known for {facts['target']}"
    share = share_text(held, capacity)
    if facts["fits"]:
        left = human_bytes(capacity - held)
        return "fits", f"{human_bytes(held)} of {human_bytes(capacity)} on a device ({share}), {left} left"
    needs = f"needs {human_bytes(held)} of a device that has {human_bytes(capacity)} ({share})"
    more = f"{human_bytes(held - capacity)} too much" if held > capacity else "the compiler refuses it"
    return "does not fit", f"{needs}: {more}"


def pace(facts: Mapping[str, Any]) -> str:
    """Seconds a step, MFU and what binds.

    >>> pace({"estimate_seconds": 5.0, "mfu": 0.601, "bound_by": "compute"})
    'estimated 5.00 s a step, MFU 60.1%, bound by compute'
    >>> pace({"estimate_seconds": None, "mfu": None, "bound_by": None, "target": "cpu:8"})
    'time not estimated for cpu:8'
    """
    if facts["estimate_seconds"] is None:
        return f"time not estimated for {facts['target']}"
    parts = [f"estimated {seconds_text(facts['estimate_seconds'])} a step"]
    parts += [f"MFU {facts['mfu']:.1%}"] if facts["mfu"] is not None else []
    parts += [f"bound by {facts['bound_by']}"] if facts["bound_by"] else []
    return ", ".join(parts)


def not_estimated(facts: Mapping[str, Any]) -> str:
    """Why there is no estimate."""
    if facts["wire_bytes"] is None:
        return "the compiler left no program"
    if facts["layout"] is None or facts["hbm_capacity_bytes"] is None:
        return f"no speeds are known for {facts['target']}"
    return f"the program for {facts['target']} does not say enough"


def flops_text(flops: float) -> str:
    """Floating point operations with three digits.

    >>> flops_text(4.61e20), flops_text(2.5e12), flops_text(1000)
    ('461 EFLOP', '2.50 TFLOP', '0.00 GFLOP')
    """
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if flops >= size:
            return f"{_three(flops / size)} {unit}FLOP"
    return f"{_three(flops / 1e9)} GFLOP"


def sent(facts: Mapping[str, Any]) -> str:
    """What a device sends a step, in both kinds of units: links are sold in powers of 1000.

    >>> sent({"wire_bytes": 420 * 10**9})
    '391.2 GiB (420.0 GB) sent by a device a step'
    """
    if facts["wire_bytes"] is None:
        return "what is sent is not known: the compiler left no program"
    if not facts["wire_bytes"]:
        return "nothing is sent"
    size = facts["wire_bytes"]
    decimal = f" ({size / 1e9:,.1f} GB)" if size >= 1e9 else ""
    return f"{human_bytes(size)}{decimal} sent by a device a step"


def idle(facts: Mapping[str, Any]) -> str:
    """The pipeline's idle share.

    >>> idle({"plan": {"stages": 4, "schedule": "1f1b", "bubble_fraction": 0.0857}})
    'pipeline 1f1b over 4 stages: idle 8.6% of a step'
    """
    plan = facts["plan"]
    if plan["stages"] == 1:
        return "no pipeline"
    return f"pipeline {plan['schedule']} over {plan['stages']} stages: idle {plan['bubble_fraction']:.1%} of a step"


def command(facts: Mapping[str, Any]) -> str | None:
    """The command line that makes these facts; None where no config file was given.

    >>> facts = {"config": "my model.py", "target": "cpu:8", "overrides": {"mesh": "data=8", "model.num_layers": 2}}
    >>> command(facts)
    "shardlab compile 'my model.py' --target cpu:8 --mesh data=8 --model.num-layers 2"
    """
    if not facts["config"]:
        return None
    given = {"target": facts["target"]} | dict(facts["overrides"])
    words = ["shardlab", "compile", facts["config"]]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def axes_text(axes: Iterable[str]) -> str:
    """The axes that a collective crosses.

    >>> axes_text(["data", "tensor"]), axes_text(["?"]), axes_text([])
    ('data x tensor', 'no product of axes', 'one device')
    """
    names = list(axes)
    return "no product of axes" if "?" in names else " x ".join(names) or "one device"


def why(row: Mapping[str, Any]) -> str:
    """The cause of a collective, without its kind, which stands beside it.

    >>> why({"cause": "all-gather of blocks/*/mlp/up/kernel (weights)"}), why({"cause": "the gradients' norm"})
    ('blocks/*/mlp/up/kernel (weights)', "the gradients' norm")
    """
    return re.sub(r"^(all|reduce|collective|ragged)-[a-z-]+ of ", "", row["cause"])


def short_source(source: str) -> str:
    """The file and line of a source without the way to them.

    >>> short_source("/home/me/project/models/decoder.py:109"), short_source("decoder.py:109")
    ('models/decoder.py:109', 'decoder.py:109')
    """
    return "/".join(source.split("/")[-2:])


def shape_text(shape: str) -> str:
    """A shape as XLA writes it, without the layout in memory.

    >>> shape_text("f32[4,32,96]{2,1,0:T(8,128)}")
    'f32[4,32,96]'
    """
    return re.sub(r"\{[^}]*\}", "", shape)


def alike(buffers: Iterable[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Buffers with how many of them read the same, as the moments of an optimizer do.

    >>> one = {"bytes": 64, "what": "state of a", "shape": "f32[16]", "category": "state", "source": ""}
    >>> [(count, buffer["bytes"]) for count, buffer in alike([one, one, one | {"bytes": 32}])]
    [(2, 64), (1, 32)]
    """
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for one in buffers:
        key = one["bytes"], one["what"], shape_text(one["shape"]), one["category"], one["source"]
        found.setdefault(key, []).append(one)
    return [(len(group), group[0]) for group in found.values()]


def with_rest(parts: Sequence[tuple[str, float]], most: int) -> list[tuple[str, float]]:
    """The parts of a whole, the smallest of them together where there are more than `most`.

    >>> with_rest([("a", 5), ("b", 1), ("c", 7), ("d", 2)], 3)
    [('a', 5), ('c', 7), ('2 smaller parts', 3)]
    """
    if len(parts) <= most:
        return list(parts)
    kept = sorted(range(len(parts)), key=lambda place: -parts[place][1])[: most - 1]
    rest = [size for place, (_, size) in enumerate(parts) if place not in kept]
    return [*(parts[place] for place in sorted(kept)), (f"{len(rest)} smaller parts", sum(rest))]


def count_bound(row: Mapping[str, Any]) -> str:
    """How a row's count is to be read: nothing, or the mark of a bound; of both kinds it is neither.

    >>> count_bound({"exact": False, "in_branch": False}), count_bound({"exact": True, "in_branch": True})
    ('>= ', '<= ')
    """
    if row["in_branch"]:
        return "<= " if row["exact"] else "~ "
    return "" if row["exact"] else ">= "


def cost_words(finding: Mapping[str, Any]) -> str:
    """What a lint costs; nothing where no number is known.

    >>> cost_words({"bytes": 2**30, "seconds": 0.5}), cost_words({"bytes": None, "seconds": None})
    ('1.0 GiB, 500 ms', '')
    """
    parts = [human_bytes(finding["bytes"])] if finding["bytes"] is not None else []
    parts += [seconds_text(finding["seconds"])] if finding["seconds"] is not None else []
    return ", ".join(parts)


def merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Collectives of one kind, axes, cause and way of waiting together, most wire bytes first.

    Counts, bytes and seconds are summed; of seconds, None where one is not known. `source` is kept where all agree.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], tuple(row["axes"]), row["cause"], row["async"]), []).append(row)
    found = []
    for (kind, axes, cause, hidden), group in groups.items():
        sources = {row["source"] for row in group}
        found.append(
            {
                "kind": kind,
                "axes": list(axes),
                "cause": cause,
                "async": hidden,
                "source": sources.pop() if len(sources) == 1 else "",
                **{name: sum(row[name] for row in group) for name in ("count", "payload_bytes", "wire_bytes")},
                **{name: _sum(row[name] for row in group) for name in ("seconds", "exposed_seconds")},
                "in_loop": any(row["in_loop"] for row in group),
                "exact": all(row["exact"] for row in group),
                "in_branch": any(row["in_branch"] for row in group),
            }
        )
    return sorted(found, key=lambda row: -row["wire_bytes"])


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _three(value: float) -> str:
    """Three digits, none of them in an exponent."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
