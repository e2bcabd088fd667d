"""How a scan's operands are dealt, the same under every JAX: its parameters name them differently from 0.12 on."""

from __future__ import annotations

from typing import Any


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
