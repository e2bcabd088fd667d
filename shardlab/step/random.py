"""Random draws that do not know how the batch is cut: a draw over some rows is those rows of the whole draw.

Inside a manual region every shard holds b of the batch's B rows, and a plain key would give each shard the same
numbers. A *rows key* carries the index of its first row; a draw of shape [b, ...] with it is rows
``[first, first + b)`` of the [B, ...] draw with the plain key, bit for bit (partitionable threefry numbers
element i of a draw by hashing i alone). Keys split for the examples are rows of the whole split likewise, and so are
keys that their places are folded into. Draws that do not depend on the batch are the plain key's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend.random import define_prng_impl, threefry_2x32, threefry_prng_impl

from shardlab.mesh.faults import DeclarationError
from shardlab.module.inner import programs_in

Shape = tuple[int, ...]
Drawn = tuple[str, Shape]
"""What an operation on a key makes: its name and the shape. ``random_bits`` and ``random_split`` as JAX has them;
``fold_in_place``, the places of the examples folded into a key, and ``fold_in_rows``, numbers of their own."""

# How a gamma variate splits its key: made an array of one key first, so that it can be told from a model's own split.
_SPLIT_OF_ONE = "random_split of one"


def site_key(key: jax.Array, site: int | jax.Array) -> jax.Array:
    """The key of a site of the model: 0 before the blocks, 1 + i in block i, -1 after them."""
    return jax.random.fold_in(key, jnp.asarray(site, jnp.int32).astype(jnp.uint32))


def rows_key(key: jax.Array, first: jax.Array, rows: int, batched: frozenset[Drawn]) -> jax.Array:
    """`key` for a region that holds `rows` rows, the first of them row `first` of the batch.

    Args:
      key: a plain threefry key.
      first: int32 scalar, may be traced.
      batched: the draws whose leading dim counts rows, from `batched_draws` and `check_rows_to_rows`. Empty: `key`
        itself.
    """
    if not batched:
        return key
    data = jnp.concatenate([jax.random.key_data(key), jnp.asarray(first, jnp.uint32)[None]])
    return jax.random.wrap_key_data(data, impl=_implementation(rows, batched))


def batched_draws(here: Any, there: Any, rows: int, where: str) -> frozenset[Drawn]:
    """The random draws and splits of keys, with `rows` rows, whose leading dim counts rows.

    Args:
      here, there: the jaxprs of the function with `rows` rows and with twice as many.
      where: what to call the function in an error.

    Raises:
      DeclarationError: a draw follows the batch with another dim than its leading one, or one shape is drawn both per
        row and once for all.
    """
    mine, double = list(_draws(here)), list(_draws(there))
    if [name for name, _, _ in mine] != [name for name, _, _ in double]:
        some, more = (sum(name != "random_split" for name, _, _ in found) for found in (mine, double))
        raise DeclarationError(f"{where}: makes {some} random draws for {rows} examples and {more} for {2 * rows}")
    kinds: dict[Drawn, bool] = {}
    for (name, shape, keys), (_, doubled, double_keys) in zip(mine, double, strict=True):
        if keys != double_keys and shape == doubled:
            continue  # of each example's own key, which knows of no rows
        by_row = shape != doubled
        if by_row and (len(shape) != len(doubled) or shape[0] * 2 != doubled[0] or shape[1:] != doubled[1:]):
            what = "a key split to shape" if name == "random_split" else "a random draw of shape"
            raise DeclarationError(
                f"{where}: {what} {list(shape)} for {rows} examples has shape {list(doubled)} for "
                f"{2 * rows}; the batch must be its leading dim, so that each device can draw its own rows"
            )
        split = "random_split" if math.prod(keys) > 1 or not (keys or name == "random_gamma") else _SPLIT_OF_ONE
        made: dict[Drawn, bool] = {(split if name == "random_split" else name, shape): by_row}
        if name == "random_gamma":
            # When it is lowered, where no jaxpr shows it, it splits the key for its elements, and each key again.
            inner: dict[Drawn, bool] = dict.fromkeys(
                [] if by_row else [("random_split", (2,)), ("random_split", (3,))], False
            )
            made = {(split, (math.prod(shape),)): by_row, **inner}
        for drawn, each in made.items():
            if kinds.setdefault(drawn, each) != each:
                raise DeclarationError(
                    f"{where}: with {rows} examples a device, shape {list(drawn[1])} is drawn once per example and "
                    "once for all; use another batch size or number of microbatches so that the two shapes differ"
                )
    return frozenset(drawn for drawn, by_row in kinds.items() if by_row)


def _draws(jaxpr: Any) -> Iterable[tuple[str, Shape, Shape]]:
    """What a jaxpr makes of keys, in order, inner programs included: with the shape of each and of its keys."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("random_bits", "random_split", "random_gamma"):
            keys = tuple(equation.invars[0].aval.shape)
            shape = equation.params["shape"] if name != "random_gamma" else equation.outvars[0].aval.shape[len(keys) :]
            yield name, tuple(shape), keys
        for program in programs_in(equation):
            yield from _draws(program)


