"""How products and convolutions lie, and the operations that a device does for them."""

from __future__ import annotations

import math
from typing import Any

from shardlab.search.laid import Laid
from shardlab.search.program import Op
from shardlab.search.walk import Walk


def dot(walk: Walk, op: Op) -> None:
    """A product: each axis splits one of its dims; where that one is summed, every device makes a part of the sum."""
    left, right = op.ins
    (lc, rc), (lb, rb) = op.params["dimension_numbers"]
    lhs, rhs = walk.summed(left), walk.summed(right)
    ldims, rdims = list(lhs.dims), list(rhs.dims)
    lfree = [dim for dim in range(len(ldims)) if dim not in (*lc, *lb)]
    rfree = [dim for dim in range(len(rdims)) if dim not in (*rc, *rb)]
    for a, b in (*zip(lb, rb, strict=True), *zip(lc, rc, strict=True)):
        if ldims[a] != rdims[b]:
            # Cut the one that is whole; of two that are cut otherwise the more finely cut stays.
            axes = max(ldims[a], rdims[b], key=walk.size)
            ldims[a] = rdims[b] = axes
    for axis in {axis for axes in (*ldims, *rdims) for axis in axes}:
        _one_place(axis, (lhs, ldims, lc, lb, lfree), (rhs, rdims, rc, rb, rfree))
    walk.gathered(left, tuple(ldims))
    walk.gathered(right, tuple(rdims))
    partial = tuple(dict.fromkeys(axis for dim in lc for axis in ldims[dim]))
    dims = tuple([ldims[dim] for dim in lb] + [ldims[dim] for dim in lfree] + [rdims[dim] for dim in rfree])
    (out,) = op.outs
    walk.at[out] = Laid(dims, partial, walk.values[out].itemsize)
    terms = math.prod(walk.values[left].shape[dim] for dim in lc) * math.prod(walk.values[out].shape)
    share = walk.size(axis for axes in dims for axis in axes) * walk.size(partial)
    wide = 4 if walk.values[out].dtype.startswith("complex") else 1
    walk.work.flops[walk.values[left].dtype] += 2.0 * wide * terms / share


def _one_place(axis: str, *sides: Any) -> None:
    """Of the dims of a product that an axis would split, all but one are whole."""
    (lhs, ldims, lc, lb, lfree), (rhs, rdims, rc, _, rfree) = sides
    free = [
        (side, dim)
        for side, dims, places in ((0, ldims, lfree), (1, rdims, rfree))
        for dim in places
        if axis in dims[dim]
    ]
    summed = [dim for dim in range(len(lc)) if axis in ldims[lc[dim]]]
    joint = [dim for dim in range(len(lb)) if axis in ldims[lb[dim]]]
    if len(free) + len(summed) + len(joint) < 2:
        return

    def drop(entries: list[tuple[str, ...]], dim: int) -> None:
        entries[dim] = tuple(one for one in entries[dim] if one != axis)

    def drop_free(one: tuple[int, int]) -> None:
        drop((ldims, rdims)[one[0]], one[1])

    if joint:
        for one in free:
            drop_free(one)
        for place in summed:
            drop(ldims, lc[place])
            drop(rdims, rc[place])
        return
    weights = (lhs.weight, rhs.weight)
    heavy = [one for one in free if weights[one[0]]]
    if summed and free and not heavy:
        # A weight that is summed over its split dim stays as it lies.
        (place,) = summed[:1]
        holder = lhs if lhs.weight and axis in lhs.dims[lc[place]] else rhs
        if holder.weight and axis in holder.dims[(lc if holder is lhs else rc)[place]]:
            for one in free:
                drop_free(one)
            return
    keep = heavy[0] if heavy else free[-1] if free else None
    if keep is None:
        return
    for one in free:
        if one != keep:
            drop_free(one)
    for place in summed:
        drop(ldims, lc[place])
        drop(rdims, rc[place])


def convolution(walk: Walk, op: Op) -> None:
    """A convolution: examples, features made and features summed may be split, places may not."""
    left, right = op.ins
    lhs, rhs = walk.summed(left), walk.summed(right)
    given, kernel, out = op.params["dimension_numbers"]
    batch, summed, made = lhs.dims[given[0]], lhs.dims[given[1]], rhs.dims[kernel[0]]
    made = tuple(axis for axis in made if axis not in batch)
    inner = rhs.dims[kernel[1]] or summed
    inner = tuple(axis for axis in inner if axis not in (*batch, *made))
    ldims: list[tuple[str, ...]] = [()] * len(lhs.dims)
    rdims: list[tuple[str, ...]] = [()] * len(rhs.dims)
    ldims[given[0]], ldims[given[1]], rdims[kernel[0]], rdims[kernel[1]] = batch, inner, made, inner
    walk.gathered(left, tuple(ldims))
    walk.gathered(right, tuple(rdims))
    dims: list[tuple[str, ...]] = [()] * len(walk.values[op.outs[0]].shape)
    dims[out[0]], dims[out[1]] = batch, made
    walk.lay(op, tuple(dims), partial=inner, itemsize=walk.values[op.outs[0]].itemsize)
    terms = math.prod(walk.values[right].shape) // walk.values[right].shape[kernel[0]]
    share = walk.size((*batch, *made, *inner))
    walk.work.flops[walk.values[left].dtype] += 2.0 * terms * math.prod(walk.values[op.outs[0]].shape) / share
