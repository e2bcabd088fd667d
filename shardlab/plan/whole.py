"""Operations that XLA's partitioner gets wrong along dims that are cut, and the dims that are kept whole for them.

Measured on jax 0.10.2 and 0.12.0.1 with arrays laid by `jax.jit` alone, against one device: convolutions of images cut
along their height are wrong, forward and backward, where a second axis of the mesh does not cut them too; gradients of
strided slices and of strided sums over windows are wrong, or of another shape, along any cut dim, and so are those of
cumulative maxima and products, which are made of such slices; a Fourier transform along a cut dim can end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax

from shardlab.module.inner import programs_in

_CUMULATIVE = frozenset({"cumlogsumexp", "cummax", "cummin", "cumprod"})
_SAID = {"conv_general_dilated": "convolutions", "slice": "strided slices", "pad": "paddings between entries"}
_SAID |= {"reduce_window_sum": "strided sums over windows", "fft": "Fourier transforms"}
_SAID |= dict.fromkeys(_CUMULATIVE, "cumulative maxima and products")


def whole_dims(equation: Any, axes: int) -> tuple[list[Collection[int]], Collection[int]] | None:
    """The dims of an operation's operands and of its result that must not be cut; None where any may be.

    Args:
      equation: of a traced program.
      axes: how many automatic axes of more than one device there are.

    >>> import jax.numpy as jnp
    >>> (equation,) = jax.make_jaxpr(lambda x: jnp.cumprod(x, 1))(jnp.ones((2, 3))).eqns[-1].params["jaxpr"].eqns
    >>> whole_dims(equation, axes=1)
    ([(1,)], (1,))
    """
    name, params = equation.primitive.name, equation.params
    along: Collection[int]
    if not axes:
        return None
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        # With one axis they are right.
        return ([numbers.lhs_spec[2:], numbers.rhs_spec[2:]], numbers.out_spec[2:]) if axes > 1 else None
    if name == "slice":
        along = [dim for dim, stride in enumerate(params["strides"] or ()) if stride > 1]
    elif name == "pad":
        along = [dim for dim, (_, _, interior) in enumerate(params["padding_config"]) if interior > 0]
    elif name == "reduce_window_sum":
        along = [dim for dim, stride in enumerate(params["window_strides"]) if stride > 1]
    elif name in _CUMULATIVE:
        along = (params["axis"],)
    elif name == "fft":
        rank = equation.invars[0].aval.ndim
        along = range(rank - len(params["fft_lengths"]), rank)
    else:
        return None
    others: list[Collection[int]] = [()] * (len(equation.invars) - 1)
    return ([along, *others], along) if along else None


def kept_whole(function: Callable[..., Any], *args: Any, axes: int) -> set[str]:
    """What a function computes along dims that are kept whole, in words.

    >>> import jax.numpy as jnp
    >>> sorted(kept_whole(lambda x: jnp.fft.fft(jnp.cumprod(x)[::2]), jnp.ones(8), axes=1))
    ['Fourier transforms', 'cumulative maxima and products', 'strided slices']
    """
    equations = _equations(jax.make_jaxpr(function)(*args).jaxpr)
    return {_SAID[one.primitive.name] for one in equations if whole_dims(one, axes) is not None}


def whole_note(found: Iterable[str]) -> list[str]:
    """What a plan says of them."""
    if not (names := sorted(found, key=str.lower)):
        return []
    said = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return [f"{said} are computed with the dims that they go along whole: XLA gets them wrong where those are cut"]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for program in programs_in(equation):
            yield from _equations(program)
