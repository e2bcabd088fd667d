"""An audit as one page that stands alone: no network, no script; to be opened, printed, or sent to someone.

What a stranger asks first stands first: what was compiled for what, whether it fits, how long a step takes, what is
sent, what idles. What is not known is said in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from shardlab.plan.text import human_bytes
from shardlab.report.audit_words import (
    TIERS,
    alike,
    at_once_words,
    axes_text,
    bandwidth_text,
    command,
    cost_words,
    count_bound,
    count_text,
    flops_text,
    merged,
    not_estimated,
    plan_words,
    room_words,
    seconds_text,
    shape_text,
    share_text,
    short_source,
    subject,
    verdict,
    why,
    with_rest,
)
from shardlab.report.html_style import STYLE
from shardlab.report.text import plan_schedule
from shardlab.report.timeline_svg import NAMES, kinds, timeline_svg

_COLLECTIVES, _BUFFERS, _PARTS = 40, 16, 9  # that are listed
_OTHERS = {"?": "between devices that no mesh axes name"}
_COLOURS = {
    "parameters": 0,
    "optimizer state": 1,
    "gradients": 3,
    "activations": 4,
    "gathered weights": 5,
    "communication": 6,
    "code": 8,
}


def page(facts: Mapping[str, Any]) -> str:
    """The page of an audit, a whole HTML document.

    Args:
      facts: of an audit, as `shardlab compile --json` prints them.
    """
    title = f"{subject(facts)}: {verdict(facts)[0]}"
    sections = [
        ("What would make room", _remedies(facts)),
        ("Memory of one device", _memory(facts)),
        ("Where the time goes", _time(facts)),
        ("Mesh and links", _links(facts)),
        ("Pipeline", _pipeline(facts)),
        ("Collectives of one device and step", _collectives(facts)),
        ("Findings", _findings(facts)),
        ("Parameters", _parameters(facts)),
        ("How this was made", _made(facts)),
    ]
    body = "\n".join(f"<section>\n<h2>{_e(name)}</h2>\n{text}\n</section>" for name, text in sections if text)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(facts)}\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(facts: Mapping[str, Any]) -> str:
    answer = verdict(facts)[0]
    look = "bad" if not facts["fits"] else "plain" if facts["hbm_capacity_bytes"] is None else "good"
    return (
        f'<header>\n<div class="title"><h1>{_e(subject(facts))}</h1> '
        f'<span class="pill {look}">{_e(answer)}</span></div>\n'
        f'<p class="soft">{_e(plan_words(facts))}</p>\n'
        f'<div class="tiles">\n{_tile_memory(facts)}\n{_tile_time(facts)}\n{_tile_sent(facts)}\n{_tile_idle(facts)}\n'
        "</div>\n</header>"
    )


def _tile(name: str, value: str, more: str, *, between: str = "") -> str:
    """`between` is markup; `value` is larger where it is a number."""
    look = "value" if value[:1].isdigit() else "value words"
    return (
        f'<div class="tile"><div class="name">{_e(name)}</div><div class="{look}">{_e(value)}</div>{between}'
        f'<div class="more">{_e(more)}</div></div>'
    )


def _tile_memory(facts: Mapping[str, Any]) -> str:
    held, capacity = facts["hbm_bytes"], facts["hbm_capacity_bytes"]
    name = "Memory of a device"
    if capacity is None:
        return _tile(name, human_bytes(held), f"no capacity is known for {facts['target']}")
    if facts["fits"] and held > capacity:
        return _tile(name, "fits", f"{at_once_words(facts)} of {human_bytes(capacity)}")
    longest = max(held, capacity)
    over = "" if facts["fits"] else " over"
    mark = f'<b style="left:{_percent(capacity, longest)}"></b>' if held > capacity else ""
    meter = f'<div class="meter{over}"><i style="width:{_percent(held, longest)}"></i>{mark}</div>'
    rest = f"{human_bytes(capacity - held)} left" if held <= capacity else f"{human_bytes(held - capacity)} too much"
    return _tile(
        name, human_bytes(held), f"of {human_bytes(capacity)} ({share_text(held, capacity)}), {rest}", between=meter
    )


def _tile_time(facts: Mapping[str, Any]) -> str:
    if facts["estimate_seconds"] is None:
        return _tile("A step takes", "not estimated", not_estimated(facts))
    mfu = "MFU not known" if facts["mfu"] is None else f"MFU {facts['mfu']:.1%}"
    bound = f", bound by {facts['bound_by']}" if facts["bound_by"] else ""
    return _tile("A step takes, estimated", seconds_text(facts["estimate_seconds"]), f"{mfu}{bound}")


def _tile_sent(facts: Mapping[str, Any]) -> str:
    name, size = "Sent by a device a step", facts["wire_bytes"]
    if size is None:
        return _tile(name, "not known", "the compiler left no program")
    if not size:
        return _tile(name, "nothing", "no collective crosses a link")
    count = sum(row["count"] for row in facts["collectives"])
    hidden = sum(row["wire_bytes"] for row in facts["collectives"] if row["async"])
    how = f"{count:,} collectives, {share_text(hidden, size)} of the bytes beside compute"
    if size < 1e9:
        return _tile(name, human_bytes(size), how)
    return _tile(name, f"{size / 1e9:,.1f} GB", f"{human_bytes(size)} in {how}")


def _tile_idle(facts: Mapping[str, Any]) -> str:
    plan = facts["plan"]
    if plan["stages"] == 1:
        return _tile("Pipeline", "none", "one stage: no bubble")
    more = f"of a step: {plan['schedule']}, {plan['stages']} stages, {plan['microbatches']} microbatches"
    return _tile("Pipeline idles", f"{plan['bubble_fraction']:.1%}", more)


def _remedies(facts: Mapping[str, Any]) -> str:
    if facts["fits"]:
        return ""
    capacity = facts["hbm_capacity_bytes"]
    if not facts["remedies"]:
        return "<p>No single change was found. Use more devices, or shorter sequences, or a smaller batch.</p>"
    rows = [
        (
            f"<code>{_e(one['change'])}</code>",
            _e(human_bytes(one["saves_bytes"])),
            _e(human_bytes(one["hbm_bytes"])),
            f'<span class="tag {"beside" if one["fits"] else "waits"}">{_e(room_words(one))}</span>',
        )
        for one in facts["remedies"]
    ]
    note = f"A device has {human_bytes(capacity)}, and the step needs {human_bytes(facts['hbm_bytes'])}."
    header = ("Change", "Saves", "Then holds", "")
    return _soft(f"{note} Each change alone.") + _table(header, rows, ("long", "number", "number", "tight"))


def _memory(facts: Mapping[str, Any]) -> str:
    colours = _category_colours(facts["categories"])
    parts = [(name, size, colours[name]) for name, size in facts["categories"].items() if size]
    held, capacity = facts["hbm_bytes"], facts["hbm_capacity_bytes"]
    if not parts:
        bar = _soft("What holds it is not known: the compiler left no program.")
    else:
        # In a bar of a device nearly empty there is nothing to see: it is of what is held then.
        free = 0 if capacity is None or held < capacity / 20 else max(capacity - held, 0)
        bar = _bar(parts, held + free, free=("free", free))
        if capacity is not None and held > capacity and not facts["fits"]:
            # Beyond the middle there is no room for the words on the right of the mark.
            right = capacity > held / 2
            place = f"right:{_percent(held - capacity, held)}" if right else f"left:{_percent(capacity, held)}"
            side = ' class="left"' if right else ""
            words = f"a device ends here: {human_bytes(capacity)}"
            bar += f'<div class="mark"><span{side} style="{place}">{_e(words)}</span></div>'
        bar += _legend([(name, human_bytes(size), share_text(size, held), colour) for name, size, colour in parts])
    of = " The bar is of what is held." if parts and capacity is not None and held < capacity / 20 else ""
    return f"{_soft(_sentence(verdict(facts)[1]) + of)}\n{bar}\n{_largest(facts)}"


def _category_colours(names: Iterable[str]) -> dict[str, int]:
    """A colour for each category; those without one of their own get what is left, the last that there is again."""
    left = [2, 7, *(colour for name, colour in _COLOURS.items() if name not in names)]
    found: dict[str, int] = {}
    for name in names:
        found[name] = _COLOURS[name] if name in _COLOURS else left.pop(0) if len(left) > 1 else left[0]
    return found


def _largest(facts: Mapping[str, Any]) -> str:
    if not facts["largest"]:
        return "<h3>Largest buffers</h3>" + _soft("Not known: the compiler says nothing of single buffers here.")
    most = max(one["bytes"] for one in facts["largest"])
    colours, found = _category_colours(facts["categories"]), alike(facts["largest"])
    rows = [
        (
            _e(human_bytes(one["bytes"]) if count == 1 else f"{count} x {human_bytes(one['bytes'])}"),
            _length(one["bytes"], most, colours.get(one["category"], 7)),
            _e(one["what"]),
            f"<code>{_e(shape_text(one['shape']))}</code>",
            _e(one["category"]),
            _line(one["source"]) or '<span class="soft">no line</span>',
        )
        for count, one in found[:_BUFFERS]
    ]
    more = len(facts["largest"]) - sum(count for count, _ in found[:_BUFFERS])
    note = f'<p class="soft note">And {more} smaller.</p>' if more > 0 else ""
    header = ("Bytes", "", "What", "Shape", "Category", "Line")
    looks = ("number", "length", "long", "tight", "tight", "tight")
    return "<h3>Largest buffers at the peak</h3>" + _table(header, rows, looks) + note


def _time(facts: Mapping[str, Any]) -> str:
    estimate = facts["estimate"]
    if estimate is None:
        return _soft(f"Not estimated: {not_estimated(facts)}.")
    total = estimate["seconds"]
    shown = with_rest([(part["name"], part["seconds"]) for part in estimate["parts"]], _PARTS)
    colours = _time_colours([name for name, _ in shown])
    parts = [(name, seconds, colour) for (name, seconds), colour in zip(shown, colours, strict=True)]
    legend = [(name, seconds_text(size), share_text(size, total), colour) for name, size, colour in parts]
    flops = f"the model's own arithmetic is {flops_text(estimate['model_flops'])}"
    lead = f"{seconds_text(total)} a step, from {estimate['basis']}; {flops} on all devices together."
    hidden = seconds_text(estimate["overlapped_seconds"])
    out = [f"{hidden} of communication, which goes on beside compute", *estimate["left_out"]]
    listed = "".join(f"<li>{_e(one)}</li>" for one in out)
    return f"{_soft(lead)}{_bar(parts, total)}{_legend(legend)}<h3>Not in the bar</h3><ul>{listed}</ul>"


def _time_colours(names: Sequence[str]) -> list[int]:
    """Compute in blue, what is waited for in warm colours, the bubble grey."""
    compute, waited = iter((0, 4, 1, 2) * len(names)), iter((3, 5, 6, 2) * len(names))
    return [
        7
        if "bubble" in name
        else 8
        if "smaller" in name
        else next(waited)
        if "exposed" in name or " over " in name
        else next(compute)
        for name in names
    ]


def _links(facts: Mapping[str, Any]) -> str:
    layout, by_axis = facts["layout"], facts["wire_bytes_by_axis"]
    known = facts["wire_bytes"] is not None
    most = max(by_axis.values(), default=0)

    def row(name: str, size: str, link: str, speed: str, words: str) -> tuple[str, ...]:
        sent = by_axis.get(name, 0)
        bytes_ = human_bytes(sent) if known else "not known"
        bar = _length(sent, most, 0) if known and sent else ""
        tag = f'<span class="tag">{_e(link)}</span>' if link else '<span class="soft">not known</span>' * bool(size)
        return f"<b>{_e(axes_text(name.split(' x ')))}</b>", _e(size), tag, _e(speed), _e(bytes_), bar, _e(words)

    if layout is None:
        rows = [row(axis, str(size), "", "not known", "not known") for axis, size in facts["mesh"].items()]
        words = f"On which links the axes lie is not known for {facts['target']}."
        drawing = ""
    else:
        rows = [
            row(
                one["axis"],
                str(one["size"]),
                TIERS.get(one["tier"], one["tier"]),
                bandwidth_text(one["bandwidth"]),
                one["words"],
            )
            for one in layout["axes"]
        ]
        own = {one["words"] for one in layout["axes"]}  # of the axes: these stand in the table
        words = " ".join(line for line in layout["words"].splitlines() if line not in own)
        drawing = f"<pre>{_e(layout['drawing'])}</pre>" if layout["drawing"].strip() else ""
    others = [axes for axes in by_axis if axes not in facts["mesh"]]
    rows += [row(axes, "", "", "", _OTHERS.get(axes, "over these together")) for axes in others]
    header = ("Axis", "Size", "Link", "A device sends", "Sent a step", "", "Where")
    looks = ("tight", "number", "tight", "number", "number", "length", "long")
    return f"{_soft(words)}{_table(header, rows, looks)}{drawing}"


def _pipeline(facts: Mapping[str, Any]) -> str:
    plan = facts["plan"]
    if plan["stages"] == 1:
        return ""
    schedule = plan_schedule(plan)
    svg, cut = timeline_svg(schedule)
    each = f", {plan['virtual']} virtual stages on each device" if plan["virtual"] > 1 else ""
    lead = (
        f"Schedule {plan['schedule']}: {plan['stages']} devices{each}, {plan['microbatches']} microbatches, "
        f"idle {plan['bubble_fraction']:.1%} of a step with a backward twice as long as a forward. Grey is idle."
    )
    names = {"F": 0, "B": 3, "I": 5, "W": 4}
    legend = [(NAMES[kind], "", "", names[kind]) for kind in kinds(schedule)]
    held = ", ".join(map(str, plan["peak_in_flight"]))
    flight = f'<p class="note">Microbatches in flight at most, by device: {_e(held)}.</p>'
    note = f"<p>In the picture, {_e(cut)}.</p>" if cut else ""
    return f"{_soft(lead)}{svg}{note}{_legend(legend)}{flight}"


def _collectives(facts: Mapping[str, Any]) -> str:
    if facts["wire_bytes"] is None:
        return _soft("Not known: the compiler left no program.")
    found = merged(facts["collectives"])
    if not found:
        return _soft("None.")
    most = found[0]["wire_bytes"]
    rows = [
        (
            _e(row["kind"]),
            _e(axes_text(row["axes"])),
            _e(f"{count_bound(row)}{row['count']:,}"),
            _e(human_bytes(row["wire_bytes"])),
            _length(row["wire_bytes"], most, 0),
            _waiting(row),
            f"{_e(why(row))} {_line(row['source'])}",
        )
        for row in found[:_COLLECTIVES]
    ]
    rest = found[_COLLECTIVES:]
    if rest:
        size = sum(row["wire_bytes"] for row in rest)
        words = f"{len(rest)} more, {share_text(size, facts['wire_bytes'])} of all bytes"
        count = f"{sum(row['count'] for row in rest):,}"
        rows.append(("and", "", _e(count), _e(human_bytes(size)), _length(size, most, 7), "", _e(words)))
    notes = []
    if not all(row["exact"] for row in found):
        notes.append("&gt;= is in a loop of unknown length.")
    if any(row["in_branch"] for row in found):
        notes.append("&lt;= is in a branch, counted as if it were always taken.")
    note = f'<p class="soft note">{" ".join(notes)}</p>' if notes else ""
    header = ("Kind", "Over", "Count", "Wire bytes", "", "Waited for", "Why")
    looks = ("tight", "tight", "number", "number", "length", "wait", "long wide")
    lead = _soft("From the compiled program, loops counted; most bytes first.")
    return f"{lead}{_by_kind(found)}{_table(header, rows, looks)}{note}"


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar of what each kind of collective sends over each axis."""
    sizes: dict[str, int] = {}
    for row in rows:
        name = f"{row['kind']} over {axes_text(row['axes'])}"
        sizes[name] = sizes.get(name, 0) + row["wire_bytes"]
    whole = sum(sizes.values())
    order = sorted(sizes, key=lambda name: -sizes[name])
    parts = [(name, sizes[name], colour) for name, colour in zip(order, (0, 3, 4, 5, 1, 6, 2), strict=False)]
    rest = sum(sizes[name] for name in order[len(parts) :])
    parts += [("others", rest, 7)] if rest else []
    legend = [(name, human_bytes(size), share_text(size, whole), colour) for name, size, colour in parts]
    return _bar(parts, whole) + _legend(legend) + "<h3>Each of them</h3>"