@functools.cache
def _implementation(rows: int, batched: frozenset[Drawn]) -> Any:
    """A PRNG whose key is (two threefry words, first row)."""

    def split_as(name: str, key: jax.Array, shape: Shape) -> jax.Array:
        if (name, shape) in batched:
            # Each of these keys is one example's, and what is drawn from it begins at its own first number.
            children, first = jnp.stack(_hashed(key[:2], shape, key[2], rows), axis=-1), jnp.zeros(1, jnp.uint32)
        else:
            children, first = _threefry().split(key[:2], shape), key[2:]
        return jnp.concatenate([children, jnp.broadcast_to(first, (*shape, 1))], axis=-1)

    def split(key: jax.Array, shape: Shape) -> jax.Array:
        one = custom_vmap(lambda key: split_as("random_split", key, shape))

        @one.def_vmap
        def each(size: int, mapped: Sequence[bool], keys: jax.Array) -> tuple[jax.Array, bool]:
            name = _SPLIT_OF_ONE if size == 1 else "random_split"
            return jax.vmap(lambda key: split_as(name, key, shape))(keys), True

        return one(key)

    def folded(key: jax.Array, data: jax.Array) -> jax.Array:
        return jnp.concatenate([_threefry().fold_in(key[:2], data), key[2:]])

    @custom_vmap
    def fold_in(key: jax.Array, data: jax.Array) -> jax.Array:
        return folded(key, data)

    @fold_in.def_vmap
    def fold_all_in(size: int, mapped: Sequence[bool], key: jax.Array, data: jax.Array) -> tuple[jax.Array, bool]:
        by_place, by_row = (not mapped[0] and (name, (size,)) in batched for name in ("fold_in_place", "fold_in_rows"))
        if by_place:
            data = data + key[2] * jnp.uint32(size // rows)
        if by_place or by_row:
            # Each of these keys is one example's, as those of a split.
            key = key.at[2].set(0)
        return jax.vmap(folded, in_axes=tuple(0 if one else None for one in mapped))(key, data), True

    def random_bits(key: jax.Array, bit_width: int, shape: Sequence[int]) -> jax.Array:
        shape = tuple(shape)
        first = key[2] if ("random_bits", shape) in batched else jnp.uint32(0)
        return _bits(key[:2], bit_width, shape, first, rows)

    return define_prng_impl(
        key_shape=(3,),
        seed=lambda seed: jnp.concatenate([_threefry().seed(seed), jnp.zeros(1, jnp.uint32)]),
        split=split,
        random_bits=random_bits,
        fold_in=lambda key, data: fold_in(key, jnp.asarray(data, jnp.uint32)),
        name=f"shardlab_rows_{rows}_{len(batched)}",
        tag=f"rows{rows}",
    )


def _threefry() -> Any:
    return getattr(threefry_prng_impl, "_impl", threefry_prng_impl)


def _bits(words: jax.Array, bit_width: int, shape: Shape, first: jax.Array, rows: int) -> jax.Array:
    """Random bits of the elements of `shape`, counted from row `first` of the whole draw."""
    one, two = _hashed(words, shape, first, rows)
    if bit_width == 64:
        return (one.astype(jnp.uint64) << 32) | two.astype(jnp.uint64)
    return (one ^ two).astype(jnp.dtype(f"uint{bit_width}"))


def _hashed(words: jax.Array, shape: Shape, first: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Both words of the hash of every element's number in the whole draw."""
    inner = math.prod(shape[1:])
    per_row = shape[0] // rows if shape else 1
    start = first * jnp.uint32(per_row) if shape else first
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) + start if shape else start
    high, low = _multiply(row, inner)
    position = jnp.zeros(shape, jnp.uint32)
    stride = inner
    for dim, size in enumerate(shape[1:], start=1):
        stride //= size if size else 1
        position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
    total = low + position
    high = high + (total < low).astype(jnp.uint32)
    count = math.prod(shape)
    hashed = threefry_2x32(words, jnp.concatenate([high.reshape(count), total.reshape(count)]))
    return hashed[:count].reshape(shape), hashed[count:].reshape(shape)


def _multiply(x: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """High and low words of the 64-bit product of uint32 values and an int below 2**32."""
    mask, sixteen = jnp.uint32(0xFFFF), jnp.uint32(16)
    a, b = x >> sixteen, x & mask
    c, d = jnp.uint32(factor >> 16), jnp.uint32(factor & 0xFFFF)
    middle = a * d + ((b * d) >> sixteen)
    other = (middle & mask) + b * c
    return a * c + (middle >> sixteen) + (other >> sixteen), x * jnp.uint32(factor)
