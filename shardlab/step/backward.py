"""The backward of one operation that has a rule of its own: of `jax.custom_vjp` and `jax.custom_jvp`.

A traced program shows what such a function computes; its rule is Python that runs when the function is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

_CUSTOM = frozenset({"custom_vjp_call", "custom_vjp_call_jaxpr", "custom_jvp_call"})


@dataclass(frozen=True)
class Backward:
    """A rule, traced.

    Attributes:
      program: closed jaxpr ``(*operands, *cotangents of made) -> cotangents of given``.
      operands: indices of the operation's inputs: the variables among them, each once.
      given: indices into `operands` of those that have a cotangent.
      made: indices of the results that have one.
    """

    program: Any
    operands: tuple[int, ...]
    given: tuple[int, ...]
    made: tuple[int, ...]


def has_rule(equation: Any) -> bool:
    """Whether an operation of a jaxpr has a rule of its own."""
    return equation.primitive.name in _CUSTOM


def operands_of(equation: Any) -> tuple[int, ...]:
    """Indices of its inputs that are variables, each variable once."""
    first: dict[Any, int] = {}
    for index, var in enumerate(equation.invars):
        if not isinstance(var, Literal):
            first.setdefault(var, index)
    return tuple(first.values())


def as_function(equation: Any, jaxpr: Any) -> Callable[..., list[Any]]:
    """An operation of `jaxpr` as a function of its operands; differentiated, it follows its own rule."""
    operands = [equation.invars[index] for index in operands_of(equation)]
    results = [var for var in equation.outvars if not _dropped(var)]
    nameless = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    alone = jaxpr.replace(constvars=[], invars=operands, outvars=results, eqns=[equation], debug_info=nameless)

    def function(*values: Any) -> list[Any]:
        found = iter(jax.core.eval_jaxpr(alone, (), *values))
        return [jnp.zeros(var.aval.shape, var.aval.dtype) if _dropped(var) else next(found) for var in equation.outvars]

    return function


def backward_of(equation: Any, jaxpr: Any) -> Backward | None:
    """The backward of an operation of `jaxpr`; None where there is nothing to differentiate."""
    operands = operands_of(equation)
    shapes = [_shape(equation.invars[index].aval) for index in operands]
    given = tuple(index for index, shape in enumerate(shapes) if jnp.issubdtype(shape.dtype, jnp.inexact))
    results = [_shape(var.aval) for var in equation.outvars]
    made = tuple(index for index, shape in enumerate(results) if jnp.issubdtype(shape.dtype, jnp.inexact))
    if not given or not made:
        return None
    function = as_function(equation, jaxpr)

    def backward(values: list[Any], cotangents: list[Any]) -> Any:
        def of_given(*some: Any) -> list[Any]:
            every = dict(enumerate(values)) | dict(zip(given, some, strict=True))
            found = function(*(every[index] for index in range(len(values))))
            return [found[index] for index in made]

        return jax.vjp(of_given, *(values[index] for index in given))[1](cotangents)

    return Backward(jax.make_jaxpr(backward)(shapes, [results[index] for index in made]), operands, given, made)


def _dropped(var: Any) -> bool:
    return type(var).__name__ == "DropVar"


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