def _waiting(row: Mapping[str, Any]) -> str:
    exposed = row["exposed_seconds"]
    if row["async"]:
        more = f" {_e(seconds_text(exposed))} exposed" if exposed else ""
        return f'<span class="tag beside">beside compute</span>{more}'
    return f'<span class="tag waits">waits</span>{f" {_e(seconds_text(exposed))}" if exposed else ""}'


def _findings(facts: Mapping[str, Any]) -> str:
    if facts["wire_bytes"] is None and not facts["lints"]:
        return _soft("Not looked for: the compiler left no program.")
    if not facts["lints"]:
        return _soft("None: nothing was found that costs and was perhaps not meant.")
    return "\n".join(_finding(one) for one in facts["lints"])


def _finding(one: Mapping[str, Any]) -> str:
    cost = cost_words(one)
    path = f"<code>{_e(one['path'])}</code> " if one["path"] else ""
    code, line = f'<span class="tag">{_e(one["code"])}</span>', _line(one.get("source", ""))
    title = f"{code} {path}{f'<b>{_e(cost)}</b> ' if cost else ''}{line}"
    message = _e(_sentence(one["message"]))
    return f'<div class="finding"><p>{title}</p><p>{message}</p><p><b>Fix:</b> {_e(one["fix"])}</p></div>'


