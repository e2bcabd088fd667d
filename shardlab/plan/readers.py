"""Which parts of a model read an array: found by tracing them, so that nobody need say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Literal


def read_by(
    functions: Mapping[str, Callable[..., Any]], values: Mapping[str, Any], *others: Any
) -> dict[str, tuple[str, ...]]:
    """By path, the names of those functions of ``(values, *others)`` whose result depends on the array.

    >>> import jax.numpy as jnp
    >>> functions = {"before": lambda v, x: v["a"] * x, "after": lambda v, x: v["a"] + v["b"]}
    >>> read_by(functions, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}, jnp.ones(2))
    {'a': ('before', 'after'), 'b': ('after',), 'c': ()}
    """
    found = {name: read(function, values, *others) for name, function in functions.items()}
    return {path: tuple(name for name, paths in found.items() if path in paths) for path in values}


def read(function: Callable[..., Any], values: Mapping[str, Any], *others: Any) -> set[str]:
    """The paths of the arrays that a result of ``function(values, *others)`` depends on."""
    jaxpr = jax.make_jaxpr(function)(dict(values), *others).jaxpr
    used: set[Any] = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        if used & set(equation.outvars):
            used |= {var for var in equation.invars if not isinstance(var, Literal)}
    # The arguments of a traced function are flattened, a dict's by its sorted keys.
    return {path for path, var in zip(sorted(values), jaxpr.invars, strict=False) if var in used}
