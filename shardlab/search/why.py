"""Two plans beside each other: only what differs, with the numbers of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardlab.plan.plan import Plan
from shardlab.plan.text import columns, human_bytes
from shardlab.search.choice import Choice
from shardlab.search.estimate import Estimate
from shardlab.sharding.rules import spec_text

LEAST = 0.002
"""Numbers that differ by less than this part of the larger total are not told."""


def difference(a: Estimate, b: Estimate) -> list[tuple[str, str, str]]:
    """Lines of (what, of the first, of the second)."""
    lines = _choices(a.choice, b.choice)
    lines += _numbers("memory", a.memory, b.memory, a.hbm_bytes, b.hbm_bytes, _bytes)
    wires = [{f"{cause} over {' x '.join(axes)}": size for (cause, axes), size in one.wire.items()} for one in (a, b)]
    lines += _numbers("wire", wires[0], wires[1], a.wire_bytes, b.wire_bytes, _bytes)
    lines += _numbers("seconds", a.seconds, b.seconds, a.total_seconds, b.total_seconds, _seconds)
    if abs(a.mfu - b.mfu) > LEAST:
        lines.append(("MFU", f"{a.mfu:.1%}", f"{b.mfu:.1%}"))
    return lines


def parameters(a: Plan, b: Plan) -> list[tuple[str, str, str]]:
    """Parameters that are computed with, stored or updated otherwise, those of all blocks once."""
    stars = {path: stack.name for plan in (a, b) for stack in plan.stacks for path in stack.members if path}
    theirs = {parameter.path: parameter for parameter in b.parameters}
    lines: dict[tuple[str, str, str], None] = {}
    for mine in a.parameters:
        other = theirs.get(mine.path)
        name = stars.get(mine.path, mine.path)
        if other is None:
            lines[name, "there", "not there"] = None
            continue
        for field in ("compute", "storage", "state"):
            pair = getattr(mine, field), getattr(other, field)
            if pair[0] != pair[1]:
                lines[f"{name}, {_FIELDS[field]}", spec_text(pair[0]), spec_text(pair[1])] = None
    return list(lines)


_FIELDS = {"compute": "computed with", "storage": "stored", "state": "optimizer"}


def table(lines: list[tuple[str, str, str]], names: tuple[str, str]) -> str:
    """The lines as text.

    >>> print(table([("zero", "1", "3")], ("a", "b")))
          a  b
    ----  -  -
    zero  1  3
    """
    if not lines:
        return "nothing differs"
    return "\n".join(columns(("", *names), lines, right=(1, 2)))


def _choices(a: Choice, b: Choice) -> list[tuple[str, str, str]]:
    lines = []
    for axis, size in a.mesh:
        other = b.sizes.get(axis, 1)
        if size != other:
            lines.append((f"mesh {axis}", str(size), str(other)))
    for field in Choice.__dataclass_fields__:
        if field == "mesh":
            continue
        mine, theirs = getattr(a, field), getattr(b, field)
        if mine != theirs:
            what, words = _PLACES.get(field, (field.replace("_", " "), _shown))
            lines.append((what, words(mine), words(theirs)))
    return lines


def _over(parts: Any) -> str:
    return ", ".join(f"{axis} over {count}" for axis, count in parts) or "none"


def _on(links: Any) -> str:
    """An axis of which nothing is said lies where `lay_out` has it."""
    return ", ".join(f"{axis} on {' x '.join(dims)}" for axis, dims in links) or "as laid out"


_PLACES = {"dcn": ("slices", _over), "links": ("links", _on)}


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return ", ".join(f"{pattern} not over {axis}" for pattern, axis in value)
    return "none" if value is None or value == () else str(value) or "''"


def _numbers(
    what: str, a: Mapping[str, float], b: Mapping[str, float], of_a: float, of_b: float, shown: Any
) -> list[tuple[str, str, str]]:
    least = LEAST * max(of_a, of_b)
    lines = [
        (f"{what}: {name.replace('_', ' ')}", shown(a.get(name, 0.0)), shown(b.get(name, 0.0)))
        for name in {**a, **b}
        if abs(a.get(name, 0.0) - b.get(name, 0.0)) > least
    ]
    if lines:
        lines.append((f"{what}, all", shown(of_a), shown(of_b)))
    return lines


def _bytes(size: float) -> str:
    return human_bytes(round(size))


def _seconds(size: float) -> str:
    return f"{size:.3g} s"
