"""The user's functions made legal inside a manual region.

`with_sharding_constraint(x, P("data", None, "tensor"))` is right in a model that runs under `jit`. Inside a region
that is manual over ``data`` that axis is already taken, and JAX refuses. The user's function is therefore traced as
if all axes were automatic, the manual axes are removed from its constraints, every `batch_sum` becomes a sum over
the devices that hold the batch, and the result is run in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from shardlab.sharding.zero import without
from shardlab.step.batch_sum import is_batch_sum


def made_legal(
    function: Callable[..., Any], manual: tuple[str, ...], spread: tuple[str, ...], automatic: AbstractMesh
) -> Callable[..., Any]:
    """`function`, with `manual` axes left out of its constraints, and its batch sums taken over `spread`.

    Args:
      function: of pytrees of arrays.
      manual: axes that are manual where the result will be called.
      spread: those of them that the examples at hand are spread over.
      automatic: the mesh with every axis automatic.
    """
    if not manual:
        return function

    def wrapped(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        with jax.sharding.use_abstract_mesh(automatic):
            closed, out = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(treedef, flat)), return_shape=True)(
                *shapes
            )
        if not any(_names(equation, manual) or is_batch_sum(equation) for equation in _equations(closed.jaxpr)):
            return function(*args)
        # Every equation remembers the mesh that it was traced under, and is to be run under this one.
        here = jax.make_jaxpr(lambda x: x + 1)(0.0).eqns[0].ctx
        rewritten = _rewrite(closed.jaxpr, manual, spread, here)
        flat = jax.core.eval_jaxpr(rewritten, closed.consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return wrapped


def uses_batch_sum(jaxpr: Any) -> bool:
    """Whether a traced program has a `batch_sum` in it."""
    return any(is_batch_sum(equation) for equation in _equations(jaxpr))


def _names(equation: Any, manual: tuple[str, ...]) -> bool:
    """Whether it is a constraint that names a manual axis."""
    sharding = equation.params["sharding"] if equation.primitive.name == "sharding_constraint" else None
    return isinstance(sharding, NamedSharding) and without(sharding.spec, manual) != sharding.spec


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _rewrite(jaxpr: Any, manual: tuple[str, ...], spread: tuple[str, ...], here: Any) -> Any:
    """The same program made legal, inner programs included."""

    def value_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(value_of(one) for one in value)
        if hasattr(value, "consts") and hasattr(value, "jaxpr"):
            return value.replace(jaxpr=_rewrite(value.jaxpr, manual, spread, here))
        return _rewrite(value, manual, spread, here) if hasattr(value, "eqns") else value

    mesh = jax.sharding.get_abstract_mesh()
    equations = []
    for equation in jaxpr.eqns:
        if is_batch_sum(equation) and spread:
            (operand,) = equation.invars
            summed = jax.make_jaxpr(lambda x: jax.lax.psum(x, spread))(operand.aval)
            equations.append(equation.replace(params={**equation.params, "jaxpr": summed}, ctx=here))
            continue
        params = {name: value_of(value) for name, value in equation.params.items()}
        # Of a constraint; of a derivative's broadcasts, which say the sharding that they were traced with.
        if isinstance(params.get("sharding"), NamedSharding):
            spec: PartitionSpec = without(params["sharding"].spec, manual)
            params["sharding"] = NamedSharding(mesh, spec)
            if equation.primitive.name == "sharding_constraint":
                params["context_mesh"] = mesh
        equations.append(equation.replace(params=params, ctx=here))
    return jaxpr.replace(eqns=equations)
