"""Collectives that could wait for ever: those in a branch that not all of their devices take.

A divergent pipeline schedule lets each stage take its own branch of a conditional. A collective inside is safe if all
its devices are of one stage, for they take the same branch; XLA:CPU's collective-permute waits for every device
whatever its pairs, so a permute is never safe there. Conditionals whose index is the same on all devices are of two
branches (`jax.lax.cond`) and are left out; one of three or more is taken to diverge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardlab.hlo.collectives import UNKNOWN, Collective, each_once
from shardlab.hlo.parse import HloModule, parse

_LEAST_BRANCHES = 3


def could_hang(text: str, axes: Mapping[str, int], stage: str) -> tuple[Collective, ...]:
    """The collectives in branches of divergent conditionals that span stages, or are permutes.

    Args:
      text: `compiled.as_text()`.
      axes: sizes of the mesh axes in mesh order.
      stage: the axis whose positions take different branches.

    Raises:
      ValueError: no conditional of three branches: the compiler has made something else of them, which was not looked
        at.

    >>> could_hang('''
    ... HloModule step, num_partitions=4
    ... %idle (x: f32[6]) -> f32[6] {
    ...   ROOT %x = f32[6]{0} parameter(0)
    ... }
    ... %also (x: f32[6]) -> f32[6] {
    ...   ROOT %x = f32[6]{0} parameter(0)
    ... }
    ... %work (x: f32[6]) -> f32[6] {
    ...   %x = f32[6]{0} parameter(0)
    ...   ROOT %sum = f32[6]{0} all-reduce(%x), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
    ... }
    ... ENTRY %main (i: s32[], x: f32[6]) -> f32[6] {
    ...   %i = s32[] parameter(0)
    ...   %x = f32[6]{0} parameter(1)
    ...   ROOT %y = f32[6]{0} conditional(%i, %x, %x, %x), branch_computations={%idle, %also, %work}
    ... }
    ... ''', {"stage": 2, "tensor": 2}, "stage")[0].axes
    ('stage',)
    """
    module = parse(text)
    once = each_once(module, axes)
    branches = list(_branches(module))
    if not branches:
        raise ValueError("the compiled program has no conditional of three branches; what it runs instead is not known")
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
            if instruction.opcode == "conditional":
                branches = instruction.callees("branch_computations")
                if len(branches) >= _LEAST_BRANCHES:
                    yield from branches


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
