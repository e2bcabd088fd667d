"""Whether a model treats its examples one by one, found by tracing it with some of them and with twice as many.

A device holds some rows of a batch, and a microbatch is not the batch. A function that maps rows to rows is the same
on any share of them; a sum over rows adds up if nothing but sums is made of it. Everything else (the maximum over the
batch, statistics of it, one example compared with another, the place of an example among those at hand) would be
another number on every mesh.

A value of the traced program is of the kind

  ROWS     its shape follows the number of examples, and each part of it is made of its own example
  ALIKE    its shape follows the number of examples, which are all the same in it
  PLACE    0, 1, 2, ... along the examples, or a multiple: right for picking each example's own, and for nothing else
  SHIFTED  made of their places: wrong, once it is used
  ONE      of one example, inside a loop over them
  SUM      it is a sum over the examples at hand, linear in it
  COUNT    a constant that follows the number of examples: of tokens, say
  ODD      a constant that follows it, but not in proportion
  ZERO     zero, whatever it is added to
  OWN      a random key that the model made itself
  SAME     none of these: parameters, constants
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
import numpy as np
from jax.extend.core import Literal

from shardlab.mesh.faults import DeclarationError
from shardlab.module.inner import CALLS, program_of, scan_counts
from shardlab.step.backward import backward_of, has_rule
from shardlab.step.batch_sum import is_batch_sum
from shardlab.step.blocks import Blocks, following, reshaped, sliced
from shardlab.step.random import Drawn


class Kind(enum.Enum):
    """See the module's docstring."""

    SHIFTED = enum.auto()
    ROWS = enum.auto()
    SUM = enum.auto()
    ODD = enum.auto()
    COUNT = enum.auto()
    ONE = enum.auto()
    PLACE = enum.auto()
    ALIKE = enum.auto()
    OWN = enum.auto()
    SAME = enum.auto()
    ZERO = enum.auto()


@dataclass(frozen=True)
class Value:
    """What is known of a value.

    Attributes:
      blocks: of ROWS that lie otherwise than one after another: see `shardlab.step.blocks`.
      columns: of indices put together of several arrays: what each column is.
      stride, span: of a PLACE in units of entries, where each example has `stride` of the `span` of all of them.
      within: whether an example's own number below `stride` has been added to its PLACE.
    """

    kind: Kind
    blocks: Blocks = ()
    columns: tuple[Value, ...] = ()
    stride: int = 0
    span: int = 0
    within: bool = False


ROWS, SUM, COUNT, ODD, ZERO, SAME = (
    Value(kind) for kind in (Kind.ROWS, Kind.SUM, Kind.COUNT, Kind.ODD, Kind.ZERO, Kind.SAME)
)
ADDITIVE = frozenset({Kind.SUM, Kind.COUNT, Kind.ZERO})

