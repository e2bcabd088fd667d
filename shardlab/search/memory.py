"""What a plan holds in a device's memory: what it stores throughout a step, and what each part of it holds beside that.

A step with a loop, over microbatches or ticks, holds working copies and accumulators throughout. Without one XLA makes
accumulators, and working copies of what is outside blocks, where they are first used, and what is used up by then
gives its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardlab.search.storage import Group

_HELD = (
    "parameters",
    "optimizer_state",
    "batch",
    "working_copy",
    "gradients",
    "activations",
    "mail",
    "temporaries",
    "fragments",
    "counted_twice",
)


class Moment(NamedTuple):
    """What is there at once in a part of a step, in bytes, beside parameters, optimizer state and batch.

    Attributes:
      held: all of it.
      passing: but for what a loop has carried or carries: accumulators, stacks of what is kept, x, slots of mail.
    """

    held: float
    passing: float


class Memory:
    """The memory of one plan while it is estimated.

    Args:
      groups: of parameters: how many of each a device holds, and whether they are of blocks.
      embeds: those that `before` reads.
      by_layer: whether weights of blocks are gathered layer by layer.
      pieces: whether gradients are accumulated as the optimizer's state lies.
      loops: whether a step has a loop over microbatches or ticks; `ticks`: whether over ticks.

    Attributes:
      bytes: by what they hold.
      transient: the most bytes that each part of the step makes and holds at once.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Group, int, bool]],
        embeds: Sequence[Group],
        *,
        by_layer: bool,
        pieces: bool,
        loops: bool,
        ticks: bool,
    ) -> None:
        self.groups, self.embeds = groups, embeds
        self.by_layer, self.pieces, self.loops, self.ticks = by_layer, pieces, loops, ticks
        self.bytes = self._stored()
        self.transient: dict[str, float] = {}

    def _stored(self) -> dict[str, float]:
        """What is held throughout the step."""
        found = dict.fromkeys(_HELD, 0.0)
        for group, count, inside in self.groups:
            found["parameters"] += group.stored * count
            found["optimizer_state"] += group.state * count
            if inside and self.by_layer and group.cut:
                found["working_copy"] += group.shard * count if group.cast else 0.0
            elif (group.cast or group.cut) and (inside or self.loops):
                # Without a loop what is outside blocks is made where it is used, and its gradient takes its place.
                found["working_copy"] += group.whole * count
            found["gradients"] += self.sums(group) * count
        return found

    def sums(self, group: Group) -> float:
        """Bytes of the accumulators of a group."""
        return group.pieces if self.pieces else group.accumulated

    def holds(self, where: str, size: float) -> None:
        """Notes what a part of the step makes and holds at once."""
        self.transient[where] = max(self.transient.get(where, 0.0), size)

    @property
    def throughout(self) -> float:
        """What `bytes` says is held throughout a step, beside parameters, optimizer state and batch."""
        return sum(self.bytes[name] for name in ("working_copy", "gradients", "activations", "mail"))

    def moments(self) -> dict[str, Moment]:
        """Of each part of the step what it holds: one may hold less than what is held throughout."""
        copies, kept, x = (self.bytes[name] for name in ("working_copy", "activations", "mail"))
        most, all_sums = self.transient, self.bytes["gradients"]
        inside = sum(self.sums(group) * count for group, count, within in self.groups if within)
        if not any(within for _, _, within in self.groups):
            return {name: Moment(self.throughout + size, self.throughout + size) for name, size in most.items()}
        embeds = {id(group) for group in self.embeds}
        heads = [group for group, _, within in self.groups if not within and id(group) not in embeds]
        head = sum(self.sums(group) for group in heads)
        if self.loops:
            found = {name: Moment(self.throughout + size, copies + size) for name, size in most.items()}
            found.pop("cast", None)
            if self.ticks:
                # Slots begin as they are found; the head's gradient is chosen between the sum so far and with its own.
                found["begin"] = Moment(self.throughout, copies + all_sums)
                if "after" in found:
                    found["after"] = found["after"]._replace(passing=copies + most["after"] + head + x)
            else:
                found["begin"] = Moment(self.throughout, self.throughout)
            return found
        if not self.pieces:
            head = sum(group.summed for group in heads)  # until it is added to nothing
        backward, finish, after = (most.get(name, 0.0) for name in ("B", "finish", "after"))
        found = {
            "before": Moment(copies + kept + x, copies + kept + x),
            "F": Moment(copies + kept + x + most.get("F", 0.0), copies + most.get("F", 0.0)),
            "after": Moment(copies + kept + x + after, copies + x + after),
            "zeros": Moment(copies + kept + inside + head + x, copies + inside + head + x),
            "B": Moment(copies + kept + inside + head + x + backward, copies + head + backward),
            "finish": Moment(all_sums + x + finish, head + finish),
        }
        if "cast" in most:
            found["cast"] = Moment(copies + kept + x + most["cast"], copies + kept + x + most["cast"])
        return found
