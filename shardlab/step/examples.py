"""Whether a model treats its examples one by one, found by tracing it with some of them and with twice as many.

A device holds some rows of a batch, and a microbatch is not the batch. A function that maps rows to rows is the same
on any share of them; a sum over rows adds up if nothing but sums is made of it. Everything else (the maximum over the
batch, statistics of it, one example compared with another) would be another number on every mesh.

A value of the traced program is of the kind

  ROWS     its shape follows the number of examples
  SUM      it is a sum over the examples at hand, linear in it
  COUNT    a constant that follows the number of examples: of tokens, say
  ZERO     zero, whatever it is added to
  SAME     none of these: parameters, constants
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from shardlab.mesh.faults import DeclarationError
from shardlab.step.batch_sum import is_batch_sum


class Kind(enum.Enum):
    """See the module's docstring."""

    ROWS = enum.auto()
    SUM = enum.auto()
    COUNT = enum.auto()
    ZERO = enum.auto()
    SAME = enum.auto()


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
    | {"reduce_sum", "sharding_constraint", "optimization_barrier", "psum", "psum_invariant"}
)
_ADDITIONS = frozenset({"add", "sub", "add_any", "concatenate", "stack", "pad", "select_n", "dynamic_update_slice"})
_PRODUCTS = frozenset({"mul", "div", "dot_general"})
# Of rows, a sum over them.
_SUMS = frozenset({"reduce_sum", "dot_general"})
# Along a dim: what one row becomes depends on the rows before it, or on its place among them.
_ALONG = {"sort": "dimension", "cumsum": "axis", "cumprod": "axis", "cummax": "axis", "cummin": "axis"}
_ALONG |= {"cumlogsumexp": "axis", "rev": "dimensions"}


def check_rows_to_rows(here: Any, there: Any, where: str, rows: int, *, auxiliary: bool = False) -> None:
    """Every array that `where` returns follows the examples one by one, or does not follow them at all.

    Args:
      here, there: the closed jaxprs with `rows` examples and with twice as many.
      where: what to call the function in an error.
      auxiliary: whether scalars that it returns are an auxiliary loss, (sum, weight).

    Raises:
      DeclarationError: naming the operation and the line of the model.
    """
    kinds = _Walk(where, rows).closed(here, there)
    if auxiliary:
        count = sum(not var.aval.shape for var in here.jaxpr.outvars)
        kinds, extra = kinds[: len(kinds) - count], kinds[len(kinds) - count :]
        _check_pair(extra, where)
    for kind in kinds:
        if kind in (Kind.SUM, Kind.COUNT):
            raise DeclarationError(
                f"{where}: returns a sum over the examples, and a device holds {rows} of the batch's; {_WAY_OUT}"
            )


def check_sums(here: Any, there: Any, where: str, rows: int) -> None:
    """The sum and the weight that `where` returns last add up over any cut of the batch.

    Raises:
      DeclarationError: naming the operation and the line, or which of the two does not follow the examples.
    """
    _check_pair(_Walk(where, rows).closed(here, there), where)


def _check_pair(kinds: list[Kind], where: str) -> None:
    for name, kind in zip(("sum", "weight"), kinds, strict=False):
        if kind not in ADDITIVE:
            raise DeclarationError(
                f"{where}: its {name} does not grow with the number of examples, so that it cannot be added up over "
                "microbatches and devices; return the sum over examples and how many (or how much weight) it is over"
            )


_WAY_OUT = (
    "sum it with shardlab.batch_sum, or let XLA see the whole batch: batch_axes='automatic' without a pipeline, with "
    "microbatches=1"
)


