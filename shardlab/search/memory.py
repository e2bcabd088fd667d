"""What a plan holds in a device's memory: what it stores throughout a step, and the most that a part makes beside that.

A step with a loop, over microbatches or ticks, holds working copies and accumulators throughout. Without one XLA makes
accumulators, and working copies of what is outside blocks, where they are first used, and what is used up by then
gives its place.
"""

from __future__ import annotations

from collections.abc import Sequence

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
)


class Memory:
    """The memory of one plan while it is estimated.

    Args:
      groups: of parameters: how many of each a device holds, and whether they are of blocks.
      embeds: those that `before` reads.
      by_layer: whether weights of blocks are gathered layer by layer.
      pieces: whether gradients are accumulated as the optimizer's state lies.
      loops: whether a step has a loop over microbatches or ticks.

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
    ) -> None:
        self.groups, self.embeds = groups, embeds
        self.by_layer, self.pieces, self.loops = by_layer, pieces, loops
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

    def most(self) -> float:
        """Beside what is held throughout, the most that is made and held at once."""
        if self.loops or not any(inside for _, _, inside in self.groups):
            return max((size for name, size in self.transient.items() if name != "cast"), default=0.0)
        # Without a loop accumulators begin where they are first added to, those of blocks after the head, of what
        # `before` reads after the blocks; by then the weights of blocks are no longer needed.
        of_blocks = sum(self.sums(group) * count for group, count, inside in self.groups if inside)
        last = sum(self.sums(group) for group in self.embeds)
        ends = [self.transient.get(name, 0.0) - of_blocks for name in ("after", "F")]
        finish = self.transient.get("finish", 0.0) - self.bytes["working_copy"] - self.bytes["activations"]
        cast = self.transient.get("cast", 0.0) - self.bytes["gradients"]
        return max(self.transient.get("B", 0.0) - last, finish, cast, *ends)