def _parameters(facts: Mapping[str, Any]) -> str:
    rows = [
        (
            f"<code>{_e(one['path'])}</code>",
            _e(f"{one['count']:,}"),
            _e(" x ".join(map(str, one["shape"])) or "scalar"),
            _e(one["dtype"]),
            f"<code>{_e(one['spec'])}</code>",
            "as declared" if one["storage"] == one["spec"] else f"<code>{_e(one['storage'])}</code>",
            _e(one["source"]),
            _e(human_bytes(one["bytes_per_device"])),
        )
        for one in facts["parameters"]
    ]
    lead = f"{count_text(facts['plan']['num_parameters'])} in all; layers that are alike share a line."
    header = ("Path", "Arrays", "Shape", "Dtype", "Spec", "Stored", "From", "A device")
    looks = ("long", "number", "tight", "tight", "tight", "tight", "long", "number")
    return _soft(lead) + _table(header, rows, looks)


def _made(facts: Mapping[str, Any]) -> str:
    typed = command(facts)
    how = f"<pre>{_e(typed)}</pre>" if typed else "<p>From a step made in Python, not from a config file.</p>"
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    taken = [
        f"{words} {facts[f'{name}_seconds']:.1f} s"
        for name, words in (("plan", "planning"), ("trace", "tracing"), ("compile", "compiling"), ("audit", "reading"))
        if facts.get(f"{name}_seconds") is not None
    ]
    notes = "".join(f"<li>{_e(note)}</li>" for note in facts["plan"]["notes"])
    listed = f"<h3>Notes of the plan</h3><ul>{notes}</ul>" if notes else ""
    times = f" Took: {', '.join(taken)}." if taken else ""
    return _soft(f"Compiled for {facts['num_devices']:,} devices with {versions}.{times}") + how + listed


