"""Few cases in which every two choices meet: of all pairs of values that may stand together, each is in some case."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Choice = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(choice: Mapping[str, Any]) -> set[Pair]:
    """Every two of its values."""
    return set(itertools.combinations(choice.items(), 2))


def pairwise(
    features: Mapping[str, Sequence[Any]], allowed: Callable[[Choice], bool], *, seed: int = 0
) -> list[Choice]:
    """Choices, one value of every feature, in which each two values meet that any allowed choice has.

    Greedy: of some choices drawn around a pair that is left, the one with the most such pairs. The same for one seed.

    >>> found = pairwise({"a": (1, 2), "b": (1, 2), "c": (1, 2)}, lambda c: not (c["a"] == c["b"] == 2))
    >>> len(found), any(c["a"] == c["b"] == 2 for c in found)
    (5, False)
    """
    draw = random.Random(seed)
    names = list(features)

    def around(pair: Pair) -> Choice:
        fixed = dict(pair)
        return {name: fixed.get(name, draw.choice(features[name])) for name in names}

    left = {
        ((one, a), (two, b))
        for one, two in itertools.combinations(names, 2)
        for a in features[one]
        for b in features[two]
    }
    found = []
    while left:
        pair = min(left, key=str)
        some = [choice for choice in (around(pair) for _ in range(400)) if allowed(choice)]
        if not some:
            left.remove(pair)
            continue
        best = max(some, key=lambda choice: len(pairs_of(choice) & left))
        left -= pairs_of(best)
        found.append(best)
    return found
