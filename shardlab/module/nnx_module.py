"""A Flax NNX module as arrays by path and functions of them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.module.model import Model, Parts, Values, as_held, call, call_after, kinds_of
from shardlab.module.pipeline import Pipeline
from shardlab.module.written import written_by
from shardlab.sharding.annotations import from_nnx


class Graph:
    """A module taken apart: its structure, and for every leaf its path and the kind of variable."""

    def __init__(self, module: nnx.Module) -> None:
        self.graphdef, state = nnx.split(module)
        flat = {tuple(path): variable for path, variable in nnx.to_flat_state(state)}
        self.treedef = jax.tree.structure(state)
        self.paths: list[str] = []
        self.kinds: list[type] = []
        self.variables: dict[str, Any] = {}
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        for names, leaf in _leaves(state):
            path = "/".join(map(str, names))
            self.paths.append(path)
            self.kinds.append(type(flat[names]))
            self.variables[path] = flat[names]
            self.shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    def of(self, *kinds: type) -> list[str]:
        """Paths of the variables of these kinds."""
        pairs = zip(self.paths, self.kinds, strict=True)
        return [path for path, kind in pairs if issubclass(kind, kinds)]

    @property
    def buffers(self) -> list[str]:
        """Paths of the arrays that are neither trained nor random state."""
        held = set(self.of(nnx.Param, nnx.RngState))
        return [path for path in self.paths if path not in held]

    def run(self, values: Values, key: Any, function: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
        """`function` of the module made of `values`, and the buffers it may have written to, by path.

        Every random stream of the module gets its own key: `key` folded with the stream's path; of streams that are
        stacked, each its own. What `function` adds to the module, by `nnx.Module.sow`, is left out.
        """
        leaves = []
        for path, kind in zip(self.paths, self.kinds, strict=True):
            shape = self.shapes[path].shape
            if issubclass(kind, nnx.RngKey):
                base = jax.random.key(0) if key is None else key
                stream = jax.random.fold_in(base, zlib.crc32(path.encode()))
                leaves.append(jax.random.split(stream, shape) if shape else stream)
            elif issubclass(kind, nnx.RngState):
                leaves.append(jnp.zeros(shape, jnp.uint32))
            else:
                leaves.append(values[path])
        module = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))
        out = function(module)
        after = {"/".join(map(str, names)): leaf for names, leaf in _leaves(nnx.state(module))}
        written = {path: after[path] for path in self.buffers if after[path] is not values[path]}
        return out, {path: as_held(path, value, self.shapes[path]) for path, value in written.items()}

    def refuse_writing(self, values: Values, key: Any, function: Callable[[Any], Any], prefix: str = "") -> Any:
        """`function` of the module made of `values`.

        Raises:
          DeclarationError: it writes to a buffer.
        """
        out, written = self.run(values, key, function)
        if written:
            held = {path: values[path] for path in written}
            _refuse_written(written_by(lambda held: self.run({**values, **held}, key, function)[1], held), prefix)
        return out


def _leaves(state: nnx.State) -> list[tuple[tuple[Any, ...], Any]]:
    """The arrays of a state, each with the names that lead to it."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [(tuple(key.key for key in keys if isinstance(key, jax.tree_util.DictKey)), leaf) for keys, leaf in leaves]


class _Stream(nnx.RngStream):
    """A stream of the same keys, whose counter is set without a look at its sharding.

    Under tracing that look searches everything traced so far: a model of many layers took time in their square.
    """

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.count[...])
        self.count.set_value(self.count[...] + 1)
        return key


