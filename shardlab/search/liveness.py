"""What is held at once: what a program has made and not yet read for the last time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from shardlab.search.operation_kinds import FUSED
from shardlab.search.walk import Walk


def live(walk: Walk, inner: Mapping[int, float]) -> tuple[float, float]:
    """The most bytes that a walked program holds at once of what it makes, and those of the largest array among it.

    Args:
      walk: at its end.
      inner: by place, bytes that an operation holds while it runs.
    """
    ops, end = walk.program.ops, len(walk.program.ops)
    roots: dict[int, frozenset[int]] = {}
    given = set(range(walk.program.num_ins))
    readers: dict[int, int] = defaultdict(int)  # of a value made by fused operations, products that read it
    for op in ops:
        if op.name in ("dot_general", "conv_general_dilated", "scan"):
            for number in set(op.ins):
                readers[number] += 1
    last: dict[int, int] = {}
    made_at: dict[int, int] = {}
    for place, op in enumerate(ops):
        used = frozenset().union(*(roots.get(number, frozenset({number})) for number in op.ins if number >= 0))
        for number in used:
            last[number] = place
        fused = op.name in FUSED
        for out in op.outs:
            stored = not fused or readers[out] > 1
            roots[out] = frozenset({out}) if stored else used
            if stored:
                made_at[out] = place
                last[out] = max(last.get(out, place), place)
    for out in walk.program.outs:
        for number in roots.get(out, ()):
            last[number] = end
    events = [0.0] * (end + 3)
    for number, place in made_at.items():
        if number not in given:
            size = walk.bytes(number)
            events[place] += size
            # What is fused writes where it reads.
            until = last[number]
            in_place = (
                until < end and ops[until].name in FUSED and any(made_at.get(out) == until for out in ops[until].outs)
            )
            events[until + (0 if in_place and until > place else 1)] -= size
    for place, size in walk.extra.items():
        events[place] += size
    largest = max((walk.bytes(number) for number in made_at if number not in given), default=0.0)
    most = now = 0.0
    for place in range(end):
        now += events[place]
        most = max(most, now + inner.get(place, 0.0))
    return most, largest
