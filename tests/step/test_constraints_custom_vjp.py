"""Rules of the user's own for a derivative, inside a manual region: their constraints and batch sums made legal too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.batch_sum import batch_sum
from shardlab.step.compile import compile_train_step
from shardlab.step.constraints import uses_batch_sum
from shardlab.testing import assert_matches_reference

WIDTH = 6


def constrained(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P("data", "tensor"))


def centred(x: jax.Array) -> jax.Array:
    return x - batch_sum(x.sum(0)) / batch_sum(jnp.ones(len(x), x.dtype).sum())


@jax.custom_vjp
def centre(x: jax.Array) -> jax.Array:
    return centred(x)


centre.defvjp(lambda x: (centred(x), None), lambda _, g: (centred(g),))


@jax.custom_vjp
def only_backward(x: jax.Array) -> jax.Array:
    return x


only_backward.defvjp(lambda x: (x, None), lambda _, g: (centred(g),))


@jax.custom_vjp
def slope(x: jax.Array, scale: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return constrained(jnp.tanh(x * scale)), labels + 1


def slope_forward(x: jax.Array, scale: jax.Array, labels: jax.Array) -> Any:
    return slope(x, scale, labels), (constrained(jnp.tanh(x * scale)), x, scale, labels)


def slope_backward(kept: Any, g: Any) -> Any:
    y, x, scale, labels = kept
    inner = constrained(g[0] * (1 - y * y))
    return inner * scale, jnp.sum(inner * x), np.zeros(labels.shape, jax.dtypes.float0)


slope.defvjp(slope_forward, slope_backward)


@jax.custom_jvp
def sine(x: jax.Array) -> jax.Array:
    return constrained(jnp.sin(x))


sine.defjvp(lambda given, tangents: (sine(given[0]), constrained(tangents[0] * jnp.cos(given[0]))))


@jax.custom_vjp
def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return constrained(a * b)


product.defvjp(lambda a, b: (product(a, b), (a, b)), lambda kept, g: (g * kept[1], constrained(2 * g * kept[0]) / 2))

LABELS = np.arange(WIDTH)
LAYERS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "batch sums": lambda w, x: centre(jnp.tanh(x @ w)),
    "a batch sum in the backward only": lambda w, x: only_backward(jnp.tanh(x @ w)),
    "constraints": lambda w, x: slope(x @ w, w[0, 0], LABELS)[0],
    "constraints in a scan": lambda w, x: jax.lax.scan(
        lambda x, _: (slope(x @ w, w[0, 0], LABELS)[0], None), x @ w, None, length=2
    )[0],
    "constraints in a checkpoint": jax.checkpoint(lambda w, x: slope(x @ w, w[0, 0], LABELS)[0]),
    "batch sums in a jit in a checkpoint": jax.checkpoint(jax.jit(lambda w, x: centre(jnp.tanh(x @ w)))),
    "a rule for the tangent": lambda w, x: sine(x @ w),
    "of one array twice": lambda w, x: product(x @ w, x @ w) + product(*[jnp.tanh(x @ w)] * 2),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 1}, {"data": 2, "tensor": 2}])
def test_the_same_as_on_one_device(name: str, sizes: dict[str, int]) -> None:
    model = Functions(
        init=lambda key: {"w": jax.random.normal(key, (WIDTH, WIDTH)) * 0.3},
        apply=lambda params, batch: LAYERS[name](params["w"], batch["x"]) @ params["w"],
    )
    mesh = MeshSpec(sizes, batch="data", target="cpu:4")
    batch = {"x": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}
    assert_matches_reference(
        model,
        lambda y, batch: (jnp.sum(y**2), len(y)),
        optax.sgd(0.1),
        batch,
        mesh=mesh,
        rules=Rules((Rule("w", P()),)),
        steps=2,
    )


def test_a_batch_sum_in_a_rule_is_found() -> None:
    x = jnp.ones((4, WIDTH))
    assert uses_batch_sum(jax.make_jaxpr(only_backward)(x).jaxpr)
    assert not uses_batch_sum(jax.make_jaxpr(jax.nn.relu)(x).jaxpr)
    model = Functions(
        init=lambda key: {"w": jnp.eye(WIDTH)},
        apply=lambda params, batch: only_backward(batch["x"] @ params["w"]),
    )
    mesh, batch, sgd = MeshSpec({"data": 2}, batch="data", target="cpu:2"), {"x": np.ones((8, WIDTH))}, optax.sgd(0.1)
    plan = make_plan(model, mesh=mesh, rules=Rules((Rule("w", P()),)), optimizer=sgd, batch=batch, microbatches=2)
    with pytest.raises(DeclarationError, match=r"the model: calls shardlab\.batch_sum, and each of 2 microbatches"):
        compile_train_step(model, lambda y, batch: (jnp.sum(y**2), len(y)), sgd, plan, batch)


NARROW = """
import shardlab; shardlab.emulate(8)
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
from shardlab import *
from shardlab.testing import assert_matches_reference

def centred(x):
    return x - batch_sum(x.sum(0)) / batch_sum(jnp.ones(len(x), x.dtype).sum())

model = Functions(
    init=lambda key: {"w": jax.random.normal(key, (6, 6)) * 0.3},
    apply=lambda p, b: centred(jnp.tanh(b["x"].astype(p["w"].dtype) @ p["w"])) @ p["w"],
)
batch = {"x": np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)}
mesh = MeshSpec({"data": 2, "tensor": 2}, batch="data", target="cpu:4")
assert_matches_reference(
    model, lambda y, b: (jnp.sum(y.astype(jnp.float32) ** 2), len(y)), optax.sgd(0.1), batch,
    mesh=mesh, rules=Rules((Rule("w", P()),)), dtype="bfloat16", steps=1,
)
print("survived")
"""


@pytest.mark.versions
def test_a_narrow_batch_sum() -> None:
    """XLA's CPU backend aborts on a bfloat16 sum over manual axes where another axis is automatic."""
    found = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, timeout=300, check=False)
    assert found.stdout.endswith("survived\n"), found.stderr[-2000:]
