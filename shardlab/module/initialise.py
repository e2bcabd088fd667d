"""Parameters created leaf by leaf, already sharded, with the numbers the user's own initialisation gives.

The user's initialisation is traced once. Each leaf's own slice of that program is small: a few key derivations and
one draw. Layers differ only in the integers folded into their keys, so those become arguments, and one compiled
program makes a stack of any number of layers: compile time does not grow with depth, and a device computes the
slice it keeps (threefry draws are elementwise in the index).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Recipe:
    """How one leaf is made: a program of the key and of integers, and those integers for this leaf.

    Two leaves with equal `signature` run the same program.
    """

    signature: str
    integers: tuple[int, ...]
    make: Callable[[jax.Array, Sequence[Any]], jax.Array]


def recipes(initialise: Callable[[jax.Array], dict[str, Any]]) -> dict[str, Recipe]:
    """The recipe of every leaf of ``initialise(key)``, by path."""
    paths: list[str] = []

    def flat(key: jax.Array) -> list[Any]:
        values = initialise(key)
        paths.extend(values)
        return list(values.values())

    key = jax.eval_shape(lambda: jax.random.key(0))
    closed = jax.make_jaxpr(flat)(key)
    if any(_is_remat(equation) for equation in closed.jaxpr.eqns):
        traced = closed
        # Flax runs a layer to make its parameters. Under remat that is one equation, so that the parameters of a layer
        # would depend on all layers before it.
        closed = jax.make_jaxpr(lambda key: _without_remat(traced.jaxpr, traced.consts, [key]))(key)
    jaxpr = closed.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    producer: dict[Any, Any] = {}
    with jax.ensure_compile_time_eval():
        for equation in jaxpr.eqns:
            inputs = [_value(var, known) for var in equation.invars]
            small = all(math.prod(getattr(out.aval, "shape", (2,))) <= 1 for out in equation.outvars)
            if small and not equation.effects and all(value is not None for value in inputs):
                known.update(zip(equation.outvars, apply_equation(equation, inputs), strict=True))
            else:
                producer.update(dict.fromkeys(equation.outvars, equation))
    key_var = jaxpr.invars[0]
    return {path: _slice(out, key_var, known, producer) for path, out in zip(paths, jaxpr.outvars, strict=True)}


def apply_equation(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs of one equation."""
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return outputs if equation.primitive.multiple_results else [outputs]


def _is_remat(equation: Any) -> bool:
    return equation.primitive.name in ("remat", "remat2", "checkpoint")


def _without_remat(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a program, with that of every `jax.checkpoint` in place of the call."""
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for equation in jaxpr.eqns:
        inputs = [_value(var, env) for var in equation.invars]
        if _is_remat(equation):
            inner = equation.params["jaxpr"]
            outputs: Sequence[Any] = _without_remat(
                getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs
            )
        else:
            outputs = apply_equation(equation, inputs)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [_value(var, env) for var in jaxpr.outvars]


def _value(var: Any, known: dict[Any, Any]) -> Any:
    return var.val if isinstance(var, jex.Literal) else known.get(var)


def _slice(out: Any, key_var: Any, known: dict[Any, Any], producer: dict[Any, Any]) -> Recipe:
    """The part of the program that `out` depends on."""
    needed: dict[int, Any] = {}
    pending = [out]
    while pending:
        var = pending.pop()
        equation = None if isinstance(var, jex.Literal) or var in known else producer.get(var)
        if equation is not None and id(equation) not in needed:
            needed[id(equation)] = equation
            pending.extend(equation.invars)
    program = {id(equation): equation for equation in producer.values()}  # in the order of the trace
    equations = [equation for identity, equation in program.items() if identity in needed]

    names: dict[Any, str] = {key_var: "key"}
    integers: list[int] = []
    slots: dict[tuple[int, int], int] = {}
    lines: list[str] = []

    def name(var: Any, place: tuple[int, int]) -> str:
        value = _value(var, known)
        if value is None:
            return names[var]
        array = np.asarray(value) if not jnp.issubdtype(var.aval.dtype, jax.dtypes.extended) else None
        if array is not None and array.ndim == 0 and array.dtype.kind in "iu" and -(2**31) <= array < 2**32:
            slots[place] = len(integers)
            integers.append(int(array))
            return f"int:{array.dtype}"
        if array is not None and array.size <= 1:
            return f"{array.dtype}:{array.tolist()!r}"
        return f"const:{id(value)}"

    for row, equation in enumerate(equations):
        inputs = [name(var, (row, column)) for column, var in enumerate(equation.invars)]
        for var in equation.outvars:
            names[var] = f"v{len(names)}"
        types = [str(var.aval) for var in equation.outvars]
        lines.append(f"{types} = {equation.primitive} {_parameters(equation.params)} {inputs}")
    lines.append(f"return {name(out, (-1, 0))} {out.aval}")

    def make(key: jax.Array, given: Sequence[Any]) -> jax.Array:
        env: dict[Any, Any] = {key_var: key}

        def read(var: Any, place: tuple[int, int]) -> Any:
            if place in slots:
                return jnp.asarray(given[slots[place]], var.aval.dtype)
            value = _value(var, known)
            return env[var] if value is None else value

        for row, equation in enumerate(equations):
            inputs = [read(var, (row, column)) for column, var in enumerate(equation.invars)]
            env.update(zip(equation.outvars, apply_equation(equation, inputs), strict=True))
        return read(out, (-1, 0))

    return Recipe("\n".join(lines), tuple(integers), make)


def _parameters(params: dict[str, Any]) -> str:
    """Parameters as text that is equal only for equal programs: inner arrays do not print, so they count by id."""
    return " ".join(f"{key}={value}{_arrays(value) or ''}" for key, value in params.items())


def _arrays(value: Any) -> list[int]:
    """Ids of the constant arrays in a parameter, programs inside programs included."""
    if isinstance(value, (list, tuple)):
        return [found for one in value for found in _arrays(one)]
    jaxpr = getattr(value, "jaxpr", value)
    if not hasattr(jaxpr, "eqns"):
        return [id(value)] if isinstance(value, (jax.Array, np.ndarray)) else []
    variables = [var for equation in jaxpr.eqns for var in equation.invars] + list(jaxpr.outvars)
    literals = [var.val for var in variables if isinstance(var, jex.Literal) and np.shape(var.val)]
    inner = [found for equation in jaxpr.eqns for one in equation.params.values() for found in _arrays(one)]
    return [id(array) for array in (*getattr(value, "consts", ()), *literals)] + inner
