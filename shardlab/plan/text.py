"""A plan as text: its table, its totals, and what was decided."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardlab.pipeline.cost import idle_fraction
from shardlab.sharding.rules import canonical, spec_text

if TYPE_CHECKING:
    from shardlab.plan.plan import Plan


def human_bytes(size: int) -> str:
    """A number of bytes in the largest unit (powers of 1024) that leaves at least 1.

    >>> human_bytes(1023), human_bytes(1536), human_bytes(3 * 2**40)
    ('1023 B', '1.5 KiB', '3.0 TiB')
    """
    value, unit = float(size), 0
    # 1023.95 would print as 1024.0: the next unit then.
    while abs(value) >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{size} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def bytes_label(name: str) -> str:
    """What an entry of `Plan.bytes_per_device` is called in a table."""
    return _LABELS.get(name, name.replace("_", " "))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a table; the columns numbered in `right` are aligned right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = (
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def describe(plan: Plan) -> str:
    """The plan's table: sibling layers on one line, totals per device, notes."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for p in plan.parameters:
        key = (
            sibling_pattern(p.path),
            p.shape,
            p.dtype,
            p.spec,
            _same_source(p.source),
            p.storage,
            p.state,
            p.bytes_per_device,
        )
        groups.setdefault(key, []).append(p.path)
    rows = []
    for (pattern, shape, dtype, spec, source, storage, state, size), paths in groups.items():
        path = paths[0] if len(paths) == 1 else f"{pattern} x{len(paths)}"
        stored = "as declared" if canonical(storage) == canonical(spec) else spec_text(canonical(storage))
        rows.append(
            (
                path,
                "x".join(map(str, shape)) or "scalar",
                dtype,
                spec_text(spec),
                stored,
                spec_text(canonical(state)),
                source,
                human_bytes(size),
            )
        )
    held: dict[Any, list[str]] = {}
    for buffer in plan.buffers:
        same = dataclasses.replace(buffer, path=sibling_pattern(buffer.path), source=_same_source(buffer.source))
        held.setdefault(same, []).append(buffer.path)
    for one, paths in held.items():
        path = paths[0] if len(paths) == 1 else f"{one.path} x{len(paths)}"
        shape, size = "x".join(map(str, one.shape)) or "scalar", human_bytes(one.bytes_per_device)
        rows.append((path, shape, one.dtype, spec_text(one.spec), "as declared", "not trained", one.source, size))
    mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.sizes.items())
    roles = f"batch axes {', '.join(plan.mesh.batch) or 'none'}; stage axis {plan.mesh.stage or 'none'}"
    microbatches = _of(plan.num_microbatches, "microbatch", "es")
    lines = [
        f"mesh {mesh} on {plan.mesh.target} ({roles})",
        f"{plan.num_parameters:,} parameters, computed in {plan.dtype}, gradients summed in {plan.reduce_dtype}; "
        f"ZeRO {plan.zero}; remat {plan.remat if isinstance(plan.remat, str) else ' | '.join(plan.remat)}",
        f"batch of {plan.batch_size}, {microbatches} of {plan.microbatch_rows} a shard",
    ]
    flows = {"x between blocks": plan.activation_spec, "kept for the backward": plan.saved_activation_spec}
    if any(flows.values()):
        lines.append(", ".join(f"{what} {spec_text(spec)}" for what, spec in flows.items() if spec is not None))
    if plan.num_stages > 1:
        each = f", {plan.virtual} on each device" if plan.virtual > 1 else ""
        alike = len(set(plan.layers)) == 1
        blocks = f"{_of(plan.layers[0], 'layer')} each" if alike else f"{', '.join(map(str, plan.layers))} layers"
        lines.append(
            f"{plan.num_stages} stages of {blocks}{each}, schedule {plan.schedule}, "
            f"{'sends delayed, ' if plan.sends == 'delayed' else ''}"
            f"head over {plan.head.replace('_', ' ')}"
        )
        table = plan.table()
        bubble = f"a bubble of {idle_fraction(table, (1,) * plan.num_stages):.1%}"
        idle = f"idle {idle_fraction(table, plan.layers):.1%} in lockstep"
        if max(plan.kinds) > 0:  # how long each takes, and which slots are left out, is not known here
            idle = f"{bubble} in lockstep, were all stages to take as long"
        elif not alike:
            idle += f": {bubble}, and slots of shorter stages"
        lines.append(f"{len(table.ticks)} ticks, {idle}")
    lines += ["", *columns(_HEADER, rows, right=(7,)), "", "per device:"]
    totals = {name: size for name, size in plan.bytes_per_device().items() if size}
    lines += [f"  {bytes_label(name):<28}{human_bytes(size):>10}" for name, size in totals.items()]
    if not plan.layers:
        lines.append(f"  {NOT_ESTIMATED}")
    lines += _choices(plan)
    if plan.zero > 1 and plan.batch_axes_manual and plan.accumulate == "full":
        whole = "gradients accumulate whole over the microbatches of a step, and are cut once they are reduced"
        otherwise = "; accumulate='sharded' keeps a piece on each device" if plan.layers else ""
        lines.append(f"note: ZeRO {plan.zero}: {whole}{otherwise}")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _choices(plan: Plan) -> list[str]:
    """What each choice about weights and gradients costs, a line each; none where there is nothing to choose."""
    from shardlab.plan.communication import choices

    rows = []
    for choice in choices(plan):
        sizes = map(human_bytes, (choice.held_bytes, choice.wire_bytes, choice.total_bytes))
        what = {"gather": "weights", "accumulate": "gradients"}[choice.option]
        rows.append((f'{choice.option}="{choice.value}"', what, *sizes, "chosen" if choice.chosen else ""))
    if not rows:
        return []
    header = ("choice", "of", "held", "sent a step", "held in all", "")
    table = columns(header, rows, right=(2, 3, 4))
    return ["", "per device, by choice:", *(f"  {line}" for line in table)]


NOT_ESTIMATED = "activations not estimated: the model is taken whole"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_LABELS = {
    "buffers": "arrays not trained",
    "working_copy": "weights to compute with",
    "activations": "activations, at most",
    "padding": "of the parameters, padding",
}
_HEADER = ("path", "shape", "dtype", "spec", "stored", "optimizer state", "from", "a device")


def _of(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{plural if count > 1 else ''}"


def sibling_pattern(path: str) -> str:
    """The path of an array of a layer with ``*`` for the layer's number."""
    return re.sub(r"(?<![^/_])\d+(?=/)", "*", path, count=1)


def _same_source(source: str) -> str:
    return re.sub(r"(?<![^/_])\d+(?=/)", "*", source)
