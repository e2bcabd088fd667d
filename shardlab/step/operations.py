"""What an operation makes of values that follow the number of examples; the legend is in `shardlab.step.kinds`."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
from jax.extend.core import Literal

from shardlab.step.blocks import Blocks, following, reshaped, sliced
from shardlab.step.kinds import (
    ADDITIONS,
    ADDITIVE,
    FORM,
    ODD,
    PRODUCTS,
    ROWS,
    SAME,
    SUM,
    ZERO,
    Kind,
    Spot,
    Value,
    iota,
    of_counts,
)

# Of rows, a sum over them.
_SUMS = frozenset({"reduce_sum", "dot_general"})
# Of examples that are all the same, what is the same for any number of them.
_ANY_ONE = frozenset({"reduce_max", "reduce_min", "reduce_or", "reduce_and", "slice", "dynamic_slice", "squeeze"})
# Of places, still places.
_PLACES = frozenset({"convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint", "device_put"})
_PLACES |= {"reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose"}
# Along a dim: what one row becomes depends on the rows before it, or on its place among them.
_ALONG = {"sort": "dimension", "cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis"}
_ALONG |= {"cumlogsumexp": "axis", "rev": "dimensions"}
# Of whole matrices, the last two dims.
_MATRICES = frozenset({"qr", "geqrf", "geqp3", "householder_product", "lu", "svd", "eigh", "eig", "cholesky", "schur"})
_MATRICES |= {"hessenberg", "tridiagonal", "ormqr", "lu_pivots_to_permutation", "triangular_solve"}
_APART = "takes the examples apart"


def operation(at: Spot, mine: Any, other: Any, name: str, ins: list[Value]) -> list[Value]:
    """What an operation without a program of its own makes of its inputs, random ones apart.

    Args:
      mine, other: its equations with some examples and with twice as many.
      name: of its primitive.
      ins: what is known of its inputs.

    Raises:
      DeclarationError: it brings examples together otherwise than in a sum.
    """
    outs = [following(a.aval, b.aval) for a, b in zip(mine.outvars, other.outvars, strict=True)]
    if name == "iota":
        return [SAME if dim is None else iota(mine, dim) for dim in outs]
    if name == "select_n" and ins[0].kind is Kind.ZERO:
        return [ins[1]]
    dims = [following(a.aval, b.aval) for a, b in zip(mine.invars, other.invars, strict=True)]
    if name == "gather" or name.startswith("scatter"):
        ins = _indexed(at, mine, name, ins, dims)
    elif name in ("dynamic_slice", "dynamic_update_slice"):
        ins = ins[: 1 + (name == "dynamic_update_slice")]
    kinds = [value.kind for value in ins]
    if Kind.PLACE in kinds or Kind.SHIFTED in kinds:
        return _of_places(at, mine, name, ins, dims, outs)
    if Kind.SUM in kinds:
        return [Value(_of_sum(at, mine, name, kinds))] * len(outs)
    if Kind.ROWS not in kinds:
        return [_of_none(at, mine, name, ins, dims, dim is not None) for dim in outs]
    if any(dim is None for dim in outs):
        added = name == "scatter-add" and kinds[0] is Kind.ZERO
        if not added and (name not in _SUMS or len(outs) > 1):
            at.fault(mine, "takes one value of all examples")
        return [SUM]
    if Kind.COUNT in kinds or Kind.ODD in kinds:
        if name == "add" and mine.outvars[0].aval.dtype.kind == "i":  # how NumPy's negative indices are traced
            at.fault(mine, "picks examples by their number, or uses the number of examples at hand")
        at.fault(mine, "uses the number of examples at hand")
    return _of_rows(at, mine, other, name, ins, dims, outs)


def _of_rows(
    at: Spot, mine: Any, other: Any, name: str, ins: list[Value], dims: list[int | None], outs: list[int | None]
) -> list[Value]:
    """Of rows, rows: the examples still lie as before, or as a change of shape has laid them."""
    size = [var.aval.shape[dim] if dim is not None else 0 for var, dim in zip(mine.invars, dims, strict=True)]
    if name == "concatenate" and mine.params["dimension"] == outs[0]:
        joined = [value.blocks or (length,) for value, length in zip(ins, size, strict=True)]
        return [Value(Kind.ROWS, tuple(itertools.chain.from_iterable(joined)))]
    found = {value.blocks for value in ins if value.kind is Kind.ROWS}
    if len(found) > 1:
        at.fault(mine, "brings examples together that lie in different orders")
    (blocks_of,) = found
    first = next(index for index, value in enumerate(ins) if value.kind is Kind.ROWS)
    dim, blocks = dims[first], blocks_of or (size[first],)
    assert dim is not None
    _whole_examples(at, mine, other, name, first, dim)
    if name == "reshape":
        shape = mine.invars[0].aval.shape
        order = mine.params["dimensions"] or range(len(shape))
        given = tuple(shape[axis] for axis in order)
        new = reshaped(blocks, given, list(order).index(dim), mine.outvars[0].aval.shape, outs[0] or 0)
        return [_laid(at, mine, new)]
    if name == "tile":
        return [_laid(at, mine, blocks * mine.params["reps"][dim])]
    if name == "slice":
        cut = [
            (equation.params["start_indices"][dim], equation.params["limit_indices"][dim]) for equation in (mine, other)
        ]
        stride = (mine.params["strides"] or (1,) * (dim + 1))[dim]
        ok = stride > 1 or (2 * cut[0][0], 2 * cut[0][1]) == cut[1]
        return [_laid(at, mine, sliced(blocks, *cut[0], stride) if ok else None)]
    if name == "split" and mine.params["axis"] == dim:
        ends = np.cumsum([0, *mine.params["sizes"]]).tolist()
        return [_laid(at, mine, sliced(blocks, a, b)) for a, b in itertools.pairwise(ends)]
    if blocks_of and any(var.aval.shape[out] != size[first] for var, out in zip(mine.outvars, outs, strict=True)):
        at.fault(mine, _APART)
    return [Value(Kind.ROWS, blocks_of)] * len(outs)


def _laid(at: Spot, mine: Any, blocks: Blocks | None) -> Value:
    if blocks is None:
        at.fault(mine, _APART)
    return Value(Kind.ROWS, blocks if len(blocks) > 1 else ())


def _whole_examples(at: Spot, mine: Any, other: Any, name: str, index: int, dim: int) -> None:
    """The operation does not go along the dim of the examples, `dim` of operand `index`."""
    params, shape = mine.params, mine.invars[index].aval.shape
    if name in _ALONG:
        along = params[_ALONG[name]]
        if dim in (along if isinstance(along, tuple) else (along,)):
            at.fault(mine, "orders the examples")
    elif name == "pad" and tuple(params["padding_config"][dim]) != (0, 0, 0):
        at.fault(mine, _APART)
    elif name in ("dynamic_slice", "dynamic_update_slice"):
        whole = {shape[dim], (mine.outvars if name == "dynamic_slice" else mine.invars[1:])[0].aval.shape[dim]}
        if len(whole) > 1:
            at.fault(mine, _APART)
    elif "window_dimensions" in params and params["window_dimensions"][dim] != 1:
        at.fault(mine, "goes from example to example")
    elif name == "conv_general_dilated":
        # As features they are convolved apart where each example is a group of them: so a convolution is mapped.
        spec = params["dimension_numbers"][min(index, 1)]
        grouped = params["feature_group_count"] != other.params["feature_group_count"]
        if dim in spec[2:] or (dim == spec[1] and not grouped) or (index and dim == spec[0] and not grouped):
            at.fault(mine, "goes from example to example")
    elif name == "fft" and dim >= len(shape) - len(params["fft_lengths"]):
        at.fault(mine, "goes from example to example")
    elif name in _MATRICES and dim >= len(shape) - 2:
        columns = len(shape) - (1 if params.get("left_side") else 2)
        if name != "triangular_solve" or index != 1 or dim != columns:
            at.fault(mine, "goes from example to example")


def _indexed(at: Spot, mine: Any, name: str, ins: list[Value], dims: list[int | None]) -> list[Value]:
    """The operands of a gather or scatter, the places in its indices checked; indices made of them are rows."""
    operand, indices, *updates = ins
    numbers, dim = mine.params["dimension_numbers"], dims[0]
    gathers = name == "gather"
    picked = numbers.start_index_map if gathers else numbers.scatter_dims_to_operand_dims
    columns = list(indices.columns or (indices,) * len(picked))
    if dim is not None and dim in picked:
        column, size = picked.index(dim), mine.invars[0].aval.shape[dim]
        index = columns[column]
        anything = gathers and (operand.kind is Kind.ALIKE or mine.params["slice_sizes"][dim] == size)
        if not anything and (index.kind is not Kind.PLACE or index.span != size or operand.blocks):
            at.fault(mine, "picks examples by their number")
        columns[column] = ROWS
    kinds = {value.kind for value in columns}
    left = next((kind for kind in Kind if kind in kinds), indices.kind)
    return [operand, Value(Kind.SHIFTED if left is Kind.PLACE else left, indices.blocks), *updates]


def _of_places(
    at: Spot, mine: Any, name: str, ins: list[Value], dims: list[int | None], outs: list[int | None]
) -> list[Value]:
    kinds = [value.kind for value in ins]
    if name == "concatenate" and mine.params["dimension"] != outs[0]:
        dim = mine.params["dimension"]
        columns = [value for var, value in zip(mine.invars, ins, strict=True) for _ in range(var.aval.shape[dim])]
        return [Value(Kind.SHIFTED, columns=tuple(columns))]
    if name in ("add", "mul") and (moved := _of_place_and(at, mine, name, ins)) is not None:
        return [moved]
    reduced = any(dim is None for dim in outs) and any(dim is not None for dim in dims)
    if {Kind.ROWS, Kind.SUM, Kind.ONE} & set(kinds) or reduced:
        if name == "sort" and outs[0] == mine.params["dimension"]:
            at.fault(mine, "orders the examples")
        at.fault(mine, "uses the places of the examples at hand")
    if kinds == [Kind.PLACE, Kind.ZERO] and name == "lt":
        return [ZERO]  # a place is never below zero: how NumPy's negative indices are traced
    if name in _PLACES and kinds[0] is Kind.PLACE:
        (out,), (given,) = outs, dims[:1]
        assert out is not None
        assert given is not None
        before, after = mine.invars[0].aval.shape, mine.outvars[0].aval.shape
        apart = ins[0].within and name == "reshape" and math.prod(before[:given]) == math.prod(after[:out])
        if before[given] == after[out] or apart:
            return [ins[0]]
    return [ins[0] if name in ("convert_element_type", "copy") else Value(Kind.SHIFTED)] * len(outs)


def _of_place_and(at: Spot, mine: Any, name: str, ins: list[Value]) -> Value | None:
    """Of a place, that of an example's first entry among those of all, or of another of its entries."""
    index = [value.kind for value in ins].index(Kind.PLACE) if Kind.PLACE in [v.kind for v in ins] else None
    if index is None:
        return None
    place, other, var = ins[index], ins[1 - index], mine.invars[1 - index]
    number = int(var.val) if isinstance(var, Literal) and np.asarray(var.val).dtype.kind in "iu" else None
    if other.kind is Kind.ZERO and name == "add":
        return place
    if place.within:
        return None
    if name == "mul" and other.kind is Kind.SAME and number is not None and number > 0:
        return replace(place, stride=place.stride * number, span=place.span * number)
    if name == "add" and place.stride > 1 and other.kind in (Kind.ROWS, Kind.ALIKE, Kind.SAME) and not other.blocks:
        return replace(place, within=True) if number is None or 0 <= number < place.stride else None
    return None


