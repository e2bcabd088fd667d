"""A Flax Linen module as arrays by path and functions of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.module.functions import path_of
from shardlab.module.model import Model, Parts, call, call_after
from shardlab.module.pipeline import Pipeline
from shardlab.sharding.annotations import from_linen


def read_linen(module: nn.Module, batch: Any, pipeline: Pipeline | None) -> Model:
    """A Linen module as a `Model`; ``module(batch)`` must be callable, since it creates the parameters.

    Paths are those of ``variables["params"]``; other collections are buffers, their paths begin with the
    collection's name.

    Raises:
      DeclarationError: naming the method the pipeline names and the module lacks, with the lines to add.
    """
    streams = ("params", "dropout")

    def init(key: Any, batch: Any) -> Any:
        return module.init({"params": key, "dropout": key}, batch, **_accepted(module.__call__, train=False))

    boxed = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    shapes = meta.unbox(boxed)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes["params"])
    parameters = {path_of(keys): leaf for keys, leaf in leaves}
    others = {name: tree for name, tree in shapes.items() if name != "params"}
    held, others_def = jax.tree_util.tree_flatten_with_path(others)
    buffers = {path_of(keys): leaf for keys, leaf in held}
    boxes = jax.tree_util.tree_flatten_with_path(
        boxed["params"], is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata)
    )[0]
    annotations = {path_of(keys): found for keys, box in boxes if (found := from_linen(box)) is not None}

    def variables(values: Any) -> dict[str, Any]:
        rest = jax.tree.unflatten(others_def, [values[path] for path in buffers])
        return {"params": jax.tree.unflatten(treedef, [values[path] for path in parameters]), **rest}

    def initialise(key: jax.Array) -> dict[str, Any]:
        example = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), batch)
        made = meta.unbox(init(key, example))
        rest = {name: tree for name, tree in made.items() if name != "params"}
        values = dict(zip(parameters, jax.tree.leaves(made["params"]), strict=True))
        return values | dict(zip(buffers, jax.tree.leaves(rest), strict=True))

    def forward(values: Any, batch: Any, key: Any, train: bool) -> tuple[Any, dict[str, Any]]:
        rngs = None if key is None else dict.fromkeys(streams, key)
        mutable = list(others) if train else []
        out = module.apply(
            variables(values), batch, rngs=rngs, mutable=mutable or False, **_accepted(module.__call__, train)
        )
        y, written = out if mutable else (out, {})
        return y, {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(meta.unbox(written))[0]}

    parts = None
    if pipeline is not None:
        raise_faults(
            Fault(
                path,
                "a collection beside the parameters is written by one microbatch of one shard at a time in a stack",
                "train it without pipeline=, with microbatches=1 (all axes are then automatic)",
            )
            for path in buffers
        )
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


def _accepted(function: Callable[..., Any], train: bool) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {name: value for name, value in (("train", train), ("deterministic", not train)) if name in names}


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
    layers: list[dict[str, str]] = []
    for child in blocks:
        inside = {path.removeprefix(f"{child}/"): path for path in parameters if path.startswith(f"{child}/")}
        if layers and set(inside) != set(layers[0]):
            odd = sorted(set(inside) ^ set(layers[0]))[0]
            raise DeclarationError(
                f"{child}/{odd}: not every block has it; every block of a stack has the same parameters"
            )
        for path in inside:
            first, here = parameters[next(iter(blocks)) + "/" + path], parameters[inside[path]]
            if first.shape != here.shape or first.dtype != here.dtype:
                raise DeclarationError(
                    f"{inside[path]}: {here.dtype}{list(here.shape)} here and {first.dtype}{list(first.shape)} in the "
                    "first block; every block of a stack has the same shapes"
                )
        layers.append(inside)
    template = next(iter(blocks.values()))
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

    def block(layer: Any, x: Any, c: Any, key: Any, train: bool) -> Any:
        args = (x,) if pipeline.context is None else (x, c)
        rngs = None if key is None else {"params": key, "dropout": key}
        return template.apply({"params": _nest(layer)}, *args, rngs=rngs, **_accepted(template.__call__, train))

    def after(values: Any, x: Any, batch: Any, key: Any, train: bool) -> Any:
        return run(values, pipeline.after, x, key=key, train=train, last=batch)

    return Parts(tuple(layers), before, None if pipeline.context is None else context, block, after)


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
    children = {str(block.name): block.clone(parent=None, name=None) for block in found}
    templates = list(children.values())
    for child, block in children.items():
        if block != templates[0]:
            raise DeclarationError(
                f"{child}: {block!r} is not the first block, {templates[0]!r}; every block of a stack runs the same "
                "program, so pass what differs as an array"
            )
    return children


def _nest(values: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
