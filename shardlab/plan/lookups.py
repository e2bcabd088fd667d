"""Arrays that a model looks up in, and how they lie for it where several axes are automatic.

XLA's partitioner ends the process at a gather, inside a manual region, whose looked-up dim lies over one automatic axis
while another dim of its operand, indices or result lies over a second ("Check failed: partition_group_list...": jax
0.11.2 and 0.12.0.1; of a batched gather jax 0.10.2 too). So an array enters such a function with its looked-up dims
whole: their axes go to other dims, which moves shards and makes none larger, or, where none divides, are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from shardlab.module.inner import programs_in
from shardlab.sharding.rules import axes_of, canonical, entry, spec_text


def looked_up(function: Callable[..., Any], values: Mapping[str, Any], *others: Any) -> dict[str, frozenset[int]]:
    """By path, the dims of an array along which ``function(values, *others)`` picks by indices.

    >>> import jax.numpy as jnp
    >>> looked_up(lambda v, t: 2 * v["a"][t] @ v["b"], {"a": jnp.ones((5, 2)), "b": jnp.ones((2, 2))}, jnp.arange(3))
    {'a': frozenset({0})}
    """
    jaxpr = jax.make_jaxpr(function)(dict(values), *others).jaxpr
    found: dict[str, frozenset[int]] = {}
    # The arguments of a traced function are flattened, a dict's by its sorted keys.
    arrays = zip(sorted(values), jaxpr.invars, strict=False)
    _follow(jaxpr, {var: (path, tuple(range(var.aval.ndim))) for path, var in arrays}, found)
    return found


def for_lookup(
    spec: PartitionSpec, shape: Sequence[int], dims: Collection[int], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The spec with `dims` whole, their axes on others of the array's dims, each on the largest that divides.

    Args:
      spec: of automatic axes.
      shape: of the array.
      dims: those that are looked up along.
      sizes: of the automatic axes of more than one device; beside none but one there is nothing to do.

    >>> for_lookup(PartitionSpec("tensor", "expert"), (19, 8), {0}, {"tensor": 2, "expert": 2})
    P(None, ('expert', 'tensor'))
    >>> for_lookup(PartitionSpec("tensor", "expert"), (19, 6), {0}, {"tensor": 2, "expert": 2})
    P(None, 'expert')
    """
    entries = [[*axes_of(of)] for of in (*spec, *[None] * (len(shape) - len(spec)))]
    others = [dim for dim in range(len(shape)) if dim not in dims]
    if len(sizes) < 2 or not others:
        return spec
    moving = [axis for dim in sorted(dims) for axis in entries[dim] if axis in sizes]
    for dim in dims:
        entries[dim] = [axis for axis in entries[dim] if axis not in sizes]
    for axis in moving:
        fitting = [
            dim for dim in others if shape[dim] % math.prod(sizes.get(one, 1) for one in [*entries[dim], axis]) == 0
        ]
        if fitting:
            # Behind the axes that are there: an exchange over this one alone.
            entries[max(fitting, key=lambda dim: shape[dim])].append(axis)
    return canonical([entry(axes) for axes in entries])


def lookup_note(
    path: str, spec: PartitionSpec, shape: Sequence[int], dims: Collection[int], sizes: Mapping[str, int]
) -> list[str]:
    """What looking up in an array costs beside several automatic axes, if anything; arguments as of `for_lookup`."""
    laid = for_lookup(spec, shape, dims, sizes)
    if laid == spec:
        return []
    whole = {axis for of in spec for axis in axes_of(of) if axis in sizes} - {
        axis for of in laid for axis in axes_of(of)
    }
    over = " and ".join(repr(axis) for axis in sizes if axis in whole)
    gathered = f", gathered over {over} since no dim of {list(shape)} divides" if whole else ""
    return [f"{path}: spec {spec_text(spec)} is {spec_text(laid)} where it is looked up in{gathered}"]


def _follow(jaxpr: Any, known: dict[Any, tuple[str, tuple[int, ...]]], found: dict[str, frozenset[int]]) -> None:
    """Adds to `found` what a program looks up in; `known`: which variables are which array, and their dims of it."""
    for equation in jaxpr.eqns:
        operands = [var for var in equation.invars if not isinstance(var, Literal) and var in known]
        if not operands:
            continue
        path, dims = known[operands[0]]
        if equation.primitive.name == "gather" and equation.invars[0] in operands:
            along = {dims[dim] for dim in equation.params["dimension_numbers"].start_index_map}
            found[path] = found.get(path, frozenset()) | along
        elif equation.primitive.name == "transpose":
            known[equation.outvars[0]] = path, tuple(dims[dim] for dim in equation.params["permutation"])
        else:
            for program in programs_in(equation):
                # A branch does not get what chooses it, which comes first.
                pairs = zip(reversed(program.invars), reversed(equation.invars), strict=False)
                same = {mine: known[var] for mine, var in pairs if var in operands and _alike(mine, var)}
                _follow(program, same, found)
            # Whatever has its shape is taken for the array, cast or scaled.
            known |= {out: known[var] for var in operands for out in equation.outvars if _alike(out, var)}


def _alike(one: Any, other: Any) -> bool:
    return bool(one.aval.shape == other.aval.shape)
