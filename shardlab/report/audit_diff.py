"""What changed between two audits of one config: another plan, another JAX, another compiler.

Which differences matter is fixed, so that a test can lean on it: all of communication and of findings, and memory by
more than 1 % of what the first audit holds. Times differ from compile to compile, and are estimates besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardlab.plan.text import human_bytes
from shardlab.report.audit_words import axes_text, bandwidth_text, count_bound, seconds_text, subject

LEAST = 0.01  # of the first audit's memory: less moves with every version of a compiler


@dataclass(frozen=True)
class Difference:
    """One thing that two audits say differently.

    Attributes:
      part: ``"declared"``, ``"versions"``, ``"parameters"``, ``"memory"``, ``"links"``, ``"collectives"``, ``"time"``
        or ``"findings"``.
      what: differs, named as the audit names it.
      before: what the first audit says; None where it says nothing.
      after: what the second says.
      text: both, in words.
      matters: whether it is one for which a comparison fails.
    """

    part: str
    what: str
    before: Any
    after: Any
    text: str
    matters: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.text}"


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """All that two audits say differently, in the order of the report; none where they say the same.

    How long planning, tracing and compiling took is not compared.
    """
    parts = (_declared, _versions, _parameters, _memory, _links, _collectives, _time, _findings)
    return [one for part in parts for one in part(a, b)]


def diff_text(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The differences as lines, those that matter marked with ``!``."""
    found = differences(a, b)
    before, after = subject(a), subject(b)
    title = before if before == after else f"{before} -> {after}"
    if not found:
        return f"{title}: nothing changed"
    matter = sum(one.matters for one in found)
    count = f"{len(found)} difference{'s' if len(found) > 1 else ''}"
    lines = [f"{title}: {count}, {matter or 'none'} in communication, findings, or memory by more than {LEAST:.0%}"]
    for part in dict.fromkeys(one.part for one in found):
        lines += ["", part]
        lines += [f"{'!' if one.matters else ' '} {one}" for one in found if one.part == part]
    return "\n".join(lines)