def _bar(parts: Iterable[tuple[str, float, int]], whole: float, *, free: tuple[str, float] = ("", 0)) -> str:
    """A bar of (name, size, colour); a part that is wide enough holds its name."""
    spans = []
    for name, size, colour in parts:
        title = f"{name}: {share_text(size, whole)}"
        label = _e(name) if size > len(name) * whole / 110 else ""
        style = f"width:{_percent(size, whole)};background:var(--c{colour})"
        spans.append(f'<span style="{style}" title="{_e(title)}">{label}</span>')
    if free[1]:
        name = _e(free[0]) if free[1] > whole / 16 else ""
        spans.append(f'<span class="free" style="width:{_percent(free[1], whole)}">{name}</span>')
    return f'<div class="bar">{"".join(spans)}</div>'


def _legend(parts: Iterable[tuple[str, str, str, int]]) -> str:
    """Of (name, value, share, colour)."""
    items = "".join(
        f'<li><span class="swatch" style="background:var(--c{colour})"></span><span>{_e(name)}</span>'
        + (f'<span class="of">{_e(value)}</span><span class="share">{_e(share)}</span></li>' if value else "</li>")
        for name, value, share, colour in parts
    )
    return f'<ul class="legend">{items}</ul>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], looks: Sequence[str]) -> str:
    """Cells are markup, the header is text; `looks` are the classes of the columns."""

    def line(tag: str, cells: Sequence[str]) -> str:
        inner = (f'<{tag} class="{look}">{cell}</{tag}>' for cell, look in zip(cells, looks, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    head, body = line("th", [_e(name) for name in header]), "\n".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _length(size: float, most: float, colour: int) -> str:
    return f'<i style="width:{_percent(size, most)};background:var(--c{colour})"></i>'


def _line(source: str) -> str:
    return f'<code class="soft" title="{_e(source)}">{_e(short_source(source))}</code>' if source else ""


def _soft(text: str) -> str:
    return f'<p class="soft">{_e(text)}</p>'


def _sentence(text: str) -> str:
    """The text with a capital letter and a full stop.

    >>> _sentence("it fits"), _sentence("It fits.")
    ('It fits.', 'It fits.')
    """
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _percent(part: float, whole: float) -> str:
    """A length in a style, never more than the whole."""
    share = min(max(part / whole, 0.0), 1.0) if whole else 0.0
    return f"{100 * share:.3f}%"


def _e(text: Any) -> str:
    """Text as it is to be read, whatever its characters mean to a browser."""
    return escape(str(text), quote=True)
