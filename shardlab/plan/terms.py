"""Terms: what an optimizer's trace computes, comparable with its trace on the same numbers in another form.

Layers stacked into one array, or an array padded with zeros, hold the same numbers in another form. Every value of
the trace on the arrays as they are becomes a term, a number that stands for (operation, terms that it is applied to).
A value of the trace on the other form becomes a term too, or one for each of its pieces:

    stacked [3, n, m]      pieces [n, m], [n, m], [n, m]      terms 7, 12, 0     (0: zeros, the third only fills)
    padded  [n, m + 1]     pieces [n, m] and what is beyond   terms 7, 0

An operation on each number alone is applied piece by piece, a reduction of everything to one number is that of the
pieces' reductions, and what else looks at an array in pieces is a term of its own, equal to nothing. Where the terms
of what comes out are equal, so are the numbers, whatever step, learning rate and gradients are; where they are not,
nothing is known. No number is computed: counters, thresholds and schedules cannot hide anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

ZERO, TRUE, UNDEFINED = 0, 1, 2
"""The terms of zeros in any shape, of true, and of what divides by zero where an array is only filled up."""


@dataclass(frozen=True)
class Pieces:
    """An array as its pieces: a term and a shape for each."""

    terms: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    def like(self, terms: Sequence[int]) -> Pieces:
        """The same pieces of another array."""
        return dataclasses.replace(self, terms=tuple(terms))


Value = int | Pieces

# Of each number alone, and zero if all that goes in is zero.
_ZERO_TO_ZERO = (
    {"add", "add_any", "sub", "max", "min", "or", "neg", "abs", "sign", "sqrt", "cbrt", "square", "expm1", "log1p"}
    | {"sin", "tan", "asin", "atan", "sinh", "tanh", "asinh", "atanh", "erf", "erf_inv", "floor", "ceil", "round"}
    | {"real", "imag", "conj", "complex", "convert_element_type", "reduce_precision", "copy", "copy_p"}
    | {"stop_gradient"}
)
_ELEMENTWISE = (
    _ZERO_TO_ZERO
    | {"mul", "div", "rem", "and", "xor", "not", "rsqrt", "pow", "integer_pow", "exp", "exp2", "log", "logistic", "cos"}
    | {"acos", "atan2", "cosh", "acosh", "erfc", "nextafter", "is_finite", "select_n", "clamp"}
    | {"eq", "ne", "lt", "le", "gt", "ge"}
)
_ZERO_WITH_ZERO = {"eq": TRUE, "le": TRUE, "ge": TRUE, "ne": ZERO, "lt": ZERO, "gt": ZERO}
# Reductions to one number, and the operation whose order and grouping does not matter.
_REDUCTIONS = {"reduce_sum": "add", "reduce_max": "max", "reduce_min": "min", "reduce_and": "and", "reduce_or": "or"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint"}
_MOVES = {"convert_element_type", "copy", "copy_p", "stop_gradient"}


class Terms:
    """Terms, equal where what they stand for is equal, and walks over traces that give them to values."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {"zero": ZERO, "true": TRUE, "undefined": UNDEFINED}
        self._literals: dict[int, Any] = {}
        self._scalar_of: dict[int, int] = {}  # the one number that all of an array are
        self._members: dict[int, tuple[str, tuple[int, ...]]] = {}  # of sums and the like

    def symbol(self, name: Any) -> int:
        """The term of an input."""
        return self._number("symbol", name)

    def unknown(self) -> int:
        """A term equal to no other."""
        return self._number("unknown", len(self._numbers))

    def walk(self, closed: Any, given: Sequence[Value]) -> list[Value]:
        """The values of the outputs of a closed jaxpr, from those of its inputs."""
        jaxpr = closed.jaxpr
        known: dict[Any, Value] = dict(zip(jaxpr.invars, given, strict=True))
        known |= {var: self._constant(value) for var, value in zip(jaxpr.constvars, closed.consts, strict=True)}

        def read(var: Any) -> Value:
            return self._constant(var.val) if isinstance(var, jex.Literal) else known[var]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(var) for var in equation.invars])
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def in_pieces(self, value: Value, like: Pieces) -> Pieces | None:
        """`value` as pieces of the same shapes as those of `like`; None where it is not known to have them."""
        if isinstance(value, Pieces):
            return value if value.shapes == like.shapes else None
        if value in (ZERO, TRUE, UNDEFINED):
            return like.like([value] * len(like.terms))
        scalar = self._scalar_of.get(value)
        return None if scalar is None else like.like([self._filled(scalar, shape) for shape in like.shapes])

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _constant(self, value: Any) -> int:
        if hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if not (array != 0).any():
            return ZERO
        if array.dtype.kind == "b" and array.all():
            return TRUE
        term = self._number("constant", str(array.dtype), array.shape, array.tobytes())
        if not array.shape:
            self._literals[term] = value
        return term

    def _filled(self, scalar: int, shape: tuple[int, ...]) -> int:
        if not shape or scalar in (ZERO, TRUE, UNDEFINED):
            return scalar
        term = self._number("filled", shape, scalar)
        self._scalar_of[term] = scalar
        return term

    def _equation(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            return self.walk(inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ()), inputs)
        if name == "cond":
            return self._cond(inputs[0], [self.walk(branch, inputs[1:]) for branch in params["branches"]])
        shapes = [var.aval.shape for var in equation.invars]
        if name in _ELEMENTWISE:
            return [self._elementwise(name, params, inputs, shapes, equation.outvars[0].aval.shape)]
        if name in _REDUCTIONS and len(params["axes"]) == len(shapes[0]):
            return [self._reduced(name, inputs[0])]
        terms = [value for value in inputs if isinstance(value, int)]
        if len(terms) < len(inputs):
            return [self.unknown() for _ in equation.outvars]
        if name == "broadcast_in_dim" and len(terms) == 1 and not shapes[0]:
            return [self._filled(terms[0], tuple(params["shape"]))]
        if name == "concatenate" and (single := self._singles(terms, shapes)) is not None:
            return [self._several(single)]
        # Constants of an inner program do not print, so they count by identity.
        text = tuple((key, str(value), *map(id, getattr(value, "consts", ()))) for key, value in params.items())
        return [self._number(name, text, tuple(terms), index) for index in range(len(equation.outvars))]

    def _cond(self, index: Value, branches: list[list[Value]]) -> list[Value]:
        def one(values: Sequence[Value]) -> Value:
            pieces = next((value for value in values if isinstance(value, Pieces)), None)
            if pieces is None:
                return self._chosen(index, values)
            parts = [self.in_pieces(value, pieces) for value in values]
            if any(part is None for part in parts):
                return self.unknown()
            each = zip(*(part.terms for part in parts if part is not None), strict=True)
            return pieces.like([self._chosen(index, terms) for terms in each])

        return [one(values) for values in zip(*branches, strict=True)]

    def _chosen(self, index: Value, cases: Sequence[Value]) -> int:
        if not isinstance(index, int):
            return self.unknown()
        first = cases[0]
        assert isinstance(first, int)
        if len(set(cases)) == 1:
            return first
        return UNDEFINED if UNDEFINED in cases else self._number("chosen", index, tuple(cases))

    def _elementwise(
        self, name: str, params: dict[str, Any], inputs: list[Value], shapes: list[tuple[int, ...]], shape: Any
    ) -> Value:
        text = tuple((key, str(value)) for key, value in params.items() if key not in ("sharding", "weak_type"))
        pieces = next((value for value in inputs if isinstance(value, Pieces)), None)
        if pieces is None:
            terms = [value for value in inputs if isinstance(value, int)]
            kind, members = self._members.get(terms[0], ("", ()))
            if len(terms) == 1 and kind == "several":
                return self._several([self._applied(name, text, [term], [()], ()) for term in members])
            return self._applied(name, text, terms, shapes, shape)
        columns: list[list[tuple[int, tuple[int, ...]]]] = []
        for value, own in zip(inputs, shapes, strict=True):
            if isinstance(value, int) and own == ():
                columns.append([(value, ())] * len(pieces.terms))
                continue
            parts = self.in_pieces(value, pieces)
            if parts is None:
                return self.unknown()
            columns.append(list(zip(parts.terms, parts.shapes, strict=True)))
        rows = zip(zip(*columns, strict=True), pieces.shapes, strict=True)
        return pieces.like(
            [
                self._applied(name, text, [term for term, _ in row], [own for _, own in row], piece)
                for row, piece in rows
            ]
        )

    def _applied(
        self, name: str, text: Any, terms: Sequence[int], shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]
    ) -> int:
        """The term of an operation on each number alone, of operands in `shape` or single."""
        # A single number is written out in the shape of the others or not, as JAX finds it convenient.
        single = [self._scalar_of.get(term, term) for term in terms]
        if shape and all(
            own == () or term in self._scalar_of or term in (ZERO, TRUE, UNDEFINED)
            for term, own in zip(terms, shapes, strict=True)
        ):
            return self._filled(self._applied(name, text, single, [()] * len(terms), ()), shape)
        if name == "select_n":
            cases = terms[1:] if terms[0] not in (ZERO, TRUE) else [terms[1 + (terms[0] == TRUE)]]
            if len(set(cases)) == 1:
                return cases[0] if shapes[1] else self._filled(cases[0], shape)
        if UNDEFINED in single:
            return UNDEFINED
        if (found := self._of_zero(name, text, single)) is not None:
            return found
        if not shape and name in _REDUCTIONS.values():
            return self._gathered(name, single)
        term = self._number(name, text, tuple(single))
        if name in _MOVES and single[0] in self._literals:
            self._literals[term] = self._literals[single[0]]
        return term

    def _of_zero(self, name: str, text: Any, terms: Sequence[int]) -> int | None:
        """What comes out where something that goes in is zero or true; None if that depends on the rest."""
        zero = [term == ZERO for term in terms]
        literals = [0 if term == ZERO else self._literals.get(term) for term in terms]
        if name == "is_finite" and terms[0] in (ZERO, TRUE):
            return TRUE
        if name == "not" and terms[0] == TRUE:
            return ZERO
        if not any(zero):
            return None
        if name in _ZERO_WITH_ZERO and all(zero):
            return _ZERO_WITH_ZERO[name]
        if name in ("mul", "and") or (name in _ZERO_TO_ZERO and all(zero)):
            return ZERO
        if name in ("div", "rem"):
            return UNDEFINED if zero[1] else ZERO
        if name in ("rsqrt", "log"):
            return UNDEFINED
        if name == "integer_pow":
            return ZERO if int(dict(text)["y"]) > 0 else UNDEFINED
        if name == "pow" and zero[0]:
            return ZERO if literals[1] is not None and literals[1] > 0 else UNDEFINED
        if name in ("max", "min"):
            other = literals[zero.index(False)]
            return ZERO if other is not None and (other <= 0 if name == "max" else other >= 0) else None
        if name == "clamp" and zero[1] and literals[0] is not None and literals[2] is not None:
            return ZERO if literals[0] <= 0 <= literals[2] else None
        return None

    def _reduced(self, name: str, value: Value) -> int:
        """A reduction of every number to one."""
        if isinstance(value, Pieces):
            parts = zip(value.terms, value.shapes, strict=True)
            return self._gathered(
                _REDUCTIONS[name], [self._reduced(name, term) if shape else term for term, shape in parts]
            )
        kind, members = self._members.get(value, ("", ()))
        if kind == "several":
            return self._gathered(_REDUCTIONS[name], members)
        return value if value in (ZERO, TRUE, UNDEFINED) else self._number(name, value)

    def _gathered(self, name: str, terms: Sequence[int]) -> int:
        """A sum or the like of single numbers, whatever the order."""
        flat: list[int] = []
        for term in terms:
            kind, members = self._members.get(term, ("", ()))
            flat += members if kind == name else [term]
        if UNDEFINED in flat:
            return UNDEFINED
        neutral = {"add": ZERO, "or": ZERO, "and": TRUE}.get(name)
        flat = sorted(term for term in (flat if name == "add" else set(flat)) if term != neutral)
        if not flat:
            return TRUE if name == "and" else ZERO
        if len(flat) == 1:
            return flat[0]
        return self._with_members(name, flat)

    def _singles(self, terms: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[int] | None:
        """The single numbers that make up arrays of one dim; None where one is something else."""
        found: list[int] = []
        for term, shape in zip(terms, shapes, strict=True):
            kind, members = self._members.get(term, ("", ()))
            if kind == "several":
                found += members
            elif shape == (1,) and (term in (ZERO, TRUE, UNDEFINED) or term in self._scalar_of):
                found.append(self._scalar_of.get(term, term))
            else:
                return None
        return found

    def _several(self, terms: Sequence[int]) -> int:
        """Single numbers side by side."""
        return self._with_members("several", terms)

    def _with_members(self, name: str, terms: Sequence[int]) -> int:
        term = self._number(name, tuple(terms))
        self._members[term] = (name, tuple(terms))
        return term
