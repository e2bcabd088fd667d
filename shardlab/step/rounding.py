"""How far the dtypes of a plan alone take its gradients from those in float32, measured on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardlab.module.model import Model, computed
from shardlab.plan.plan import Plan
from shardlab.step.calls import Loss
from shardlab.step.reference import one_device_mesh, reference_loss
from shardlab.step.region import rows_of

Arrays = dict[str, Any]
DRAWS = 16
_NEAR = float(jnp.finfo(jnp.bfloat16).eps)


def sizes_of(error: Any, gradient: Any) -> jax.Array:
    """[2]: the largest entry of an error, and its length along the gradient.

    A wrong scale or a part left out is along the gradient, where rounding, which knows no direction, has least.

    >>> sizes_of(jnp.array([3.0, -4.0]), jnp.array([2.0, 0.0]))
    Array([4., 3.], dtype=float32)
    """
    length = jnp.linalg.norm(gradient)
    along = jnp.abs(jnp.vdot(gradient, error)) / jnp.where(length > 0, length, 1)
    return jnp.stack([jnp.max(jnp.abs(error), initial=0), along])


def gradient_rounding(
    model: Model, loss: Loss, plan: Plan
) -> Callable[[Arrays, Arrays, Any, jax.Array], dict[str, np.ndarray]]:
    """``(parameters, buffers, batch, key) -> by path the sizes of an error`` that rounding makes: see `sizes_of`.

    The gradient in the plan's dtypes less that in float32 of the same program on one device. It takes the plan's
    microbatches and shards one after another, adds them up in float32, and rounds each shard's sum to `reduce_dtype`.
    The largest of `DRAWS`: at the parameters, and at some as near to them as rounding is, since at one point alone
    errors may cancel.
    """
    rows, count = plan.microbatch_rows, plan.num_microbatches
    wide = str(jnp.promote_types(plan.dtype, jnp.float32))

    def gradient(values: Arrays, buffers: Arrays, batch: Any, key: jax.Array, dtype: str, reduce_dtype: str) -> Arrays:
        def microbatch(held: Any, index: jax.Array) -> tuple[Any, None]:
            def total(values: Arrays) -> tuple[jax.Array, jax.Array]:
                examples, mine = rows_of(batch, index * rows, rows), jax.random.fold_in(key, index)
                summed, (weight, _) = reference_loss(model, loss, {**values, **buffers}, examples, mine, dtype)
                return summed, weight

            return jax.tree.map(
                lambda one, more: one + more.astype(one.dtype), held, jax.grad(total, has_aux=True)(values)
            ), None

        def shard(held: Any, first: jax.Array) -> tuple[Any, None]:
            (sums, weight), _ = jax.lax.scan(microbatch, zeros, first + jnp.arange(count))
            rounded = {path: value.astype(computed(value.dtype, reduce_dtype)) for path, value in sums.items()}
            return jax.tree.map(lambda one, more: one + more.astype(one.dtype), held, (rounded, weight)), None

        kinds = {path: computed(value.dtype, wide) for path, value in values.items()}
        zeros = {path: jnp.zeros(value.shape, kinds[path]) for path, value in values.items()}, jnp.zeros((), wide)
        (sums, weight), _ = jax.lax.scan(shard, zeros, jnp.arange(0, plan.batch_size // rows, count))
        return {path: value / weight for path, value in sums.items()}

    @jax.jit
    def errors(parameters: Arrays, buffers: Arrays, batch: Any, key: jax.Array) -> Arrays:
        narrow = {path: value.astype(computed(value.dtype, plan.dtype)) for path, value in parameters.items()}
        exact = {path: value.astype(computed(value.dtype, wide)) for path, value in narrow.items()}
        found = gradient(narrow, buffers, batch, key, plan.dtype, plan.reduce_dtype)
        expected = gradient(exact, buffers, batch, key, wide, wide)
        return {path: sizes_of(found[path] - expected[path], expected[path]) for path in found}

    def largest(parameters: Arrays, buffers: Arrays, batch: Any, key: jax.Array) -> dict[str, np.ndarray]:
        rng, found = np.random.default_rng(0), list[Arrays]()
        with jax.set_mesh(one_device_mesh(plan)):
            for draw in range(DRAWS):
                away = _NEAR if draw else 0.0
                near = {
                    path: value * jnp.asarray(1 + away * rng.uniform(-1, 1, value.shape), value.dtype)
                    for path, value in parameters.items()
                }
                found.append(errors(near, buffers, batch, key))
        return {path: np.max([of[path] for of in found], axis=0) for path in parameters}

    return largest
