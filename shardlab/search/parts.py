"""The parts of a model as flat programs: traced once for a policy of remat, whatever the mesh.

Every part is traced with a few examples and with twice as many: all that it takes is then a constant (what weights
take) and a share for each example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from shardlab.mesh.build import abstract_mesh
from shardlab.mesh.spec import MeshSpec
from shardlab.module.model import Model, computed, flowing, split_auxiliary
from shardlab.module.residuals import BlockVjp, rematerialised
from shardlab.search.program import Program, flat

ROWS = 2
"""Examples of the smaller trace: JAX writes a program otherwise where a dim has size 1."""


@dataclass(frozen=True)
class Traced:
    """A function, traced: its program and what its inputs and results are.

    Attributes:
      program: the operations.
      ins: by input, what it is: (argument, path of the parameter or "").
      outs: by result, what it is.
    """

    program: Program
    ins: tuple[tuple[str, str], ...]
    outs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Part:
    """A part of a model, forward and backward.

    Attributes:
      name: "before", "block 0" (the number of its kind), "after", or "the model".
      forward: (values, x, c, ...) -> (x or loss, what is kept).
      backward: (what is kept, values, c, cotangent) -> (gradients, cotangents); of `before` and `after` both in one.
    """

    name: str
    forward: Traced
    backward: Traced | None


class Parts:
    """A model's parts for some examples.

    Args:
      model: as read.
      loss: ``(y, batch) -> (sum, weight)``.
      batch: shapes of the global batch.
      mesh: whose axes the user's code may name.
      dtype: what a step computes in.
    """

    def __init__(self, model: Model, loss: Callable[..., Any], batch: Any, mesh: MeshSpec, dtype: str) -> None:
        self.model, self.loss, self.batch, self.mesh, self.dtype = model, loss, batch, mesh, dtype
        kinds = {path: computed(leaf.dtype, dtype) for path, leaf in model.parameters.items()}
        self.values: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(leaf.shape, kinds.get(path, leaf.dtype))
            for path, leaf in {**model.parameters, **model.buffers}.items()
        }
        inside = model.parts.block_paths if model.parts is not None else frozenset()
        self.outside = {path: value for path, value in self.values.items() if path not in inside}

        self.pair = functools.cache(self._pair)
        self.x = functools.cache(self._x)
        self.c = functools.cache(self._c)

    def _pair(self, name: str, kind: int, remat: str) -> tuple[Part, Part]:
        """Of "before", "after", a "block" or the "whole" model, traced with a few examples and with twice as many."""
        make: Mapping[str, Callable[[int], Part]] = {
            "before": self.before,
            "after": self.after,
            "block": lambda rows: self.block(kind, remat, rows),
            "whole": lambda rows: self.whole(remat, rows),
        }
        return make[name](ROWS), make[name](2 * ROWS)

    def examples(self, rows: int) -> Any:
        """Shapes of some examples."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), self.batch)

    def _x(self, rows: int) -> Any:
        """Shapes of what flows between the blocks."""
        with self._meshed():
            return jax.eval_shape(self._before, self.values, self.examples(rows), self._key)

    def _c(self, rows: int) -> Any:
        """Shapes of the context, None without one."""
        parts = self.model.parts
        if parts is None or parts.context is None:
            return None
        context = parts.context
        with self._meshed():
            return jax.eval_shape(lambda v, b, k: context(v, b, k, True), self.values, self.examples(rows), self._key)

    def before(self, rows: int) -> Part:
        """`before`: x, and the gradients of its parameters."""
        outer, rest = self._trained_outside, self._not_trained_outside

        def backward(mine: Any, others: Any, batch: Any, key: Any, dx: Any) -> Any:
            _, pull = jax.vjp(lambda mine: self._before({**others, **mine}, batch, key), mine)
            return pull(dx)[0]

        given = (self.outside, self.examples(rows), self._key)
        forward = self._traced(self._before, given, ("values", "batch", "key"), "x")
        both = self._traced(
            backward, (outer, rest, *given[1:], self.x(rows)), ("values", "values", "batch", "key", "dx"), "gradient"
        )
        return Part("before", forward, both)

    def after(self, rows: int) -> Part:
        """`after` and the loss: forward alone, and with its derivatives in one program."""
        outer, rest = self._trained_outside, self._not_trained_outside
        after = self.model.parts.after if self.model.parts is not None else None
        assert after is not None

        def loss(mine: Any, others: Any, x: Any, batch: Any, key: Any) -> Any:
            total, weight = self.loss(after({**others, **mine}, x, batch, key, True), batch)
            return jnp.asarray(total, jnp.promote_types(jnp.result_type(total), jnp.float32)), weight

        def both(mine: Any, others: Any, x: Any, batch: Any, key: Any) -> Any:
            total, pull, weight = jax.vjp(lambda mine, x: loss(mine, others, x, batch, key), mine, x, has_aux=True)
            gradient, dx = pull(jnp.ones_like(total))
            return gradient, dx, total, weight

        given = (outer, rest, self.x(rows), self.examples(rows), self._key)
        names = ("values", "values", "x", "batch", "key")
        return Part(
            "after",
            self._traced(lambda *args: loss(*args)[0], given, names, "loss"),
            self._traced(both, given, names, ("gradient", "dx", "loss", "loss")),
        )

    def block(self, kind: int, remat: str, rows: int) -> Part:
        """A block of a kind under a policy, as the engine runs it: forward, and backward from what it kept."""
        parts = self.model.parts
        assert parts is not None
        paths = parts.layers[parts.kinds.index(kind)]
        layer = {inner: self.values[path] for inner, path in paths.items() if path in self.model.parameters}
        frozen = {inner: self.values[path] for inner, path in paths.items() if inner not in layer}
        x, c, key = self.x(rows), self.c(rows), self._key
        run = parts.blocks[kind]

        def block(layer: Any, x: Any, c: Any, extra: Any) -> Any:
            y, auxiliary = split_auxiliary(x, run({**layer, **extra[0]}, x, c, extra[1], True))
            return flowing(y, self.dtype), auxiliary

        vjp = BlockVjp(block, remat, context=False)
        given = (layer, x, c, (frozen, key))
        with self._meshed():
            (y, _), kept = jax.eval_shape(vjp.forward, *given)
        stores_x = vjp.stores_x

        def forward(layer: Any, x: Any, c: Any, extra: Any) -> Any:
            (y, _), stored = vjp.forward(layer, x, c, extra)
            return y, stored

        def backward(stored: Any, layer: Any, c: Any, extra: Any, dy: Any) -> Any:
            dlayer, dx, _ = vjp.backward(stored, layer, c, extra, dy)
            return dlayer, dx

        there = self._traced(forward, given, ("values", "x", "c", "frozen"), ("x", "kept"), paths)
        outs = tuple(
            ("kept x" if stores_x[place - len(jax.tree.leaves(y))] else "kept", path)
            if what == "kept"
            else (what, path)
            for place, (what, path) in enumerate(there.outs)
        )
        back = self._traced(
            backward,
            (kept, layer, c, (frozen, key), y),
            ("kept", "values", "c", "frozen", "dx"),
            ("gradient", "dx"),
            paths,
        )
        return Part(f"block {kind}", Traced(there.program, there.ins, outs), back)

    def whole(self, remat: str, rows: int) -> Part:
        """A model without parts: the loss, and its gradients in one program."""
        trained = {path: value for path, value in self.values.items() if path in self.model.parameters}
        rest = {path: value for path, value in self.values.items() if path not in trained}

        def loss(mine: Any, others: Any, batch: Any, key: Any) -> Any:
            forward = rematerialised(lambda mine: self.model.forward({**others, **mine}, batch, key, True)[0], remat)
            total, weight = self.loss(forward(mine), batch)
            return jnp.asarray(total, jnp.promote_types(jnp.result_type(total), jnp.float32)), weight

        def both(mine: Any, others: Any, batch: Any, key: Any) -> Any:
            (total, weight), gradient = jax.value_and_grad(loss, has_aux=True)(mine, others, batch, key)
            return gradient, total, weight

        given = (trained, rest, self.examples(rows), self._key)
        names = ("values", "values", "batch", "key")
        return Part(
            "the model",
            self._traced(lambda *args: loss(*args)[0], given, names, "loss"),
            self._traced(both, given, names, ("gradient", "loss", "loss")),
        )

    # Tracing.

    @cached_property
    def _key(self) -> Any:
        return jax.eval_shape(lambda: jax.random.key(0))

    def _meshed(self) -> Any:
        return jax.sharding.use_abstract_mesh(abstract_mesh(self.mesh))

    @property
    def _trained_outside(self) -> dict[str, Any]:
        return {path: value for path, value in self.outside.items() if path in self.model.parameters}

    @property
    def _not_trained_outside(self) -> dict[str, Any]:
        return {path: value for path, value in self.outside.items() if path not in self.model.parameters}

    def _before(self, values: Any, batch: Any, key: Any) -> Any:
        parts = self.model.parts
        assert parts is not None
        return flowing(parts.before(values, batch, key, True), self.dtype)

    def _traced(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        names: Sequence[str],
        made: str | Sequence[str],
        inner: Mapping[str, str] | None = None,
    ) -> Traced:
        """A function traced, its inputs and results named; `inner` gives the path of what a block calls its own."""
        flat_args, treedef = jax.tree.flatten(tuple(args))
        with self._meshed():
            closed, out = jax.make_jaxpr(
                lambda *leaves: function(*jax.tree.unflatten(treedef, leaves)), return_shape=True
            )(*flat_args)

        def named(trees: Sequence[Any], names: Sequence[str]) -> tuple[tuple[str, str], ...]:
            found = []
            for tree, name in zip(trees, names, strict=True):
                for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
                    path = str(getattr(keys[0], "key", "")) if keys and name in ("values", "gradient") else ""
                    found.append((name, (inner or {}).get(path, path)))
            return tuple(found)

        outs = (out,) if isinstance(made, str) else out
        made = (made,) if isinstance(made, str) else made
        return Traced(flat(closed), named(args, names), named(outs, made))
