"""Which layers a stage holds: a contiguous run of them, listed, or as even as can be.

A list says it stage by stage, in the order in which a microbatch passes them, virtual stages too:

    E t*2 | t*3 | t*3 | t*2 H        as a text: E is what comes before the blocks, H what comes after them, and any
                                     other word stands for a block
    2, 3, 3, 2                       the same as numbers
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from shardlab.pipeline.actions import ScheduleError


@dataclass(frozen=True)
class LayerCosts:
    """How long the parts of a model take, measured or estimated, in any one unit.

    Attributes:
        blocks: each block, in order.
        before: what comes before them.
        after: what comes after them.

    Raises:
        ScheduleError: a time that is negative or not finite, or a block that takes none.

    >>> LayerCosts(blocks=(1, 1, 1, 1), after=2).of_stages((1, 2, 1))
    (1.0, 2.0, 3.0)
    """

    blocks: tuple[float, ...]
    before: float = 0.0
    after: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(map(float, self.blocks)))
        for layer, value in enumerate(self.blocks):
            if not (math.isfinite(value) and value > 0):
                raise ScheduleError(f"costs: layer {layer} takes {value}; give every layer a positive, finite cost")
        for name, value in (("before", self.before), ("after", self.after)):
            if not (math.isfinite(value) and value >= 0):
                raise ScheduleError(f"costs: {name} takes {value}; give it a finite cost of at least 0")

    def of_stages(self, layers: Sequence[int]) -> tuple[float, ...]:
        """What each stage takes, if it holds so many blocks."""
        ends = list(accumulate(layers))
        times = [sum(self.blocks[end - held : end]) for end, held in zip(ends, layers, strict=True)]
        times[0] += self.before
        times[-1] += self.after
        return tuple(times)


Stages = str | Sequence[int] | LayerCosts | None
"""A list as text or numbers, ``"balanced"``, costs to balance by, or nothing: as even as can be."""


def stage_layers(
    stages: Stages, num_layers: int, num_stages: int, estimate: LayerCosts | None = None, *, alike: bool = True
) -> tuple[int, ...]:
    """How many layers each stage holds, as declared.

    By costs, no stage gets more layers than the longest of even ones, if they are alike: all stages compute as many
    slots in a tick as the longest holds, so that one layer more on a cheap stage would be time for every stage.

    Args:
        stages: the declaration.
        num_layers: layers of the model.
        num_stages: stages on all devices.
        alike: whether all layers are one program.
        estimate: the costs that ``"balanced"`` goes by; without them all layers are alike.

    Raises:
        ScheduleError: a list that cannot be read, or is not of as many stages and layers; what `assign_layers` raises.

    >>> stage_layers("E t*2 | t*3 | t*3 | t*2 H", 10, 4), stage_layers(None, 10, 4)
    ((2, 3, 3, 2), (3, 3, 2, 2))
    >>> stage_layers(LayerCosts(blocks=(1,) * 10, before=0.5, after=2), 10, 4)
    (3, 3, 3, 1)
    """
    costs = estimate if isinstance(stages, str) and stages == "balanced" else stages
    if costs is None or (isinstance(costs, str) and not costs):
        return assign_layers(num_layers, num_stages)
    if isinstance(costs, LayerCosts):
        at_most = math.ceil(num_layers / max(num_stages, 1)) if alike else None
        return assign_layers(
            num_layers, num_stages, costs.blocks, before=costs.before, after=costs.after, at_most=at_most
        )
    shown = repr(stages)
    layers = _numbers(stages) if _of_numbers(stages) else _counts(stages)
    if len(layers) != num_stages:
        raise ScheduleError(
            f"stages: {shown} lists {_of(len(layers), 'stage')}, and there {'are' if num_stages > 1 else 'is'} "
            f"{num_stages}, virtual stages counted; list {num_stages}, or leave them out: as even as can be"
        )
    listed = sum(layers)
    if listed != num_layers:
        way_out = f"list {abs(num_layers - listed)} {'more' if num_layers > listed else 'fewer'}"
        raise ScheduleError(
            f"stages: {shown} lists {_of(listed, 'block')} ({' + '.join(map(str, layers))}), and the model has "
            f"{num_layers}; {way_out}"
        )
    return layers


def read_stages(text: str) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The stages of a text, each a run of (word, how many).

    Raises:
        ScheduleError: what is no word, an E or H elsewhere than at the two ends, or a stage of which nothing is said.

    >>> read_stages("E t*7 | d m*2 H")
    ((('E', 1), ('t', 7)), (('d', 1), ('m', 2), ('H', 1)))
    """
    stages: list[list[tuple[str, int]]] = [[]]
    bars = [0]  # where each stage starts
    text = " ".join(text.split())
    at, end = 0, len(text)
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None:
            at += text[at] == " "
            raise _fault(text, at, f"{text[at]!r} is no part of a stage", _WORDS)
        at = found.end()
        bar, word, count = found.groups()
        if bar:
            stages.append([])
            bars.append(at)
            continue
        start = found.start(2)
        if word in _ENDS and count:
            raise _fault(text, start, f"there is one {word}", f"write {word} alone")
        if word == "E" and (any(stages[0]) or len(stages) > 1):
            raise _fault(text, start, "E is what comes before all blocks", "put it at the start of the first stage")
        if word == "H" and at < end:
            raise _fault(text, start, "H is what comes after all blocks", "put it at the end of the last stage")
        if word not in _ENDS and not word[0].islower():
            raise _fault(text, start, f"{word!r} is no part of a stage", _WORDS)
        stages[-1].append((word, int(count or 1)))
    for stage, (words, bar) in enumerate(zip(stages, bars, strict=True)):
        if not words:
            raise _fault(text, bar, f"nothing is said of stage {stage}", "write t*0 if it is to hold no block")
    return tuple(map(tuple, stages))


