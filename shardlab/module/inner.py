"""Programs inside a traced program: where an operation holds them, the same under every JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
CALLS |= {"remat2": "jaxpr", "remat": "jaxpr", "checkpoint": "jaxpr"}
"""Operations that run a program once as it is, and the parameter that holds it."""


def program_of(jaxpr: Any) -> Any:
    """The program itself, of one that may be closed over constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def programs_in(equation: Any) -> Iterator[Any]:
    """The programs that an operation holds, whatever for.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, lambda x: -x, lambda x: x, x))(1.0)
    >>> [sum(1 for _ in programs_in(equation)) for equation in jaxpr.eqns]
    [0, 0, 2]
    """
    for value in equation.params.values():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if hasattr(program := program_of(one), "eqns"):
                yield program


def scan_counts(equation: Any) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many of its inputs (and results) are carried.

    Inputs are constants, carry, slices; results are carry, slices. A slice has lost its leading dim in the body.

    >>> import jax
    >>> scan = lambda w, x, xs: jax.lax.scan(lambda h, x: (h * w, h + x), x, xs)
    >>> jaxpr = jax.make_jaxpr(scan)(2.0, 1.0, jax.numpy.ones(3))
    >>> scan_counts(jaxpr.eqns[0])
    (1, 1)
    """
    body = equation.params["jaxpr"]
    sliced = sum(a.aval.ndim != b.ndim for a, b in zip(equation.invars, body.in_avals, strict=True))
    carried = sum(a.aval.ndim == b.ndim for a, b in zip(equation.outvars, body.out_avals, strict=True))
    return len(equation.invars) - sliced - carried, carried
