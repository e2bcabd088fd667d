"""What XLA:TPU takes of a device's memory beyond what its program holds at once.

The compiler's buffer assignment (`--xla_dump_to`) lies up to 1 GiB above what is live, for gaps, and what it reports in
the end lies above that: the rest is reserved when code is made, and no dump says for what. So these are measurements of
the steps of `benchmarks/predicted.py` with jax 0.10.2 and libtpu 0.0.42.1, not a derivation. They go with the largest
sum of gradients, and where a block's backward holds more than two of these, it and the head's logits lie apart from
them. That is so of 16 layers and more: with 4 three of these steps take less, and 11, 26 and 61 % too much is foretold
for them. XLA:GPU takes at most 0.1 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shardlab.search.storage import Axes, Group

SCATTERED, REDUCED = 3, 1
"""In parts of the largest sum of gradients, where it is reduce-scattered and where it is all-reduced: nine FSDP steps
on 16 to 1,024 chips lie within 0.5 GiB of it, those of 70 billion parameters at 5.4 and 5.9 GiB."""
OVER_SLICES = 4
"""The same where the sum goes over slices: five steps of few layers on two slices of v5e lie within 11 % of
their memory."""
FITS = 2
"""Where gradients are summed layer by layer, so many of the largest sums lie beside logits and the backward of a block,
if that does not fit into their place. Of 27 steps on 16 to 1,024 chips of v5e, v5p and v6e all lie within 10 % of their
memory; ten were compiled after the rule before this was made, and showed it wrong, six after this one, and did not."""
SCATTERED_ONCE = 1.75 * 2**30
"""Where the whole gradients of blocks are scattered once a step, so much more: four ZeRO 1 steps have 1.5 to 2.2
GiB, the smallest of them beside 0.9 GiB of such gradients. Beside smaller ones it is taken to be at most twice as much
as they are, which is a guess."""
CODE = 40 * 2**20
"""The program itself: 31 to 64 MiB in those steps."""


def beyond_of_tpu(
    groups: Iterable[tuple[Group, int, bool]],
    doubled: Callable[[Axes], bool],
    over_slices: Callable[[Axes], bool],
    *,
    once: bool,
    backward: float,
    head: float,
    most: float,
) -> float:
    """Bytes beyond what is live.

    Args:
      groups: of parameters: how many of each a device holds, and whether they are of blocks.
      doubled: whether XLA:TPU makes an all-reduce of a reduce-scatter over these axes.
      over_slices: whether these axes go over several slices.
      once: whether gradients of blocks are summed once a step, and not layer by layer.
      backward: what a block's backward makes and holds at once.
      head: the largest array that the head makes.
      most: the most that any part of the step makes and holds at once.
    """
    largest, more, by_layer = 0.0, 0.0, 0.0
    for group, count, inside in groups:
        scattered = [axes for kind, axes in group.reduces if kind == "reduce-scatter"]
        stacked = inside and once
        if group.reduces:
            size = group.largest * (count if stacked else 1)
            times = SCATTERED if any(not doubled(axes) for axes in scattered) else REDUCED
            if any(over_slices(axes) for _, axes in group.reduces):
                times = OVER_SLICES
            elif not once:
                by_layer = max(by_layer, size)
            largest = max(largest, times * size)
        if stacked and scattered:
            more += 2 * group.accumulated * count
    if by_layer and backward > FITS * by_layer:
        largest = max(largest, FITS * by_layer + backward + head - most)
    return largest + min(more, SCATTERED_ONCE) + CODE