def _declared(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for name in ("config", "target", "num_devices"):
        yield from _plain("declared", name, a[name], b[name])
    for name, before, after in _both(_leaves("mesh", a["mesh"]), _leaves("mesh", b["mesh"])):
        yield from _plain("declared", name, before, after)
    for name, before, after in _both(_leaves("", a["overrides"]), _leaves("", b["overrides"])):
        yield from _plain("declared", f"given --{name}", before, after)
    # The mesh and the target again; the table is long, and has its name and bubble beside it.
    kept = [{name: value for name, value in facts["plan"].items() if name not in _REPEATED} for facts in (a, b)]
    for name, before, after in _both(_leaves("plan", kept[0]), _leaves("plan", kept[1])):
        yield from _plain("declared", name, before, after, show=_show(name))
    if a["plan"].get("table_csv") != b["plan"].get("table_csv"):
        before, after = a["plan"].get("table_csv"), b["plan"].get("table_csv")
        yield Difference("declared", "plan.table_csv", before, after, "another table", False)


_REPEATED = ("mesh", "target", "table_csv")


def _versions(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for name, before, after in _both(a["versions"], b["versions"]):
        yield from _plain("versions", name, before, after)


def _parameters(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    fields = ("count", "shape", "dtype", "spec", "storage", "bytes_per_device")

    def table(facts: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]]:
        """By path; siblings that differ have the same, and are told apart by their place."""
        seen: dict[str, int] = {}
        found: dict[tuple[str, int], Mapping[str, Any]] = {}
        for one in facts["parameters"]:
            place = seen[one["path"]] = seen.get(one["path"], -1) + 1
            found[one["path"], place] = one
        return found

    for (path, _), before, after in _both(table(a), table(b)):
        if before is None or after is None:
            yield _only("parameters", path, before, after, False)
            continue
        for name in fields:
            yield from _plain("parameters", f"{path} {name}", before[name], after[name], show=_show(name))


def _memory(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    yield from _plain("memory", "fits", a["fits"], b["fits"], matters=True, show=lambda fits: "yes" if fits else "no")
    yield from _plain("memory", "capacity", a["hbm_capacity_bytes"], b["hbm_capacity_bytes"], show=human_bytes)
    rows = [("total", a["hbm_bytes"], b["hbm_bytes"])]
    if a["categories"] and b["categories"]:
        rows += _both(a["categories"], b["categories"])
    else:
        yield from _known("memory", "by category", bool(a["categories"]), bool(b["categories"]))
    for name, before, after in rows:
        if (before or 0) == (after or 0):
            continue
        matters = abs((after or 0) - (before or 0)) > LEAST * a["hbm_bytes"]
        yield Difference("memory", name, before, after, _sizes(before or 0, after or 0), matters)


def _links(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    if _read(a) and _read(b):
        by_axis = [{"all axes": facts["wire_bytes"], **facts["wire_bytes_by_axis"]} for facts in (a, b)]
        for name, before, after in _both(*by_axis):
            if (before or 0) != (after or 0):
                yield Difference("links", f"sent over {name}", before, after, _sizes(before or 0, after or 0), True)
    axes = [{one["axis"]: one for one in facts["layout"]["axes"]} if facts["layout"] else {} for facts in (a, b)]
    for axis, before, after in _both(*axes):
        if before and after:  # an axis that is new or gone is a difference of the mesh
            for name in ("tier", "bandwidth", "words"):
                yield from _plain("links", f"{axis} {name}", before[name], after[name], show=_show(name))


def _collectives(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    if not (_read(a) and _read(b)):
        yield from _known("collectives", "all of them", _read(a), _read(b))
        return
    for (kind, axes, cause), before, after in _both(_by_cause(a["collectives"]), _by_cause(b["collectives"])):
        what = f"{kind} over {axes_text(axes)}, {cause}"
        if before is None or after is None:
            one = before or after
            text = f"{'new' if before is None else 'gone'}: {one['count_text']}, {human_bytes(one['wire_bytes'])}"
            yield Difference("collectives", what, before, after, text, True)
            continue
        changes = []
        if before["count_text"] != after["count_text"]:
            changes.append(f"count {before['count_text']} -> {after['count_text']}")
        for name in ("wire", "payload"):
            sizes = before[f"{name}_bytes"], after[f"{name}_bytes"]
            if sizes[0] != sizes[1]:
                changes.append(f"{name} {_sizes(*sizes)}")
                break  # the one follows from the other
        if before["async_text"] != after["async_text"]:
            changes.append(f"{before['async_text']} -> {after['async_text']}")
        if changes:
            yield Difference("collectives", what, before, after, ", ".join(changes), True)


def _by_cause(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, tuple[str, ...], str], dict[str, Any]]:
    groups: dict[tuple[str, tuple[str, ...], str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], tuple(row["axes"]), row["cause"]), []).append(row)
    found = {}
    for key, group in groups.items():
        count, hidden = sum(row["count"] for row in group), sum(row["count"] for row in group if row["async"])
        bounds = {"exact": all(row["exact"] for row in group), "in_branch": any(row["in_branch"] for row in group)}
        beside = "beside compute" if hidden == count else "waited for" if not hidden else f"{hidden} beside compute"
        found[key] = {
            **{name: sum(row[name] for row in group) for name in ("payload_bytes", "wire_bytes")},
            "count": count,
            "count_text": f"{count_bound(bounds)}{count:,}",
            "async": hidden,
            "async_text": beside,
        }
    return found


def _time(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """To the three digits that a report shows."""
    yield from _shown("time", "a step", a["estimate_seconds"], b["estimate_seconds"], seconds_text)
    yield from _shown("time", "MFU", a["mfu"], b["mfu"], "{:.1%}".format)
    yield from _plain("time", "bound by", a["bound_by"], b["bound_by"])
    parts = [
        {part["name"]: part["seconds"] for part in facts["estimate"]["parts"]} if facts["estimate"] else {}
        for facts in (a, b)
    ]
    for name, before, after in _both(*parts):
        yield from _shown("time", name, before, after, seconds_text)


def _findings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    if not (_read(a) and _read(b)):
        yield from _known("findings", "all of them", _read(a), _read(b))
        return

    def table(facts: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
        found: dict[tuple[str, str], list[str]] = {}
        for one in facts["lints"]:
            found.setdefault((one["code"], one["path"] or ""), []).append(one["message"])
        return {key: sorted(messages) for key, messages in found.items()}

    for (code, path), before, after in _both(table(a), table(b)):
        if before == after:
            continue
        what = f"{code} {path}".rstrip()
        if before is None or after is None:
            text = f"{'new' if before is None else 'gone'}: {'; '.join(before or after or [])}"
        else:
            text = f"{'; '.join(before)} -> {'; '.join(after)}"
        yield Difference("findings", what, before, after, text, True)


def _read(facts: Mapping[str, Any]) -> bool:
    """Whether the compiler left a program to read."""
    return facts["wire_bytes"] is not None


def _known(part: str, what: str, before: bool, after: bool) -> Iterator[Difference]:
    yield from _plain(part, what, before, after, matters=True, show=lambda known: "known" if known else "not known")


def _both(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Every key of either, in their order, with both values; None for one that is not there."""
    for key in dict.fromkeys((*a, *b)):
        yield key, a.get(key), b.get(key)


def _leaves(name: str, value: Any) -> dict[str, Any]:
    """A nested mapping flat; names joined by dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    inner = ((f"{name}.{key}".removeprefix("."), item) for key, item in value.items())
    return {path: leaf for key, item in inner for path, leaf in _leaves(key, item).items()}


def _plain(
    part: str, what: str, before: Any, after: Any, *, matters: bool = False, show: Callable[[Any], str] = str
) -> Iterator[Difference]:
    if before != after:
        yield Difference(part, what, before, after, _arrow(before, after, show), matters)


def _shown(
    part: str, what: str, before: float | None, after: float | None, show: Callable[[float], str]
) -> Iterator[Difference]:
    text = _arrow(before, after, show)
    if len(set(text.split(" -> "))) > 1:
        yield Difference(part, what, before, after, text, False)


def _only(part: str, what: str, before: Any, after: Any, matters: bool) -> Difference:
    return Difference(part, what, before, after, "new" if before is None else "gone", matters)


def _show(name: str) -> Callable[[Any], str]:
    """How the value of a field reads."""
    if "bytes_per_device" in name:
        return human_bytes
    return bandwidth_text if name == "bandwidth" else "{:.1%}".format if name.endswith("fraction") else str


def _arrow(before: Any, after: Any, show: Callable[[Any], str]) -> str:
    texts: Iterable[str] = ("none" if value is None else show(value) for value in (before, after))
    return " -> ".join(texts)


def _sizes(before: int, after: int) -> str:
    """Both sizes and by how much they differ, in bytes where the sizes read the same.

    >>> _sizes(2**30, 3 * 2**29), _sizes(2**30, 2**30 + 1), _sizes(0, 512)
    ('1.0 GiB -> 1.5 GiB (+50.0%)', '1.0 GiB -> 1.0 GiB (+1 B)', '0 B -> 512 B')
    >>> _sizes(512, 8192)
    '512 B -> 8.0 KiB (x 16.0)'
    """
    texts = human_bytes(before), human_bytes(after)
    if texts[0] == texts[1]:
        change = f" ({after - before:+,} B)"
    elif before:
        change = f" (x {after / before:.1f})" if after > 10 * before else f" ({(after - before) / before:+.1%})"
    else:
        change = ""
    return f"{texts[0]} -> {texts[1]}{change}"
