"""Collectives that could wait for ever: those in a branch that not all of their devices take.

A divergent pipeline schedule lets each stage take its own branch: a loop that runs once or not at all (`is_branch`). A
collective inside is safe if all its devices are of one stage, for they take the same branch; XLA:CPU's
collective-permute waits for every device whatever its pairs, so a permute is never safe there. Conditionals
(`jax.lax.cond`) have an index that is the same on all devices, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardlab.hlo.collectives import UNKNOWN, Collective, each_once
from shardlab.hlo.loops import is_branch
from shardlab.hlo.parse import HloModule, parse


def could_hang(
    text: str, axes: Mapping[str, int], stage: str, *, slices: Mapping[str, int] | None = None
) -> tuple[Collective, ...]:
    """The collectives in branches that span stages, or are permutes.

    Args:
      text: `compiled.as_text()`.
      axes: sizes of the mesh axes in mesh order.
      stage: the axis whose positions take different branches.
      slices: of several TPU slices, over how many of them an axis runs.

    Raises:
      ValueError: no loop of one trip at most: the compiler has made something else of it, which was not looked at.

    >>> could_hang('''
    ... HloModule step, num_partitions=4
    ... %due (s: (pred[], f32[6])) -> pred[] {
    ...   %s = (pred[], f32[6]{0}) parameter(0)
    ...   ROOT %yes = pred[] get-tuple-element(%s), index=0
    ... }
    ... %work (s.1: (pred[], f32[6])) -> (pred[], f32[6]) {
    ...   %s.1 = (pred[], f32[6]{0}) parameter(0)
    ...   %no = pred[] constant(false)
    ...   %x = f32[6]{0} get-tuple-element(%s.1), index=1
    ...   %sum = f32[6]{0} all-reduce(%x), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
    ...   ROOT %after = (pred[], f32[6]{0}) tuple(%no, %sum)
    ... }
    ... ENTRY %main (i: pred[], x.1: f32[6]) -> (pred[], f32[6]) {
    ...   %i = pred[] parameter(0)
    ...   %x.1 = f32[6]{0} parameter(1)
    ...   %before = (pred[], f32[6]{0}) tuple(%i, %x.1)
    ...   ROOT %y = (pred[], f32[6]{0}) while(%before), condition=%due, body=%work
    ... }
    ... ''', {"stage": 2, "tensor": 2}, "stage")[0].axes
    ('stage',)
    """
    module = parse(text)
    once = each_once(module, axes, slices or {})
    branches = list(_branches(module))
    if not branches:
        raise ValueError("the compiled program has no loop of one trip at most; what it runs instead is not known")
    inside = {name for branch in branches for name in _reached(module, branch)}
    return tuple(
        one
        for (computation, _), one in once.items()
        if computation in inside
        and (stage in one.axes or one.axes == UNKNOWN or one.kind in ("collective-permute", "collective-broadcast"))
    )


def _branches(module: HloModule) -> Iterator[str]:
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode == "while" and is_branch(module, instruction):
                yield from instruction.callees("body")


def _reached(module: HloModule, name: str) -> set[str]:
    """The computation and all that it runs."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        here = waiting.pop()
        if here in found or here not in module.computations:
            continue
        found.add(here)
        for instruction in module.computations[here].instructions.values():
            for attribute in _RUN:
                waiting += instruction.callees(attribute)
    return found


_RUN = (
    "body",
    "condition",
    "calls",
    "to_apply",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)
