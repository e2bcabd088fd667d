"""What computes across examples is refused by name, and what does not is let through."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.batch_sum import batch_sum
from shardlab.step.compile import compile_train_step
from shardlab.step.examples import check_rows_to_rows, check_sums

ROWS, WIDTH = 4, 6


def traced(function: Callable[..., Any]) -> tuple[Any, Any]:
    shapes = [jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32) for rows in (ROWS, 2 * ROWS)]
    w = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    return jax.make_jaxpr(function)(w, shapes[0]), jax.make_jaxpr(function)(w, shapes[1])


ROW_BY_ROW: dict[str, Callable[[Any, Any], Any]] = {
    "a layer": lambda w, x: jnp.tanh(x @ w) + x,
    "softmax over features": lambda w, x: jax.nn.softmax(x @ w, axis=-1),
    "layer norm": lambda w, x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6),
    "a scan over features": lambda w, x: jax.lax.scan(lambda c, col: (c + col, c), jnp.zeros(len(x)), x.T)[1],
    "a map over examples": lambda w, x: jax.lax.map(lambda row: row @ w, x),
    "remat": lambda w, x: jax.checkpoint(lambda x: jnp.sin(x @ w))(x),
    "a gather by row": lambda w, x: x[jnp.arange(len(x)), 0],
    "flattened and back": lambda w, x: (x.reshape(-1, 3) * 2).reshape(x.shape),
    "parameters only": lambda w, x: w.sum(),
    "a batch sum": lambda w, x: x - batch_sum(x.sum(0)) / batch_sum(jnp.ones(len(x)).sum()),
    "a scaled batch sum": lambda w, x: x + batch_sum(0.5 * jnp.einsum("bi,bj->ij", x, x))[0] * 2,
    "a batch sum in a jit": jax.jit(lambda w, x: x * batch_sum(jnp.sum(x * x))),
}


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_row_by_row(name: str) -> None:
    check_rows_to_rows(*traced(ROW_BY_ROW[name]), "block", ROWS)


HERE = re.escape(__file__)
ACROSS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "batch mean": (lambda w, x: x - x.mean(0), "div at FILE takes a mean over the examples at hand"),
    "maximum": (lambda w, x: x / x.max(), "reduce_max at FILE takes one value of all examples"),
    "one example": (lambda w, x: x - x[0], "slice at FILE takes one value of all examples"),
    "contrast": (lambda w, x: jax.nn.softmax(x @ x.T) @ x, r"dot_general at FILE makes \[4, 4\] of 4 examples"),
    "sort": (lambda w, x: jnp.sort(x, axis=0), "sort at FILE orders the examples"),
    "running sum": (lambda w, x: jnp.cumsum(x, axis=0), "cumsum at FILE orders the examples"),
    "neighbour": (lambda w, x: x[1:] - x[:-1], r"slice at FILE makes \[3, 6\] of 4 examples"),
    "recurrence": (
        lambda w, x: jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(WIDTH), x)[1],
        "scan at FILE carries something from example to example",
    ),
    "square of a sum": (lambda w, x: x * jnp.sum(x) ** 2, "integer_pow at FILE goes on from a sum over the examples"),
    "inside jit": (jax.jit(lambda w, x: x / x.max()), "reduce_max at FILE takes one value of all examples"),
    "inside remat": (jax.checkpoint(lambda w, x: x / x.max()), "reduce_max at FILE takes one value of all examples"),
    "a choice": (
        lambda w, x: jax.lax.cond(jnp.sum(x) > 0, lambda x: x, lambda x: -x, x),
        "gt at FILE goes on from a sum over the examples",
    ),
}


@pytest.mark.parametrize("name", ACROSS)
def test_across_examples(name: str) -> None:
    function, message = ACROSS[name]
    wanted = "block: " + message.replace("FILE", HERE + r":\d+")
    with pytest.raises(DeclarationError, match=wanted):
        check_rows_to_rows(*traced(function), "block", ROWS)


def test_a_sum_returned() -> None:
    with pytest.raises(DeclarationError) as error:
        check_rows_to_rows(*traced(lambda w, x: x.sum(0)), "after", ROWS)
    assert str(error.value) == (
        "after: returns a sum over the examples, and a device holds 4 of the batch's; sum it with shardlab.batch_sum, "
        "or let XLA see the whole batch: batch_axes='automatic' without a pipeline, with microbatches=1"
    )


SUMS: dict[str, Callable[[Any, Any], Any]] = {
    "sum and count": lambda w, x: (jnp.sum(x**2), x.size),
    "sum and mask": lambda w, x: (jnp.sum(x * (x > 0)), jnp.sum(x > 0)),
    "halved": lambda w, x: (0.5 * jnp.sum(x), jnp.float32(len(x))),
    "chunks": lambda w, x: (
        jax.lax.scan(lambda total, column: (total + column.sum(), None), 0.0, x.T)[0],
        jnp.full((), x.size, jnp.float32),
    ),
    "stacked": lambda w, x: (jnp.stack([x.sum(), (x**2).sum()]).sum(), len(x)),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    check_sums(*traced(SUMS[name]), "loss", ROWS)


NO_SUMS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a mean": (lambda w, x: (jnp.mean(x), 1.0), "loss: div at .* takes a mean over the examples at hand"),
    "a constant weight": (lambda w, x: (jnp.sum(x), 1.0), "loss: its weight does not grow with the number of examples"),
    "a decay of the weights": (lambda w, x: (jnp.sum(x) + jnp.sum(w**2), len(x)), "loss: add at .* adds what does not"),
    "decay alone": (lambda w, x: (jnp.sum(w**2), len(x)), "loss: its sum does not grow with the number of examples"),
    "a logarithm": (lambda w, x: (jnp.log(jnp.sum(x)), len(x)), "loss: log at .* goes on from a sum"),
    "a ratio": (lambda w, x: (jnp.sum(x) / jnp.sum(x > 0), len(x)), "loss: div at .* goes on from a sum"),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_no_sums(name: str) -> None:
    function, message = NO_SUMS[name]
    with pytest.raises(DeclarationError, match=message):
        check_sums(*traced(function), "loss", ROWS)


def compiled(microbatches: int, centre: Callable[[jax.Array], jax.Array], **options: Any) -> Any:
    model = Functions(
        init=lambda key: {"w": jax.random.normal(key, (WIDTH, WIDTH))},
        apply=lambda params, batch: centre(batch["x"] @ params["w"]),
    )
    mesh = MeshSpec({"data": 2}, batch="data", target="cpu:2")
    optimizer, batch = optax.sgd(0.1), {"x": np.ones((8, WIDTH), np.float32)}
    rules = Rules((Rule("w", P()),))
    plan = make_plan(
        model, mesh=mesh, rules=rules, optimizer=optimizer, batch=batch, microbatches=microbatches, **options
    )
    return compile_train_step(model, lambda y, batch: (jnp.sum(y**2), len(y)), optimizer, plan, batch)


def test_a_model_across_examples_is_refused_where_the_batch_is_cut() -> None:
    with pytest.raises(DeclarationError, match=r"the model: div at .* takes a mean over the examples at hand"):
        compiled(1, lambda x: x - x.mean(0))
    compiled(1, lambda x: x - x.mean(0), batch_axes="automatic")


def test_a_batch_sum_and_microbatches() -> None:
    with pytest.raises(DeclarationError) as error:
        compiled(2, lambda x: x - batch_sum(x.sum(0)))
    assert str(error.value) == (
        "the model: calls shardlab.batch_sum, and each of 2 microbatches is only a part of the batch; "
        "use microbatches=1"
    )
