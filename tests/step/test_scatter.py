"""Scatters over a batch axis: which parts the links ask for, and that they leave the same pieces in the same order."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from shardlab.step.scatter import Scatter, scattered, scatters
from tests.equivalence.cases import case, compiled

pytestmark = pytest.mark.versions


def torus(dims: tuple[int, ...], sizes: dict[str, int], *, order: tuple[int, ...] = (0, 1, 2), slices: int = 1) -> Any:
    """A mesh of chips of `dims`, laid out over the torus's dims in an order, the first one outermost."""
    moved = itertools.product(*(range(dims[dim]) for dim in order))
    coords = [tuple(place[order.index(dim)] for dim in range(len(dims))) for place in moved]
    chips = [
        SimpleNamespace(platform="tpu", coords=place, slice_index=index % slices) for index, place in enumerate(coords)
    ]
    devices = np.array(chips, dtype=object).reshape(tuple(sizes.values()))
    return SimpleNamespace(devices=devices, axis_names=tuple(sizes), shape=sizes)


@pytest.mark.parametrize(
    ("mesh", "parts", "why"),
    [
        # 31/32 over two dims and 7/8 of a 32nd over one, against 2 x 255/256 over three: 0.512 of 0.664.
        (
            torus((4, 8, 8), {"data": 256}),
            (32, 8),
            "over dims x and y and then dim z of the torus, in 0.77 of the time",
        ),
        (torus((4, 8, 8), {"data": 256}, order=(1, 2, 0)), (64, 4), "over dims y and z and then dim x"),
        (torus((8, 8, 8), {"data": 512}), (64, 8), "over dims x and y and then dim z"),
        (torus((4, 8, 8), {"data": 64, "tensor": 4}, order=(1, 2, 0)), (64,), "over dims y and z of the torus"),
        (torus((4, 8, 8), {"data": 128, "tensor": 2}), (32, 4), "over dims x and y and then dim z"),
        (torus((2, 2, 1), {"data": 4}), (4,), "one reduce-scatter, over dims x and y"),
        (torus((4, 8, 8), {"data": 256}, slices=2), (256,), "one reduce-scatter"),
    ],
)
def test_the_links_say_in_which_parts(mesh: Any, parts: tuple[int, ...], why: str) -> None:
    (found,) = scatters(mesh, ("data",), "auto")
    assert found.parts == parts
    assert why in found.why


def test_an_order_that_no_cut_fits_is_left_to_the_compiler() -> None:
    chips = torus((4, 8, 8), {"data": 256})
    mixed = np.random.default_rng(0).permutation(chips.devices)
    chips.devices = mixed
    (found,) = scatters(chips, ("data",), "auto")
    assert found.parts == (256,)
    assert "all-reduce" in found.why


def test_what_is_declared_is_done() -> None:
    mesh = torus((4, 8, 8), {"data": 256})
    assert [one.parts for one in scatters(mesh, ("data",), "whole")] == [(256,)]
    (found,) = scatters(mesh, ("data",), "data=4x64")
    assert str(found) == "data 4x64: as declared"


@pytest.mark.parametrize("parts", [(8,), (2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_every_device_keeps_its_piece_of_the_sum(parts: tuple[int, ...], dim: int) -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    shape = (8, 16, 3) if dim == 1 else (16, 8, 3)
    values = np.random.default_rng(0).integers(0, 9, (8, *shape)).astype(np.float32)
    run = jax.shard_map(
        lambda mine: scattered(mine[0], "data", parts, dim),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(*[None] * dim, "data"),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(run)(values), values.sum(axis=0))


AWKWARD = 17 * 128  # tiles of a prime number


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((8, AWKWARD), 0), ((AWKWARD, 16), 1), ((16, 8, AWKWARD), 1), ((3, 4, 16), 2), ((16,), 0), ((8, 3, 5), 0)],
)
@pytest.mark.parametrize("parts", [(8,), (4, 2)])
def test_what_is_widened_for_a_tpu_is_narrowed_again(shape: tuple[int, ...], dim: int, parts: tuple[int, ...]) -> None:
    """Scattered with its dim outermost in memory, before and after, and its lanes padded; few rows as one table."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    values = np.random.default_rng(0).integers(0, 9, (8, *shape)).astype(np.float32)
    run = jax.shard_map(
        lambda mine: scattered(mine[0], "data", parts, dim, on_tpu=True),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(*[None] * dim, "data"),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(run)(values), values.sum(axis=0))
    (inside,) = (one.params["jaxpr"] for one in jax.make_jaxpr(run)(values).eqns if one.primitive.name == "shard_map")
    laid = [one for one in inside.eqns if one.primitive.name == "layout_constraint"]
    sent = next(one.invars[0].aval.shape for one in inside.eqns if one.primitive.name == "reduce_scatter")
    assert len(laid) == (2 if len(shape) > 1 else 0)
    others = [size for place, size in enumerate(shape) if place != dim]
    table = len(others) > 1 and others[-2] <= 4
    assert all(one.params["layout"].major_to_minor[0] == (0 if table else dim) for one in laid)
    assert sent == (
        (shape[dim], math.prod(others)) if table else tuple(18 * 128 if size == AWKWARD else size for size in shape)
    )


def test_a_step_says_how_it_scatters() -> None:
    this = compiled(case("mlp", data=4, zero=2, scatter="data=2x2"))
    assert [str(one) for one in this.scatters] == ["data 2x2: as declared"]
    assert compiled(case("mlp", data=2, zero=2)).scatters == (Scatter("data", (2,), "one reduce-scatter"),)
