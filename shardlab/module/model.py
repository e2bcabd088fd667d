"""A model as the rest of shardlab sees it: arrays by path, and functions of them.

Shapes: B examples; every leaf of a batch has B as its leading dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from shardlab.mesh.faults import DeclarationError
from shardlab.module.pipeline import Pipeline
from shardlab.sharding.annotations import Annotation

Values = Mapping[str, Any]
"""Arrays by path, parameters and buffers together."""


@dataclass(frozen=True)
class Parts:
    """A model cut at its blocks.

    Attributes:
      layers: for each block, in order, the path of every array it holds by the path inside the block.
      before: ``(values, batch, key, train) -> x``.
      context: ``(values, batch, key, train) -> c``, or None.
      kinds: of each block, which kind it is; blocks of one kind are one program over arrays of the same shapes.
      blocks: by kind, ``(layer values by path inside the block, x, c, key, train) -> x``.
      after: ``(values, x, batch, key, train) -> y``.
    """

    layers: tuple[Mapping[str, str], ...]
    before: Callable[..., Any]
    context: Callable[..., Any] | None
    kinds: tuple[int, ...]
    blocks: tuple[Callable[..., Any], ...]
    after: Callable[..., Any]

    @property
    def block_paths(self) -> frozenset[str]:
        """Every path that belongs to some block."""
        return frozenset(path for layer in self.layers for path in layer.values())


@dataclass(frozen=True)
class Model:
    """The user's model, read once and without computing anything.

    Attributes:
      name: the class or function that the user wrote.
      parameters: what is trained, by path: shape and dtype.
      buffers: arrays that the model holds and that are not trained (batch statistics, tables), by path.
      annotations: what the module itself says of a parameter's sharding, by path.
      treedef: the structure of the user's own tree of parameters, leaves in the order of `parameters`.
      initialise: ``key -> values``; traceable, the numbers Flax itself gives for that key.
      forward: ``(values, batch, key, train) -> (y, buffers by path as they are afterwards)``.
      parts: the model cut at its blocks, where a `Pipeline` names them.
    """

    name: str
    parameters: Mapping[str, jax.ShapeDtypeStruct]
    buffers: Mapping[str, jax.ShapeDtypeStruct]
    annotations: Mapping[str, Annotation]
    treedef: Any
    initialise: Callable[[jax.Array], dict[str, Any]]
    forward: Callable[..., tuple[Any, dict[str, Any]]]
    parts: Parts | None

    def tree(self, values: Values) -> Any:
        """The user's own tree of parameters with the leaves `values`."""
        return jax.tree.unflatten(self.treedef, [values[path] for path in self.parameters])

    def flat(self, tree: Any) -> dict[str, Any]:
        """The leaves of a tree shaped like the user's, by path."""
        return dict(zip(self.parameters, self.treedef.flatten_up_to(tree), strict=True))


