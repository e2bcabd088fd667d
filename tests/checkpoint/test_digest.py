"""A digest is the same on every layout, and another for every other array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.checkpoint.digest import digest, digests_by_device

pytestmark = pytest.mark.versions

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn")


def drawn(dtype: str, shape: tuple[int, ...] = (8, 12)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 90, shape), jnp.dtype(dtype))


def same(a: jax.Array, b: jax.Array) -> bool:
    return bool((digest(a) == digest(b)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_same_however_the_array_lies(dtype: str) -> None:
    array = drawn(dtype)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec in (P(), P("a", "b"), P("b", "a"), P(None, ("a", "b")) if array.shape[1] % 8 == 0 else P(("a", "b"))):
        laid = jax.device_put(array, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(jax.jit(digest)(laid), digest(array))


@pytest.mark.parametrize("spec", [P("a"), P("b", None, "a"), P(None, ("b", "a"))])
def test_those_of_a_stack_are_what_its_devices_add_up(spec: P) -> None:
    """Of arrays [6, 4] that are padded to [8, 4], with something in the padding; every device but one copy counts."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    stack, sharding = drawn("float32", (4, 8, 4)) + jnp.arange(4.0)[:, None, None], NamedSharding(mesh, spec)
    laid = jax.device_put(stack, sharding)
    by_device = jax.jit(lambda array: digests_by_device(array, sharding, (6, 4)))(laid)
    assert by_device.shape == (8, 4, 2)
    np.testing.assert_array_equal(by_device.sum(axis=0, dtype=jnp.uint32), [digest(one[:6]) for one in stack])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_single_bit_of_every_number_shows(dtype: str) -> None:
    array = np.asarray(drawn(dtype, (3, 4)))
    bits = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    whole = jax.jit(digest)
    first = np.asarray(whole(jnp.asarray(array)))
    for place in np.ndindex(bits.shape):
        for bit in range(8 * array.dtype.itemsize):
            other = bits.copy()
            other[place] ^= other.dtype.type(1 << bit)
            assert (np.asarray(whole(jnp.asarray(other.view(array.dtype)))) != first).all(), (place, bit)


def test_numbers_that_change_places_show() -> None:
    array = drawn("float32", (4, 6)) + jnp.arange(24.0).reshape(4, 6) / 32
    assert not same(array, array[::-1])
    assert not same(array, jnp.roll(array, 1, axis=1))
    assert not same(array[:3, :3], array[:3, :3].T)


def test_wide_numbers_and_keys_have_one_too() -> None:
    with jax.enable_x64(True):
        array = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)))
        assert array.dtype == jnp.float64
        assert not same(array, array.at[1, 2].multiply(1 + 2**-52))
    key = jax.random.key(3)
    assert same(key, jax.random.key_data(key))
    assert not same(jnp.ones(3, jnp.complex64), 1j * jnp.ones(3, jnp.complex64))
    assert digest(jnp.float32(0)).shape == (2,)
