"""ZeRO's move on a spec: batch axes onto the largest free dim that divides, and off again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.sharding.zero import add_axes, without

MESH = MeshSpec({"replica": 2, "fsdp": 3, "tensor": 2}, batch=("replica", "fsdp"), target="cpu:12")


@pytest.mark.parametrize(
    ("spec", "shape", "axes", "expected", "dim"),
    [
        (P(), (6, 12), ("replica", "fsdp"), P(None, ("replica", "fsdp")), 1),
        (P(), (12, 12), ("fsdp",), P("fsdp"), 0),
        (P(None, "tensor"), (6, 64), ("replica",), P("replica", "tensor"), 0),
        (P(None, "tensor"), (7, 64), ("replica",), P(None, "tensor"), None),
        (P(), (8, 9), ("fsdp",), P(None, "fsdp"), 1),
        (P(), (9, 8), ("fsdp",), P("fsdp"), 0),
        (P(), (3003, 2400), ("fsdp",), P("fsdp"), 0),  # no piece is whole tiles: 1001 rows, 800 columns
        (P(), (3003, 1152), ("fsdp",), P(None, "fsdp"), 1),  # three tiles of 128 columns
        (P(), (1200, 2400), ("fsdp",), P("fsdp"), 0),  # 50 tiles of 8 rows; 800 columns are none
        (P(), (24, 32), ("fsdp",), P("fsdp"), 0),
        (P(), (16, 27), ("fsdp",), P(None, "fsdp"), 1),  # a small array
        (P("tensor"), (4,), ("fsdp",), P("tensor"), None),
        (P(), (), ("fsdp",), P(), None),
        (P(), (2,), ("replica", "fsdp"), P(), None),
        (P(), (0,), ("fsdp",), P(), None),
        (P("tensor", None, None), (2, 3, 6), ("fsdp",), P("tensor", None, "fsdp"), 2),
        (P("tensor"), (2, 3), (), P("tensor"), None),
    ],
)
def test_add_axes(spec: P, shape: tuple[int, ...], axes: tuple[str, ...], expected: P, dim: int | None) -> None:
    assert add_axes(spec, shape, axes, MESH) == (expected, dim)


@pytest.mark.parametrize(
    ("spec", "shape", "expected", "dim"),
    [
        (P("tensor", None), (32, 9), P(("tensor", "data")), 0),
        (P(None, "tensor"), (8, 64), P(None, ("tensor", "data")), 1),  # the largest, as without the axis
        (P("tensor", "stage"), (9, 16), P("tensor", ("stage", "data")), 1),
        (P(("stage", "tensor"), None), (9, 9), P(("stage", "tensor"), None), None),
    ],
)
def test_an_axis_of_one_device_splits_nothing(spec: P, shape: tuple[int, ...], expected: P, dim: int | None) -> None:
    mesh = MeshSpec({"data": 8, "stage": 1, "tensor": 1}, batch="data", stage="stage", target="cpu:8")
    assert add_axes(spec, shape, ("data",), mesh) == (expected, dim)


def test_axes_that_are_there_already() -> None:
    with pytest.raises(ValueError, match="already names"):
        add_axes(P("fsdp"), (6, 6), ("fsdp",), MESH)


@pytest.mark.parametrize(
    ("spec", "axes", "expected"),
    [
        (P(("fsdp", "tensor"), "replica"), ("fsdp", "replica"), P("tensor", None)),
        (P(("replica", "fsdp", "tensor")), ("fsdp",), P(("replica", "tensor"))),
        (P(None, "tensor"), ("fsdp",), P(None, "tensor")),
        (P("fsdp", P.UNCONSTRAINED), ("fsdp",), P(None, P.UNCONSTRAINED)),
        (P("fsdp", unreduced={"tensor"}), ("fsdp",), P(None, unreduced={"tensor"})),
    ],
)
def test_without(spec: P, axes: tuple[str, ...], expected: P) -> None:
    assert without(spec, axes) == expected


@given(st.lists(st.integers(1, 24), max_size=4).map(tuple), st.sampled_from([("replica",), ("replica", "fsdp")]))
def test_what_is_added_divides_and_comes_off(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    product = {("replica",): 2, ("replica", "fsdp"): 6}[axes]
    spec, dim = add_axes(P(), shape, axes, MESH)
    fitting = [size for size in shape if size % product == 0]
    assert (dim is None) == (not fitting)
    if dim is not None:
        assert shape[dim] == max(fitting)
    assert not any(without(spec, axes))
