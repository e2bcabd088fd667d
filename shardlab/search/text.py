"""What a search found, as text and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardlab.plan.text import columns, human_bytes
from shardlab.search.choice import Choice, command
from shardlab.search.estimate import Estimate
from shardlab.search.explain import bound, bound_by, explanation, fits, links, name
from shardlab.search.search import Found
from shardlab.search.subject import Subject
from shardlab.search.why import difference, table


def facts(found: Found, subject: Subject, *, config_path: str, top: int) -> dict[str, Any]:
    """Fit for JSON: the first `top` plans, and what became of the others."""
    return {
        "target": subject.target.text,
        "hbm_capacity_bytes": subject.room,
        "plans": [plan_facts(one, found, subject, config_path) for one in found.ranked[:top]],
        "searched": found.searched,
        "fitting": len(found.ranked),
        "dropped": found.dropped,
        "least": None if found.least is None else plan_facts(found.least, found, subject, config_path),
        "pipelining": pipelining(found, subject),
        "seconds": found.seconds,
    }


def plan_facts(one: Estimate, found: Found, subject: Subject, config_path: str) -> dict[str, Any]:
    """One plan."""
    target = subject.target.text
    compiled: Mapping[str, Any] | None = found.confirmed.get(one.choice)
    line = command(config_path, one.choice, subject.config, target)
    return {
        "name": name(one, subject),
        "plan": {**one.choice.overrides(target), "command": line},
        "fits": fits(one, subject) if compiled is None else compiled["fits"],
        "hbm_bytes": round(one.hbm_bytes),
        "needed_bytes": round(one.needed_bytes),
        "memory": {key: round(size) for key, size in one.memory.items()},
        "wire_bytes": round(one.wire_bytes),
        "wire": [
            {"cause": cause, "axes": list(axes), "links": links(one, subject, axes), "wire_bytes": round(size)}
            for (cause, axes), size in one.wire.items()
        ],
        "estimate_seconds": one.total_seconds,
        "seconds": dict(one.seconds),
        "mfu": one.mfu,
        "bound_by": bound_by(one, subject),
        "explanation": explanation(one, subject),
        "confirmed": compiled is not None and "error" not in compiled,
        "compiled": compiled,
    }


def pipelining(found: Found, subject: Subject) -> dict[str, Any]:
    """Whether stages pay: the best plan with them against the best without."""
    piped, flat = found.piped, found.flat
    if piped is None or flat is None:
        lacking = "with" if piped is None else "without"
        return {
            "pays": None if piped is None and flat is None else flat is None,
            "words": f"no plan {lacking} stages fits",
        }
    with_, without = piped.total_seconds, flat.total_seconds
    pays = with_ < without
    ratio = (without / with_ if pays else with_ / without) - 1
    verb = "wins" if pays else "loses"
    named = name(piped, subject), name(flat, subject)
    words = f"pipelining {verb} by {ratio:.1%}: {named[0]} {with_:.3g} s, {named[1]} {without:.3g} s"
    return {
        "pays": pays,
        "by": ratio,
        "with_stages": {"name": name(piped, subject), "estimate_seconds": with_},
        "without_stages": {"name": name(flat, subject), "estimate_seconds": without},
        "words": words,
    }


def text(found: Found, subject: Subject, *, config_path: str, top: int) -> str:
    """For a terminal: the ranked table, why the first is the first, what was dropped."""
    chip, room = subject.target.text, subject.room
    lines = [
        f"{found.searched:,} plans for {chip} in {found.seconds:.1f} s; {len(found.ranked):,} fit in "
        f"{human_bytes(int(room))} a device"
    ]
    for reason, count in found.dropped.items():
        lines.append(f"  {count:,} dropped: {reason}")
    if not found.ranked:
        return "\n".join([*lines, "", *nothing_fits(found, subject)])
    shown = found.ranked[:top]
    rows = [
        (
            str(place),
            name(one, subject),
            how(one.choice, subject),
            f"{one.total_seconds:.4g} s",
            f"{one.mfu:.1%}",
            human_bytes(round(one.needed_bytes)),
            human_bytes(round(one.wire_bytes)),
            bound(one, subject).by,
            _confirmed(found.confirmed.get(one.choice)),
        )
        for place, one in enumerate(shown, start=1)
    ]
    header = ("", "plan", "how", "step", "MFU", "needs", "wire", "bound by", "compiled")
    lines += ["", *columns(header, rows, right=(0, 3, 4, 5, 6)), ""]
    first = shown[0]
    parts = sorted(first.seconds.items(), key=lambda item: -item[1])
    lines.append(f"{explanation(first, subject)}:")
    lines += [f"  {part:<12}{seconds:>10.4g} s" for part, seconds in parts if seconds > 0.001 * first.total_seconds]
    line = command(config_path, first.choice, subject.config, chip)
    if line is not None:
        lines.append(f"  {line}")
    lines += ["", pipelining(found, subject)["words"]]
    if len(shown) > 1:
        lines += [
            "",
            f"why {name(shown[1], subject)} came second:",
            table(difference(first, shown[1]), ("first", "second")),
        ]
    return "\n".join(lines)


def nothing_fits(found: Found, subject: Subject) -> list[str]:
    """What is missing, at the least, and what would help."""
    least, room = found.least, subject.room
    if least is None:
        return ["no plan can be made: see what was dropped; other sizes of the batch or the model would help"]
    lacks = least.needed_bytes - room
    largest = max(_HELPS, key=lambda part: least.memory[part])
    return [
        f"nothing fits: {name(least, subject)} ({how(least.choice, subject)}) lacks the least, "
        f"{human_bytes(round(lacks))} of {human_bytes(round(least.needed_bytes))}",
        f"most of it is {largest.replace('_', ' ')}, {human_bytes(round(least.memory[largest]))}: "
        f"{_HELPS[largest]} would help",
    ]


_HELPS = {
    "parameters": "more devices to store them on",
    "optimizer_state": "more devices to store it on, or an optimizer that keeps less",
    "working_copy": "gather='layer', or more devices",
    "gradients": "accumulate='sharded', or more devices",
    "activations": "a smaller batch a device, or an axis to split the sequence over (activation=)",
    "temporaries": "fewer examples in a microbatch, attention in chunks, a loss in parts of the vocabulary",
    "batch": "a smaller batch",
}


def how(choice: Choice, subject: Subject) -> str:
    """What a plan does beside its mesh, in a few words."""
    words = []
    if choice.microbatches > 1:
        words.append(f"{choice.microbatches} microbatches")
    if choice.virtual > 1:
        words.append(f"{choice.virtual} virtual")
    words.append(f"remat {choice.remat}")
    if choice.gather == "layer":
        words.append("gather layer")
    if choice.accumulate == "sharded":
        words.append("sharded sums")
    if subject.config.activation is not None and choice.activation is None:
        words.append("x whole")
    words += [f"{pattern} whole over {axis}" for pattern, axis in choice.whole]
    words += [f"{axis} over {parts} slices" for axis, parts in choice.dcn]
    words += [f"{axis} on {' x '.join(dims)}" for axis, dims in choice.links]
    if choice.stages:
        words.append(f"stages {choice.stages}")
    return ", ".join(words)


def _confirmed(compiled: Mapping[str, Any] | None) -> str:
    if compiled is None:
        return ""
    if "error" in compiled:
        return compiled["error"].partition("\n")[0][:60]
    wire, seconds = compiled.get("wire_bytes"), compiled.get("estimate_seconds")
    words = f"{human_bytes(compiled['hbm_bytes'])} reported" + ("" if wire is None else f", wire {human_bytes(wire)}")
    return words + ("" if seconds is None else f", {seconds:.4g} s") + ("" if compiled["fits"] else ", does not fit")
