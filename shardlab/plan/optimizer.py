"""What an optax optimizer keeps for each parameter, and whether it may run on stacked layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from shardlab.module.model import Model
from shardlab.plan.plan import Stack

_CAP = 130  # above adafactor's threshold for factoring (128), so that a probe factors what the model will
_SAME = 2e-6  # relative, in float32: what another order of summation gives


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
        _names(keys): (leaf.shape, spec)
        for (keys, leaf), spec in zip(
            jax.tree_util.tree_flatten_with_path(parameters)[0],
            jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)),
            strict=True,
        )
    }

    def one(keys: Any, leaf: Any) -> PartitionSpec:
        names = _names(keys)
        for length in range(len(names), -1, -1):
            found = owners.get(names[len(names) - length :])
            if found is not None:
                return _fit(leaf.shape, *found)
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(one, state)


def _names(keys: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


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


def why_per_layer(optimizer: optax.GradientTransformation, model: Model, stacks: Sequence[Stack]) -> str | None:
    """Why the optimizer must not see stacked layers, or None if it computes the same on them.

    Three updates of a small copy of the parameters (every dim capped; the ranks and the number of layers real) are
    computed on the user's tree and on the stacked one, and compared.
    """
    draws = _small_draws(model)
    per_layer = _updated(optimizer, draws, model.tree)
    try:
        stacked = _updated(optimizer, draws, lambda values: nest(stack(values, stacks)))
    except Exception as error:  # whatever an optimizer raises when the tree is not the one it was made for
        return f"it does not accept a tree of stacked layers ({type(error).__name__})"
    expected = stack(model.flat(per_layer), stacks)
    found = unnest(stacked, expected)
    for path, value in expected.items():
        if not (difference := _difference(found[path], value)) <= _SAME:
            return f"on stacked layers its update of {path} differs by {difference:.0e}"
    return None


def changed_by_padding(
    optimizer: optax.GradientTransformation, model: Model, extra: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """By path, the relative difference of an update when parameters are padded with zeros; where there is one.

    Args:
      extra: by path, how much to add to each dim.
    """

    def padded(values: Mapping[str, Any]) -> Any:
        return model.tree(
            {
                path: jnp.pad(value, [(0, more) for more in extra[path]]) if path in extra else value
                for path, value in values.items()
            }
        )

    draws = _small_draws(model)
    expected, found = (model.flat(_updated(optimizer, draws, form)) for form in (model.tree, padded))
    wanted = model.flat(padded(expected))
    differences = {path: _difference(found[path], value) for path, value in wanted.items()}
    return {path: difference for path, difference in differences.items() if not difference <= _SAME}


def _small_draws(model: Model) -> list[dict[str, Any]]:
    """Parameters and three gradients, each dim capped."""
    rng = np.random.default_rng(0)
    shapes = {path: tuple(min(size, _CAP) for size in leaf.shape) for path, leaf in model.parameters.items()}
    return [
        {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()} for _ in range(4)
    ]


def _updated(
    optimizer: optax.GradientTransformation, draws: list[dict[str, Any]], form: Callable[[Mapping[str, Any]], Any]
) -> Any:
    """The parameters after three updates, on the tree that `form` makes."""

    @jax.jit
    def update(gradient: Any, state: Any, values: Any) -> Any:
        updates, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, updates), state

    parameters, *gradients = draws
    values = form(parameters)
    state = jax.jit(optimizer.init)(values)
    for gradient in gradients:
        values, state = update(form(gradient), state, values)
    return values


def _difference(found: Any, expected: Any) -> float:
    return float(jnp.max(jnp.abs(found - expected)) / (jnp.max(jnp.abs(expected)) + 1e-30))
