"""What is provably the same of three stacked arrays as of each, and what only looks so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from shardlab.plan.terms import ZERO, Pieces, Terms

SHAPE, SLOTS = (4, 5), 3
ONE, STACKED = jax.ShapeDtypeStruct(SHAPE, "float32"), jax.ShapeDtypeStruct((SLOTS, *SHAPE), "float32")
SCALAR = jax.ShapeDtypeStruct((), "float32")


def proved(each: Callable[..., Any], stacked: Callable[..., Any], *, filled: bool = False) -> bool:
    """Whether ``stacked(x [3, 4, 5], s)`` is proved to be ``each(x0, x1, x2, s)``, a list, stacked.

    Where `filled`, the last of the three is zeros, given to ``stacked`` only and expected to stay so.
    """
    count = SLOTS - filled
    terms = Terms()
    symbols, scalar = [terms.symbol(("x", index)) for index in range(count)], terms.symbol("s")
    expected = terms.walk(jax.make_jaxpr(each)(*[ONE] * count, SCALAR), [*symbols, scalar])
    pieces = Pieces((*symbols, ZERO) if filled else tuple(symbols), (SHAPE,) * SLOTS)
    (found,) = terms.walk(jax.make_jaxpr(stacked)(STACKED, SCALAR), [pieces, scalar])
    parts = terms.in_pieces(found, pieces)
    return parts is not None and list(parts.terms) == [*expected, *[ZERO] * filled]


def test_what_is_not_known_equals_nothing_not_even_itself_again() -> None:
    terms = Terms()
    assert len({terms.unknown(), terms.unknown(), terms.symbol("x"), ZERO}) == 4


def apiece(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *given: [function(x, given[-1]) for x in given[:-1]]


def by_norm(*given: Any) -> Any:
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in reversed(given[:-1])))
    return [x / norm for x in given[:-1]]


def if_finite(*given: Any) -> Any:
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in given[:-1]]))
    return [jnp.where(finite, x, 0.0) for x in given[:-1]]


def halved_if(x: Any, s: Any) -> Any:
    return jax.lax.cond(s > 0, lambda: x / 2, lambda: jnp.zeros_like(x))


SAME: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "each number": (apiece(lambda x, s: jnp.tanh(x) * s), lambda x, s: jnp.tanh(x) * s),
    "sum of all, in another order": (by_norm, lambda x, s: x / jnp.sqrt(jnp.sum(x**2))),
    "all finite": (if_finite, lambda x, s: jnp.where(jnp.all(jnp.isfinite(x)), x, 0.0)),
    "a branch": (apiece(halved_if), halved_if),
    "zeros": (apiece(lambda x, s: jnp.zeros_like(x)), lambda x, s: jnp.zeros_like(x)),
    "an inner jit": (apiece(lambda x, s: jnp.clip(x, -1, 1)), lambda x, s: jnp.clip(x, -1, 1)),
}

DIFFERENT: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sum of each": (apiece(lambda x, s: x / jnp.sum(x)), lambda x, s: x / jnp.sum(x)),
    "mean of all": (
        lambda *given: [x - sum(jnp.mean(y) for y in given[:-1]) for x in given[:-1]],
        lambda x, s: x - jnp.mean(x),
    ),
    "rows": (apiece(lambda x, s: x - x.mean(0)), lambda x, s: x - x.mean(0)),
    "along the layers": (apiece(lambda x, s: x), lambda x, s: jnp.cumsum(x, 0)),
    "in another order": (apiece(lambda x, s: x), lambda x, s: x[::-1]),
    "another constant": (apiece(lambda x, s: x * 0.1), lambda x, s: x * 0.10000001),
    "another power": (apiece(lambda x, s: x**2), lambda x, s: x**3),
    "a sum of as many as there are": (
        apiece(lambda x, s: x * jnp.sum(jnp.full(x.shape, s))),
        lambda x, s: x * jnp.sum(jnp.full(x.shape, s)),
    ),
    "drawn at random": (
        apiece(lambda x, s: x + jax.random.normal(jax.random.key(0), x.shape)),
        lambda x, s: x + jax.random.normal(jax.random.key(0), x.shape),
    ),
    "another branch": (apiece(halved_if), lambda x, s: halved_if(x, -s)),
    "one layer": (
        lambda x, y, z, s: [x, y, jnp.zeros_like(z)],
        lambda x, s: x,
    ),
}

# Of zeros something else than zeros, or nothing at all.
NOT_ZERO: dict[str, Callable[[Any, Any], Any]] = {
    "plus a number": lambda x, s: x + 1e-8,
    "cosine": lambda x, s: jnp.cos(x),
    "divided by itself": lambda x, s: x / jnp.abs(x),
    "divided by its root": lambda x, s: x * jax.lax.rsqrt(x**2),
    "at least a number": lambda x, s: jnp.maximum(x, 0.1),
    "at most an unknown number": lambda x, s: jnp.minimum(x, s),
}

STILL_ZERO: dict[str, Callable[[Any, Any], Any]] = {
    "Adam's quotient": lambda x, s: s * x / (jnp.sqrt(x**2) + 1e-8),
    "clipped": lambda x, s: jnp.clip(x, -0.1, 0.1),
    "sign": lambda x, s: -s * jnp.sign(x),
    "chosen": lambda x, s: jnp.where(x > 0, 1.0 / s, 0.0) * x,
    "to a power": lambda x, s: jnp.abs(x) ** 1.5,
}


@pytest.mark.parametrize("name", SAME)
def test_the_same(name: str) -> None:
    assert proved(*SAME[name])


@pytest.mark.parametrize("name", ["each number", "sum of all, in another order", "all finite", "a branch", "zeros"])
def test_the_same_beside_zeros_that_fill(name: str) -> None:
    assert proved(*SAME[name], filled=True)


@pytest.mark.parametrize("name", DIFFERENT)
def test_not_the_same(name: str) -> None:
    assert not proved(*DIFFERENT[name])


@pytest.mark.parametrize("name", NOT_ZERO)
def test_zeros_that_do_not_stay(name: str) -> None:
    assert proved(apiece(NOT_ZERO[name]), NOT_ZERO[name])
    assert not proved(apiece(NOT_ZERO[name]), NOT_ZERO[name], filled=True)


@pytest.mark.parametrize("name", STILL_ZERO)
def test_zeros_that_stay(name: str) -> None:
    assert proved(apiece(STILL_ZERO[name]), STILL_ZERO[name], filled=True)
