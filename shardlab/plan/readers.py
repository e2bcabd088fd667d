"""Which parts of a model outside its blocks read a parameter: found by tracing them, so that nobody need say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from shardlab.module.model import Parts


def readers(parts: Parts, values: dict[str, Any], x: Any, batch: Any, key: Any) -> dict[str, tuple[str, ...]]:
    """By path, those of ``before``, ``context`` and ``after`` whose result depends on the array.

    Args:
      values: shapes of the model's arrays by path.
      x: shapes of what flows between blocks.
      batch, key: shapes of some examples and of a key.
    """
    context, before, after = parts.context, parts.before, parts.after
    read = {
        "before": _read(lambda v, x, b, k: before(v, b, k, True), values, x, batch, key),
        "context": frozenset()
        if context is None
        else _read(lambda v, x, b, k: context(v, b, k, True), values, x, batch, key),
        "after": _read(lambda v, x, b, k: after(v, x, b, k, True), values, x, batch, key),
    }
    return {path: tuple(name for name, paths in read.items() if path in paths) for path in values}


def _read(function: Callable[..., Any], values: dict[str, Any], *others: Any) -> frozenset[str]:
    """The paths of the values that a result of ``function(values, *others)`` depends on."""
    jaxpr = jax.make_jaxpr(function)(values, *others).jaxpr
    used: set[Any] = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        if used & set(equation.outvars):
            used |= {var for var in equation.invars if not isinstance(var, Literal)}
    # A tree of arrays by path has them in the order of their sorted paths.
    return frozenset(path for path, var in zip(sorted(values), jaxpr.invars, strict=False) if var in used)
