"""How each operation lays what it makes: as what it is made of, which is first summed or gathered where it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardlab.search.laid import Laid
from shardlab.search.operation_kinds import JOINED, LINEAR
from shardlab.search.product_rules import convolution, dot
from shardlab.search.program import Op
from shardlab.search.walk import Walk
from shardlab.sharding.rules import axes_of


def elementwise(walk: Walk, op: Op) -> None:
    """An operation on numbers place by place, or one without a rule; unknown where no input has the shape it makes."""
    ins = [number for number in op.ins if number >= 0]
    out = op.outs[0]
    shape = walk.values[out].shape
    full = [number for number in ins if walk.values[number].shape == shape]
    if not full or any(walk.values[other].shape != shape for other in op.outs):
        _unknown(walk, op, ins)
        return
    lays = [walk.at[number] for number in full]
    parts = {lay.partial for lay in lays}
    one = len(parts) == 1 and lays[0].partial
    if one and (
        (op.name in LINEAR and len(ins) == 1)
        or (walk.compiler.merges and op.name in JOINED and len(full) == len(ins) == len(op.ins))
    ):
        dims = walk.merged(full)
        for number in full:
            if walk.at[number].dims != dims:
                walk.summed(number)
        if all(walk.at[number].partial for number in full):
            size = max(lay.itemsize for lay in lays)
            walk.lay(op, dims, partial=lays[0].partial, itemsize=size, weight=False)
            return
    dims = walk.merged(full)
    for number in full:
        walk.gathered(number, dims)
    for number in ins:
        if number not in full:
            walk.summed(number)
    walk.lay(op, dims, weight=all(walk.at[number].weight for number in full))


def _unknown(walk: Walk, op: Op, ins: Sequence[int]) -> None:
    """An operation of which nothing is known: its inputs are whole; a leading dim that lasts keeps its split."""
    first = next((number for number in ins if walk.values[number].shape), None)
    for out in op.outs:
        shape = walk.values[out].shape
        dims: list[tuple[str, ...]] = [()] * len(shape)
        if first is not None and shape and walk.values[first].shape[0] == shape[0]:
            dims[0] = walk.at[first].dims[0]
        walk.at[out] = Laid(tuple(dims))
    for number in ins:
        now = walk.at[number].dims
        keep = tuple(
            axes if dim == 0 and first is not None and axes == walk.at[first].dims[0] else ()
            for dim, axes in enumerate(now)
        )
        walk.gathered(number, keep)


def _constraint(walk: Walk, op: Op) -> None:
    spec = getattr(op.params["sharding"], "spec", ())
    (number,) = op.ins
    dims: list[tuple[str, ...]] = [()] * len(walk.values[number].shape)
    for dim, entry in enumerate(spec):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        if not isinstance(entry, str | tuple) and entry is not None:  # unconstrained
            axes = walk.at[number].dims[dim]
        dims[dim] = tuple(axis for axis in axes if walk.sizes.get(axis, 1) > 1)
    found = walk.gathered(number, tuple(dims))
    walk.lay(op, tuple(dims), weight=found.weight)


def _reduce(walk: Walk, op: Op) -> None:
    numbers = [number for number in op.ins if number >= 0]
    axes = op.params["axes"]
    for number in numbers:
        walk.summed(number)
    now = walk.at[numbers[0]]
    partial = tuple(axis for dim in axes for axis in now.dims[dim])
    dims = tuple(entry for dim, entry in enumerate(now.dims) if dim not in axes)
    size = walk.values[op.outs[0]].itemsize
    for out in op.outs:
        walk.at[out] = Laid(dims, partial, size)
        if partial and op.name != "reduce_sum":
            walk.summed(out)


def _transpose(walk: Walk, op: Op) -> None:
    now = walk.at[op.ins[0]]
    dims = tuple(now.dims[dim] for dim in op.params["permutation"])
    walk.lay(op, dims, partial=now.partial, itemsize=now.itemsize, weight=now.weight)


def _broadcast(walk: Walk, op: Op) -> None:
    number = op.ins[0]
    shape = walk.values[op.outs[0]].shape
    dims: list[tuple[str, ...]] = [()] * len(shape)
    if number >= 0:
        now = walk.summed(number)
        for dim, to in enumerate(op.params["broadcast_dimensions"]):
            if walk.values[number].shape[dim] == shape[to]:
                dims[to] = now.dims[dim]
    walk.lay(op, tuple(dims), weight=number >= 0 and walk.at[number].weight)


def _reshape(walk: Walk, op: Op) -> None:
    number = op.ins[0]
    now = walk.at[number]
    given, made = walk.values[number].shape, walk.values[op.outs[0]].shape
    dims: list[tuple[str, ...]] = [()] * len(made)
    keep = [()] * len(given)  # type: list[tuple[str, ...]]
    for ins, outs in _groups(given, made):
        first_in = next((dim for dim in ins if given[dim] > 1), None)
        first_out = next((dim for dim in outs if made[dim] > 1), None)
        if first_in is None or first_out is None:
            continue
        axes = now.dims[first_in]
        while axes and made[first_out] % walk.size(axes):
            axes = axes[:-1]
        keep[first_in], dims[first_out] = axes, axes
        # A dim behind whole ones of the same sizes keeps its own.
        for a, b in zip(ins[1:], outs[1:], strict=False):
            if [given[dim] for dim in ins[: ins.index(a) + 1]] == [made[dim] for dim in outs[: outs.index(b) + 1]]:
                keep[a], dims[b] = now.dims[a], now.dims[a]
    if tuple(keep) != now.dims:
        walk.gathered(number, tuple(keep))
        now = Laid(tuple(keep), weight=now.weight)
    walk.lay(op, tuple(dims), partial=now.partial, itemsize=now.itemsize, weight=now.weight)


def _groups(given: Sequence[int], made: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dims of two shapes of one size that stand for each other, in runs as short as can be.

    >>> _groups((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    groups = []
    i = j = 0
    while i < len(given) or j < len(made):
        ins, outs, left, right = [], [], 1, 1
        if i < len(given):
            ins, left, i = [i], given[i], i + 1
        if j < len(made):
            outs, right, j = [j], made[j], j + 1
        while left != right:
            if left < right and i < len(given):
                ins, left, i = [*ins, i], left * given[i], i + 1
            elif j < len(made):
                outs, right, j = [*outs, j], right * made[j], j + 1
            else:
                break
        groups.append((ins, outs))
    return groups


def _squeeze(walk: Walk, op: Op) -> None:
    now = walk.at[op.ins[0]]
    gone = op.params["dimensions"]
    dims = tuple(axes for dim, axes in enumerate(now.dims) if dim not in gone)
    walk.lay(op, dims, partial=now.partial, itemsize=now.itemsize, weight=now.weight)


def _expand(walk: Walk, op: Op) -> None:
    now, new = walk.at[op.ins[0]], op.params["dimensions"]
    old = iter(now.dims)
    dims = tuple(() if dim in new else next(old) for dim in range(len(walk.values[op.outs[0]].shape)))
    walk.lay(op, dims, partial=now.partial, itemsize=now.itemsize, weight=now.weight)


def _along(walk: Walk, op: Op) -> None:
    """Operations that keep dims in place and need those whole whose size they change, or along which they go."""
    numbers = [number for number in op.ins if number >= 0 and walk.values[number].shape]
    out = walk.values[op.outs[0]].shape
    along = {op.params[key] for key in ("axis", "dimension") if isinstance(op.params.get(key), int)}
    same = [number for number in numbers if len(walk.values[number].shape) == len(out)]
    if not same:
        _unknown(walk, op, numbers)
        return
    for number in same:
        walk.summed(number)
    dims = list(walk.merged(same))
    for dim in range(len(out)):
        if dim in along or any(walk.values[number].shape[dim] != out[dim] for number in same):
            dims[dim] = ()
    for number in same:
        walk.gathered(number, tuple(dims))
    for made in op.outs:
        walk.at[made] = Laid(tuple(dims), weight=all(walk.at[number].weight for number in same))


def _gather(walk: Walk, op: Op) -> None:
    operand, indices = op.ins[:2]
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    table, places = walk.summed(operand), walk.summed(indices)
    shape = walk.values[operand].shape
    gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    sliced = [dim for dim in range(len(shape)) if dim not in gone]
    dims: list[tuple[str, ...]] = [()] * len(walk.values[op.outs[0]].shape)
    keep: list[tuple[str, ...]] = [()] * len(shape)
    for dim, to in zip(sliced, numbers.offset_dims, strict=True):
        if sizes[dim] == shape[dim]:
            dims[to] = keep[dim] = table.dims[dim]
    used = {axis for axes in dims for axis in axes}
    batch = [dim for dim in range(len(dims)) if dim not in numbers.offset_dims]
    for dim, to in zip(range(len(places.dims) - 1), batch, strict=False):
        dims[to] = tuple(axis for axis in places.dims[dim] if axis not in used)
    # Rows that lie elsewhere count as zeros, and are summed.
    picked = [dim for dim in numbers.collapsed_slice_dims if dim in numbers.start_index_map]
    partial = tuple(axis for dim in picked for axis in table.dims[dim])
    for dim in picked:
        keep[dim] = table.dims[dim]
    walk.gathered(operand, tuple(keep))
    walk.lay(op, tuple(dims), partial=partial, itemsize=walk.values[op.outs[0]].itemsize)
    walk.work.moved += 2 * walk.bytes(op.outs[0])


def _scatter(walk: Walk, op: Op) -> None:
    operand, indices, updates = op.ins[:3]
    numbers = op.params["dimension_numbers"]
    now = walk.summed(updates)
    if operand >= 0:
        walk.summed(operand)
    if indices >= 0:
        walk.summed(indices)
    shape, mine = walk.values[op.outs[0]].shape, walk.values[updates].shape
    gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    windows = [dim for dim in range(len(shape)) if dim not in gone]
    dims: list[tuple[str, ...]] = [()] * len(shape)
    for dim, source in zip(windows, numbers.update_window_dims, strict=True):
        if mine[source] == shape[dim]:
            dims[dim] = now.dims[source]
    partial = tuple(axis for dim, axes in enumerate(now.dims) if dim not in numbers.update_window_dims for axis in axes)
    walk.lay(op, tuple(dims), partial=partial, itemsize=walk.values[op.outs[0]].itemsize)
    walk.work.moved += 3 * walk.bytes(updates)


def _shard_map(walk: Walk, op: Op) -> None:
    """A region that lays by hand what goes in and out of it; what it does inside is not walked."""
    for numbers, specs in ((op.ins, op.params["in_specs"]), (op.outs, op.params["out_specs"])):
        for number, spec in zip(numbers, specs, strict=True):
            if number < 0:
                continue
            dims: list[tuple[str, ...]] = [()] * len(walk.values[number].shape)
            for dim, entry in enumerate(spec):
                dims[dim] = tuple(axis for axis in axes_of(entry) if walk.sizes.get(axis, 1) > 1)
            walk.at[number] = Laid(tuple(dims)) if numbers is op.outs else walk.gathered(number, tuple(dims))


RULES: dict[str, Callable[[Walk, Op], None]] = {
    "sharding_constraint": _constraint,
    "dot_general": dot,
    "conv_general_dilated": convolution,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "gather": _gather,
    "shard_map": _shard_map,
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add"), _scatter),
    **dict.fromkeys(
        ("concatenate", "pad", "slice", "dynamic_slice", "dynamic_update_slice", "split", "rev", "sort"), _along
    ),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k"), _along),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
}
"""Of every other operation `elementwise`."""
