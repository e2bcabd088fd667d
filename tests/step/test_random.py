"""Draws over some rows are those rows of the draw over all, bit for bit; what cannot be cut so is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from shardlab.mesh.faults import DeclarationError
from shardlab.step.random import _bits, _multiply, batched_draws, rows_key, site_key

BATCH, ROWS = 12, 3
Draw = Callable[[jax.Array, int], Any]


def traced(draw: Draw, rows: int) -> Any:
    return jax.make_jaxpr(lambda key: draw(key, rows))(jax.random.key(0)).jaxpr


def draws_of(draw: Draw, rows: int = ROWS) -> Any:
    return batched_draws(traced(draw, rows), traced(draw, 2 * rows), rows, "block")


def by_rows(draw: Draw, key: jax.Array) -> Any:
    """The draw made by every shard of the batch with its rows key."""
    batched = draws_of(draw)
    shard = jax.jit(lambda first: draw(rows_key(key, first, ROWS, batched), ROWS))
    shards = [shard(jnp.int32(first)) for first in range(0, BATCH, ROWS)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *shards)


@pytest.mark.versions
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bits_of_every_width(width: int) -> None:
    with jax.enable_x64(True):
        key = jax.random.key(3)
        for inner in ((), (2, 1, 7)):

            def draw(key: jax.Array, rows: int, inner: tuple[int, ...] = inner) -> jax.Array:
                return jax.random.bits(key, (rows, *inner), f"uint{width}")

            whole = np.asarray(draw(key, BATCH))
            assert whole.dtype == f"uint{width}"
            np.testing.assert_array_equal(by_rows(draw, key), whole)


DRAWS: dict[str, Draw] = {
    "uniform": lambda key, rows: jax.random.uniform(key, (rows, 5)),
    "normal": lambda key, rows: jax.random.normal(key, (rows, 5)),
    "bernoulli": lambda key, rows: jax.random.bernoulli(key, 0.3, (rows, 5)),
    "bfloat16": lambda key, rows: jax.random.normal(key, (rows, 5), jnp.bfloat16),
    "integers": lambda key, rows: jax.random.randint(key, (rows,), 0, 1000),
    "categories": lambda key, rows: jax.random.categorical(key, jnp.ones((rows, 5))),
    "truncated": lambda key, rows: jax.random.truncated_normal(key, -1.0, 1.0, (rows, 2)),
    "several rows of an example": lambda key, rows: jax.random.uniform(key, (4 * rows, 5)),
    "of a split key": lambda key, rows: jax.random.uniform(jax.random.split(key, 3)[1], (rows, 5)),
    "of a folded key": lambda key, rows: jax.random.uniform(jax.random.fold_in(key, 7), (rows, 5)),
    "in a scan": lambda key, rows: jax.lax.scan(
        lambda key, _: (jax.random.fold_in(key, 1), jax.random.uniform(key, (rows, 5))), key, None, length=2
    )[1].swapaxes(0, 1),
    "keys of the examples": lambda key, rows: jax.vmap(lambda k: jax.random.normal(k, (5,)))(
        jax.random.split(key, rows)
    ),
    "gamma of the examples' keys": lambda key, rows: jax.vmap(lambda k: jax.random.gamma(k, 0.7, (2,)))(
        jax.random.split(key, rows)
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.versions if n == "normal" else ()) for n in DRAWS])
def test_rows_of_the_whole_draw(name: str) -> None:
    key = site_key(jax.random.key(11), 4)
    # Compiled, as the shards' draws are: compiled normals differ from eager ones in the last bit.
    whole = np.asarray(jax.jit(lambda key: DRAWS[name](key, BATCH))(key))
    assert len(np.unique(whole)) > 1
    np.testing.assert_array_equal(by_rows(DRAWS[name], key), whole)


def test_draws_once_for_all_are_the_same_everywhere() -> None:
    def draw(key: jax.Array, rows: int) -> Any:
        one, two = jax.random.split(key)
        return jax.random.uniform(one, (rows, 5)), jax.random.uniform(two, (7,))

    key = jax.random.key(2)
    mask, shared = draw(rows_key(key, jnp.int32(6), ROWS, draws_of(draw)), ROWS)
    whole, expected = draw(key, BATCH)
    np.testing.assert_array_equal(mask, whole[6 : 6 + ROWS])
    np.testing.assert_array_equal(shared, expected)


def test_a_function_without_draws_by_row_keeps_the_plain_key() -> None:
    key = jax.random.key(2)
    assert draws_of(lambda key, rows: jax.random.uniform(key, (7,))) == frozenset()
    assert rows_key(key, jnp.int32(6), ROWS, frozenset()) is key


def test_numbers_beyond_32_bits() -> None:
    """Element i of a draw hashes the two words of i; far into a large batch the high word is not zero."""
    # Element 2**32 lies in row 87381, a third into it: 87381 * 3 * 2**14 + 2**14.
    words, first, rows, shape = jnp.array([5, 6], jnp.uint32), 87381, 2, (2, 3, 2**14)
    number = (np.arange(np.prod(shape)) + first * np.prod(shape[1:])).astype(np.uint64)
    assert number[2**14] == 2**32
    high, low = (number >> np.uint64(32)).astype(np.uint32), number.astype(np.uint32)
    one, two = np.split(np.asarray(threefry_2x32(words, jnp.concatenate([high, low]))), 2)
    found = _bits(words, 32, shape, jnp.uint32(first), rows)
    np.testing.assert_array_equal(np.asarray(found).reshape(-1), one ^ two)


def test_products_of_64_bits() -> None:
    values = [0, 1, 2**16 - 1, 2**16, 2**31 + 12345, 2**32 - 1]
    for factor in values:
        high, low = _multiply(jnp.array(values, jnp.uint32), factor)
        assert [int(h) << 32 | int(w) for h, w in zip(high, low, strict=True)] == [v * factor for v in values]


def test_sites_have_keys_of_their_own() -> None:
    key = jax.random.key(0)
    found = {tuple(jax.random.key_data(site_key(key, site)).tolist()) for site in (-2, -1, 0, 1, 2, 2**16)}
    assert len(found) == 6
    traced = jax.jit(site_key)(key, jnp.int32(-1))
    np.testing.assert_array_equal(jax.random.key_data(traced), jax.random.key_data(site_key(key, -1)))


REFUSED: dict[str, tuple[Draw, str]] = {
    "another dim": (
        lambda key, rows: jax.random.normal(key, (5, rows)),
        "block: a random draw of shape [5, 3] for 3 examples has shape [5, 6] for 6; the batch must be its leading "
        "dim, so that each device can draw its own rows",
    ),
    "pairs of examples": (
        lambda key, rows: jax.random.normal(key, (rows, rows)),
        "block: a random draw of shape [3, 3] for 3 examples has shape [6, 6] for 6; the batch must be its leading "
        "dim, so that each device can draw its own rows",
    ),
    "keys along another dim": (
        lambda key, rows: jax.random.key_data(jax.random.split(key, (2, rows))),
        "block: a key split to shape [2, 3] for 3 examples has shape [2, 6] for 6; the batch must be its leading "
        "dim, so that each device can draw its own rows",
    ),
    "a draw for each example": (
        lambda key, rows: [jax.random.normal(jax.random.fold_in(key, i), (5,)) for i in range(rows)],
        "block: makes 3 random draws for 3 examples and 6 for 6",
    ),
    "one shape for both": (
        lambda key, rows: (jax.random.normal(key, (rows,)), jax.random.normal(key, (3,))),
        "block: with 3 examples a device, shape [3] is drawn once per example and once for all; use another batch size "
        "or number of microbatches so that the two shapes differ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    draw, message = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        draws_of(draw)
    assert str(error.value) == message
