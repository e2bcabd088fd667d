"""The reference step, which defines what is correct, against training written out by hand in plain Flax and JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rules
from shardlab.step.reference import ReferenceStep, one_device_mesh
from tests.equivalence.cases import features

CONFIG = mlp.MLPConfig(num_layers=2)
ADAM = optax.adam(1e-2)
PARTS = Pipeline(before="embed", blocks="blocks", after="head")
REPLICATED = Rules((("**", None),))


def planned(model: Any, *, dtype: str = "float64") -> Plan:
    """On a mesh that the reference step must not use."""
    mesh = MeshSpec({"data": 64, "tensor": 8}, batch="data", target="tpu:v5p:8x8x8")
    return make_plan(model, mesh=mesh, rules=REPLICATED, optimizer=optax.sgd(0.1), batch=features(64), dtype=dtype)


def step_of(model: Any, pipeline: Pipeline | None = None, **more: Any) -> ReferenceStep:
    read = read_model(model, features(64), pipeline)
    return ReferenceStep(read, mlp.label_loss, ADAM, planned(model, **more), seed=4)


def test_three_steps_as_flax_users_write_them() -> None:
    with jax.enable_x64(True):
        own = CONFIG(nnx.Rngs(4))
        graphdef, params = nnx.split(own, nnx.Param)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        state = ADAM.init(params)
        batches = [{name: np.roll(value, i, axis=0)[:64] for name, value in features(67).items()} for i in range(3)]

        def loss(params: Any, batch: Any) -> jax.Array:
            logits = nnx.merge(graphdef, params)(batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

        steps = [step_of(CONFIG), step_of(CONFIG, PARTS)]

        @jax.jit
        def plain(params: Any, state: Any, batch: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = ADAM.update(gradient, state, params)
            return value, gradient, optax.apply_updates(params, updates), state

        for batch in batches:
            expected, gradient, params, state = plain(params, state, batch)
            for step in steps:
                found, gradients = step(batch)
                np.testing.assert_allclose(found, expected, rtol=1e-12)
                for path, value in nnx.to_flat_state(gradient):
                    name = "/".join(map(str, path))
                    np.testing.assert_allclose(gradients[name], value[...], rtol=1e-9, atol=1e-12, err_msg=name)
        for step in steps:
            for path, value in nnx.to_flat_state(params):
                name = "/".join(map(str, path))
                np.testing.assert_allclose(step.parameters[name], value[...], rtol=1e-8, atol=1e-10, err_msg=name)
            assert {next(iter(value.devices())) for value in step.parameters.values()} == {jax.devices()[0]}


class Counted(nnx.Module):
    """Dropout, and a buffer that every call writes to."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(12, 10, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, batch: Any) -> jax.Array:
        self.calls[...] += 1
        return self.layer(self.drop(batch["features"].astype(self.layer.kernel.dtype)))


def test_dropout_is_another_in_every_step_and_the_same_from_the_same_seed() -> None:
    first, second = (step_of(Counted, dtype="float32") for _ in range(2))
    batch = features(64)
    again = first.gradients(batch)[0]
    losses = []
    for _ in range(2):
        first.parameters = second.parameters
        losses.append(first(batch)[0])
    assert losses[0] == again == second(batch)[0]
    assert losses[1] != losses[0]
    assert first.buffers["calls"] == 2


def test_auxiliary_losses_are_added_to_the_sum() -> None:
    def block(layer: Any, x: jax.Array) -> Any:
        y = mlp.block(layer, x)
        return y, (0.1 * jnp.sum(y**2), len(y))

    model = Functions(init=lambda key: mlp.init(key, CONFIG), before=mlp.before, block=block, after=mlp.after)
    batch: Any = features(64)
    found, _ = step_of(model, dtype="float32").gradients(batch)

    @jax.jit
    def by_hand(params: Any) -> jax.Array:
        x, extra = mlp.before(params, batch), jnp.zeros(())
        for layer in params["blocks"]:
            x = mlp.block(layer, x)
            extra += 0.1 * jnp.sum(x**2)
        return (mlp.label_loss(mlp.after(params, x), batch)[0] + extra) / 64

    np.testing.assert_allclose(found, by_hand(mlp.init(jax.random.key(4), CONFIG)), rtol=1e-6)


def test_of_a_bfloat16_step_only_the_parameters_are_rounded() -> None:
    step = step_of(CONFIG, dtype="bfloat16")
    before = step.parameters
    _, gradients = step(features(64))
    for values in (before, gradients, step.parameters):
        assert {value.dtype for value in values.values()} == {jnp.dtype("float32")}
    # Computed in float32, from the parameters that a step in bfloat16 computes with.
    wide = step_of(CONFIG, dtype="float32")
    wide.parameters = {path: value.astype(jnp.bfloat16).astype(jnp.float32) for path, value in before.items()}
    for path, expected in wide(features(64))[1].items():
        np.testing.assert_array_equal(gradients[path], expected)
    assert any(not np.array_equal(wide.parameters[path], value) for path, value in step.parameters.items())


def test_a_mesh_of_one_device_has_every_axis() -> None:
    mesh = one_device_mesh(planned(CONFIG, dtype="float32"))
    assert mesh.shape == {"data": 1, "tensor": 1}