def _of_none(at: Spot, mine: Any, name: str, ins: list[Value], dims: list[int | None], follows: bool) -> Value:
    """Of constants, parameters and what is the same for all examples."""
    kinds = [value.kind for value in ins]
    if Kind.ONE in kinds:
        if Kind.COUNT in kinds or Kind.ODD in kinds:
            at.fault(mine, "uses the number of examples at hand")
        return Value(Kind.ONE)
    if Kind.ODD in kinds or Kind.COUNT in kinds:
        return Value(of_counts(name, kinds)) if Kind.ALIKE not in kinds else ODD
    if Kind.OWN in kinds:
        return Value(Kind.OWN)
    if kinds and set(kinds) == {Kind.ZERO} and name in FORM | ADDITIONS | PRODUCTS:
        return ZERO
    if Kind.ALIKE in kinds or follows:
        dim = next((dim for dim in dims if dim is not None), None)
        if not follows:
            if name not in _SUMS | _ANY_ONE:
                at.fault(mine, "takes one value of all examples")
            return SUM if name in _SUMS else SAME
        if name == "concatenate" and mine.params["dimension"] == dim:
            lengths = tuple(var.aval.shape[dim] for var in mine.invars)
            return Value(Kind.ROWS, lengths if len(lengths) > 1 else ())
        if dim is not None and name != "rev":
            index = next(index for index, value in enumerate(dims) if value is not None)
            if name in _ALONG or "window_dimensions" in mine.params:
                _whole_examples(at, mine, mine, name, index, dim)
        return Value(Kind.ALIKE)
    # Zero in another form stays zero.
    return ins[0] if name in FORM and kinds and kinds[0] is Kind.ZERO else SAME


