"""Sharding constraints in the user's code, made legal inside a manual region.

`with_sharding_constraint(x, P("data", None, "tensor"))` is right in a model that runs under `jit`. Inside a region
that is manual over ``data`` that axis is already taken, and JAX refuses. The user's function is therefore traced as
if all axes were automatic, the manual axes are removed from its constraints, and the result is run in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from shardlab.sharding.zero import without


def drop_manual(function: Callable[..., Any], manual: tuple[str, ...], automatic: AbstractMesh) -> Callable[..., Any]:
    """`function`, with `manual` axes left out of the constraints in it.

    Args:
      function: of pytrees of arrays.
      manual: axes that are manual where the result will be called.
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
        if not _names_manual(closed.jaxpr, set(manual)):
            return function(*args)
        rewritten = _rewrite(closed.jaxpr, manual)
        flat = jax.core.eval_jaxpr(rewritten, closed.consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return wrapped


def _inner(value: Any) -> Any:
    return getattr(value, "jaxpr", value)


def _names_manual(jaxpr: Any, manual: set[str]) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            sharding = equation.params["sharding"]
            if isinstance(sharding, NamedSharding) and without(sharding.spec, tuple(manual)) != sharding.spec:
                return True
        for value in equation.params.values():
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if hasattr(_inner(one), "eqns") and _names_manual(_inner(one), manual):
                    return True
    return False


def _rewrite(jaxpr: Any, manual: tuple[str, ...]) -> Any:
    """The same program with `manual` axes left out of its constraints, inner programs included."""

    def value_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(value_of(one) for one in value)
        if hasattr(value, "consts") and hasattr(value, "jaxpr"):
            return value.replace(jaxpr=_rewrite(value.jaxpr, manual))
        return _rewrite(value, manual) if hasattr(value, "eqns") else value

    equations = []
    for equation in jaxpr.eqns:
        params = {name: value_of(value) for name, value in equation.params.items()}
        if equation.primitive.name == "sharding_constraint" and isinstance(params["sharding"], NamedSharding):
            mesh = jax.sharding.get_abstract_mesh()
            spec: PartitionSpec = without(params["sharding"].spec, manual)
            params |= {"sharding": NamedSharding(mesh, spec), "context_mesh": mesh}
        equations.append(equation.replace(params=params))
    return jaxpr.replace(eqns=equations)
