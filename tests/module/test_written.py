"""What a function writes to, told from what it only reads, through whatever JAX wraps it in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardlab.module.written import written_by

X = jnp.ones(3)


def step(held: Any) -> dict[str, Any]:
    return {"read": held["read"], "written": held["written"] + 1}


def scanned(held: Any) -> Any:
    """Slices of both go in and come out, as in layers that are stacked; a carry and a constant beside them."""

    def body(carry: Any, layer: Any) -> Any:
        return (carry[0], carry[1] + layer["read"] * held["read"].sum()), step(layer)

    return jax.lax.scan(body, (held["read"], held["read"][0]), held)[1]


def carried(held: Any) -> Any:
    return jax.lax.scan(lambda carry, x: (step(carry), None), held, X)[0]


def exchanged(held: Any) -> Any:
    return jax.lax.scan(lambda carry, x: ({"read": carry["read"], "written": carry["read"]}, None), held, X)[0]


def looped(held: Any) -> Any:
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, step(s[1])), (0, held))[1]


def chosen(held: Any) -> Any:
    return jax.lax.cond(
        held["read"].sum() > 0,
        jax.checkpoint(step),
        lambda held: {"read": held["read"], "written": held["written"]},
        held,
    )


def ruled(held: Any) -> Any:
    @jax.custom_vjp
    def function(held: Any) -> Any:
        return step(held)

    function.defvjp(lambda held: (step(held), None), lambda _, g: (g,))
    return function(held)


WAYS: dict[str, Any] = {
    "plainly": step,
    "jit": jax.jit(step),
    "checkpoint": jax.checkpoint(step),
    "checkpoint in jit": jax.jit(jax.checkpoint(jax.jit(step))),
    "vmap": jax.vmap(step),
    "scan, slices": scanned,
    "scan, carry": carried,
    "while": looped,
    "cond": chosen,
    "custom_vjp": ruled,
    "another's value": lambda held: {"read": held["read"], "written": held["read"]},
    "another's value, carried": exchanged,
    "a barrier": lambda held: jax.lax.optimization_barrier(step(held)),
    "nothing of the rest": lambda held: {"written": jnp.zeros(3)},
}


@pytest.mark.parametrize("way", WAYS)
def test_written(way: str) -> None:
    assert written_by(WAYS[way], {"read": X, "written": X}) == ("written",)


def test_shapes_will_do_and_weak_types_count_for_nothing() -> None:
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert written_by(lambda held, x: {"a": held["a"], "b": held["b"] * x}, {"a": shape, "b": shape}, shape) == ("b",)
    weak = jnp.full(3, 0.5)
    assert written_by(lambda held: {"a": jax.lax.convert_element_type(held["a"], jnp.float32)}, {"a": weak}) == ()
    assert written_by(lambda held: {"a": held["a"].astype(jnp.float16)}, {"a": weak}) == ("a",)
