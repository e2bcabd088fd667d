"""A Flax Linen module as arrays by path and functions of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.module.functions import path_of
from shardlab.module.model import Model, Parts, accepted, as_held, call, call_after, kinds_of
from shardlab.module.pipeline import Pipeline
from shardlab.module.written import written_by
from shardlab.sharding.annotations import from_linen


def read_linen(module: nn.Module, batch: Any, pipeline: Pipeline | None) -> Model:
    """A Linen module as a `Model`; ``module(batch)`` must be callable, since it creates the parameters.

    Paths are those of ``variables["params"]``; other collections are buffers, their paths begin with the
    collection's name. What the module hands out by `nn.Module.sow` is left out.

    Raises:
      DeclarationError: naming the method the pipeline names and the module lacks, with the lines to add.
    """
    streams = ("params", "dropout")

    def init(key: Any, batch: Any) -> Any:
        args, named = _accepted(module.__call__, (batch,), train=False)
        return module.init({"params": key, "dropout": key}, *args, **named)

    boxed = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    shapes = meta.unbox(boxed)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes["params"])
    parameters = {path_of(keys): leaf for keys, leaf in leaves}
    boxes = jax.tree_util.tree_flatten_with_path(
        boxed["params"], is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)
    )[0]
    annotations = {path_of(keys): found for keys, box in boxes if (found := from_linen(box)) is not None}

    def apply(variables: Any, batch: Any, key: Any, train: bool, mutable: list[str]) -> tuple[Any, Any]:
        rngs = None if key is None else dict.fromkeys(streams, key)
        args, named = _accepted(module.__call__, (batch,), train)
        out = module.apply(variables, *args, rngs=rngs, mutable=mutable or False, **named)
        return out if mutable else (out, {})

    others = {name: tree for name, tree in shapes.items() if name != "params"}
    if others:
        # What `Module.sow` added to in `init` is longer after a call: it is what a call hands out, and nothing held.
        key = jax.eval_shape(lambda: jax.random.key(0))
        after = jax.eval_shape(lambda v, b, k: apply(v, b, k, True, list(others))[1], shapes, batch, key)
        others = _kept(others, meta.unbox(after))
    held, others_def = jax.tree_util.tree_flatten_with_path(others)
    buffers = {path_of(keys): leaf for keys, leaf in held}

    def variables(values: Any) -> dict[str, Any]:
        rest = jax.tree.unflatten(others_def, [values[path] for path in buffers])
        return {"params": jax.tree.unflatten(treedef, [values[path] for path in parameters]), **rest}

    def initialise(key: jax.Array) -> dict[str, Any]:
        example = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), batch)
        made = meta.unbox(init(key, example))
        values = dict(zip(parameters, jax.tree.leaves(made["params"]), strict=True))
        rest = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(made)[0]}
        return values | {path: rest[path] for path in buffers}

    def forward(values: Any, batch: Any, key: Any, train: bool) -> tuple[Any, dict[str, Any]]:
        y, after = apply(variables(values), batch, key, train, list(others) if train else [])
        found = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(meta.unbox(after))[0]}
        return y, {
            path: as_held(path, found[path], leaf)
            for path, leaf in buffers.items()
            if path in found and found[path] is not values[path]
        }

    parts = None
    if pipeline is not None:
        _refuse_collections(buffers, forward, {**parameters, **buffers}, batch)
        parts = _parts(module, pipeline, parameters)
    return Model(
        name=type(module).__name__,
        parameters=parameters,
        buffers=buffers,
        annotations=annotations,
        treedef=treedef,
        initialise=initialise,
        forward=forward,
        parts=parts,
    )


def _accepted(
    function: Callable[..., Any], args: tuple[Any, ...], train: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return accepted(function, args, {"train": train, "deterministic": not train})


def _refuse_collections(buffers: Any, forward: Callable[..., Any], values: Any, batch: Any) -> None:
    """A stack of Linen blocks is given parameters alone."""
    if not buffers:
        return

    def after(held: Any, values: Any, batch: Any, key: Any) -> Any:
        return forward({**values, **held}, batch, key, True)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    written = written_by(after, buffers, values, batch, key)
    raise_faults(
        Fault(
            path,
            "a collection beside the parameters is written by one microbatch of one shard at a time in a stack",
            "train it without pipeline=, with microbatches=1 (all axes are then automatic)",
        )
        if path in written
        else Fault(
            path,
            "a stack of blocks is given its parameters, and no other collection",
            "compute it where it is used, or train it without pipeline=",
        )
        for path in buffers
    )


def _kept(before: Any, after: Any) -> Any:
    """The variables that are a tree of the same structure after a call as before it."""
    kept = {}
    for name, value in before.items():
        there = after.get(name, value)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            if inner := _kept(value, there):
                kept[name] = inner
        elif str(jax.tree.structure(value)) == str(jax.tree.structure(there)):
            kept[name] = value
    return kept


def _parts(module: nn.Module, pipeline: Pipeline, parameters: Any) -> Parts:
    name = type(module).__name__
    blocks = _blocks(module, pipeline)
    methods = (("before", pipeline.before), ("after", pipeline.after), ("context", pipeline.context))
    raise_faults(
        Fault(
            f"pipeline {role}={method!r}",
            f"{name} has no method {method!r}",
            f"add `def {method}(self, {'x, batch' if role == 'after' else 'batch'}):` to {name}",
        )
        for role, method in methods
        if method is not None and not hasattr(type(module), method)
    )
    layers = [
        {path.removeprefix(f"{child}/"): path for path in parameters if path.startswith(f"{child}/")}
        for child in blocks
    ]
    shapes = [
        {inside: (parameters[path].shape, parameters[path].dtype) for inside, path in layer.items()} for layer in layers
    ]
    members = list(zip(blocks.values(), shapes, strict=True))
    kinds = kinds_of(members, lambda one, two: _same(two[0], one[0]) and one[1] == two[1], pipeline.blocks)
    inner = {path for layer in layers for path in layer.values()}
    outer = [path for path in parameters if path not in inner]

    def run(values: Any, method: str, *args: Any, key: Any, train: bool, last: Any = None) -> Any:
        def bound(self: Any) -> Any:
            function = getattr(self, method)
            if last is None:
                return call(function, *args, key=key, train=train)
            return call_after(function, *args, batch=last, key=key, train=train)

        rngs = None if key is None else {"params": key, "dropout": key}
        return module.apply({"params": _nest({path: values[path] for path in outer})}, rngs=rngs, method=bound)

    def before(values: Any, batch: Any, key: Any, train: bool) -> Any:
        return run(values, pipeline.before, batch, key=key, train=train)

    def context(values: Any, batch: Any, key: Any, train: bool) -> Any:
        assert pipeline.context is not None
        return run(values, pipeline.context, batch, key=key, train=train)

    def block(template: nn.Module, layer: Any, x: Any, c: Any, key: Any, train: bool) -> Any:
        args: tuple[Any, ...] = (x,) if pipeline.context is None else (x, c)
        rngs = None if key is None else {"params": key, "dropout": key}
        args, named = _accepted(template.__call__, args, train)
        return template.apply({"params": _nest(layer)}, *args, rngs=rngs, **named)

    def after(values: Any, x: Any, batch: Any, key: Any, train: bool) -> Any:
        return run(values, pipeline.after, x, key=key, train=train, last=batch)

    return Parts(
        layers=tuple(layers),
        before=before,
        context=None if pipeline.context is None else context,
        kinds=kinds,
        blocks=tuple(functools.partial(block, members[kinds.index(kind)][0]) for kind in range(max(kinds) + 1)),
        after=after,
    )


def _blocks(module: nn.Module, pipeline: Pipeline) -> dict[str, nn.Module]:
    """The blocks, taken out of their parent, by the name of their parameters."""
    name = type(module).__name__
    try:
        found = list(getattr(module.bind({}), pipeline.blocks))
    except (AttributeError, TypeError, ValueError) as error:
        raise DeclarationError(
            f"pipeline blocks={pipeline.blocks!r}: {name} has no list of that name outside @nn.compact; add\n"
            f"    def setup(self):\n        self.{pipeline.blocks} = [Block(...) for _ in range(...)]\n"
            f"and call them in {name}.__call__ ({error})"
        ) from None
    if not found:
        raise DeclarationError(f"pipeline blocks={pipeline.blocks!r}: the list is empty; a pipeline needs blocks")
    return {str(block.name): block.clone(parent=None, name=None) for block in found}


def _same(block: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks, neither of them bound, are the same program.

    `nn.remat` makes a new class whenever it is called; what it wraps decides, since it changes no number.
    """
    mine, theirs = type(block), type(other)
    if mine is theirs:
        return block == other
    remat = f"Checkpoint{mine.__bases__[0].__name__}"
    if mine.__bases__ != theirs.__bases__ or (mine.__name__, theirs.__name__) != (remat, remat):
        return False
    names = [field.name for field in dataclasses.fields(block) if field.compare and field.init]
    return all(getattr(block, name) == getattr(other, name) for name in names)


def _nest(values: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
