"""Arrays that an initialiser is closed over, however deep inside its own jitted functions, keep to their own leaf."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.module.initialise import recipes

TABLES = tuple(np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32) for seed in range(3))


def plain(table: Any) -> Any:
    return table * 1.0


def once(table: Any) -> Any:
    return jax.jit(lambda: table * 1.0)()


def twice(table: Any) -> Any:
    inner = jax.jit(lambda: table * 1.0)
    return jax.jit(lambda: inner() + 0.0)()


def thrice(table: Any) -> Any:
    return jax.jit(lambda: twice(table) * 1.0)()


def in_a_branch(table: Any) -> Any:
    return jax.jit(lambda pick: jax.lax.cond(pick, lambda: table * 1.0, lambda: table * 2.0))(True)


def in_a_loop(table: Any) -> Any:
    row = jax.jit(lambda index: jnp.asarray(table)[index])
    return jax.lax.scan(lambda carry, index: (carry, row(index)), 0, jnp.arange(3))[1]


def in_a_derivative_rule(table: Any) -> Any:
    @jax.custom_jvp
    def held(x: Any) -> Any:
        return jax.jit(lambda x: x + table)(x)

    held.defjvp(lambda primals, tangents: (held(*primals), tangents[0]))
    return jax.jit(held)(jnp.zeros((3, 5)))


@pytest.mark.parametrize("make", [plain, once, twice, thrice, in_a_branch, in_a_loop, in_a_derivative_rule])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_each_leaf_keeps_its_own_table(make: Callable[[Any], Any], kind: Callable[[Any], Any]) -> None:
    """Leaves of one signature are made by one program: two tables are two programs."""
    tables = [kind(table) for table in TABLES]
    made = recipes(lambda key: {f"{index}": make(table) for index, table in enumerate(tables)})
    assert len({recipe.signature for recipe in made.values()}) == 3
    for index, table in enumerate(TABLES):
        np.testing.assert_array_equal(made[f"{index}"].make(jax.random.key(0), made[f"{index}"].integers), table)


def test_one_table_in_every_layer_is_one_program() -> None:
    table = jnp.asarray(TABLES[0])
    inner = jax.jit(lambda key: table + jax.random.normal(key, table.shape))
    outer = jax.jit(lambda key: inner(key) * 2.0)
    made = recipes(lambda key: {f"{index}": outer(jax.random.fold_in(key, index)) for index in range(4)})
    assert len({recipe.signature for recipe in made.values()}) == 1


def test_numbers_that_differ_in_the_last_bit_are_two_programs() -> None:
    numbers = (np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1)))
    made = recipes(lambda key: {f"{x!r}": jax.jit(partial(jnp.full, 3, x))() for x in numbers})
    assert len({recipe.signature for recipe in made.values()}) == 2