def _of_sum(at: Spot, mine: Any, name: str, kinds: list[Kind]) -> Kind:
    rest: list[Kind] = [kind for kind in kinds if kind is not Kind.SUM]
    if name in FORM:
        return Kind.SUM
    if name == "gather" and kinds[1] in (Kind.SAME, Kind.ZERO):
        return Kind.SUM
    if name in ADDITIONS or name == "scatter-add":
        if name == "select_n" and kinds[0] in (Kind.SAME, Kind.ZERO):
            rest = rest[1:]
        if name == "scatter-add":
            # Of rows added to a sum, the sum over them.
            rest = [kinds[0], Kind.SUM if kinds[0] is Kind.SUM and kinds[2] is Kind.ROWS else kinds[2]]
        if all(kind in ADDITIVE for kind in rest) or name == "dynamic_update_slice":
            return Kind.SUM
        if Kind.ODD in rest:
            at.fault(mine, "adds to a sum over the examples what does not grow in proportion to their number")
        at.fault(mine, "adds what does not grow with the examples to a sum over them")
    if name in PRODUCTS and kinds.count(Kind.SUM) == 1 and (name != "div" or kinds[0] is Kind.SUM):
        if all(kind in (Kind.SAME, Kind.ZERO) for kind in rest):
            return Kind.SUM
        if rest == [Kind.COUNT]:
            at.fault(mine, "takes a mean over the examples at hand")
        if rest == [Kind.ODD]:
            at.fault(mine, "scales a sum over the examples by a number that follows theirs")
    at.fault(mine, "goes on from a sum over the examples at hand")