def read_nnx(factory: Callable[[nnx.Rngs], nnx.Module], pipeline: Pipeline | None) -> Model:
    """The module that `factory` makes, as a `Model`; the module is traced, never built.

    Training calls ``module.train()``, evaluation ``module.eval()``, whatever the module was made with: batch statistics
    are frozen, and dropout is switched off, in the call (``self.norm(x, use_running_average=True)``).

    Raises:
      DeclarationError: naming the attribute the pipeline names and the module lacks, the shared parameter, or a module
        made to be frozen beside others that are not.
    """

    def build(key: Any) -> nnx.Module:
        with nnx.use_eager_sharding(False):
            rngs = nnx.Rngs(key)
            rngs.default = _Stream(key, tag="default")  # type: ignore[attr-defined]  # Rngs keeps streams as attributes
            module = factory(rngs)
        if not isinstance(module, nnx.Module):
            raise DeclarationError(f"model: {factory!r} returned {type(module).__name__}, not an nnx.Module")
        _hold_arrays(module)
        return module

    made = []

    def arrays(key: Any) -> nnx.State:
        graphdef, state = nnx.split(build(key))
        made.append(graphdef)
        return state

    # Not `nnx.eval_shape`: it leaves tracers in arrays that are attributes and no `nnx.Variable`.
    shapes = jax.eval_shape(arrays, jax.eval_shape(lambda: jax.random.key(0)))
    traced = nnx.merge(made[-1], shapes)
    _refuse_frozen(traced)
    for _, node in nnx.iter_graph(traced):
        # Embed fixes its dtype at creation, by default its parameter's; what follows the parameter must go on
        # following it when the step computes in another dtype.
        if isinstance(node, nnx.Embed) and node.dtype == node.param_dtype:
            node.dtype = None
    apart = nnx.split(traced)

    def mode(train: bool) -> nnx.Module:
        # A copy: tracing a model of many layers again would take seconds.
        module = nnx.merge(*apart)
        module.train() if train else module.eval()
        return module

    graphs = {train: Graph(mode(train)) for train in (True, False)}
    graph = graphs[True]
    parameters = graph.of(nnx.Param)
    pure = nnx.to_pure_dict(nnx.state(mode(True), nnx.Param))
    annotations = {path: found for path in parameters if (found := from_nnx(graph.variables[path])) is not None}

    def initialise(key: jax.Array) -> dict[str, Any]:
        leaves = jax.tree.leaves(nnx.state(build(key)))
        held = set(graph.of(nnx.RngState))
        return {path: leaf for path, leaf in zip(graph.paths, leaves, strict=True) if path not in held}

    def forward(values: Any, batch: Any, key: Any, train: bool) -> tuple[Any, dict[str, Any]]:
        return graphs[train].run(values, key, lambda module: call(module.__call__, batch, key=key, train=train))

    model = mode(True)
    return Model(
        name=type(model).__name__,
        parameters={path: graph.shapes[path] for path in parameters},
        buffers={path: graph.shapes[path] for path in graph.buffers},
        annotations=annotations,
        treedef=jax.tree.structure(pure),
        initialise=initialise,
        forward=forward,
        parts=None if pipeline is None else _parts(mode, pipeline),
    )


def _hold_arrays(module: nnx.Module) -> None:
    """Makes leaves of the arrays that are plain attributes; Flax does, but for those being traced."""
    for node in [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)]:
        for name, value in list(vars(node).items()):
            plain = isinstance(value, (jax.Array, list, tuple, dict))
            if plain and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
                setattr(node, name, nnx.data(value))


def _parts(mode: Callable[[bool], nnx.Module], pipeline: Pipeline) -> Parts:
    """The module cut at the list `pipeline.blocks`; the rest keeps an empty list in its place."""
    model = mode(True)
    name = type(model).__name__
    raise_faults(
        Fault(
            f"pipeline {role}={wanted!r}",
            f"{name} has no attribute {wanted!r}",
            f"add it to {name}, or name another",
        )
        for role, wanted in _named(pipeline)
        if wanted is not None and not hasattr(model, wanted)
    )
    blocks = _list_of_blocks(model, pipeline.blocks)
    if not blocks:
        raise DeclarationError(f"pipeline blocks={pipeline.blocks!r}: the list is empty; a pipeline needs blocks")
    _refuse_shared(model, pipeline.blocks, blocks)

    stages: dict[bool, tuple[Graph, list[Graph]]] = {}
    for train in (True, False):
        whole = mode(train)
        members = [Graph(block) for block in getattr(whole, pipeline.blocks)]
        setattr(whole, pipeline.blocks, nnx.List([]))
        stages[train] = (Graph(whole), members)
    kinds = kinds_of(stages[True][1], _same_kind, pipeline.blocks)
    firsts = [kinds.index(kind) for kind in range(max(kinds) + 1)]
    inner = []
    for first in firsts:
        graph = stages[True][1][first]
        held = set(graph.of(nnx.RngState))
        inner.append([path for path in graph.paths if path not in held])
    layers = tuple({path: f"{pipeline.blocks}/{i}/{path}" for path in inner[kind]} for i, kind in enumerate(kinds))

    def outside(values: Any, key: Any, train: bool, function: Callable[[Any], Any]) -> Any:
        return stages[train][0].refuse_writing(values, key, function)

    def before(values: Any, batch: Any, key: Any, train: bool) -> Any:
        return outside(values, key, train, lambda m: call(getattr(m, pipeline.before), batch, key=key, train=train))

    def context(values: Any, batch: Any, key: Any, train: bool) -> Any:
        assert pipeline.context is not None
        method = pipeline.context
        return outside(values, key, train, lambda m: call(getattr(m, method), batch, key=key, train=train))

    def block(first: int, layer: Any, x: Any, c: Any, key: Any, train: bool) -> Any:
        args = (x,) if pipeline.context is None else (x, c)

        def run(module: Any) -> Any:
            return call(module.__call__, *args, key=key, train=train)

        number = "*" if len(firsts) == 1 else first
        return stages[train][1][first].refuse_writing(layer, key, run, f"{pipeline.blocks}/{number}/")

    def after(values: Any, x: Any, batch: Any, key: Any, train: bool) -> Any:
        return outside(
            values,
            key,
            train,
            lambda m: call_after(getattr(m, pipeline.after), x, batch=batch, key=key, train=train),
        )

    return Parts(
        layers=layers,
        before=before,
        context=None if pipeline.context is None else context,
        kinds=kinds,
        blocks=tuple(functools.partial(block, first) for first in firsts),
        after=after,
    )


