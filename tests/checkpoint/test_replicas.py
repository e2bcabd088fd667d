"""Replicas that have diverged are found, whichever array, copy or bit it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.checkpoint.replicas import diverged

pytestmark = pytest.mark.versions


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def laid(mesh: Mesh, spec: P, dtype: Any = jnp.float32, flip: tuple[int, ...] = ()) -> jax.Array:
    """An array [8, 6]; on the devices `flip` one bit of one number is another."""
    whole = jnp.arange(48, dtype=dtype).reshape(8, 6)
    array = jax.device_put(whole, NamedSharding(mesh, spec))
    shards = []
    for shard in array.addressable_shards:
        local = np.array(shard.data)
        if shard.device.id in flip:
            bits = local.view(np.uint8)
            bits[-1, 0] ^= 1
        shards.append(jax.device_put(local, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "tensor")])
def test_equal_copies_are_no_fault(mesh: Mesh, spec: P, dtype: Any) -> None:
    assert diverged({"a": laid(mesh, spec, dtype), "b": {"c": laid(mesh, P("data", "tensor"), dtype)}}) == []


@pytest.mark.parametrize(("spec", "copies"), [(P(), 8), (P("data"), 2), (P(None, "tensor"), 4), (P("tensor", None), 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_one_bit_of_one_copy_is_found_and_named(mesh: Mesh, spec: P, copies: int, dtype: Any) -> None:
    sound = laid(mesh, P(), dtype)
    (found,) = diverged({"blocks": {"up": laid(mesh, spec, dtype, flip=(5,))}, "head": sound})
    assert (found.name, found.copies) == ("blocks/up", copies)
    # Of two copies nobody can say which one is right.
    assert [device.id for device in found.devices] == ([5] if copies > 2 else [4, 5])


def test_of_several_arrays_each_is_named(mesh: Mesh) -> None:
    found = diverged([laid(mesh, P(), flip=(0, 7)), laid(mesh, P()), laid(mesh, P("tensor"), flip=(3,))])
    assert [(one.name, [device.id for device in one.devices]) for one in found] == [("0", [0, 7]), ("2", [3])]


def test_what_no_device_holds_a_copy_of_cannot_diverge(mesh: Mesh) -> None:
    assert diverged({"a": laid(mesh, P("data", "tensor"), flip=(2,))}) == []
    assert diverged({"a": jax.device_put(jnp.ones(3), jax.devices()[0])}) == []
