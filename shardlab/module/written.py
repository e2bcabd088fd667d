"""Which arrays a function gives back changed, of those that it takes and gives back.

A model hands back every array that it holds, also those that it only reads. Under `jax.checkpoint` or `lax.scan` one
that was only read comes back as a new value: the traced program says that it is the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from shardlab.module.inner import program_of, scan_counts


def written_by(function: Callable[..., Mapping[str, Any]], held: Mapping[str, Any], *others: Any) -> tuple[str, ...]:
    """Names in `held` for which ``function(held, *others)`` returns another array.

    >>> def step(held, x):
    ...     both = jax.checkpoint(lambda held: {"seen": held["seen"] + x, "table": held["table"]})
    ...     return both(held)
    >>> written_by(step, {"seen": jax.numpy.zeros(2), "table": jax.numpy.ones(2)}, 1.0)
    ('seen',)
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(dict(held), *others)
    names = sorted(held)  # the order in which JAX flattens a dict
    found = []
    for name, var in zip(sorted(out), closed.jaxpr.outvars, strict=True):
        place = _input_of(closed.jaxpr, var)
        if name in held and (place is None or names[place : place + 1] != [name]):
            found.append(name)
    return tuple(found)


def _input_of(jaxpr: Any, var: Any) -> int | None:
    """The number of the input that `var` is, unchanged; None where it is not an input."""
    producer = {id(out): (equation, place) for equation in jaxpr.eqns for place, out in enumerate(equation.outvars)}
    while id(var) in producer:
        equation, place = producer[id(var)]
        through = _through(equation, place)
        if through is None:
            return None
        var = equation.invars[through]
    return next((place for place, given in enumerate(jaxpr.invars) if given is var), None)


def _through(equation: Any, place: int) -> int | None:
    """The number of the input of `equation` that its output `place` is; None where it is another value."""
    name, params = equation.primitive.name, equation.params
    if name in ("copy", "copy_p", "optimization_barrier"):
        return place
    if name == "convert_element_type":  # of a weak type, to the same dtype
        return place if params["new_dtype"] == equation.invars[0].aval.dtype else None
    if name == "cond":
        chosen = {_input_of(program_of(branch), program_of(branch).outvars[place]) for branch in params["branches"]}
        (first, *others) = chosen
        return None if others or first is None else first + 1
    if name == "while":
        body = program_of(params["body_jaxpr"])
        found = _input_of(body, body.outvars[place])
        return params["cond_nconsts"] + found if found == params["body_nconsts"] + place else None
    inner = next((program_of(params[key]) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    if inner is None or len(inner.invars) != len(equation.invars):
        return None
    found = _input_of(inner, inner.outvars[place])
    if name == "scan":
        first, carried = scan_counts(equation)
        # What is carried on must come from its own place, what is stacked from slices of an input.
        same = found == first + place if place < carried else found is not None and found >= first + carried
        return found if same else None
    return found
