"""The manual region: what it is over, and sums that leave each device the shard of its spec."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.step.region import Region, check_rows, make_region, rows_of, tree_where
from tests.equivalence.cases import features

MODEL = Functions(init=mlp.init, before=mlp.before, block=mlp.block, after=mlp.after)
SIZES = {"replica": 2, "data": 2, "stage": 2, "tensor": 1}


def region(sizes: dict[str, int], reduce_dtype: str = "float32") -> Region:
    mesh = build_mesh(MeshSpec(sizes, batch=("data",), stage="stage", target=f"cpu:{np.prod(list(sizes.values()))}"))
    batch, stages = ("data",) if sizes["data"] > 1 else (), sizes["stage"]
    return Region(mesh, batch, "stage" if stages > 1 else None, stages, sizes["data"], reduce_dtype)


def test_what_a_plan_makes_manual() -> None:
    spec = MeshSpec(SIZES, batch=("replica", "data"), stage="stage", target="cpu:8")
    given: dict[str, Any] = {"rules": mlp.mlp_rules(None), "optimizer": optax.sgd(0.1), "batch": features(8)}
    found = make_region(make_plan(MODEL, mesh=spec, **given), build_mesh(spec))
    assert (found.batch, found.stage, found.num_stages, found.shards) == (("replica", "data"), "stage", 2, 4)
    assert found.manual == ("replica", "data", "stage")
    assert found.automatic_mesh.shape == SIZES
    assert set(found.automatic_mesh.axis_types) == {AxisType.Auto}
    spec_of_a_kernel = P(("data", "tensor"), None, ("stage", "replica"))
    assert found.manual_part(spec_of_a_kernel) == P("data", None, ("stage", "replica"))
    assert found.automatic_part(spec_of_a_kernel) == P("tensor", None, None)


def test_axes_of_one_device_and_automatic_ones_are_not_manual() -> None:
    spec = MeshSpec({"replica": 1, "data": 2}, batch=("replica", "data"), target="cpu:2")
    model = Functions(init=mlp.init, apply=lambda params, batch: mlp.after(params, mlp.before(params, batch)))
    given: dict[str, Any] = {"rules": mlp.mlp_rules(None), "optimizer": optax.sgd(0.1), "batch": features(8)}
    assert make_region(make_plan(model, mesh=spec, **given), build_mesh(spec)).manual == ("data",)
    automatic = make_region(make_plan(model, mesh=spec, batch_axes="automatic", **given), build_mesh(spec))
    assert (automatic.manual, automatic.shards) == ((), 1)

    def function(x: Any) -> Any:
        return x

    assert automatic.run(function, P(), P()) is function


def summed(at: Region, axes: tuple[str, ...], compute: P, state: P, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The sum over `axes` of a value that is another one on every manual device, and what it should be."""
    manual = dict(at.mesh.shape)
    counts = [manual[name] for name in at.manual]
    # Whole numbers, so that no order of addition shows.
    values = np.random.default_rng(0).integers(-99, 99, (*counts, *shape)).astype(np.float32)
    lead = tuple(at.manual)

    def inside(value: Any) -> Any:
        own = value.reshape(shape)
        own = jax.lax.with_sharding_constraint(own, at.automatic_part(compute))
        out = at.reduced({"w": own}, {"w": axes}, {"w": compute}, {"w": state})["w"]
        kept = tuple(name for name in lead if name not in axes)
        return out.reshape((1,) * len(kept) + out.shape)

    kept = tuple(name for name in lead if name not in axes)
    out_spec = P(*kept, *at.manual_part(state))
    given = jax.device_put(values, NamedSharding(at.mesh, P(*lead)))
    with jax.set_mesh(at.mesh):
        found = jax.jit(at.run(inside, P(*lead), out_spec))(given)
    return found, values.sum(tuple(lead.index(name) for name in axes))