def abstract(tree: Any) -> Any:
    """The shapes and dtypes of a pytree of arrays; a dtype's width as JAX would hold it."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        aval = leaf if hasattr(leaf, "shape") else np.asarray(leaf)
        return jax.ShapeDtypeStruct(aval.shape, jax.dtypes.canonicalize_dtype(aval.dtype, allow_extended_dtype=True))

    return jax.tree.map(one, tree)


def computed(kind: Any, dtype: str) -> str:
    """What a step in `dtype` computes with numbers of dtype `kind` in: for complex ones the complex dtype of its width.

    >>> computed("bfloat16", "float32"), computed("complex64", "float64"), computed("complex64", "bfloat16")
    ('float32', 'complex128', 'complex64')
    """
    if not jax.numpy.issubdtype(kind, jax.numpy.complexfloating):
        return dtype
    return "complex128" if dtype == "float64" else "complex64"


def as_held(path: str, value: Any, held: Any) -> Any:
    """What a model writes to the array `held` at `path`, in its dtype.

    Raises:
      DeclarationError: it has another shape.
    """
    if value.shape != held.shape:
        raise DeclarationError(
            f"{path}: the model writes {list(value.shape)} to it, and it is {list(held.shape)}; keep its shape: a step "
            "is compiled once"
        )
    return value if value.dtype == held.dtype else value.astype(held.dtype)


def flowing(x: Any, dtype: str) -> Any:
    """What flows between blocks: floating point (or complex), in the dtype that the step computes in.

    Without this one layer that fixes its dtype when it is made (`nnx.Embed` does) would set the dtype of all blocks.
    """

    def one(keys: Any, leaf: Any) -> Any:
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise DeclarationError(
                f"before: x {path} has dtype {leaf.dtype}; what flows between blocks is floating point, other arrays "
                "belong in context(batch)"
            )
        return leaf.astype(computed(leaf.dtype, dtype))

    return jax.tree_util.tree_map_with_path(one, x)


def split_auxiliary(x: Any, out: Any) -> tuple[Any, Any]:
    """What a block returned, as (x, its auxiliary loss); None in place of a loss where it returned x alone.

    Args:
      x: what went into the block; tells x from ``(x, (sum, weight))`` by its structure.

    Raises:
      DeclarationError: what it returned beside x is not ``(sum, weight)``.
    """
    structure = str(jax.tree.structure(x))
    if isinstance(out, tuple) and len(out) == 2 and str(jax.tree.structure(out)) != structure:
        y, auxiliary = out
        if str(jax.tree.structure(y)) == structure:
            if isinstance(auxiliary, tuple) and len(auxiliary) == 2:
                return y, auxiliary
            raise DeclarationError(
                f"block: returns x and {jax.tree.structure(auxiliary)} beside it; beside x there is room for an "
                "auxiliary loss alone, as its sum and the weight that it is over: return (x, (sum, weight))"
            )
    return out, None


def call(function: Callable[..., Any], *args: Any, key: Any = None, train: bool) -> Any:
    """`function` of `args`, and of ``key``, ``train`` or ``deterministic`` where its signature has them."""
    return _offered(function, args, {"key": key, "train": train, "deterministic": not train})


def call_after(function: Callable[..., Any], *args: Any, batch: Any, key: Any = None, train: bool) -> Any:
    """Like `call`; it is given ``batch`` too if it has a parameter of that name, or needs one more than `args`."""
    offered = {"key": key, "train": train, "deterministic": not train}
    parameters = list(inspect.signature(function).parameters.values())
    places = [parameter for parameter in parameters if parameter.kind in _PLACES and parameter.name not in offered]
    if "batch" in [parameter.name for parameter in parameters if parameter not in places[: len(args)]]:
        offered["batch"] = batch
    elif len(places) > len(args) and places[len(args)].default is inspect.Parameter.empty:
        args = (*args, batch)
    return _offered(function, args, offered)


_PLACES = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _offered(function: Callable[..., Any], args: tuple[Any, ...], offered: Mapping[str, Any]) -> Any:
    """`function` of `args` and of those of `offered` that its signature names."""
    args, named = accepted(function, args, offered)
    return function(*args, **named)


def accepted(
    function: Callable[..., Any], args: tuple[Any, ...], offered: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and those of `offered` that the signature of `function` names: by position where that is possible.

    A flag that `nn.remat` or `jax.checkpoint` is told of by ``static_argnums`` must not come by keyword.

    >>> accepted(lambda x, mask=None, train=False, *, key: x, (1,), {"train": True, "key": 2, "other": 3})
    ((1, None, True), {'key': 2})
    """
    parameters = inspect.signature(function).parameters
    named = {name: value for name, value in offered.items() if name in parameters}
    given = list(args)
    places = [parameter for parameter in parameters.values() if parameter.kind in _PLACES]
    last = max((place for place, parameter in enumerate(places) if parameter.name in named), default=-1)
    for parameter in places[len(args) : last + 1]:
        if parameter.name not in named and parameter.default is inspect.Parameter.empty:
            break  # The call is wrong, and Python says so best.
        given.append(named.pop(parameter.name) if parameter.name in named else parameter.default)
    return tuple(given), named


def kinds_of(layers: Sequence[Any], same: Callable[[Any, Any], bool], list_name: str) -> tuple[int, ...]:
    """Of each block which kind it is, kinds being numbered as they come.

    Args:
      layers: whatever tells a block's kind.
      same: whether two blocks are of one kind.
      list_name: what the list of blocks is called.

    Raises:
      DeclarationError: there are more than `MAX_KINDS` kinds.
    """
    firsts: list[int] = []
    kinds = []
    for index, layer in enumerate(layers):
        kind = next((kind for kind, first in enumerate(firsts) if same(layers[first], layer)), len(firsts))
        firsts += [index] if kind == len(firsts) else []
        if len(firsts) > MAX_KINDS:
            raise DeclarationError(
                f"{list_name}/{index}: is a block of yet another kind, after {MAX_KINDS} others (a layer index, or a "
                "function of its own?), and every kind is a program in every stage; pass what differs as an array"
            )
        kinds.append(kind)
    return tuple(kinds)


MAX_KINDS = 8


def read_model(model: Any, batch: Any, pipeline: Pipeline | None = None) -> Model:
    """The user's model as arrays by path and functions of them; nothing is computed.

    Args:
      model: a function ``nnx.Rngs -> nnx.Module`` (the class with its arguments bound), a Linen module, a
        `shardlab.Functions`, or a `Model` already read.
      batch: a batch, or its `jax.ShapeDtypeStruct`s.
      pipeline: the names of the module's parts; needed for a pipeline and for storing layers stacked.

    Raises:
      DeclarationError: naming what the model lacks and the lines to add.
    """
    from flax import linen, nnx

    from shardlab.module.functions import Functions, read_functions
    from shardlab.module.linen_module import read_linen
    from shardlab.module.nnx_module import read_nnx

    if isinstance(model, Model):
        return model
    if isinstance(model, Functions):
        return read_functions(model, abstract(batch), pipeline)
    if isinstance(model, linen.Module):
        return read_linen(model, abstract(batch), pipeline)
    if isinstance(model, nnx.Module):
        name = type(model).__name__
        raise DeclarationError(
            f"model: an instance of {name} already holds its parameters, and shardlab creates them sharded from a "
            f"seed; pass the function that makes it: lambda rngs: {name}(..., rngs=rngs)"
        )
    if callable(model):
        return read_nnx(model, pipeline)
    raise DeclarationError(
        f"model: {type(model).__name__} is no model; pass a function nnx.Rngs -> nnx.Module, a Linen module, or "
        "shardlab.Functions(init=..., apply=...)"
    )