_ENDS = ("E", "H")
_TOKEN = re.compile(r" ?(?:(\|)|([A-Za-z]\w*)(?: ?\* ?(\d+)(?!\w))?)")
_WORDS = "write blocks as t or t*8, any lower-case word for t, E and H for what is before and after, | between stages"


def _fault(text: str, at: int, problem: str, way_out: str) -> ScheduleError:
    return ScheduleError(f"stages: {problem}; {way_out}\n    {text}\n    {' ' * at}^")


def _counts(text: Any) -> tuple[int, ...]:
    """The blocks of each stage of a text."""
    return tuple(sum(count for word, count in words if word not in _ENDS) for words in read_stages(text))


def _of_numbers(stages: Any) -> bool:
    return not isinstance(stages, str) or re.fullmatch(r"[\s\d,]*", stages) is not None


def _numbers(stages: Any) -> tuple[int, ...]:
    """The blocks of each stage of a sequence, or of a text of numbers."""
    try:
        given = [int(part) for part in stages.split(",")] if isinstance(stages, str) else map(operator.index, stages)
        layers = tuple(given)
    except (TypeError, ValueError):
        raise ScheduleError(
            f"stages: {stages!r} is no list of stages; give a text as 'E t*2 | t*2 H', whole numbers as (2, 2), "
            "'balanced', or LayerCosts"
        ) from None
    for stage, held in enumerate(layers):
        if held < 0:
            raise ScheduleError(f"stages: stage {stage} of {stages!r} holds {held} blocks; give 0 or more")
    return layers


