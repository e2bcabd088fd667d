"""Arrays that are not trained: where they lie between steps, and how many bytes a device really holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rules
from shardlab.step.compile import compile_train_step
from shardlab.testing import assert_matches_reference

ROWS = {"x": np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)}
PARTS = Pipeline(before="embed", blocks="blocks", after="head")
DATA = MeshSpec({"data": 2, "tensor": 2}, batch="data", target="cpu:4")
STAGES = MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage")
RULES = Rules(
    (("table", P("tensor", "data")), ("blocks/*/scale", P("data")), ("blocks/*/shift", P("tensor")), ("**", None))
)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.scale, self.shift = nnx.Variable(jnp.linspace(1, 2, 4)), jnp.linspace(0, 1, 4)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.up(x)) * self.scale[...] + self.shift


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table, self.blocks = jnp.linspace(-1, 1, 24).reshape(4, 6), nnx.List([Block(rngs) for _ in range(3)])

    def embed(self, batch: Any) -> jax.Array:
        return batch["x"]

    def head(self, x: jax.Array) -> jax.Array:
        return x @ self.table

    def __call__(self, batch: Any) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def squares(y: jax.Array, batch: Any) -> tuple[jax.Array, int]:
    return jnp.sum(y**2), y.shape[0]


@pytest.mark.parametrize(("mesh", "pipeline"), [(DATA, None), (STAGES, PARTS)], ids=["whole", "stages"])
def test_arrays_that_are_not_trained_lie_as_their_rules_say(mesh: MeshSpec, pipeline: Pipeline | None) -> None:
    optimizer = optax.adam(1e-2)
    plan = make_plan(
        Net, mesh=mesh, rules=RULES, optimizer=optimizer, batch=ROWS, pipeline=pipeline, microbatches=2, zero=3
    )
    state = compile_train_step(Net, squares, optimizer, plan, ROWS).init(0)
    real = {
        "parameters": state.parameters,
        "buffers": state.buffers,
        "optimizer_state": state.optimizer,
    }
    held = {
        name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for name, tree in real.items()
    }
    assert held == {name: plan.bytes_per_device()[name] for name in held}
    assert str(state.buffers["table"].sharding.spec) == str(P("tensor", "data"))  # type: ignore[attr-defined]
    assert_matches_reference(
        Net, squares, optimizer, ROWS, mesh=mesh, rules=RULES, pipeline=pipeline, microbatches=2, zero=3, steps=2
    )
