"""A traced program as a flat list of operations: calls opened, what no result needs left out, nothing twice.

Of a jaxpr only what costs are made of is kept: names, shapes, parameters of the operations. Loops and branches keep
programs of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Literal

from shardlab.module.inner import CALLS, program_of, scan_counts

_OPENED = {**CALLS, "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_OPENED |= {"custom_vjp_call_jaxpr": "fun_jaxpr", "custom_lin": "call_jaxpr"}


@dataclass(frozen=True)
class Value:
    """Shape and dtype of a value of a program.

    >>> Value((2, 3), "bfloat16", 2).bytes
    12
    """

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Op:
    """One operation: values by number, -1 for a number written in the program.

    Attributes:
      name: of its primitive.
      ins, outs: what it reads and makes.
      params: as JAX has them.
      bodies: of a loop or branch, the programs that it runs.
    """

    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    params: Mapping[str, Any]
    bodies: tuple[Program, ...] = ()


@dataclass(frozen=True)
class Program:
    """Operations in order.

    Attributes:
      values: by number; the first `num_ins` are what goes in, constants come after them.
      num_ins: how many values go in.
      ops: the operations.
      outs: what comes out; -1 for a number written in the program.
    """

    values: tuple[Value, ...]
    num_ins: int
    ops: tuple[Op, ...]
    outs: tuple[int, ...]

    def only(self, outs: Sequence[int]) -> Program:
        """The program that makes some of the results, by place, and does nothing else."""
        return _needed(Program(self.values, self.num_ins, self.ops, tuple(self.outs[place] for place in outs)))


def flat(jaxpr: Any) -> Program:
    """A jaxpr as a program.

    >>> made = flat(jax.make_jaxpr(lambda x: (jax.jit(jax.numpy.tanh)(x), 2 * x)[0])(jax.numpy.ones(3)))
    >>> [op.name for op in made.ops], made.num_ins, made.outs
    (['tanh'], 1, (1,))
    """
    return _needed(_Reader().read(program_of(jaxpr)))


class _Reader:
    def __init__(self) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.known: dict[Any, tuple[int, ...]] = {}

    def read(self, jaxpr: Any) -> Program:
        names: dict[Any, int] = {}
        for var in (*jaxpr.invars, *jaxpr.constvars):
            names[var] = self._new(var.aval)
        self._equations(jaxpr, names)
        return Program(
            tuple(self.values), len(jaxpr.invars), tuple(self.ops), tuple(self._of(var, names) for var in jaxpr.outvars)
        )

    def _new(self, aval: Any) -> int:
        self.values.append(_value(aval))
        return len(self.values) - 1

    def _of(self, var: Any, names: dict[Any, int]) -> int:
        return -1 if isinstance(var, Literal) else names[var]

    def _equations(self, jaxpr: Any, names: dict[Any, int]) -> None:
        for equation in jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            ins = tuple(self._of(var, names) for var in equation.invars)
            held = params.get(_OPENED.get(name, ""))
            if held is not None:
                inner = program_of(held)
                inside = dict(zip(inner.invars, ins, strict=True))
                inside |= {var: self._new(var.aval) for var in inner.constvars}
                self._equations(inner, inside)
                for var, made in zip(equation.outvars, inner.outvars, strict=True):
                    names[var] = self._of(made, inside)
                continue
            same = self._key(equation, ins)
            if same is not None and same in self.known:
                names.update(zip(equation.outvars, self.known[same], strict=True))
                continue
            outs = tuple(self._new(var.aval) for var in equation.outvars)
            if same is not None:
                self.known[same] = outs
            names.update(zip(equation.outvars, outs, strict=True))
            bodies = tuple(
                flat(one)
                for value in params.values()
                for one in (value if isinstance(value, tuple | list) else (value,))
                if hasattr(program_of(one), "eqns")
            )
            if name == "scan":
                params = {**params, "counts": scan_counts(equation)}
            self.ops.append(Op(name, ins, outs, params, bodies))

    def _key(self, equation: Any, ins: tuple[int, ...]) -> Any:
        """Equal for operations that compute the same; None of those that cannot be compared."""
        name = equation.primitive.name
        if equation.effects or "random" in name:
            return None
        given = tuple(
            (str(var.val), str(var.aval)) if isinstance(var, Literal) else number
            for var, number in zip(equation.invars, ins, strict=True)
        )
        key = name, given, tuple(equation.params.items())
        try:
            hash(key)
        except TypeError:
            return None
        return key


def _value(aval: Any) -> Value:
    dtype = aval.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return Value(tuple(aval.shape), str(dtype), 8)
    return Value(tuple(int(size) for size in aval.shape), dtype.name, dtype.itemsize)


def _needed(program: Program) -> Program:
    """Without the operations that no result is made of."""
    wanted = {out for out in program.outs if out >= 0}
    kept = []
    for op in reversed(program.ops):
        if wanted.intersection(op.outs):
            kept.append(op)
            wanted.update(value for value in op.ins if value >= 0)
    return Program(program.values, program.num_ins, tuple(reversed(kept)), program.outs)
