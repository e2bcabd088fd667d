"""A model that is plain functions over a pytree of parameters."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from shardlab.mesh.faults import DeclarationError
from shardlab.module.model import Model, Parts, call, call_after, kinds_of
from shardlab.module.pipeline import Pipeline


@dataclass(frozen=True)
class Functions:
    """A model as functions of a pytree of parameters.

    Give `apply`, or (for stacked layers and pipelines) `before`, `block` and `after`, with the per-layer trees in
    a list ``params[blocks]``; blocks of different kinds have trees, or functions, of their own. A function that takes
    ``key``, ``train`` or ``deterministic`` is given it by keyword.

    Attributes:
      init: ``key -> params``.
      apply: ``(params, batch) -> y``.
      before: ``(params, batch) -> x``.
      block: ``(layer params, x) -> x``, or ``(layer params, x, c) -> x`` with a `context`; a sequence of them, one
        for every layer, where they differ.
      after: ``(params, x, batch) -> y`` or ``(params, x) -> y``.
      context: ``(params, batch) -> c``.
      blocks: the key of the list of layers in ``params``; `before`, `after` and `context` do not see it.

    >>> Functions(init=lambda key: {"w": jax.random.normal(key, (3,))}, apply=lambda p, b: b @ p["w"]).blocks
    'blocks'
    """

    init: Callable[..., Any]
    apply: Callable[..., Any] | None = None
    before: Callable[..., Any] | None = None
    block: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    after: Callable[..., Any] | None = None
    context: Callable[..., Any] | None = None
    blocks: str = "blocks"


def path_of(keys: tuple[Any, ...]) -> str:
    """`blocks/3/kernel` for the key path of a leaf."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def read_functions(functions: Functions, batch: Any, pipeline: Pipeline | None) -> Model:
    """`Functions` as a `Model`.

    Raises:
      DeclarationError: when neither `apply` nor all of `before`, `block`, `after` are given, or ``params`` is an array
        alone or has no list of layers.
    """
    shapes = jax.eval_shape(functions.init, jax.eval_shape(lambda: jax.random.key(0)))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    paths = [path_of(keys) for keys, _ in leaves]
    if "" in paths:
        raise DeclarationError("model: init returns an array and no tree of them; give it a name: {'kernel': array}")
    whole = (functions.before, functions.block, functions.after)
    if functions.apply is None and None in whole:
        raise DeclarationError("model: Functions needs apply=, or all of before=, block= and after=")

    def tree(values: Any) -> Any:
        return jax.tree.unflatten(treedef, [values[path] for path in paths])

    parts = None
    if functions.block is not None:
        parts = _parts(functions, shapes)
    elif pipeline is not None:
        raise DeclarationError("pipeline: these Functions have no blocks; give before=, block= and after=")

    def forward(values: Any, batch: Any, key: Any, train: bool) -> tuple[Any, dict[str, Any]]:
        if functions.apply is None:
            raise DeclarationError("model: these Functions have parts and no apply=; add it to call the model whole")
        return call(functions.apply, tree(values), batch, key=key, train=train), {}

    def initialise(key: jax.Array) -> dict[str, Any]:
        return dict(zip(paths, jax.tree.leaves(functions.init(key)), strict=True))

    return Model(
        name=getattr(functions.apply or functions.block, "__qualname__", "Functions"),
        parameters={path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True)},
        buffers={},
        annotations={},
        treedef=treedef,
        initialise=initialise,
        forward=forward,
        parts=parts,
    )


def _parts(functions: Functions, shapes: Any) -> Parts:
    name = functions.blocks
    if not isinstance(shapes, dict) or not isinstance(shapes.get(name), (list, tuple)):
        raise DeclarationError(
            f"model: params has no list of layers under {name!r}; return {{{name!r}: [layer, ...], ...}} from init, "
            "or name the list's key with Functions(blocks=...)"
        )
    before, block, after = functions.before, functions.block, functions.after
    assert before is not None
    assert block is not None
    assert after is not None
    outer = {key: value for key, value in shapes.items() if key != name}
    outer_leaves, outer_def = jax.tree_util.tree_flatten_with_path(outer)
    outer_paths = [path_of(keys) for keys, _ in outer_leaves]
    if not shapes[name]:
        raise DeclarationError(f"model: the list params[{name!r}] is empty; a pipeline needs blocks")
    layers, members = [], []
    count = len(shapes[name])
    each = tuple(block) if isinstance(block, Sequence) else (block,) * count
    if len(each) != count:
        raise DeclarationError(
            f"model: block= has {len(each)} functions and params[{name!r}] {count} layers; give one for every layer"
        )
    for index, layer in enumerate(shapes[name]):
        layer_leaves, layer_def = jax.tree_util.tree_flatten_with_path(layer)
        layers.append({path_of(keys): f"{name}/{index}/{path_of(keys)}" for keys, _ in layer_leaves})
        kinds_of_leaves = tuple((leaf.shape, leaf.dtype) for _, leaf in layer_leaves)
        members.append((each[index], layer_def, kinds_of_leaves))
    kinds = kinds_of(members, operator.eq, name)

    def outside(values: Any) -> Any:
        return jax.tree.unflatten(outer_def, [values[path] for path in outer_paths])

    def run_before(values: Any, batch: Any, key: Any, train: bool) -> Any:
        return call(before, outside(values), batch, key=key, train=train)

    def run_context(values: Any, batch: Any, key: Any, train: bool) -> Any:
        assert functions.context is not None
        return call(functions.context, outside(values), batch, key=key, train=train)

    def run_block(first: int, layer: Any, x: Any, c: Any, key: Any, train: bool) -> Any:
        context = () if functions.context is None else (c,)
        function, layer_def, _ = members[first]
        inside = jax.tree.unflatten(layer_def, [layer[path] for path in layers[first]])
        return call(function, inside, x, *context, key=key, train=train)

    def run_after(values: Any, x: Any, batch: Any, key: Any, train: bool) -> Any:
        return call_after(after, outside(values), x, batch=batch, key=key, train=train)

    return Parts(
        layers=tuple(layers),
        before=run_before,
        context=None if functions.context is None else run_context,
        kinds=kinds,
        blocks=tuple(functools.partial(run_block, kinds.index(kind)) for kind in range(max(kinds) + 1)),
        after=run_after,
    )
