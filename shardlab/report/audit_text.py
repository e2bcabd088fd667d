"""An audit as a page of plain text for a terminal: what a stranger asks first stands first."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from shardlab.plan.text import columns, human_bytes
from shardlab.report.audit_words import (
    TIERS,
    alike,
    axes_text,
    bandwidth_text,
    command,
    cost_words,
    count_bound,
    idle,
    merged,
    not_estimated,
    pace,
    plan_words,
    room_words,
    seconds_text,
    sent,
    shape_text,
    share_text,
    short_source,
    subject,
    verdict,
    why,
    with_rest,
)

_WIDTH = 120
_BAR = 40
_BUFFERS, _COLLECTIVES, _DRAWN, _PARTS = 10, 20, 24, 9  # lines of each; more would hide what they are to show


def audit_text(facts: Mapping[str, Any]) -> str:
    """The report of an audit, at most 120 wide: the verdict, then memory, links, collectives, time and findings.

    Args:
      facts: of an audit, as `shardlab compile --json` prints them.
    """
    answer, by = verdict(facts)
    head = [
        f"{subject(facts)}: {answer.upper()}",
        *textwrap.wrap(plan_words(facts), _WIDTH - 2, initial_indent="  ", subsequent_indent="  "),
        f"  {by}",
        f"  {pace(facts)}",
        f"  {sent(facts)}; {idle(facts)}",
    ]
    sections = [
        ("does not fit; what would make room, of one device", _remedies(facts)),
        ("memory of one device", _memory(facts)),
        ("largest buffers at the peak", _largest(facts)),
        ("mesh", _layout(facts)),
        ("collectives of one device and step, most wire bytes first", _collectives(facts)),
        ("time of a step, estimated", _time(facts)),
        ("findings", _lints(facts)),
    ]
    parts = ["\n".join(head)]
    parts += ["\n".join([title, *(f"  {line}".rstrip() for line in lines)]) for title, lines in sections if lines]
    return "\n\n".join([*parts, "\n".join(_made(facts))])


def bar(part: float, whole: float, width: int = _BAR) -> str:
    """A bar of `#`, at least one for what is not nothing.

    >>> bar(1, 4, 8), bar(1, 10**6, 8), bar(0, 4, 8)
    ('##', '#', '')
    """
    return "#" * max(round(width * part / whole) if whole else 0, 1 if part > 0 else 0)


def cut(text: str, width: int) -> str:
    """The text, its middle left out where it is longer than `width`.

    >>> cut("gradient of blocks/*/mlp/up/kernel", 21)
    'gradient ...up/kernel'
    """
    if len(text) <= width:
        return text
    head = (width - 2) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _memory(facts: Mapping[str, Any]) -> list[str]:
    parts = {name: size for name, size in facts["categories"].items() if size}
    if not parts:
        return ["by category not known: the compiler left no program"]
    total = facts["hbm_bytes"]
    rows = [(name, human_bytes(size), share_text(size, total), bar(size, total)) for name, size in parts.items()]
    rows.append(("total", human_bytes(total), "", ""))
    return _plain(rows, right=(1, 2))


def _largest(facts: Mapping[str, Any]) -> list[str]:
    found = alike(facts["largest"])
    rows = [
        (
            human_bytes(one["bytes"]) if count == 1 else f"{count} x {human_bytes(one['bytes'])}",
            one["what"],
            cut(shape_text(one["shape"]), 28),
            one["category"],
            cut(short_source(one["source"]), 28),
        )
        for count, one in found[:_BUFFERS]
    ]
    more = len(facts["largest"]) - sum(count for count, _ in found[:_BUFFERS])
    lines = _plain(_narrowed(rows, 1), right=(0,)) if rows else ["not known"]
    return [*lines, f"and {more} smaller"] if more > 0 else lines


def _layout(facts: Mapping[str, Any]) -> list[str]:
    layout, by_axis = facts["layout"], facts["wire_bytes_by_axis"]
    on = {one["axis"]: one for one in layout["axes"]} if layout else {}
    header, rows = ["axis", "size"], [[axis, str(size)] for axis, size in facts["mesh"].items()]
    others = [axes for axes in by_axis if axes not in facts["mesh"]]
    rows += [[axes_text(axes.split(" x ")), ""] for axes in others]
    names = [*facts["mesh"], *others]
    if layout:
        header += ["link", "of a device"]
        for name, row in zip(names, rows, strict=True):
            # Along an axis of one device there is no link.
            one = on.get(name) if facts["mesh"].get(name) != 1 else None
            row += [TIERS.get(one["tier"], one["tier"]), bandwidth_text(one["bandwidth"])] if one else ["", ""]
    if facts["wire_bytes"] is not None:
        header.append("sent")
        for name, row in zip(names, rows, strict=True):
            row.append(human_bytes(by_axis.get(name, 0)))
    right = [place for place, name in enumerate(header) if name not in ("axis", "link")]
    words = layout["words"] if layout else f"on which links they lie is not known for {facts['target']}"
    lines = columns(header, rows, right)
    lines += [line for part in words.splitlines() for line in textwrap.wrap(part, _WIDTH - 2)]
    drawing = layout["drawing"].splitlines() if layout else []
    lines += ["", *(line[: _WIDTH - 2] for line in drawing[:_DRAWN])] if drawing else []
    if len(drawing) > _DRAWN:
        lines.append(f"... {len(drawing) - _DRAWN} more lines of the drawing")
    return lines


def _collectives(facts: Mapping[str, Any]) -> list[str]:
    if facts["wire_bytes"] is None:
        return ["not known: the compiler left no program"]
    found = merged(facts["collectives"])
    if not found:
        return ["none"]
    rows = [
        (
            row["kind"],
            axes_text(row["axes"]),
            f"{count_bound(row)}{row['count']:,}",
            human_bytes(row["wire_bytes"]),
            "beside compute" if row["async"] else "waited for",
            "" if row["exposed_seconds"] is None else seconds_text(row["exposed_seconds"]),
            why(row),
        )
        for row in found[:_COLLECTIVES]
    ]
    header = ("collective", "axes", "count", "wire", "", "exposed", "why")
    lines = columns(header, _narrowed(rows, 6, header), right=(2, 3, 5))
    rest = found[_COLLECTIVES:]
    if rest:
        size = sum(row["wire_bytes"] for row in rest)
        lines.append(
            f"{len(rest)} more: {human_bytes(size)}, {share_text(size, facts['wire_bytes'])} of all wire bytes"
        )
    if not all(row["exact"] for row in found):
        lines.append(">=: in a loop of unknown length")
    if any(row["in_branch"] for row in found):
        lines.append("<=: some in a branch, counted as if it were always taken")
    return lines


def _time(facts: Mapping[str, Any]) -> list[str]:
    estimate = facts["estimate"]
    if estimate is None:
        return [f"not estimated: {not_estimated(facts)}"]
    total = estimate["seconds"]
    parts = with_rest([(part["name"], part["seconds"]) for part in estimate["parts"]], _PARTS)
    rows = [
        (cut(name, 50), seconds_text(seconds), share_text(seconds, total), bar(seconds, total))
        for name, seconds in parts
    ]
    rows.append(("total", seconds_text(total), "", ""))
    hidden = seconds_text(estimate["overlapped_seconds"])
    lines = [*_plain(rows, right=(1, 2)), f"beside compute, and not in the total: {hidden} of communication"]
    lines += textwrap.wrap(f"from {estimate['basis']}", _WIDTH - 2)
    if estimate["left_out"]:
        lines += textwrap.wrap(f"left out: {'; '.join(estimate['left_out'])}", _WIDTH - 2)
    return lines


def _lints(facts: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for one in facts["lints"]:
        cost = cost_words(one)
        path = f" {one['path']}" if one["path"] else ""
        line = f" ({short_source(one['source'])})" if one.get("source") else ""
        text = f"{one['code']}{path}{line}: {one['message']}{f' [{cost}]' if cost else ''}"
        lines += textwrap.wrap(text, _WIDTH - 2, subsequent_indent="      ")
        lines += textwrap.wrap(f"fix: {one['fix']}", _WIDTH - 2, initial_indent="      ", subsequent_indent=" " * 11)
    if not lines and facts["wire_bytes"] is None:
        return ["not looked for: the compiler left no program"]
    return lines or ["none"]


def _remedies(facts: Mapping[str, Any]) -> list[str]:
    if facts["fits"]:
        return []
    rows = [
        (
            one["change"],
            human_bytes(one["saves_bytes"]),
            human_bytes(one["hbm_bytes"]),
            room_words(one),
        )
        for one in facts["remedies"]
    ]
    search = shlex.join(["shardlab", "plan", "--search", facts["config"] or "CONFIG", "--target", facts["target"]])
    if not rows:
        return [
            "no change of an option alone; use more devices, shorter sequences or a smaller batch; the best plans:",
            search,
        ]
    lines = columns(("change", "saves", "then holds", ""), rows, right=(1, 2))
    return lines if any(one["fits"] for one in facts["remedies"]) else [*lines, f"other meshes and plans: {search}"]


def _made(facts: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    times = [
        f"{name} {facts[f'{name}_seconds']:.1f} s"
        for name in ("plan", "trace", "compile", "audit")
        if facts.get(f"{name}_seconds") is not None
    ]
    made = command(facts)
    return [f"{versions}; {', '.join(times)}", *([made] if made else [])]


def _plain(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """A table without its header."""
    return columns([""] * len(rows[0]), rows, right)[2:]


def _narrowed(rows: Sequence[Sequence[str]], place: int, header: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The rows, the texts in one column cut so that the table is no wider than the report."""
    others = [
        max(map(len, column))
        for k, column in enumerate(zip(*([header] if header else []), *rows, strict=True))
        if k != place
    ]
    left = max(_WIDTH - 2 - sum(others) - 2 * len(others), 20)
    return [(*row[:place], cut(row[place], left), *row[place + 1 :]) for row in rows]
