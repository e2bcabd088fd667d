"""How many floating point operations a traced program does: its matrix products and convolutions, loops counted.

XLA's own count of a compiled program takes the body of a loop once; here a scan counts as often as it runs. Everything
else (elementwise, gathers, reductions) is taken for free: what it costs is memory traffic.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from shardlab.module.inner import program_of, programs_in
from shardlab.module.residuals import differentiable


def flops(jaxpr: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions of a program.

    A scan counts its length times, of branches the costliest counts, and a while loop, of which no program says how
    often it runs, counts once; so does a kernel written by hand. A product of complex numbers counts four times.

    >>> import jax.numpy as jnp
    >>> flops(jax.make_jaxpr(lambda x, w: jnp.tanh(x @ w))(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    return sum(_of_equation(equation) for equation in program_of(jaxpr).eqns)


def trained_flops(function: Any, trained: Any, *others: Any) -> int:
    """`flops` of ``function(trained, *others)`` and of its derivatives in what is trained; arrays or shapes.

    >>> import jax.numpy as jnp
    >>> trained_flops(lambda w, x: x @ w, jnp.ones((3, 5)), jnp.ones((2, 3)))
    120
    """

    def both(trained: Any, *others: Any) -> Any:
        y, pull = jax.vjp(lambda trained: differentiable(function(trained, *others)), trained)
        return y, differentiable(pull([jax.numpy.ones_like(leaf) for leaf in y]))

    return flops(jax.make_jaxpr(both)(trained, *others))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
    elif name == "conv_general_dilated":
        return _of_convolution(equation)
    else:
        inside = [flops(program) for program in programs_in(equation)]
        if name == "cond":
            return max(inside, default=0)
        return sum(inside) * (params["length"] if name == "scan" else 1)
    return _twice(equation, terms * math.prod(equation.outvars[0].aval.shape))


def _of_convolution(equation: Any) -> int:
    """Of a convolution, what falls on padding and on the zeros between dilated numbers left out, as XLA counts."""
    params, (result,) = equation.params, equation.outvars
    given, kernel = (var.aval.shape for var in equation.invars)
    lhs, rhs, out = params["dimension_numbers"]
    terms = result.aval.shape[out[0]] * result.aval.shape[out[1]] * kernel[rhs[1]]
    for dim, (stride, (low, _), spread, apart) in enumerate(
        zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True)
    ):
        starts = np.arange(result.aval.shape[out[2 + dim]])[:, None] * stride
        places = starts + np.arange(kernel[rhs[2 + dim]]) * apart - low
        there = (places >= 0) & (places <= (given[lhs[2 + dim]] - 1) * spread) & (places % spread == 0)
        terms *= int(there.sum())
    return _twice(equation, terms)


def _twice(equation: Any, terms: int) -> int:
    """A multiplication and an addition for each term; of complex numbers, four times that."""
    complex_ = jax.numpy.issubdtype(equation.outvars[0].aval.dtype, jax.numpy.complexfloating)
    return 2 * terms * (4 if complex_ else 1)
