"""A microbatch on its way through a model in parts, traced: shapes, what its blocks keep, what they take.

Shapes are those on one shard of the batch, as if no automatic axis split them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax

from shardlab.mesh.build import abstract_mesh
from shardlab.mesh.spec import MeshSpec
from shardlab.module.flops import trained_flops
from shardlab.module.model import Model, Parts, computed, flowing, split_auxiliary
from shardlab.module.residuals import BlockVjp, rematerialised, residual_bytes, residual_shapes
from shardlab.module.split import Split
from shardlab.pipeline.stages import LayerCosts
from shardlab.plan.check import check_flow
from shardlab.plan.lookups import looked_up
from shardlab.plan.readers import read_by
from shardlab.plan.vocabulary import shared_by_example
from shardlab.plan.whole import kept_whole


class Microbatch:
    """Some examples that enter a model in parts.

    Args:
      model: with parts.
      batch: shapes of the global batch.
      mesh: for constraints in the user's code.
      rows: how many examples.
      dtype: what the step computes in.

    Attributes:
      values: shapes of all arrays by path, in the dtype that they are computed with.
      examples: shapes.
      key: of a random key.
    """

    def __init__(self, model: Model, batch: Any, mesh: MeshSpec, rows: int, dtype: str) -> None:
        assert model.parts is not None
        self.model, self.parts, self.rows, self.dtype = model, model.parts, rows, dtype
        self._batch, self._mesh = batch, mesh
        self.key = jax.eval_shape(lambda: jax.random.key(0))
        kinds = {path: computed(leaf.dtype, dtype) for path, leaf in model.parameters.items()}
        self.values: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(leaf.shape, kinds.get(path, leaf.dtype))
            for path, leaf in {**model.parameters, **model.buffers}.items()
        }
        self.examples = self._examples(rows)

    @cached_property
    def x(self) -> Any:
        """Shapes of what enters the blocks."""
        return self._entering(self.rows)

    @cached_property
    def c(self) -> Any:
        """Shapes of the context; None where the model has none."""
        context = self.parts.context
        return None if context is None else self._shapes(context, self.values, self.examples)

    @cached_property
    def read_by(self) -> dict[str, tuple[str, ...]]:
        """By path, those of before, context and after that read an array."""
        functions, others = self._outer()
        with jax.sharding.use_abstract_mesh(abstract_mesh(self._mesh)):
            return read_by(functions, self.values, *others)

    def looked_up(self) -> dict[str, frozenset[int]]:
        """By path, the dims along which an array is looked up in; of blocks by those of the first of each kind."""
        functions, others = self._outer()
        found: dict[str, frozenset[int]] = {}
        with jax.sharding.use_abstract_mesh(abstract_mesh(self._mesh)):
            each = [looked_up(function, self.values, *others) for function in functions.values()]
            for kind in range(len(self.parts.blocks)):
                paths = self.parts.layers[self.parts.kinds.index(kind)]
                dims = looked_up(self._block(kind), self._layer(kind), self.x, self.c, self.key)
                each.append({paths[inner]: along for inner, along in dims.items()})
        for dims in each:
            found |= {path: found.get(path, frozenset()) | along for path, along in dims.items()}
        return found

    def kept_whole(self, axes: int) -> set[str]:
        """What is computed along dims that are kept whole, beside so many automatic axes."""
        functions, others = self._outer()
        found: set[str] = set()
        with jax.sharding.use_abstract_mesh(abstract_mesh(self._mesh)):
            for function in functions.values():
                found |= kept_whole(function, self.values, *others, axes=axes)
            for kind in range(len(self.parts.blocks)):
                found |= kept_whole(self._block(kind), self._layer(kind), self.x, self.c, self.key, axes=axes)
        return found

    def _outer(self) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
        """Before, context and after as functions of ``(values, *others)``, and the others."""
        parts = self.parts
        functions: dict[str, Callable[..., Any]] = {
            "before": lambda v, x, b, k: parts.before(v, b, k, True),
            "after": lambda v, x, b, k: parts.after(v, x, b, k, True),
        }
        if (context := parts.context) is not None:
            functions["context"] = lambda v, x, b, k: context(v, b, k, True)
        return functions, (self.x, self.examples, self.key)

    def not_by_example(self, stages: int) -> str | None:
        """The first array of x whose leading dim is not the examples, so that stages cannot share them; or None."""
        if self.rows % stages:
            return None
        share = self.rows // stages
        return shared_by_example(self._entering(share), self.x, share, self.rows)

    def kept_bytes(self, kind: int, remat: str, x_parts: int = 1) -> int:
        """What a block of the model's `kind` keeps for its backward, of x one of `x_parts` parts.

        Raises:
          DeclarationError: it changes the structure or the shapes of x.
        """
        with jax.sharding.use_abstract_mesh(abstract_mesh(self._mesh)):
            block = BlockVjp(self._block(kind), remat, context=self._context_is_trained)
            kept = residual_shapes(block, self._layer(kind), self.x, self.c, self.key)
        of_x = tuple(leaf for leaf, is_x in zip(kept, block.stores_x, strict=True) if is_x)
        return residual_bytes(kept) - residual_bytes(of_x) + residual_bytes(of_x) // x_parts

    def cut_bytes(self, kind: int, remat: str) -> int:
        """What a block of the model's `kind` keeps from I to W, beside that, where its backward is split."""
        arrays, paths = self._layer(kind), self.parts.layers[self.parts.kinds.index(kind)]
        layer = {inner: value for inner, value in arrays.items() if paths[inner] in self.model.parameters}
        extra = {inner: value for inner, value in arrays.items() if inner not in layer}, self.key
        run = self._block(kind)
        block = BlockVjp(lambda w, x, c, e: run({**w, **e[0]}, x, c, e[1]), remat, context=self._context_is_trained)

        def backward(kept: Any, dy: Any) -> tuple[Any, Any]:
            stored, layer, c, extra = kept
            dlayer, dx, dc = block.backward(stored, layer, c, extra, dy)
            return (dx, dc), dlayer

        with jax.sharding.use_abstract_mesh(abstract_mesh(self._mesh)):
            kept = residual_shapes(block, layer, self.x, self.c, extra), layer, self.c, extra
            split = Split(backward, kept, self.x)
            cut = jax.eval_shape(lambda *args: split.first(*args)[1], kept, self.x)
        return residual_bytes(tuple(jax.tree.leaves(cut)))

    def costs(self, remat: str) -> LayerCosts:
        """Operations in each part of the model, forward and backward; those of the loss are not known here."""
        parts, values, x, c = self.parts, self.values, self.x, self.c
        outer = {path: values[path] for path in self.model.parameters if path not in parts.block_paths}
        others = values, self.examples, self.key

        def of_block(kind: int) -> float:
            layer, run = self._layer(kind), rematerialised(self._block(kind), remat)
            paths = parts.layers[parts.kinds.index(kind)]
            trained = {inner: value for inner, value in layer.items() if paths[inner] in self.model.parameters}
            found = trained_flops(
                lambda wx, w, c, k: run({**w, **wx[0]}, wx[1], c, k), (trained, x), layer, c, self.key
            )
            return float(max(found, 1))  # a block without a product takes some time too

        with jax.sharding.use_abstract_mesh(abstract_mesh(self._mesh)):
            before = trained_flops(lambda outer, v, b, k: parts.before({**v, **outer}, b, k, True), outer, *others)
            blocks = [of_block(kind) for kind in range(len(parts.blocks))]
            after = trained_flops(
                lambda wx, v, b, k: parts.after({**v, **wx[0]}, wx[1], b, k, True), (outer, x), *others
            )
        return LayerCosts(tuple(blocks[kind] for kind in parts.kinds), before, after)

    @property
    def _context_is_trained(self) -> bool:
        """Whether the context has a gradient."""
        return any("context" in self.read_by[path] for path in self.model.parameters)

    def _examples(self, rows: int) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), self._batch)

    def _entering(self, rows: int) -> Any:
        def before(values: Any, batch: Any, key: Any, train: bool) -> Any:
            return flowing(self.parts.before(values, batch, key, train), self.dtype)

        return self._shapes(before, self.values, self._examples(rows))

    def _shapes(self, function: Callable[..., Any], values: Mapping[str, Any], examples: Any) -> Any:
        with jax.sharding.use_abstract_mesh(abstract_mesh(self._mesh)):
            return jax.eval_shape(lambda v, b, k: function(v, b, k, True), values, examples, self.key)

    def _layer(self, kind: int) -> dict[str, Any]:
        """Shapes of the arrays of the first block of a kind."""
        return {inner: self.values[path] for inner, path in self.parts.layers[self.parts.kinds.index(kind)].items()}

    def _block(self, kind: int) -> Callable[..., tuple[Any, Any]]:
        """A block as a step runs it: ``(layer, x, c, key) -> (x, auxiliary loss)``."""
        block, name = self.parts.blocks[kind], block_names(self.parts)[kind]

        def run(w: Any, x: Any, c: Any, k: Any) -> tuple[Any, Any]:
            y, auxiliary = split_auxiliary(x, block(w, x, c, k, True))
            check_flow(x, y, name)
            return flowing(y, self.dtype), auxiliary

        return run


def block_names(parts: Parts) -> tuple[str, ...]:
    """What the blocks of each kind are called in messages: of several kinds, by the number of the first."""
    count = len(parts.blocks)
    return ("block",) if count == 1 else tuple(f"block {parts.kinds.index(kind)}" for kind in range(count))
