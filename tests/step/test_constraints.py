"""Constraints that name manual axes, and batch sums, inside a manual region: legal, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from shardlab.step.batch_sum import batch_sum
from shardlab.step.constraints import made_legal, uses_batch_sum

MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "stage", "tensor"), axis_types=(AxisType.Auto,) * 3)
AUTOMATIC = AbstractMesh((2, 2, 2), MESH.axis_names, axis_types=(AxisType.Auto,) * 3)
MANUAL = ("data", "stage")
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def constrained(x: Any, *entries: Any) -> Any:
    return jax.lax.with_sharding_constraint(x, P(*entries))


def in_region(function: Callable[[Any], Any], spread: tuple[str, ...] = ("data",), legal: bool = True) -> Any:
    """`function` of X, its rows over data, in a region that is manual over data and stage."""

    def inside(x: Any) -> Any:
        return (made_legal(function, MANUAL, spread, AUTOMATIC) if legal else function)(x)

    region = jax.shard_map(
        inside, mesh=MESH, in_specs=P("data"), out_specs=P("data"), axis_names=set(MANUAL), check_vma=False
    )
    with jax.set_mesh(MESH):
        return jax.jit(region)(X)


def twice(x: Any) -> Any:
    def body(x: Any, _: None) -> tuple[Any, None]:
        return jnp.sin(constrained(x, ("data", "stage"), "tensor")), None

    return jax.lax.scan(body, x, None, length=2)[0]


CONSTRAINED: dict[str, Callable[[Any], Any]] = {
    "plain": lambda x: jnp.sin(constrained(x, "data", "tensor")),
    "both on one dim": lambda x: jnp.sin(constrained(x, None, ("data", "tensor"))),
    "unconstrained": lambda x: jnp.sin(constrained(x, "data", P.UNCONSTRAINED)),
    "in a jit": jax.jit(lambda x: jnp.sin(constrained(x, "data", "tensor"))),
    "in a scan": twice,
    "in a checkpoint": jax.checkpoint(lambda x: jnp.sin(constrained(x, "data", "tensor"))),
    "in a branch": lambda x: jax.lax.cond(
        x[0, 0] < 9, lambda x: jnp.sin(constrained(x, "data", "tensor")), lambda x: x, x
    ),
    "in a derivative": lambda x: jax.grad(lambda x: jnp.sum(jnp.sin(constrained(x, "data", "tensor")) ** 2))(x),
    "beside what dims and keys are said of": lambda x: (
        constrained(x, "data", "tensor")[:, jnp.asarray([0, 2, 4, 1, 3, 5])]
        + jax.lax.conv_general_dilated(x[:, None], jnp.ones((1, 1, 3)), (1,), "SAME")[:, 0]
        + jax.random.normal(jax.random.key(0), (6,))
    ),
    "in a map over examples": jax.vmap(lambda row: jnp.sin(constrained(row, "tensor")), spmd_axis_name="data"),
}
NEWEST = ("plain", "in a scan", "in a checkpoint")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.versions if name in NEWEST else ()) for name in CONSTRAINED]
)
def test_legal_and_the_same(name: str) -> None:
    function = CONSTRAINED[name]
    with pytest.raises(ValueError, match=r"axis|Auto|Manual"):
        in_region(function, legal=False)
    with jax.set_mesh(MESH):
        expected = jax.jit(function)(X)
    np.testing.assert_allclose(in_region(function), expected, rtol=1e-6)


def test_what_is_kept_whole_is_the_same() -> None:
    """Of keys and of whole numbers, in maps and loops, and beside operations of several results."""

    def function(x: Any) -> Any:
        several = jax.lax.reduce_window(
            (x, 2 * x), (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] * b[1]), (1, 2), (1, 2), "VALID"
        )
        keys = jax.random.split(jax.random.key(0), 12)[::2]
        drawn = jax.vmap(lambda key, place: place * jax.random.normal(key))(keys, jnp.arange(12)[::2])
        total, products = jax.lax.scan(lambda sum, row: (sum + row[::2].sum(), jnp.cumprod(row)), 0.0, x)
        spectrum = jax.lax.fori_loop(0, 2, lambda _, row: jnp.abs(jnp.fft.fft(row)), x[0])
        return several[0].sum() + several[1].sum() + drawn + total + products + spectrum + jnp.repeat(x[:, ::2], 2, 1)

    def inside(x: Any) -> Any:
        return made_legal(function, MANUAL, ("data",), AUTOMATIC, inner=2)(x)

    region = jax.shard_map(inside, mesh=MESH, in_specs=P(), out_specs=P(), axis_names=set(MANUAL), check_vma=False)
    with jax.set_mesh(MESH):
        np.testing.assert_allclose(jax.jit(region)(X), jax.jit(function)(X), rtol=1e-5)


def test_the_automatic_axes_stay() -> None:
    def inside(x: Any) -> Any:
        legal = made_legal(lambda x: constrained(x, ("stage", "data"), "tensor"), MANUAL, (), AUTOMATIC)
        text = str(jax.make_jaxpr(legal)(x))
        assert "sharding_constraint" in text
        assert "PartitionSpec(None, 'tensor')" in text or "P(None, 'tensor')" in text
        return legal(x)

    region = jax.shard_map(inside, mesh=MESH, in_specs=P(), out_specs=P(), axis_names=set(MANUAL), check_vma=False)
    with jax.set_mesh(MESH):
        jax.jit(region)(X)


def test_what_needs_no_change_is_called_as_it_is() -> None:
    """Traced once to look, and then called itself: with the arrays it was given."""
    seen = []

    def function(x: Any) -> Any:
        seen.append(x)
        return {"y": constrained(x, None, "tensor") * 2}

    assert made_legal(function, (), (), AUTOMATIC) is function
    with jax.set_mesh(MESH):
        out = made_legal(function, MANUAL, ("data",), AUTOMATIC)(X)
    assert len(seen) == 2
    assert seen[1] is X
    np.testing.assert_array_equal(out["y"], 2 * X)


def test_trees_go_in_and_come_out() -> None:
    def function(x: Any) -> Any:
        return {"y": (constrained(x, "data") + 1, None), "z": x.sum(-1)}

    def inside(x: Any) -> Any:
        out = made_legal(lambda x, extra: function(x["x"]) | extra, MANUAL, (), AUTOMATIC)({"x": x}, {"w": 2 * x})
        assert list(out) == ["w", "y", "z"]
        assert out["y"][1] is None
        return out["y"][0] + out["w"] + out["z"][:, None]

    region = jax.shard_map(
        inside, mesh=MESH, in_specs=P("data"), out_specs=P("data"), axis_names=set(MANUAL), check_vma=False
    )
    with jax.set_mesh(MESH):
        np.testing.assert_allclose(jax.jit(region)(X), 3 * X + 1 + X.sum(-1)[:, None], rtol=1e-5)


def centred(x: Any) -> Any:
    return x - batch_sum(x.sum(0)) / batch_sum(jnp.ones(len(x)).sum())


def totals(x: Any) -> Any:
    def body(carry: Any, column: Any) -> tuple[Any, Any]:
        return carry, batch_sum(column.sum())

    return x + jax.lax.scan(body, 0.0, x.T)[1]


SUMMED: dict[str, Callable[[Any], Any]] = {
    "plain": centred,
    "in a jit": jax.jit(centred),
    "in a scan": totals,
    "in a checkpoint": jax.checkpoint(centred),
}


@pytest.mark.parametrize("name", SUMMED)
def test_batch_sums_are_over_the_whole_batch(name: str) -> None:
    expected = SUMMED[name](jnp.asarray(X))
    np.testing.assert_allclose(in_region(SUMMED[name]), expected, rtol=1e-5, atol=1e-6)


def test_batch_sums_over_what_the_examples_are_spread_over() -> None:
    """Nothing spread: each device has all the examples, and the sum is its own."""
    alone = in_region(lambda x: x * 0 + batch_sum(x.sum(0)), spread=())
    np.testing.assert_allclose(alone, np.repeat([X[:2].sum(0), X[2:].sum(0)], 2, axis=0), rtol=1e-5)
    # The two stages hold the same rows here: over both axes each is counted twice.
    both = in_region(lambda x: x * 0 + batch_sum(x.sum(0)), spread=("data", "stage"))
    np.testing.assert_allclose(both, np.broadcast_to(2 * X.sum(0), X.shape), rtol=1e-5)


def test_uses_batch_sum() -> None:
    assert uses_batch_sum(jax.make_jaxpr(centred)(X).jaxpr)
    assert uses_batch_sum(jax.make_jaxpr(totals)(X).jaxpr)
    assert not uses_batch_sum(jax.make_jaxpr(lambda x: x - x.sum(0))(X).jaxpr)