REDUCED: dict[str, tuple[dict[str, int], tuple[str, ...], P, P]] = {
    "all-reduce": ({"data": 4, "stage": 1, "tensor": 1}, ("data",), P(), P()),
    "scattered": ({"data": 4, "stage": 1, "tensor": 1}, ("data",), P(), P(None, "data")),
    "beside tensor": ({"data": 2, "stage": 1, "tensor": 2}, ("data",), P("tensor"), P("tensor", "data")),
    "inside tensor": ({"data": 2, "stage": 1, "tensor": 4}, ("data",), P("tensor"), P(("tensor", "data"))),
    "outside tensor": ({"data": 2, "stage": 1, "tensor": 4}, ("data",), P("tensor"), P(("data", "tensor"))),
    "two axes on one dim": ({"data": 2, "stage": 2, "tensor": 2}, ("data", "stage"), P(), P(("stage", "data"))),
    "two axes on two dims": (
        {"data": 2, "stage": 2, "tensor": 2},
        ("data", "stage"),
        P(None, "tensor"),
        P("data", ("stage", "tensor")),
    ),
    "beside an axis of one device": (
        {"data": 2, "stage": 1, "tensor": 2, "expert": 1},
        ("data",),
        P(("expert", "tensor")),
        P(("tensor", "expert"), "data"),
    ),
    "one of two axes": ({"data": 2, "stage": 2, "tensor": 2}, ("data",), P("tensor"), P("tensor", "data")),
}


@pytest.mark.parametrize("name", REDUCED)
def test_sums_over_manual_axes(name: str) -> None:
    sizes, axes, compute, state = REDUCED[name]
    found, expected = summed(region(sizes), axes, compute, state, (8, 12))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("sizes", "state", "order"),
    [
        ({"data": 4, "stage": 2, "tensor": 1}, P("stage", "data"), ["data", "stage"]),
        ({"data": 2, "stage": 4, "tensor": 1}, P("data", "stage"), ["stage", "data"]),
        ({"data": 4, "stage": 2, "tensor": 1}, P(None, "data", "stage"), ["data", "stage"]),
    ],
)
def test_the_largest_axis_is_scattered_first(sizes: dict[str, int], state: P, order: list[str]) -> None:
    """What is left for the others is small then; the sum is the same."""
    at, shape = region(sizes), (8, 12, 4)
    found, expected = summed(at, ("data", "stage"), P(), state, shape)
    np.testing.assert_array_equal(found, expected)

    def inside(value: Any) -> Any:
        return at.reduced({"w": value}, {"w": ("data", "stage")}, {"w": P()}, {"w": state})["w"]

    traced = jax.make_jaxpr(at.run(inside, P(), state))(jnp.zeros(shape))
    (body,) = (one.params["jaxpr"] for one in traced.eqns if one.primitive.name == "shard_map")
    axes = [one.params["axis_name"] for one in body.eqns if one.primitive.name == "reduce_scatter"]
    assert [name for (name,) in axes] == order


def test_what_is_gathered_beside_an_axis_of_one_device() -> None:
    at, spec = region({"data": 2, "stage": 1, "tensor": 2, "expert": 1}), P("data", ("expert", "tensor"))
    values = jax.device_put(np.arange(16.0).reshape(4, 4), NamedSharding(at.mesh, spec))

    def inside(value: Any) -> Any:
        return at.gathered({"w": value}, {"w": spec})["w"]

    with jax.set_mesh(at.mesh):
        found = jax.jit(at.run(inside, P("data"), P()))(values)
    np.testing.assert_array_equal(found, values)


def test_sums_in_the_reduce_dtype() -> None:
    """Both parts are rounded to 8 bits before they are added, their sum is given in float32."""
    at = region({"data": 2, "stage": 1, "tensor": 1}, "bfloat16")

    def inside(x: Any) -> Any:
        return at.reduced({"w": x[0]}, {"w": ("data",)}, {"w": P()}, {"w": P()})["w"]

    parts = np.array([[257.0, 1.0], [1.0, 2.0]], np.float32)  # 257 needs nine bits: half way, it goes to 256
    out = jax.jit(at.run(inside, P("data"), P()))(parts)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [257.0, 3.0])


def test_rows() -> None:
    tree = {"a": jnp.arange(12).reshape(6, 2), "b": jnp.arange(6)}
    found = jax.jit(lambda first: rows_of(tree, first, 2))(jnp.int32(3))
    assert found["a"].tolist() == [[6, 7], [8, 9]]
    assert found["b"].tolist() == [3, 4]
    assert check_rows(found, 2) is found
    with pytest.raises(DeclarationError) as error:
        check_rows({"y": found["b"], "loss": jnp.float32(0)}, 2)
    assert str(error.value) == (
        "y loss: shape [] for 2 examples; give every array of y the examples as its leading dim, or pass a loss"
    )


def test_garbage_is_masked() -> None:
    nan = {"x": jnp.full(3, jnp.nan), "n": jnp.int32(1)}
    kept = tree_where(jnp.bool_(False), nan, {"x": jnp.arange(3.0), "n": jnp.int32(2)})
    assert kept["x"].tolist() == [0, 1, 2]
    assert kept["n"] == 2
