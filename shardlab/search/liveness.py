"""What is held at once: what a program has made and not yet read for the last time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shardlab.search.operation_kinds import FUSED, PRODUCTS
from shardlab.search.walk import Walk


@dataclass(frozen=True)
class Live:
    """The most bytes that a program holds at once of what it makes.

    Attributes:
      all: with all of its results.
      bare: but for the gradients of weights, which are added or sent where they are made.
      gathered: as `bare`, and with the weights that it reads, each until it is read for the last time.
    """

    all: float
    bare: float
    gathered: float


def live(walk: Walk, inner: Mapping[int, float], *, gradients: Collection[int] = (), looped: bool = False) -> Live:
    """What a walked program holds.

    Args:
      walk: at its end.
      inner: by place, bytes that an operation holds while it runs.
      gradients: which results are gradients of weights, by place among the results.
      looped: whether it is the body of a loop, as attention by chunks is: XLA:TPU makes exponentials there with the
        product that they are of, and keeps them; those of a loss it computes again.
    """
    ops, end = walk.program.ops, len(walk.program.ops)
    kept = {out for op in ops if op.name == "exp" for out in op.outs} if looped else set()
    readers: dict[int, int] = defaultdict(int)  # of a value made by fused operations, products that read it
    for op in ops:
        for number in set(op.ins):
            readers[number] += op.name in PRODUCTS or op.name == "scan" or number in kept
    roots: dict[int, frozenset[int]] = {}
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
    given = range(walk.program.num_ins)
    sizes = {number: walk.bytes(number) for number in made_at if number not in given}
    weights = {number: walk.bytes(number) for number in given if number in last and walk.at[number].weight}
    results = {number for out in walk.program.outs for number in roots.get(out, ())}
    leaving = {number for place in gradients for number in roots.get(walk.program.outs[place], ())}

    def most(staying: Collection[int], lent: Mapping[int, float]) -> float:
        """With results that stay until the end, and what is there from the beginning."""
        events = [0.0] * (end + 3)
        for number, size in (*sizes.items(), *lent.items()):
            begun, until = made_at.get(number, 0), end if number in staying else last[number]
            events[begun] += size
            # What is fused writes where it reads, unless it moves what it reads to other places.
            reads = until < end and ops[until].name in FUSED and ops[until].name != "transpose"
            in_place = reads and until > begun and any(made_at.get(out) == until for out in ops[until].outs)
            events[until + (0 if in_place else 1)] -= size
        for place, size in walk.extra.items():
            events[place] += size
        most = now = 0.0
        for place in range(end):
            now += events[place]
            most = max(most, now + inner.get(place, 0.0))
        return most

    inside = results - leaving
    return Live(most(results, {}), most(inside, {}), most(inside, weights))
