"""The reference step: the same step on one device in plain JAX. It defines what is correct."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from shardlab.module.inner import programs_in
from shardlab.module.model import Model, Parts, computed, flowing
from shardlab.plan.optimizer import updated
from shardlab.plan.plan import Plan
from shardlab.step.calls import AFTER, BEFORE, CONTEXT, Loss, block_function, scalars
from shardlab.step.random import site_key

Arrays = dict[str, Any]


def one_device_mesh(plan: Plan) -> Mesh:
    """A mesh of one device with the plan's axis names, for constraints in the user's code."""
    names = plan.mesh.names
    return Mesh(
        np.array(jax.devices()[:1]).reshape((1,) * len(names)),
        names,
        axis_types=(AxisType.Auto,) * len(names),
    )


def reference_loss(
    model: Model,
    loss: Loss,
    values: Arrays,
    batch: Any,
    key: jax.Array | None,
    dtype: str,
    *,
    train: bool = True,
) -> tuple[jax.Array, tuple[jax.Array, Arrays]]:
    """Loss sum over the batch, its weight, and the buffers afterwards: the model as the user wrote it.

    With `Model.parts` these are called one after another, and the sums of the blocks' auxiliary losses are part of the
    loss sum; without, the model is called whole.
    """

    def site(index: int) -> jax.Array | None:
        return None if key is None else site_key(key, index)

    written: Arrays = {}
    auxiliary: Any = 0.0
    if model.parts is None:
        y, written = model.forward(values, batch, site(BEFORE), train)
    else:
        y, auxiliary = composed(model.parts, values, batch, site, dtype, train=train)
    total, weight = scalars(loss(y, batch))
    return total + auxiliary, (weight, written)


def composed(
    parts: Parts, values: Arrays, batch: Any, site: Callable[[int], Any], dtype: str, *, train: bool
) -> tuple[Any, Any]:
    """y of the parts called one after another, and the sum of the blocks' auxiliary losses."""
    x = flowing(parts.before(values, batch, site(BEFORE), train), dtype)
    blocks = [block_function(parts, kind, dtype, train) for kind in range(len(parts.blocks))]
    c = None if parts.context is None else parts.context(values, batch, site(CONTEXT), train)
    auxiliary: Any = 0.0
    for index, layer in enumerate(parts.layers):
        mine = {inner: values[path] for inner, path in layer.items()}
        x, pair = blocks[parts.kinds[index]](mine, x, c, site(1 + index))
        auxiliary += 0.0 if pair is None else pair[0]
    return parts.after(values, x, batch, site(AFTER), train), auxiliary


class ReferenceStep:
    """One train step on one device: whole batch, no sharding, no microbatches, the user's own tree.

    It computes in float32 at least. Of a bfloat16 step it takes the parameters as that rounds them, and nothing else:
    a sum in bfloat16 over every token of the batch would be further from the gradient than the step is.

    Attributes:
      parameters, buffers: by the user's paths.
      optimizer: the optimizer's state on the user's tree.
    """

    def __init__(
        self, model: Model, loss: Loss, optimizer: optax.GradientTransformation, plan: Plan, seed: int
    ) -> None:
        dtype = str(jnp.promote_types(plan.dtype, jnp.float32))
        self._model, self._dtype, self._mesh = model, dtype, one_device_mesh(plan)
        kinds = {parameter.path: parameter.dtype for parameter in plan.parameters}
        with jax.set_mesh(self._mesh):
            values = jax.jit(model.initialise)(jax.random.key(seed))
        self.parameters = {path: jnp.asarray(values[path], kinds[path]) for path in model.parameters}
        self.buffers = {path: values[path] for path in model.buffers}
        self.optimizer = optimizer.init(model.tree(self.parameters))
        self._key = jax.random.key(seed)
        self._steps = 0

        def gradients(parameters: Arrays, buffers: Arrays, batch: Any, key: jax.Array) -> Any:
            def mean(parameters: Arrays) -> Any:
                total, (weight, written) = reference_loss(model, loss, {**parameters, **buffers}, batch, key, dtype)
                return total / weight, written

            cast = {
                path: value.astype(computed(value.dtype, plan.dtype)).astype(computed(value.dtype, dtype))
                for path, value in parameters.items()
            }
            (value, written), gradient = jax.value_and_grad(mean, has_aux=True)(cast)
            return value, {path: gradient[path].astype(parameters[path].dtype) for path in gradient}, written

        def update(parameters: Arrays, gradient: Arrays, state: Any, value: jax.Array) -> Any:
            new, state = updated(optimizer, model.tree(gradient), state, model.tree(parameters), value)
            return model.flat(new), state

        self._gradients, self._update = jax.jit(gradients), jax.jit(update)

    def outputs(self, batch: Any) -> tuple[Any, Any]:
        """y of the model called whole, and of its parts called one after another; dropout off, present parameters.

        Raises:
          Exception: what the model raises when called with the batch.
        """
        model, dtype, parts = self._model, self._dtype, self._model.parts
        assert parts is not None

        def both(parameters: Arrays, buffers: Arrays, batch: Any) -> tuple[Any, Any]:
            values = {path: value.astype(computed(value.dtype, dtype)) for path, value in parameters.items()} | buffers
            whole, _ = model.forward(values, batch, None, False)
            return whole, composed(parts, values, batch, lambda index: None, dtype, train=False)[0]

        with jax.set_mesh(self._mesh):
            return jax.jit(both)(self.parameters, self.buffers, batch)

    def gradients(self, batch: Any) -> tuple[jax.Array, Arrays]:
        """Loss and gradients at the present parameters."""
        with jax.set_mesh(self._mesh):
            value, gradient, self._written = self._gradients(self.parameters, self.buffers, batch, self.key)
        return value, gradient

    def __call__(self, batch: Any) -> tuple[jax.Array, Arrays]:
        """One step; the loss and the gradients that it used."""
        value, gradient = self.gradients(batch)
        self.update(gradient, value)
        return value, gradient

    def update(self, gradient: Arrays, value: jax.Array) -> None:
        """Goes on from the batch that `gradients` was last given, by a gradient and a loss."""
        self.parameters, self.optimizer = self._update(self.parameters, gradient, self.optimizer, value)
        self.buffers = {**self.buffers, **self._written}
        self._steps += 1

    @property
    def key(self) -> jax.Array:
        """The random key of the next step."""
        return jax.random.fold_in(self._key, self._steps)


def narrowest(model: Model, loss: Loss, plan: Plan, batch: Any) -> str | None:
    """The dtype of 16 bits that the model itself computes something in, where the plan's is wider; or None."""
    if jnp.finfo(plan.dtype).bits <= 16:
        return None
    values = {
        path: jax.ShapeDtypeStruct(leaf.shape, computed(leaf.dtype, plan.dtype))
        for path, leaf in model.parameters.items()
    }

    def total(values: Arrays, batch: Any, key: jax.Array) -> Any:
        return reference_loss(model, loss, values, batch, key, plan.dtype)[0]

    with jax.set_mesh(one_device_mesh(plan)):
        key = jax.eval_shape(lambda: jax.random.key(0))
        closed = jax.make_jaxpr(total)({**values, **model.buffers}, batch, key)
    dtypes = {str(dtype) for dtype in _dtypes(closed.jaxpr)}
    return next((name for name in ("bfloat16", "float16") if name in dtypes), None)


def _dtypes(jaxpr: Any) -> Iterator[Any]:
    """The dtypes of everything that a jaxpr computes, calls and loops included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.dtype for var in equation.outvars if hasattr(var.aval, "dtype"))
        for program in programs_in(equation):
            yield from _dtypes(program)
