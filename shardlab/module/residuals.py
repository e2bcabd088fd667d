"""What a block's forward must keep for its backward: found by tracing, so that nothing else is stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Run = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
"""``(layer, x, c, extra) -> (x, auxiliary)``; differentiated in layer, x and (if asked) floating c, never in extra.

The auxiliary loss is (sum, weight), or None; the backward takes the derivative of its sum to be 1.
"""

REMAT = ("none", "full")
POLICIES = tuple(
    name
    for name in (
        "dots_saveable",
        "dots_with_no_batch_dims_saveable",
        "everything_saveable",
        "nothing_saveable",
    )
    if hasattr(jax.checkpoint_policies, name)
)


def rematerialised(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`function` keeping for its backward what the policy named `remat` says."""
    if remat == "none":
        return function
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    return jax.checkpoint(function, policy=policy)


def differentiable(tree: Any) -> list[Any]:
    """The floating point arrays of a tree: what a context has a gradient in, whatever masks and positions are beside.

    >>> differentiable({"bias": jnp.ones(2), "mask": jnp.ones(2, bool)})
    [Array([1., 1.], dtype=float32)]
    """
    return [leaf for leaf in jax.tree.leaves(tree) if _is_floating(leaf)]


def _with_differentiable(tree: Any, given: list[Any]) -> Any:
    """`tree` with `given` in place of its `differentiable` arrays."""
    left = iter(given)
    return jax.tree.map(lambda leaf: next(left) if _is_floating(leaf) else leaf, tree)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf), jnp.inexact)


class BlockVjp:
    """The forward of a block that hands out its residuals, and the backward that takes them.

    A residual that is an input which the backward is given again (a parameter, the context, a key) is not stored.
    `forward` must be traced before `backward`.

    Attributes:
      stores_x: of each stored array, whether it is an array of x; known once `forward` has been traced.
    """

    def __init__(self, run: Run, remat: str, *, context: bool) -> None:
        self._run, self._remat, self._context = run, remat, context
        self._recipe: tuple[Any, tuple[tuple[bool, int], ...]] | None = None
        self._cotangent: tuple[Any, Any] | None = None  # dtypes of the auxiliary loss
        self.stores_x: tuple[bool, ...] = ()

    def forward(self, layer: Any, x: Any, c: Any, extra: Any) -> tuple[tuple[Any, Any], tuple[jax.Array, ...]]:
        """The block's output, and the arrays its backward needs beside layer, c and extra."""
        if self._context:

            def run(layer: Any, x: Any, given: list[Any]) -> tuple[Any, Any]:
                return self._run(layer, x, _with_differentiable(c, given), extra)

            y, pull = jax.vjp(rematerialised(run, self._remat), layer, x, differentiable(c))
        else:
            function = rematerialised(lambda layer, x: self._run(layer, x, c, extra), self._remat)
            y, pull = jax.vjp(function, layer, x)
        if y[1] is not None:
            # The sum is part of the loss as it is, the weight is a constant.
            self._cotangent = jnp.result_type(y[1][0]), jnp.result_type(y[1][1])
        leaves, treedef = jax.tree.flatten(pull)
        known = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves((layer, c, extra)))}
        stored: dict[int, jax.Array] = {}
        places = []
        for leaf in leaves:
            if id(leaf) in known:
                places.append((False, known[id(leaf)]))
            else:
                stored.setdefault(id(leaf), leaf)
                places.append((True, list(stored).index(id(leaf))))
        self._recipe = treedef, tuple(places)
        entered = {id(leaf) for leaf in jax.tree.leaves(x)}
        self.stores_x = tuple(name in entered for name in stored)
        return y, tuple(stored.values())

    def backward(self, stored: tuple[jax.Array, ...], layer: Any, c: Any, extra: Any, dy: Any) -> tuple[Any, Any, Any]:
        """Cotangents of layer, x and `differentiable` c (None unless asked for), for the cotangent of the output."""
        assert self._recipe is not None, "the forward has not been traced"
        treedef, places = self._recipe
        known = jax.tree.leaves((layer, c, extra))
        pull = jax.tree.unflatten(treedef, [stored[i] if kept else known[i] for kept, i in places])
        auxiliary = self._cotangent and tuple(
            jnp.full((), value, dtype) for value, dtype in zip((1, 0), self._cotangent, strict=True)
        )
        out = pull((dy, auxiliary))
        return out[0], out[1], out[2] if self._context else None


def residual_shapes(block: BlockVjp, layer: Any, x: Any, c: Any, extra: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of what one block stores for one microbatch."""
    return tuple(jax.eval_shape(lambda *args: block.forward(*args)[1], layer, x, c, extra))


def residual_bytes(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> int:
    """Bytes of what one block stores for one microbatch."""
    return sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes)
