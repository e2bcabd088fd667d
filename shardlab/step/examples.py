"""Whether a model treats its examples one by one, found by tracing it with some of them and with twice as many.

A device holds some rows of a batch, and a microbatch is not the batch. A function that maps rows to rows is the same
on any share of them; a sum over rows adds up if nothing but sums is made of it. Everything else (the maximum over the
batch, statistics of it, one example compared with another, the place of an example among those at hand) would be
another number on every mesh.

It is walked equation by equation: `shardlab.step.kinds` says of what kinds its values are, `shardlab.step.operations`
and `shardlab.step.folds` what an operation makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from jax.extend.core import Literal

from shardlab.mesh.faults import DeclarationError
from shardlab.module.inner import CALLS, program_of, scan_counts
from shardlab.step.backward import backward_of, has_rule
from shardlab.step.batch_sum import is_batch_sum
from shardlab.step.blocks import following
from shardlab.step.folds import RANDOM, Folds, drawn
from shardlab.step.kinds import ADDITIVE, ROWS, SAME, SUM, Kind, Value, of_constants
from shardlab.step.operations import operation
from shardlab.step.random import Drawn


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
        self.where, self.rows = where, rows
        self.line = ""  # of the innermost call: what a library function does has no line of the user's own
        self._in_backward = False
        self._folds: Folds = {}

    def folds(self) -> frozenset[Drawn]:
        """How the examples are folded into keys: by their places, or by what is theirs."""
        return frozenset((name, shape) for shape, name in self._folds.items() if name != "fold_in")

    def closed(self, here: Any, there: Any, given: Sequence[Value | None] = ()) -> list[Value]:
        """What a closed jaxpr returns; `given` says of its inputs what no shape tells."""
        constants = [of_constants(a, b) for a, b in zip(here.consts, there.consts, strict=False)]
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
                return of_constants(getattr(mine, "val", None), getattr(other, "val", None))
            return known.get(mine, ROWS if mine.aval.shape != other.aval.shape else SAME)

        for mine, other in zip(here.eqns, there.eqns, strict=True):
            ins = [value_of(a, b) for a, b in zip(mine.invars, other.invars, strict=True)]
            outer, self.line = self.line, _line(mine) or self.line
            made = self._equation(mine, other, ins)
            if has_rule(mine) and not self._in_backward:
                self._backward((mine, here), (other, there), ins, made)
            known |= dict(zip(mine.outvars, made, strict=True))
            self.line = outer
        return [value_of(a, b) for a, b in zip(here.outvars, there.outvars, strict=True)]

    def _equation(self, mine: Any, other: Any, ins: list[Value]) -> list[Value]:
        name = mine.primitive.name
        if name not in _CALLS:  # the operation inside says more
            self._one_doubled_dim(mine, other)
        if is_batch_sum(mine):
            if ins[0].kind not in ADDITIVE and not self._in_backward:
                self.fault(mine, "is given what is not a sum over the examples", name="shardlab.batch_sum")
            return [SAME]
        if name == "scan":
            return self._scan(mine, other, ins)
        if name == "while":
            return self._while(mine, other, ins)
        if name == "cond":
            if ins[0].kind in (Kind.SUM, Kind.COUNT, Kind.ODD):
                self.fault(mine, "chooses by a sum over the examples")
            branches = zip(mine.params["branches"], other.params["branches"], strict=True)
            found = zip(*(self.closed(a, b, ins[1:]) for a, b in branches), strict=True)
            return [self._either(mine, values) for values in found]
        if name in _CALLS:
            inner, twice = (program_of(equation.params[_CALLS[name]]) for equation in (mine, other))
            if len(inner.invars) == len(ins):
                consts = [getattr(equation.params[_CALLS[name]], "consts", ()) for equation in (mine, other)]
                return self._jaxpr(inner, twice, ins, [of_constants(a, b) for a, b in zip(*consts, strict=False)])
        if name in RANDOM:
            outs = [following(a.aval, b.aval) for a, b in zip(mine.outvars, other.outvars, strict=True)]
            follows = any(dim is not None for dim in outs)
            return [self._random(mine, name, ins, follows)] * len(outs)
        return operation(self, mine, other, name, ins)

    def _random(self, mine: Any, name: str, ins: list[Value], follows: bool) -> Value:
        return drawn(self, mine, name, ins, follows, self._folds)

    # Programs inside the program.

    def _scan(self, mine: Any, other: Any, ins: list[Value]) -> list[Value]:
        params, body, twice = mine.params, mine.params["jaxpr"], other.params["jaxpr"]
        consts, carried = scan_counts(mine)
        if params["length"] != other.params["length"]:
            if carried:
                self.fault(mine, "carries something from example to example")
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
            self.fault(mine, "brings examples together that lie in different orders")
        places = (Kind.PLACE, Kind.SHIFTED)
        slices = [Value(Kind.SHIFTED) if value.kind in places else Value(Kind.ONE) for value in ins[consts:]]
        for value in self.closed(body, twice, [*ins[:consts], *slices]):
            if value.kind not in (Kind.ONE, Kind.SAME, Kind.ZERO):
                self.fault(mine, "takes one value of all examples for each of them")
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
            self.fault(mine, "repeats as all examples together say")
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
                self.fault(mine[0], "gives each example a derivative of all of them")
            if value.kind in (Kind.PLACE, Kind.SHIFTED):
                self.fault(mine[0], "uses the places of the examples at hand")

    def _either(self, mine: Any, values: Sequence[Value]) -> Value:
        """What is known of a value that is one of several."""
        if len(set(values)) == 1:
            return values[0]
        blocks = {value.blocks for value in values if value.kind is Kind.ROWS}
        if len(blocks) > 1:
            self.fault(mine, "brings examples together that lie in different orders")
        kinds = {value.kind for value in values}
        kind = next(kind for kind in Kind if kind in kinds)
        return Value(Kind.SHIFTED if kind is Kind.PLACE else kind, next(iter(blocks), ()))

    def _one_doubled_dim(self, mine: Any, other: Any) -> None:
        for a, b in zip(mine.outvars, other.outvars, strict=True):
            pairs = zip(a.aval.shape, b.aval.shape, strict=True) if a.aval.ndim == b.aval.ndim else ()
            changed = [(m, n) for m, n in pairs if m != n]
            if len(changed) > 1 or any(2 * m != n for m, n in changed):
                self.fault(mine, f"makes {list(a.aval.shape)} of {self.rows} examples")

    def _other_program(self) -> NoReturn:
        raise DeclarationError(
            f"{self.where}: is another program for {2 * self.rows} examples than for {self.rows}; let nothing "
            "but shapes follow the number of examples"
        )

    def fault(self, equation: Any, what: str, name: str = "") -> NoReturn:
        """Raises what is wrong with an equation."""
        raise DeclarationError(
            f"{self.where}: {name or equation.primitive.name}{self.line} {what}, and a device holds {self.rows} of "
            f"the batch's; {_WAY_OUT}"
        )


_CALLS = CALLS | {"custom_vmap_call": "call"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}


def _line(equation: Any) -> str:
    """Where the user wrote the operation: the innermost frame that is neither JAX's, Flax's nor shardlab's own."""
    trace = equation.source_info.traceback
    for frame in trace.frames if trace is not None else ():
        path = frame.file_name.replace("\\", "/")
        if not any(f"/{package}/" in path for package in ("jax", "flax", "optax", "shardlab/module", "shardlab/step")):
            return f" at {path}:{frame.line_num}"
    return ""