def assign_layers(
    num_layers: int,
    num_stages: int,
    costs: Sequence[float] | None = None,
    *,
    before: float = 0.0,
    after: float = 0.0,
    at_most: int | None = None,
) -> tuple[int, ...]:
    """How many layers each stage holds, in order; stage s starts where stage s-1 ends.

    The longest stage is as short as it can be, for it sets the pace of all. Among such assignments the one is
    taken whose stages are the most even (least sum of squares), then the one with more layers on earlier
    stages.

    Args:
        num_layers: layers of the model.
        num_stages: stages on all devices, at most as many as layers.
        costs: time of each layer, in any unit; all the same, 1, if left out.
        before: what the first stage takes beside its layers, in that unit.
        after: what the last stage takes beside its layers.
        at_most: layers that a stage may hold.

    Raises:
        ScheduleError: fewer layers than stages or more than they may hold, or costs that are not one positive number a
            layer.

    >>> assign_layers(10, 4)
    (3, 3, 2, 2)
    >>> assign_layers(4, 2, costs=[3, 1, 1, 1])
    (1, 3)
    >>> assign_layers(10, 4, before=1, after=1)
    (2, 3, 3, 2)
    """
    if num_stages < 1:
        raise ScheduleError(f"{num_layers} layers on {num_stages} stages; there must be at least 1 stage")
    layers = _of(num_layers, "layer")
    if num_layers < num_stages:
        fewer = f"{num_layers} stages or fewer, or more layers" if num_layers > 1 else "1 stage, or more layers"
        raise ScheduleError(f"{layers} on {num_stages} stages: a stage holds at least 1 layer; use {fewer}")
    if at_most is not None and num_layers > num_stages * at_most:
        room = f"hold at most {num_stages * at_most}, {at_most} each"
        raise ScheduleError(f"{layers} on {_of(num_stages, 'stage')}: they {room}; use more stages")
    if costs is None and not before and not after:
        short, longer = divmod(num_layers, num_stages)
        return (short + 1,) * longer + (short,) * (num_stages - longer)
    given = LayerCosts((1.0,) * num_layers if costs is None else tuple(costs), before, after)
    if len(given.blocks) != num_layers:
        raise ScheduleError(f"costs: {len(given.blocks)} for {layers}; give one cost per layer")
    return _partition(given, num_stages, num_layers if at_most is None else at_most)


def _partition(costs: LayerCosts, num_stages: int, at_most: int) -> tuple[int, ...]:
    """Dynamic programs over the first layer of a stage, from the last stage to the first."""
    n = len(costs.blocks)
    sums = [0, *accumulate(costs.blocks)]  # cost of the layers before each layer

    def time(i: int, j: int) -> float:
        """Of a stage with the layers from i up to j; only the first stage starts at 0, only the last ends at n."""
        if j - i > at_most:
            return math.inf
        return sums[j] - sums[i] + (costs.before if i == 0 else 0) + (costs.after if j == n else 0)

    # longest[i]: the shortest longest stage when the layers from i on are on the stages counted so far.
    longest: list[float] = [time(i, n) for i in range(n)] + [math.inf]
    for _ in range(num_stages - 1):
        longest = [min((max(time(i, j), longest[j]) for j in range(i + 1, n)), default=math.inf) for i in range(n)] + [
            math.inf
        ]
    limit = longest[0]

    # even[i]: the least sum of squares from i on with no stage above the limit, and where the next stage
    # starts.
    def square(i: int, j: int) -> float:
        taken = time(i, j)
        return taken * taken if taken <= limit else math.inf

    even: list[tuple[float, int]] = [(square(i, n), -n) for i in range(n)] + [(math.inf, -n)]
    starts = [even]
    for _ in range(num_stages - 1):
        # Starts are negative so that of equal sums the later start, hence the longer earlier stage, is the
        # least.
        even = [
            min(((square(i, j) + even[j][0], -j) for j in range(i + 1, n)), default=(math.inf, -n)) for i in range(n)
        ] + [(math.inf, -n)]
        starts.append(even)

    layers, at = [], 0
    for stage_starts in reversed(starts):
        following = -stage_starts[at][1]
        layers.append(following - at)
        at = following
    return tuple(layers)


def _of(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
