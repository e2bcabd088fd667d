"""`batch_sum` outside a manual region: x itself, under every transformation, and found again in a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.step.batch_sum import batch_sum, is_batch_sum
from shardlab.step.constraints import uses_batch_sum

X = jnp.arange(6.0).reshape(3, 2)


def test_a_tree_is_itself() -> None:
    tree = {"a": X, "b": (jnp.int32(3), None)}
    found = batch_sum(tree)
    assert set(found) == {"a", "b"}
    assert found["b"][1] is None
    np.testing.assert_array_equal(found["a"], X)
    assert found["b"][0].dtype == jnp.int32


def test_its_derivative_is_the_identity() -> None:
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(batch_sum(x) ** 2))(X), 2 * X)
    np.testing.assert_array_equal(jax.jvp(batch_sum, (X,), (3 * X,))[1], 3 * X)


TRANSFORMED: dict[str, Callable[[Any], Any]] = {
    "jit": jax.jit(batch_sum),
    "grad": jax.grad(lambda x: jnp.sum(batch_sum(x) ** 2)),
    "vmap": jax.vmap(batch_sum),
    "scan": lambda x: jax.lax.scan(lambda c, row: (c, batch_sum(row)), 0, x),
    "checkpoint": jax.checkpoint(batch_sum),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_it_is_found_in_a_trace(name: str) -> None:
    assert uses_batch_sum(jax.make_jaxpr(TRANSFORMED[name])(X).jaxpr)


def test_a_jit_of_another_name_is_no_batch_sum() -> None:
    def named(function: Callable[[Any], Any]) -> bool:
        (equation,) = jax.make_jaxpr(function)(X).jaxpr.eqns
        return is_batch_sum(equation)

    assert named(batch_sum)
    assert not named(jax.jit(lambda x: x + 1))
    assert not named(jnp.sin)
