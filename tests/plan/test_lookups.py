"""Which arrays a function looks up in, and how they are laid for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.plan.lookups import for_lookup, looked_up, lookup_note

VALUES = {"a": jnp.ones((6, 4)), "b": jnp.ones((4, 4))}
AT = jnp.asarray([1, 3])
SIZES = {"tensor": 2, "expert": 2}


FUNCTIONS: dict[str, tuple[Callable[[Any, Any], Any], dict[str, set[int]]]] = {
    "rows": (lambda v, t: v["a"][t], {"a": {0}}),
    "columns": (lambda v, t: v["a"][:, t], {"a": {1}}),
    "both": (lambda v, t: v["a"][t, t], {"a": {0, 1}}),
    "each row its own": (lambda v, t: jnp.take_along_axis(v["b"], v["b"].astype(int), axis=1), {"b": {1}}),
    "turned": (lambda v, t: v["a"].T[:, t], {"a": {0}}),
    "cast and scaled": (lambda v, t: (v["a"].astype("bfloat16") * 3)[t], {"a": {0}}),
    "within calls": (lambda v, t: jax.jit(jax.checkpoint(lambda a: jnp.take(a, t, axis=0)))(v["a"]), {"a": {0}}),
    "within a loop": (lambda v, t: jax.lax.map(lambda at: v["a"][at + t], t), {"a": {0}}),
    "within a branch": (lambda v, t: jax.lax.cond(t[0] > 0, lambda a: a[t], lambda a: a[:2], v["a"]), {"a": {0}}),
    "what is computed": (lambda v, t: (v["a"] @ v["b"])[:, :3][t], {}),
    "nothing": (lambda v, t: v["a"] @ v["b"] + v["a"][2], {}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_looked_up_in(name: str) -> None:
    function, expected = FUNCTIONS[name]
    assert looked_up(function, VALUES, AT) == expected


@pytest.mark.parametrize(
    ("spec", "shape", "dims", "expected"),
    [
        (P("tensor", "expert"), (16, 8), {0}, P(None, ("expert", "tensor"))),
        (P(("tensor", "expert")), (16, 8), {0}, P(None, ("tensor", "expert"))),
        (P("tensor"), (16, 8), {0}, P(None, "tensor")),
        (P("tensor", "expert"), (16, 8), {1}, P(("tensor", "expert"))),
        (P("tensor", "expert"), (16, 6), {0}, P(None, "expert")),
        (P("tensor", "expert"), (16, 6, 2), {0}, P(None, "expert", "tensor")),
        (P(None, ("tensor", "expert")), (16, 8), {0}, P(None, ("tensor", "expert"))),
        (P("tensor", "expert"), (16, 8), {0, 1}, P("tensor", "expert")),
    ],
)
def test_how_it_is_laid(spec: P, shape: tuple[int, ...], dims: set[int], expected: P) -> None:
    assert for_lookup(spec, shape, dims, SIZES) == expected


def test_one_automatic_axis_is_left_alone() -> None:
    assert for_lookup(P("tensor"), (16, 8), {0}, {"tensor": 4}) == P("tensor")


def test_what_a_plan_says_of_it() -> None:
    assert lookup_note("table", P(None, "tensor"), (16, 8), {0}, SIZES) == []
    assert lookup_note("table", P("tensor", "expert"), (16, 8), {0}, SIZES) == [
        "table: spec P('tensor', 'expert') is P(None, ('expert', 'tensor')) where it is looked up in"
    ]
    assert lookup_note("table", P("tensor", "expert"), (16, 6), {0}, SIZES) == [
        "table: spec P('tensor', 'expert') is P(None, 'expert') where it is looked up in, gathered over 'tensor' since "
        "no dim of [16, 6] divides"
    ]
