"""The user's functions as the engine calls them: on some rows, with that site's key, constraints made legal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardlab.module.model import Model, Parts, flowing
from shardlab.plan.plan import Plan
from shardlab.step.constraints import drop_manual
from shardlab.step.random import batched_draws, rows_key, site_key
from shardlab.step.region import Region

Loss = Callable[[Any, Any], tuple[Any, Any]]
"""``(y, batch) -> (sum, weight)``."""

BEFORE, AFTER, CONTEXT = 0, -1, -2  # sites of `site_key`; block i is site 1 + i


class Calls:
    """`before`, `context`, `block`, `after` and the loss on `rows` examples.

    Keys are passed as ``(key data, first row)``: arrays, so that they may be residuals.
    """

    def __init__(self, model: Model, loss: Loss | None, plan: Plan, region: Region, *, train: bool) -> None:
        self._model, self._loss, self._region, self._train = model, loss, region, train
        self._dtype = plan.dtype
        self._draws: dict[tuple[str, int], frozenset[tuple[int, ...]]] = {}
        # Not left to XLA: it would carry x as the embedding left it, split over its features, and gather it in every
        # layer that normalises.
        self.flow_spec = region.automatic_part(plan.activation_spec or PartitionSpec())

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss to compute."""
        return self._loss is not None

    @property
    def _parts(self) -> Parts:
        assert self._model.parts is not None
        return self._model.parts

    def before(self, values: Any, batch: Any, key: Any, rows: int) -> Any:
        """x of the examples of `batch`."""

        def run(v: Any, b: Any, k: Any) -> Any:
            return flowing(self._parts.before(v, b, k, self._train), self._dtype)

        return self._constrain(self._call("before", run, (values, batch), key, BEFORE, rows))

    def context(self, values: Any, batch: Any, key: Any, rows: int) -> Any:
        """c of the examples of `batch`; None where the model has no context."""
        context = self._parts.context
        if context is None:
            return None
        return self._call("context", lambda v, b, k: context(v, b, k, self._train), (values, batch), key, CONTEXT, rows)

    def block(self, layer: Any, x: Any, c: Any, extra: Any, rows: int) -> Any:
        """x after one block; ``extra`` is (frozen arrays of the layer, index of the block, key data, first row)."""
        frozen, index, data, first = extra
        x = self._constrain(x)

        def run(layer: Any, x: Any, c: Any, k: Any) -> Any:
            return flowing(self._parts.block(layer, x, c, k, self._train), self._dtype)

        key = None if data is None else (data, first)
        return self._constrain(self._call("block", run, ({**layer, **frozen}, x, c), key, 1 + index, rows))

    def after(self, values: Any, x: Any, batch: Any, key: Any, rows: int) -> Any:
        """y of the examples of `batch`."""
        function = lambda v, x, b, k: self._parts.after(v, x, b, k, self._train)  # noqa: E731
        return self._call("after", function, (values, x, batch), key, AFTER, rows)

    def whole(self, values: Any, batch: Any, key: Any, rows: int) -> tuple[Any, dict[str, Any]]:
        """y and the buffers afterwards, for a model taken whole."""
        function = lambda v, b, k: self._model.forward(v, b, k, self._train)  # noqa: E731
        return self._call("the model", function, (values, batch), key, BEFORE, rows)

    def loss(self, y: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Sum and weight of the loss; the weight is a constant of the derivative."""
        assert self._loss is not None
        function = drop_manual(self._loss, self._region.manual, self._region.automatic_mesh)
        total, weight = function(y, batch)
        wide = jnp.promote_types(jnp.result_type(total), jnp.float32)
        return jnp.asarray(total, wide), jax.lax.stop_gradient(jnp.asarray(weight, wide))

    def _call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], key: Any, site: Any, rows: int
    ) -> Any:
        legal = drop_manual(function, self._region.manual, self._region.automatic_mesh)
        if key is None:
            return legal(*args, None)
        data, first = key
        plain = site_key(jax.random.wrap_key_data(data, impl="threefry2x32"), site)
        if not self._region.manual:
            return legal(*args, plain)
        draws = self._draws.get((name, rows))
        if draws is None:
            draws = self._draws[name, rows] = self._find_draws(name, function, args, rows)
        return legal(*args, rows_key(plain, first, rows, draws))

    def _find_draws(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], rows: int
    ) -> frozenset[tuple[int, ...]]:
        """Shapes of the draws that follow the batch; found by tracing with these rows and with twice as many."""

        def trace(count: int) -> Any:
            def shape(leaf: Any) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

            def scaled(leaf: Any) -> jax.ShapeDtypeStruct:
                if leaf.ndim and leaf.shape[0] == rows:
                    return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)
                return shape(leaf)

            # The first argument holds parameters; the others follow the batch where their leading dim is its rows.
            shapes = (jax.tree.map(shape, args[0]), *(jax.tree.map(scaled, arg) for arg in args[1:]))
            key = jax.eval_shape(lambda: jax.random.key(0))
            with jax.sharding.use_abstract_mesh(self._region.automatic_mesh):
                return jax.make_jaxpr(function)(*shapes, key).jaxpr

        return batched_draws(trace, rows, name)

    def _constrain(self, x: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.flow_spec), x)