def _named(pipeline: Pipeline) -> tuple[tuple[str, str | None], ...]:
    return (
        ("before", pipeline.before),
        ("blocks", pipeline.blocks),
        ("after", pipeline.after),
        ("context", pipeline.context),
    )


def _list_of_blocks(model: nnx.Module, attribute: str) -> list[nnx.Module]:
    held, name = getattr(model, attribute), type(model).__name__
    if not isinstance(held, (nnx.List, list, tuple)) or not all(isinstance(block, nnx.Module) for block in held):
        raise DeclarationError(
            f"pipeline blocks={attribute!r}: {name}.{attribute} is {type(held).__name__}, no list of modules; write\n"
            f"    self.{attribute} = nnx.List([Block(...) for _ in range(...)])\n"
            f"and call them one after another in {name}.__call__"
        )
    return list(held)


def _variables(node: Any) -> dict[int, str]:
    found = {}
    for path, value in nnx.iter_graph(node):
        if isinstance(value, nnx.Variable) and not isinstance(value, nnx.RngState):
            found[id(value)] = "/".join(map(str, path))
    return found


def _refuse_shared(model: nnx.Module, attribute: str, blocks: list[nnx.Module]) -> None:
    """A parameter that two blocks, or a block and the rest, hold in common cannot live in one stage."""
    owners: dict[int, str] = {}
    faults = []
    for index, block in enumerate(blocks):
        for key, path in _variables(block).items():
            here = f"{attribute}/{index}/{path}"
            if key in owners:
                faults.append(Fault(here, f"is the same parameter as {owners[key]}", "give each block its own"))
            owners[key] = here
    setattr(model, attribute, nnx.List([]))
    for key, path in _variables(model).items():
        if key in owners:
            faults.append(
                Fault(
                    owners[key],
                    f"is the same parameter as {path}",
                    f"use it in {path.split('/')[0]} only, or copy it",
                )
            )
    raise_faults(faults)


def _same_kind(block: Graph, other: Graph) -> bool:
    """Whether two blocks are one program: the same static attributes, arrays of the same names, shapes and dtypes."""
    return block.paths == other.paths and block.shapes == other.shapes and block.graphdef == other.graphdef


def _refuse_frozen(model: nnx.Module) -> None:
    """A module made to be frozen beside others that are not: `nnx.Module.train` sets all of them free."""
    for attribute in ("use_running_average", "deterministic"):
        nodes = [("/".join(map(str, path)), node) for path, node in nnx.iter_graph(model)]
        set_to = {path: getattr(node, attribute, None) for path, node in nodes if isinstance(node, nnx.Module)}
        free = next((path for path, value in set_to.items() if value is False), None)
        if free is not None:
            raise_faults(
                Fault(
                    path,
                    f"is made with {attribute}=True and {free} with False, and training sets both to False",
                    f"freeze it where it is called, (x, {attribute}=True), and leave the argument out where it is made",
                )
                for path, value in set_to.items()
                if value is True
            )


def _refuse_written(written: Iterable[str], prefix: str) -> None:
    raise_faults(
        Fault(
            f"{prefix}{path}",
            "the model writes to it, and a stack of blocks sees one microbatch of one shard at a time",
            "train it without pipeline=, with microbatches=1 (all axes are then automatic)",
        )
        for path in written
    )