class _Walk:
    """A walk over two traces of one function, equation by equation."""

    def __init__(self, where: str, rows: int) -> None:
        self._where, self._rows = where, rows
        self._line = ""  # of the innermost call: what a library function does has no line of the user's own

    def closed(self, here: Any, there: Any, given: Sequence[Kind] = ()) -> list[Kind]:
        """The kinds of what a closed jaxpr returns; `given` are those of its inputs that no shape tells."""
        constants = [self._of_constants(a, b) for a, b in zip(here.consts, there.consts, strict=False)]
        return self._jaxpr(here.jaxpr, there.jaxpr, given, constants)

    def _jaxpr(self, here: Any, there: Any, given: Sequence[Kind] = (), constants: Sequence[Kind] = ()) -> list[Kind]:
        kinds: dict[Any, Kind] = dict(zip(here.constvars, constants, strict=False))
        kinds |= dict(zip(here.invars, given, strict=False))
        if len(here.eqns) != len(there.eqns):
            raise DeclarationError(
                f"{self._where}: is another program for {2 * self._rows} examples than for {self._rows}; let nothing "
                "but shapes follow the number of examples"
            )

        def kind_of(mine: Any, other: Any) -> Kind:
            if isinstance(mine, Literal) or isinstance(other, Literal):
                return self._of_constants(getattr(mine, "val", None), getattr(other, "val", None))
            if mine.aval.shape != other.aval.shape:
                return Kind.ROWS
            return kinds.get(mine, Kind.SAME)

        for mine, other in zip(here.eqns, there.eqns, strict=True):
            ins = [kind_of(a, b) for a, b in zip(mine.invars, other.invars, strict=True)]
            outer, self._line = self._line, _line(mine) or self._line
            kinds |= dict(zip(mine.outvars, self._equation(mine, other, ins), strict=True))
            self._line = outer
        return [kind_of(a, b) for a, b in zip(here.outvars, there.outvars, strict=True)]

    def _equation(self, mine: Any, other: Any, ins: list[Kind]) -> list[Kind]:
        name = mine.primitive.name
        self._one_doubled_dim(mine, other)
        if is_batch_sum(mine):
            return [Kind.SAME]
        if name == "scan":
            return self._scan(mine, other, ins)
        if name == "cond":
            if ins[0] in (Kind.SUM, Kind.COUNT):
                self._fault(mine, "chooses by a sum over the examples")
            branches = zip(mine.params["branches"], other.params["branches"], strict=True)
            return [_either(kinds) for kinds in zip(*(self.closed(a, b, ins[1:]) for a, b in branches), strict=True)]
        if name in _CALLS:
            inner, twice = (_inner(equation.params[_CALLS[name]]) for equation in (mine, other))
            if len(inner.invars) == len(ins):
                return self._jaxpr(inner, twice, ins)
        return self._operation(mine, other, name, ins)

    def _operation(self, mine: Any, other: Any, name: str, ins: list[Kind]) -> list[Kind]:
        if Kind.SUM in ins:
            return [self._of_sum(mine, name, ins)] * len(mine.outvars)
        follows = [a.aval.shape != b.aval.shape for a, b in zip(mine.outvars, other.outvars, strict=True)]
        if Kind.ROWS not in ins:
            # Of constants only: a count of rows stays one in another form, zero stays zero.
            kind = ins[0] if name in _FORM and ins and ins[0] in (Kind.COUNT, Kind.ZERO) else Kind.SAME
            return [kind] * len(mine.outvars)
        if follows and not any(follows):
            if name not in _SUMS:
                self._fault(mine, "takes one value of all examples")
            return [Kind.SUM] * len(mine.outvars)
        if name in _ALONG:
            dims = mine.params[_ALONG[name]]
            dims = dims if isinstance(dims, tuple) else (dims,)
            a, b = mine.invars[0].aval.shape, other.invars[0].aval.shape
            if any(a[dim] != b[dim] for dim in dims):
                self._fault(mine, "orders the examples")
        return [Kind.ROWS if follow else Kind.SAME for follow in follows]

    def _of_sum(self, mine: Any, name: str, ins: list[Kind]) -> Kind:
        rest = [kind for kind in ins if kind is not Kind.SUM]
        if name in _FORM:
            return Kind.SUM
        if name in _ADDITIONS:
            rest = rest[1:] if name == "select_n" and ins[0] is not Kind.SUM else rest
            if all(kind in ADDITIVE for kind in rest) or name == "dynamic_update_slice":
                return Kind.SUM
            self._fault(mine, "adds what does not grow with the examples to a sum over them")
        if name in _PRODUCTS and ins.count(Kind.SUM) == 1 and (name != "div" or ins[0] is Kind.SUM):
            if all(kind in (Kind.SAME, Kind.ZERO) for kind in rest):
                return Kind.SUM
            if rest == [Kind.COUNT]:
                self._fault(mine, "takes a mean over the examples at hand")
        self._fault(mine, "goes on from a sum over the examples at hand")
        raise AssertionError

    def _scan(self, mine: Any, other: Any, ins: list[Kind]) -> list[Kind]:
        params, body, twice = mine.params, mine.params["jaxpr"], other.params["jaxpr"]
        # Inputs are constants, carry, slices; outputs are carry, slices. A slice has lost its leading dim inside.
        sliced = sum(a.aval.ndim != b.ndim for a, b in zip(mine.invars, body.in_avals, strict=True))
        carried = sum(a.aval.ndim == b.ndim for a, b in zip(mine.outvars, body.out_avals, strict=True))
        consts = len(ins) - sliced - carried
        if params["length"] != other.params["length"] and carried:
            self._fault(mine, "carries something from example to example")
        kinds = list(ins)
        while True:
            out = self.closed(body, twice, kinds)
            joined = [_either((a, b)) for a, b in zip(kinds[consts : consts + carried], out, strict=False)]
            if joined == kinds[consts : consts + carried]:
                return [*joined, *out[carried:]]
            kinds[consts : consts + carried] = joined

    def _of_constants(self, mine: Any, other: Any) -> Kind:
        if mine is None or other is None or np.shape(mine) != np.shape(other):
            return Kind.SAME
        if jax.dtypes.issubdtype(getattr(mine, "dtype", np.asarray(mine).dtype), jax.dtypes.prng_key):
            return Kind.SAME
        mine, other = np.asarray(mine), np.asarray(other)
        if not np.any(mine) and not np.any(other):
            return Kind.ZERO
        return Kind.COUNT if mine.ndim == 0 and mine != other and 2 * mine == other else Kind.SAME

    def _one_doubled_dim(self, mine: Any, other: Any) -> None:
        for a, b in zip(mine.outvars, other.outvars, strict=True):
            pairs = zip(a.aval.shape, b.aval.shape, strict=True) if a.aval.ndim == b.aval.ndim else ()
            changed = [(m, n) for m, n in pairs if m != n]
            if len(changed) > 1 or any(2 * m != n for m, n in changed):
                self._fault(mine, f"makes {list(a.aval.shape)} of {self._rows} examples")

    def _fault(self, equation: Any, what: str) -> None:
        raise DeclarationError(
            f"{self._where}: {equation.primitive.name}{self._line} {what}, and a device holds {self._rows} of the "
            f"batch's; {_WAY_OUT}"
        )


_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_CALLS |= {"remat2": "jaxpr", "remat": "jaxpr", "checkpoint": "jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}


def _inner(jaxpr: Any) -> Any:
    """The program itself, of one that may be closed over constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _either(kinds: Sequence[Kind]) -> Kind:
    """The kind of a value that is one of several."""
    for kind in (Kind.ROWS, Kind.SUM, Kind.COUNT, Kind.SAME):
        if kind in kinds:
            return kind
    return Kind.ZERO


def _line(equation: Any) -> str:
    """Where the user wrote the operation: the innermost frame that is neither JAX's, Flax's nor shardlab's own."""
    trace = equation.source_info.traceback
    for frame in trace.frames if trace is not None else ():
        path = frame.file_name.replace("\\", "/")
        if not any(f"/{package}/" in path for package in ("jax", "flax", "optax", "shardlab/module", "shardlab/step")):
            return f" at {path}:{frame.line_num}"
    return ""
