"""Which layers a stage holds: a contiguous run of them, as even as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from shardlab.pipeline.actions import ScheduleError


def assign_layers(num_layers: int, num_stages: int, costs: Sequence[float] | None = None) -> tuple[int, ...]:
    """How many layers each stage holds, in order; stage s starts where stage s-1 ends.

    The longest stage is as short as it can be, for it sets the pace of all. Among such assignments the one is
    taken whose stages are the most even (least sum of squares), then the one with more layers on earlier
    stages.

    Args:
        num_layers: layers of the model.
        num_stages: stages on all devices, at most as many as layers.
        costs: time of each layer, in any unit; all the same if left out.

    Raises:
        ScheduleError: fewer layers than stages, or costs that are not one positive number a layer.

    >>> assign_layers(10, 4)
    (3, 3, 2, 2)
    >>> assign_layers(4, 2, costs=[3, 1, 1, 1])
    (1, 3)
    """
    if num_stages < 1:
        raise ScheduleError(f"{num_layers} layers on {num_stages} stages; there must be at least 1 stage")
    if num_layers < num_stages:
        fewer = f"{num_layers} stages or fewer, or more layers" if num_layers > 1 else "1 stage, or more layers"
        layers = f"{num_layers} layer{'s' if num_layers != 1 else ''}"
        raise ScheduleError(f"{layers} on {num_stages} stages: a stage holds at least 1 layer; use {fewer}")
    if costs is None:
        short, longer = divmod(num_layers, num_stages)
        return (short + 1,) * longer + (short,) * (num_stages - longer)
    if len(costs) != num_layers:
        raise ScheduleError(f"{len(costs)} costs for {num_layers} layers; give one cost per layer")
    for layer, value in enumerate(costs):
        if not (math.isfinite(value) and value > 0):
            raise ScheduleError(f"layer {layer} has cost {value}; give every layer a positive, finite cost")
    return _partition(costs, num_stages)


def _partition(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Dynamic programs over the first layer of a stage, from the last stage to the first."""
    n = len(costs)
    before = [0, *accumulate(costs)]  # cost of the layers before each layer

    # longest[i]: the shortest longest stage when the layers from i on are on the stages counted so far.
    longest: list[float] = [before[n] - before[i] for i in range(n)] + [math.inf]
    for _ in range(num_stages - 1):
        longest = [
            min((max(before[j] - before[i], longest[j]) for j in range(i + 1, n)), default=math.inf) for i in range(n)
        ] + [math.inf]
    limit = longest[0]

    # even[i]: the least sum of squares from i on with no stage above the limit, and where the next stage
    # starts.
    def square(i: int, j: int) -> float:
        time = before[j] - before[i]
        return time * time if time <= limit else math.inf

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