# Of a sum, still that sum in another form.
_FORM = frozenset(
    {
        "neg",
        "convert_element_type",
        "reduce_precision",
        "real",
        "imag",
        "copy",
        "copy_p",
        "name",
        "stop_gradient",
        "device_put",
    }
    | {"reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "rev", "slice", "dynamic_slice"}
    | {"reduce_sum", "sharding_constraint", "optimization_barrier", "psum", "psum_invariant", "split", "unstack"}
)
_ADDITIONS = frozenset({"add", "sub", "add_any", "concatenate", "stack", "pad", "select_n", "dynamic_update_slice"})
_PRODUCTS = frozenset({"mul", "div", "dot_general"})
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
_RANDOM = frozenset({"random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_bits"})
_RANDOM |= {"random_gamma"}


def check_rows_to_rows(
    here: Any,
    there: Any,
    where: str,
    rows: int,
    *,
    auxiliary: bool = False,
    given: Sequence[Value | None] = (),
) -> tuple[list[Value], frozenset[Drawn]]:
    """Every array that `where` returns follows the examples one by one, or does not follow them at all.

    Args:
      here, there: the closed jaxprs with `rows` examples and with twice as many.
      where: what to call the function in an error.
      auxiliary: whether what it returns last is an auxiliary loss, (sum, weight).
      given: what is known of the inputs, where it is more than their shapes tell.

    Returns:
      What is known of the arrays that it returns, without the auxiliary loss; and how it folds the examples into keys,
      for `shardlab.step.random.rows_key`.

    Raises:
      DeclarationError: naming the operation and the line of the model.
    """
    walk = Walk(where, rows)
    values = walk.closed(here, there, given)
    if auxiliary:
        values, extra = values[:-2], values[-2:]
        _check_pair(extra, where)
    for value in values:
        if value.kind in (Kind.SUM, Kind.COUNT, Kind.ODD):
            what = "sum over" if value.kind is Kind.SUM else "number that follows the count of"
            raise DeclarationError(
                f"{where}: returns a {what} the examples, and a device holds {rows} of the batch's; {_WAY_OUT}"
            )
        if value.kind in (Kind.PLACE, Kind.SHIFTED):
            raise DeclarationError(
                f"{where}: returns the places of the examples, and a device holds {rows} of the batch's; put them "
                "into the batch"
            )
    return values, walk.folds()


def check_sums(here: Any, there: Any, where: str, rows: int, *, given: Sequence[Value | None] = ()) -> None:
    """The sum and the weight that `where` returns last add up over any cut of the batch.

    Raises:
      DeclarationError: naming the operation and the line, or which of the two does not follow the examples.
    """
    _check_pair(Walk(where, rows).closed(here, there, given), where)


def _check_pair(values: list[Value], where: str) -> None:
    for name, value in zip(("sum", "weight"), values, strict=False):
        if value.kind is Kind.ODD:
            raise DeclarationError(
                f"{where}: its {name} follows the number of examples, but not in proportion, so that it cannot be "
                "added up over microbatches and devices; return the sum over examples and how many (or how much "
                "weight) it is over"
            )
        if value.kind not in ADDITIVE:
            raise DeclarationError(
                f"{where}: its {name} does not grow with the number of examples, so that it cannot be added up over "
                "microbatches and devices; return the sum over examples and how many (or how much weight) it is over"
            )


_WAY_OUT = (
    "sum it with shardlab.batch_sum, or let XLA see the whole batch: batch_axes='automatic' without a pipeline, with "
    "microbatches=1"
)


class Walk:
    """A walk over two traces of one function, equation by equation."""

    def __init__(self, where: str, rows: int) -> None:
        self._where, self._rows = where, rows
        self._line = ""  # of the innermost call: what a library function does has no line of the user's own
        self._in_backward = False
        self._folds: dict[tuple[int, ...], str] = {}

    def folds(self) -> frozenset[Drawn]:
        """How the examples are folded into keys: by their places, or by what is theirs."""
        return frozenset((name, shape) for shape, name in self._folds.items() if name != "fold_in")

    def closed(self, here: Any, there: Any, given: Sequence[Value | None] = ()) -> list[Value]:
        """What a closed jaxpr returns; `given` says of its inputs what no shape tells."""
        constants = [self._of_constants(a, b) for a, b in zip(here.consts, there.consts, strict=False)]
        return self._jaxpr(here.jaxpr, there.jaxpr, given, constants)

    def _jaxpr(
        self, here: Any, there: Any, given: Sequence[Value | None] = (), constants: Sequence[Value] = ()
    ) -> list[Value]:
        known: dict[Any, Value] = dict(zip(here.constvars, constants, strict=False))
        known |= {var: value for var, value in zip(here.invars, given, strict=False) if value is not None}
        if len(here.eqns) != len(there.eqns):
            self._other_program()

        def value_of(mine: Any, other: Any) -> Value:
            if isinstance(mine, Literal) or isinstance(other, Literal):
                return self._of_constants(getattr(mine, "val", None), getattr(other, "val", None))
            return known.get(mine, ROWS if mine.aval.shape != other.aval.shape else SAME)

        for mine, other in zip(here.eqns, there.eqns, strict=True):
            ins = [value_of(a, b) for a, b in zip(mine.invars, other.invars, strict=True)]
            outer, self._line = self._line, _line(mine) or self._line
            made = self._equation(mine, other, ins)
            if has_rule(mine) and not self._in_backward:
                self._backward((mine, here), (other, there), ins, made)
            known |= dict(zip(mine.outvars, made, strict=True))
            self._line = outer
        return [value_of(a, b) for a, b in zip(here.outvars, there.outvars, strict=True)]

    def _equation(self, mine: Any, other: Any, ins: list[Value]) -> list[Value]:
        name = mine.primitive.name
        if name not in _CALLS:  # the operation inside says more
            self._one_doubled_dim(mine, other)
        if is_batch_sum(mine):
            if ins[0].kind not in ADDITIVE and not self._in_backward:
                self._fault(mine, "is given what is not a sum over the examples", name="shardlab.batch_sum")
            return [SAME]
        if name == "scan":
            return self._scan(mine, other, ins)
        if name == "while":
            return self._while(mine, other, ins)
        if name == "cond":
            if ins[0].kind in (Kind.SUM, Kind.COUNT, Kind.ODD):
                self._fault(mine, "chooses by a sum over the examples")
            branches = zip(mine.params["branches"], other.params["branches"], strict=True)
            found = zip(*(self.closed(a, b, ins[1:]) for a, b in branches), strict=True)
            return [self._either(mine, values) for values in found]
        if name in _CALLS:
            inner, twice = (program_of(equation.params[_CALLS[name]]) for equation in (mine, other))
            if len(inner.invars) == len(ins):
                consts = [getattr(equation.params[_CALLS[name]], "consts", ()) for equation in (mine, other)]
                return self._jaxpr(inner, twice, ins, [self._of_constants(a, b) for a, b in zip(*consts, strict=False)])
        return self._operation(mine, other, name, ins)

    # What is made of values.

    def _operation(self, mine: Any, other: Any, name: str, ins: list[Value]) -> list[Value]:
        outs = [following(a.aval, b.aval) for a, b in zip(mine.outvars, other.outvars, strict=True)]
        if name == "iota":
            return [SAME if dim is None else _iota(mine, dim) for dim in outs]
        if name in _RANDOM:
            return [self._random(mine, name, ins, any(dim is not None for dim in outs))] * len(outs)
        if name == "select_n" and ins[0].kind is Kind.ZERO:
            return [ins[1]]
        dims = [following(a.aval, b.aval) for a, b in zip(mine.invars, other.invars, strict=True)]
        if name == "gather" or name.startswith("scatter"):
            ins = self._indexed(mine, name, ins, dims)
        elif name in ("dynamic_slice", "dynamic_update_slice"):
            ins = ins[: 1 + (name == "dynamic_update_slice")]
        kinds = [value.kind for value in ins]
        if Kind.PLACE in kinds or Kind.SHIFTED in kinds:
            return self._of_places(mine, name, ins, dims, outs)
        if Kind.SUM in kinds:
            return [Value(self._of_sum(mine, name, kinds))] * len(outs)
        if Kind.ROWS not in kinds:
            return [self._of_none(mine, name, ins, dims, dim is not None) for dim in outs]
        if any(dim is None for dim in outs):
            added = name == "scatter-add" and kinds[0] is Kind.ZERO
            if not added and (name not in _SUMS or len(outs) > 1):
                self._fault(mine, "takes one value of all examples")
            return [SUM]
        if Kind.COUNT in kinds or Kind.ODD in kinds:
            if name == "add" and mine.outvars[0].aval.dtype.kind == "i":  # how NumPy's negative indices are traced
                self._fault(mine, "picks examples by their number, or uses the number of examples at hand")
            self._fault(mine, "uses the number of examples at hand")
        return self._of_rows(mine, other, name, ins, dims, outs)

    def _of_rows(
        self, mine: Any, other: Any, name: str, ins: list[Value], dims: list[int | None], outs: list[int | None]
    ) -> list[Value]:
        """Of rows, rows: the examples still lie as before, or as a change of shape has laid them."""
        size = [var.aval.shape[dim] if dim is not None else 0 for var, dim in zip(mine.invars, dims, strict=True)]
        if name == "concatenate" and mine.params["dimension"] == outs[0]:
            joined = [value.blocks or (length,) for value, length in zip(ins, size, strict=True)]
            return [Value(Kind.ROWS, tuple(itertools.chain.from_iterable(joined)))]
        found = {value.blocks for value in ins if value.kind is Kind.ROWS}
        if len(found) > 1:
            self._fault(mine, "brings examples together that lie in different orders")
        (blocks_of,) = found
        first = next(index for index, value in enumerate(ins) if value.kind is Kind.ROWS)
        dim, blocks = dims[first], blocks_of or (size[first],)
        assert dim is not None
        self._whole_examples(mine, other, name, first, dim)
        if name == "reshape":
            shape = mine.invars[0].aval.shape
            order = mine.params["dimensions"] or range(len(shape))
            given = tuple(shape[axis] for axis in order)
            new = reshaped(blocks, given, list(order).index(dim), mine.outvars[0].aval.shape, outs[0] or 0)
            return [self._laid(mine, new)]
        if name == "tile":
            return [self._laid(mine, blocks * mine.params["reps"][dim])]
        if name == "slice":
            cut = [
                (equation.params["start_indices"][dim], equation.params["limit_indices"][dim])
                for equation in (mine, other)
            ]
            stride = (mine.params["strides"] or (1,) * (dim + 1))[dim]
            ok = stride > 1 or (2 * cut[0][0], 2 * cut[0][1]) == cut[1]
            return [self._laid(mine, sliced(blocks, *cut[0], stride) if ok else None)]
        if name == "split" and mine.params["axis"] == dim:
            ends = np.cumsum([0, *mine.params["sizes"]]).tolist()
            return [self._laid(mine, sliced(blocks, a, b)) for a, b in itertools.pairwise(ends)]
        if blocks_of and any(var.aval.shape[out] != size[first] for var, out in zip(mine.outvars, outs, strict=True)):
            self._fault(mine, _APART)
        return [Value(Kind.ROWS, blocks_of)] * len(outs)

    def _laid(self, mine: Any, blocks: Blocks | None) -> Value:
        if blocks is None:
            self._fault(mine, _APART)
        return Value(Kind.ROWS, blocks if len(blocks) > 1 else ())

    def _whole_examples(self, mine: Any, other: Any, name: str, index: int, dim: int) -> None:
        """The operation does not go along the dim of the examples, `dim` of operand `index`."""
        params, shape = mine.params, mine.invars[index].aval.shape
        if name in _ALONG:
            along = params[_ALONG[name]]
            if dim in (along if isinstance(along, tuple) else (along,)):
                self._fault(mine, "orders the examples")
        elif name == "pad" and tuple(params["padding_config"][dim]) != (0, 0, 0):
            self._fault(mine, _APART)
        elif name in ("dynamic_slice", "dynamic_update_slice"):
            whole = {shape[dim], (mine.outvars if name == "dynamic_slice" else mine.invars[1:])[0].aval.shape[dim]}
            if len(whole) > 1:
                self._fault(mine, _APART)
        elif "window_dimensions" in params and params["window_dimensions"][dim] != 1:
            self._fault(mine, "goes from example to example")
        elif name == "conv_general_dilated":
            # As features they are convolved apart where each example is a group of them: so a convolution is mapped.
            spec = params["dimension_numbers"][min(index, 1)]
            grouped = params["feature_group_count"] != other.params["feature_group_count"]
            if dim in spec[2:] or (dim == spec[1] and not grouped) or (index and dim == spec[0] and not grouped):
                self._fault(mine, "goes from example to example")
        elif name == "fft" and dim >= len(shape) - len(params["fft_lengths"]):
            self._fault(mine, "goes from example to example")
        elif name in _MATRICES and dim >= len(shape) - 2:
            columns = len(shape) - (1 if params.get("left_side") else 2)
            if name != "triangular_solve" or index != 1 or dim != columns:
                self._fault(mine, "goes from example to example")

    def _indexed(self, mine: Any, name: str, ins: list[Value], dims: list[int | None]) -> list[Value]:
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
                self._fault(mine, "picks examples by their number")
            columns[column] = ROWS
        kinds = {value.kind for value in columns}
        left = next((kind for kind in Kind if kind in kinds), indices.kind)
        return [operand, Value(Kind.SHIFTED if left is Kind.PLACE else left, indices.blocks), *updates]

    def _of_places(
        self, mine: Any, name: str, ins: list[Value], dims: list[int | None], outs: list[int | None]
    ) -> list[Value]:
        kinds = [value.kind for value in ins]
        if name == "concatenate" and mine.params["dimension"] != outs[0]:
            dim = mine.params["dimension"]
            columns = [value for var, value in zip(mine.invars, ins, strict=True) for _ in range(var.aval.shape[dim])]
            return [Value(Kind.SHIFTED, columns=tuple(columns))]
        if name in ("add", "mul") and (moved := self._of_place_and(mine, name, ins)) is not None:
            return [moved]
        reduced = any(dim is None for dim in outs) and any(dim is not None for dim in dims)
        if {Kind.ROWS, Kind.SUM, Kind.ONE} & set(kinds) or reduced:
            if name == "sort" and outs[0] == mine.params["dimension"]:
                self._fault(mine, "orders the examples")
            self._fault(mine, "uses the places of the examples at hand")
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

    def _of_place_and(self, mine: Any, name: str, ins: list[Value]) -> Value | None:
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

    def _of_none(self, mine: Any, name: str, ins: list[Value], dims: list[int | None], follows: bool) -> Value:
        """Of constants, parameters and what is the same for all examples."""
        kinds = [value.kind for value in ins]
        if Kind.ONE in kinds:
            if Kind.COUNT in kinds or Kind.ODD in kinds:
                self._fault(mine, "uses the number of examples at hand")
            return Value(Kind.ONE)
        if Kind.ODD in kinds or Kind.COUNT in kinds:
            return Value(_of_counts(name, kinds)) if Kind.ALIKE not in kinds else ODD
        if Kind.OWN in kinds:
            return Value(Kind.OWN)
        if kinds and set(kinds) == {Kind.ZERO} and name in _FORM | _ADDITIONS | _PRODUCTS:
            return ZERO
        if Kind.ALIKE in kinds or follows:
            dim = next((dim for dim in dims if dim is not None), None)
            if not follows:
                if name not in _SUMS | _ANY_ONE:
                    self._fault(mine, "takes one value of all examples")
                return SUM if name in _SUMS else SAME
            if name == "concatenate" and mine.params["dimension"] == dim:
                lengths = tuple(var.aval.shape[dim] for var in mine.invars)
                return Value(Kind.ROWS, lengths if len(lengths) > 1 else ())
            if dim is not None and name != "rev":
                index = next(index for index, value in enumerate(dims) if value is not None)
                if name in _ALONG or "window_dimensions" in mine.params:
                    self._whole_examples(mine, mine, name, index, dim)
            return Value(Kind.ALIKE)
        # Zero in another form stays zero.
        return ins[0] if name in _FORM and kinds and kinds[0] is Kind.ZERO else SAME

    def _of_sum(self, mine: Any, name: str, kinds: list[Kind]) -> Kind:
        rest: list[Kind] = [kind for kind in kinds if kind is not Kind.SUM]
        if name in _FORM:
            return Kind.SUM
        if name == "gather" and kinds[1] in (Kind.SAME, Kind.ZERO):
            return Kind.SUM
        if name in _ADDITIONS or name == "scatter-add":
            if name == "select_n" and kinds[0] in (Kind.SAME, Kind.ZERO):
                rest = rest[1:]
            if name == "scatter-add":
                # Of rows added to a sum, the sum over them.
                rest = [kinds[0], Kind.SUM if kinds[0] is Kind.SUM and kinds[2] is Kind.ROWS else kinds[2]]
            if all(kind in ADDITIVE for kind in rest) or name == "dynamic_update_slice":
                return Kind.SUM
            if Kind.ODD in rest:
                self._fault(mine, "adds to a sum over the examples what does not grow in proportion to their number")
            self._fault(mine, "adds what does not grow with the examples to a sum over them")
        if name in _PRODUCTS and kinds.count(Kind.SUM) == 1 and (name != "div" or kinds[0] is Kind.SUM):
            if all(kind in (Kind.SAME, Kind.ZERO) for kind in rest):
                return Kind.SUM
            if rest == [Kind.COUNT]:
                self._fault(mine, "takes a mean over the examples at hand")
            if rest == [Kind.ODD]:
                self._fault(mine, "scales a sum over the examples by a number that follows theirs")
        self._fault(mine, "goes on from a sum over the examples at hand")

    # Random keys.

    def _random(self, mine: Any, name: str, ins: list[Value], follows: bool) -> Value:
        kinds = [value.kind for value in ins]
        if {Kind.COUNT, Kind.ODD, Kind.SUM} & set(kinds):
            self._fault(mine, "draws by the number of examples at hand")
        key, data = ins[0], ins[-1]
        if name == "random_fold_in":
            return self._fold_in(mine, key, data, follows)
        if {Kind.PLACE, Kind.SHIFTED} & set(kinds):
            self._fault(mine, "uses the places of the examples at hand")
        if name in ("random_seed", "random_wrap"):
            return ROWS if follows else Value(Kind.ONE if Kind.ONE in kinds else Kind.OWN)
        if not follows:
            made = Kind.ONE if Kind.ONE in kinds else Kind.SAME
            return Value(Kind.OWN) if key.kind is Kind.OWN and name == "random_split" else Value(made)
        if key.kind is Kind.OWN:
            self._own_key(mine)
        return Value(Kind.ROWS, key.blocks)

    def _fold_in(self, mine: Any, key: Value, data: Value, follows: bool) -> Value:
        shape = tuple(mine.invars[1].aval.shape)
        if not follows:
            if data.kind in (Kind.PLACE, Kind.SHIFTED):
                self._fault(mine, "uses the place of an example among those at hand")
            if len(shape) == 1 and not mine.invars[0].aval.shape:
                self._fold(shape, "fold_in")
            return Value(next(kind for kind in Kind if kind in (key.kind, data.kind, Kind.SAME)))
        if key.kind is Kind.ROWS:
            if data.kind in (Kind.PLACE, Kind.SHIFTED):
                self._fault(mine, "uses the places of the examples at hand")
            return Value(Kind.ROWS, key.blocks)
        whole = data.kind is Kind.PLACE and data.stride == 1
        if data.kind is Kind.SHIFTED or (data.kind is Kind.PLACE and (key.kind is Kind.OWN or not whole)):
            self._fault(mine, "uses the places of the examples at hand")
        if len(shape) != 1 or mine.invars[0].aval.shape:
            self._fault(mine, f"folds numbers of shape {list(shape)} into keys, and only [{self._rows}] can be cut")
        self._fold(shape, "fold_in_place" if data.kind is Kind.PLACE else "fold_in_rows")
        return Value(Kind.ROWS, data.blocks)

    def _fold(self, shape: tuple[int, ...], name: str) -> None:
        if self._folds.setdefault(shape, name) != name:
            raise DeclarationError(
                f"{self._where}: with {self._rows} examples a device, numbers of shape {list(shape)} are folded into a "
                "key both per example and otherwise; use another batch size or number of microbatches so that the two "
                "shapes differ"
            )

    def _own_key(self, mine: Any) -> NoReturn:
        raise DeclarationError(
            f"{self._where}: {mine.primitive.name}{self._line} draws for every example from a key that the model "
            f"makes itself, and a device holds {self._rows} of the batch's; draw from the key that the model is given"
        )

    # Programs inside the program.

    def _scan(self, mine: Any, other: Any, ins: list[Value]) -> list[Value]:
        params, body, twice = mine.params, mine.params["jaxpr"], other.params["jaxpr"]
        consts, carried = scan_counts(mine)
        if params["length"] != other.params["length"]:
            if carried:
                self._fault(mine, "carries something from example to example")
            return self._over_examples(mine, body, twice, ins, consts)
        values = list(ins)
        while True:
            out = self.closed(body, twice, values)
            pairs = zip(values[consts : consts + carried], out, strict=False)
            joined = [self._either(mine, pair) for pair in pairs]
            if joined == values[consts : consts + carried]:
                return [*joined, *out[carried:]]
            values[consts : consts + carried] = joined

    def _over_examples(self, mine: Any, body: Any, twice: Any, ins: list[Value], consts: int) -> list[Value]:
        """A scan over examples that carries nothing: its body is a function of one of them."""
        orders = {value.blocks for value in ins[consts:] if value.kind is Kind.ROWS}
        if len(orders) > 1:
            self._fault(mine, "brings examples together that lie in different orders")
        places = (Kind.PLACE, Kind.SHIFTED)
        slices = [Value(Kind.SHIFTED) if value.kind in places else Value(Kind.ONE) for value in ins[consts:]]
        for value in self.closed(body, twice, [*ins[:consts], *slices]):
            if value.kind not in (Kind.ONE, Kind.SAME, Kind.ZERO):
                self._fault(mine, "takes one value of all examples for each of them")
        return [Value(Kind.ROWS, next(iter(orders), ()))] * len(mine.outvars)

    def _while(self, mine: Any, other: Any, ins: list[Value]) -> list[Value]:
        before, inside = mine.params["cond_nconsts"], mine.params["body_nconsts"]
        conditions, constants, carry = ins[:before], ins[before : before + inside], ins[before + inside :]
        while True:
            out = self.closed(mine.params["body_jaxpr"], other.params["body_jaxpr"], [*constants, *carry])
            joined = [self._either(mine, pair) for pair in zip(carry, out, strict=True)]
            if joined == carry:
                break
            carry = joined
        # A condition of the examples' own shape is one for each: JAX keeps those that are done as they are.
        (again,) = self.closed(mine.params["cond_jaxpr"], other.params["cond_jaxpr"], [*conditions, *carry])
        if again.kind not in (Kind.ROWS, Kind.ALIKE, Kind.ONE, Kind.SAME, Kind.ZERO):
            self._fault(mine, "repeats as all examples together say")
        return carry

    def _backward(self, mine: tuple[Any, Any], other: tuple[Any, Any], ins: list[Value], made: list[Value]) -> None:
        """A rule for the derivative is walked as well: of rows rows, of what all examples share a sum over them."""
        here, there = backward_of(*mine), backward_of(*other)
        if here is None or there is None:
            return
        cotangents = []
        for index in here.made:
            follows = following(mine[0].outvars[index].aval, other[0].outvars[index].aval) is not None
            one = Value(Kind.ROWS, made[index].blocks) if follows else SUM
            cotangents.append(Value(Kind.ONE) if made[index].kind is Kind.ONE else one)
        self._in_backward = True
        found = self.closed(here.program, there.program, [*(ins[index] for index in here.operands), *cotangents])
        self._in_backward = False
        for index, value in zip(here.given, found, strict=True):
            operand = ins[here.operands[index]]
            if operand.kind in (Kind.ROWS, Kind.ALIKE, Kind.ONE) and value.kind in (Kind.SUM, Kind.COUNT, Kind.ODD):
                self._fault(mine[0], "gives each example a derivative of all of them")
            if value.kind in (Kind.PLACE, Kind.SHIFTED):
                self._fault(mine[0], "uses the places of the examples at hand")

    # Odds and ends.

    def _either(self, mine: Any, values: Sequence[Value]) -> Value:
        """What is known of a value that is one of several."""
        if len(set(values)) == 1:
            return values[0]
        blocks = {value.blocks for value in values if value.kind is Kind.ROWS}
        if len(blocks) > 1:
            self._fault(mine, "brings examples together that lie in different orders")
        kinds = {value.kind for value in values}
        kind = next(kind for kind in Kind if kind in kinds)
        return Value(Kind.SHIFTED if kind is Kind.PLACE else kind, next(iter(blocks), ()))

    def _of_constants(self, mine: Any, other: Any) -> Value:
        if mine is None or other is None:
            return SAME
        if hasattr(mine, "dtype") and jax.dtypes.issubdtype(mine.dtype, jax.dtypes.prng_key):
            return Value(Kind.OWN)
        mine, other = np.asarray(mine), np.asarray(other)
        if mine.ndim != other.ndim:
            return SAME
        dim = following(mine, other)
        if not np.any(mine) and not np.any(other):
            return ZERO
        if dim is None:
            if np.array_equal(mine, other, equal_nan=mine.dtype.kind in "fc"):
                return SAME
            return COUNT if np.array_equal(2 * mine, other) else ODD
        first = other.take([0], dim)
        if np.array_equal(np.broadcast_to(first, other.shape), other):
            return Value(Kind.ALIKE) if np.array_equal(mine.take([0], dim), first) else ODD
        places = np.expand_dims(np.arange(other.shape[dim]), [axis for axis in range(other.ndim) if axis != dim])
        is_place = np.array_equal(np.broadcast_to(places, other.shape), other)
        return _place(mine.shape[dim]) if is_place else Value(Kind.SHIFTED)

    def _one_doubled_dim(self, mine: Any, other: Any) -> None:
        for a, b in zip(mine.outvars, other.outvars, strict=True):
            pairs = zip(a.aval.shape, b.aval.shape, strict=True) if a.aval.ndim == b.aval.ndim else ()
            changed = [(m, n) for m, n in pairs if m != n]
            if len(changed) > 1 or any(2 * m != n for m, n in changed):
                self._fault(mine, f"makes {list(a.aval.shape)} of {self._rows} examples")

    def _other_program(self) -> NoReturn:
        raise DeclarationError(
            f"{self._where}: is another program for {2 * self._rows} examples than for {self._rows}; let nothing "
            "but shapes follow the number of examples"
        )

    def _fault(self, equation: Any, what: str, name: str = "") -> NoReturn:
        raise DeclarationError(
            f"{self._where}: {name or equation.primitive.name}{self._line} {what}, and a device holds {self._rows} of "
            f"the batch's; {_WAY_OUT}"
        )


_APART = "takes the examples apart"
_CALLS = CALLS | {"custom_vmap_call": "call"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}


def _iota(mine: Any, dim: int) -> Value:
    return _place(mine.params["shape"][dim]) if mine.params["dimension"] == dim else Value(Kind.ALIKE)


def _place(count: int) -> Value:
    return Value(Kind.PLACE, stride=1, span=count)


def _of_counts(name: str, kinds: list[Kind]) -> Kind:
    """Of constants some of which follow the number of examples."""
    counts, rest = kinds.count(Kind.COUNT), [kind for kind in kinds if kind is not Kind.COUNT]
    if Kind.ODD in kinds:
        return Kind.ODD
    if name in _FORM:
        return Kind.COUNT
    if name in _ADDITIONS and set(rest) <= {Kind.ZERO}:
        return Kind.COUNT
    if name == "div" and counts == 2:
        return Kind.SAME
    if name in _PRODUCTS and counts == 1 and (name != "div" or kinds[0] is Kind.COUNT):
        return Kind.COUNT
    return Kind.ODD


def _line(equation: Any) -> str:
    """Where the user wrote the operation: the innermost frame that is neither JAX's, Flax's nor shardlab's own."""
    trace = equation.source_info.traceback
    for frame in trace.frames if trace is not None else ():
        path = frame.file_name.replace("\\", "/")
        if not any(f"/{package}/" in path for package in ("jax", "flax", "optax", "shardlab/module", "shardlab/step")):
            return f" at {path}:{frame.line_num}"
    return ""
