"""What an optax optimizer keeps for each parameter, and whether it may run on stacked layers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from shardlab.mesh.faults import DeclarationError
from shardlab.module.model import Model
from shardlab.plan.plan import Stack
from shardlab.plan.proof import Form, Traced, differing, place_of


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from arrays by path.

    >>> nest({"a/b": 1, "a/c": 2, "d": 3})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def unnest(tree: Any, paths: Any) -> dict[str, Any]:
    """The leaves of `nest`'s result, by path."""
    found = {}
    for path in paths:
        node = tree
        for part in path.split("/"):
            node = node[part]
        found[path] = node
    return found


def state_specs(state: Any, parameters: Any, specs: Any) -> Any:
    """A spec for every leaf of an optimizer's state.

    A leaf belongs to the parameter whose place in the parameter tree ends the leaf's own place. It gets that
    parameter's spec if it has its shape, the matching entries if it has its shape less some dims (a factored
    second moment), and is replicated otherwise (counts, placeholders).

    Args:
      state: of shapes, as ``jax.eval_shape(optimizer.init, parameters)``.
      parameters: the tree of shapes that the state was made for.
      specs: a `PartitionSpec` for each of them, by place.
    """
    owners = {
        place_of(keys): (leaf.shape, spec)
        for (keys, leaf), spec in zip(
            jax.tree_util.tree_flatten_with_path(parameters)[0],
            jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)),
            strict=True,
        )
    }

    def one(keys: Any, leaf: Any) -> PartitionSpec:
        names = place_of(keys)
        for length in range(len(names), -1, -1):
            found = owners.get(names[len(names) - length :])
            if found is not None:
                return _fit(leaf.shape, *found)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(one, state)


def _fit(shape: tuple[int, ...], owner: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    if shape == owner:
        return spec
    entries = tuple(spec) + (None,) * (len(owner) - len(spec))
    kept, dim = [], 0
    for size in shape:
        while dim < len(owner) and owner[dim] != size:
            dim += 1
        if dim == len(owner):
            return PartitionSpec()
        kept.append(entries[dim])
        dim += 1
    return PartitionSpec(*kept) if shape else PartitionSpec()


def stack(values: Mapping[str, Any], stacks: Sequence[Stack]) -> dict[str, Any]:
    """Arrays by path with those of every stack as one array; pad slots are zeros."""
    inside = {path for each in stacks for path in each.members}
    out = {path: value for path, value in values.items() if path not in inside}
    for each in stacks:
        zeros = jnp.zeros_like(values[next(path for path in each.members if path)])
        out[each.name] = jnp.stack([zeros if path is None else values[path] for path in each.members])
    return out


def updated(
    optimizer: optax.GradientTransformation, gradients: Any, state: Any, parameters: Any, loss: Any
) -> tuple[Any, Any]:
    """Parameters and optimizer state after one update; the state keeps its dtypes.

    The update is passed what a step knows beside gradients and parameters: ``value``, the loss, and ``grad``.
    """
    updates, new = with_arguments(optimizer).update(gradients, state, parameters, value=loss, grad=gradients)
    return optax.apply_updates(parameters, updates), jax.tree.map(_as_before, new, state)


def _as_before(new: Any, old: Any) -> Any:
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def with_arguments(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, its update taking arguments by name, whether it needs them or not."""
    whole = getattr(optimizer, "gradient_transformation", None)  # of an optax.MultiSteps given as it is
    wide = optax.with_extra_args_support(optimizer if whole is None else whole())
    names = inspect.signature(wide.update).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values()):
        return wide

    def update(gradients: Any, state: Any, parameters: Any = None, **given: Any) -> Any:
        return wide.update(gradients, state, parameters, **{k: value for k, value in given.items() if k in names})

    return optax.GradientTransformationExtraArgs(wide.init, update)


def why_per_layer(
    optimizer: optax.GradientTransformation,
    model: Model,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    stacks: Sequence[Stack],
) -> str | None:
    """Why the optimizer must not see stacked layers, or None if it is proved to compute the same on them.

    State at first, updates and state afterwards are compared as `shardlab.plan.terms` says; pad slots are zeros.

    Args:
      shapes: of the parameters as they are stored, by the user's paths.

    Raises:
      DeclarationError: the optimizer does not take the user's own tree, or needs what a step does not know.
    """
    names = dict(zip(shapes, shapes, strict=True))
    plain = _traced(optimizer, model.tree(names), model.tree(shapes))
    inside = {path for each in stacks for path in each.members}
    other = {path: leaf for path, leaf in shapes.items() if path not in inside}
    forms = {}
    for each in stacks:
        first = shapes.get(next(path for path in each.members if path))
        if first is not None:
            other[each.name] = jax.ShapeDtypeStruct((len(each.members), *first.shape), first.dtype)
            forms[each.name] = Form(each.members, other[each.name].shape, (first.shape,) * len(each.members))
    if not forms:
        return None
    try:
        stacked = Traced(with_arguments(optimizer), nest(dict(zip(other, other, strict=True))), nest(other))
    except Exception as error:  # whatever an optimizer raises when the tree is not the one it was made for
        return f"it does not accept a tree of stacked layers ({type(error).__name__})"
    found = differing(plain, stacked, forms)
    return None if found is None else f"on stacked layers its {found} is not that of each layer"


def changed_by_padding(
    optimizer: optax.GradientTransformation,
    model: Model,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    padded: Mapping[str, tuple[int, ...]],
) -> str | None:
    """What of the optimizer is not proved to be the same where parameters are padded with zeros; None if all is.

    Args:
      shapes: of the parameters without padding, by path.
      padded: the shapes with it, of those that have some.

    Raises:
      DeclarationError: as `why_per_layer`.
    """
    names = model.tree(dict(zip(shapes, shapes, strict=True)))
    wide = {path: jax.ShapeDtypeStruct(padded.get(path, leaf.shape), leaf.dtype) for path, leaf in shapes.items()}
    forms = {path: Form((path, None), shape, (shapes[path].shape, shape)) for path, shape in padded.items()}
    plain, other = (_traced(optimizer, names, model.tree(leaves)) for leaves in (shapes, wide))
    return differing(plain, other, forms)


def _traced(optimizer: optax.GradientTransformation, names: Any, tree: Any) -> Traced:
    """The trace on the user's own tree; what the optimizer raises there is a fault of the declaration."""
    try:
        return Traced(with_arguments(optimizer), names, tree)
    except DeclarationError:
        raise
    except Exception as error:
        needed = re.findall(r"'(\w+)'", str(error)) if "required" in str(error) else []
        problem = f"needs {' and '.join(needed)}" if needed else f"raises {type(error).__name__}: {error}"
        raise DeclarationError(
            f"optimizer: {problem}; a step calls init(parameters) and update(gradients, state, parameters, value=loss, "
            "grad=gradients): use an optimizer that needs no more"
        ) from error
