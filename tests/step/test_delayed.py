"""Delayed sends in the traced step: what travels beside a stage's layers neither waits for them nor is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.extend.core import Literal

from shardlab.mesh.build import build_mesh
from shardlab.module.model import read_model
from shardlab.pipeline.buffers import program
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls
from shardlab.step.pipelined import pipelined_gradients
from shardlab.step.region import make_region
from shardlab.step.state import storage_specs
from tests.step.test_pipelined import batch_of, init, planned, square

SIZE, LAYERS = 32, 16  # two layers and more on every stage, so that they are a loop


def inner(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def found(jaxpr: Any, name: str) -> Iterator[Any]:
    """Equations of a primitive, those within others too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for each in inner(equation):
            yield from found(each, name)


def phases(schedule: str, sends: str) -> tuple[Plan, list[Any]]:
    """The bodies of the scans over the phases, as jaxprs."""
    model, plan = planned(
        SIZE, layers=LAYERS, stage=4, microbatches=8, schedule=schedule, sends=sends, head="last_stage"
    )
    batch = batch_of(SIZE)
    read, region = read_model(model, batch), make_region(plan, build_mesh(plan.mesh))
    calls = Calls(read, square, plan, region, batch, train=True)
    step = pipelined_gradients(read, plan, region, calls, storage_specs(plan, "state"), 0.0)
    flat = read.flat(init(jax.random.key(0), layers=LAYERS))
    values = {"in": flat["in"], "out": flat["out"]}
    for stack in plan.stacks:
        values[stack.name] = jax.numpy.stack([flat[path] for path in stack.members if path])
    with jax.set_mesh(region.mesh):
        traced = jax.make_jaxpr(step)(values, {}, batch, jax.random.key_data(jax.random.key(0)))
    (region_of,) = found(traced.jaxpr, "shard_map")
    (jaxpr,) = inner(region_of)
    bodies = [next(inner(equation)) for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert len(bodies) == len(program(plan.table()).phases)
    return plan, bodies


def beside(body: Any) -> list[int]:
    """For every send in an iteration, beside how many of its layer loops it may run: none depends on the other."""
    # Of every variable, the numbers of the equations that it comes from.
    comes_from: dict[Any, set[int]] = {}
    sources: list[set[int]] = []
    for number, equation in enumerate(body.eqns):
        of = set().union(*(comes_from.get(v, set()) for v in equation.invars if not isinstance(v, Literal)))
        sources.append(of)
        comes_from |= dict.fromkeys(equation.outvars, of | {number})
    # A loop of layers, or a branch in which there is one.
    loops = [
        number
        for number, equation in enumerate(body.eqns)
        if equation.primitive.name == "scan"
        or (
            equation.primitive.name in ("cond", "while")
            and any(True for each in inner(equation) for _ in found(each, "scan"))
        )
    ]
    sends = [number for number, equation in enumerate(body.eqns) if equation.primitive.name == "ppermute"]
    return [sum(send not in sources[loop] and loop not in sources[send] for loop in loops) for send in sends]


STEADY: dict[str, tuple[int, list[int], list[int]]] = {
    # The phase; then of each of its sends, with direct and with delayed ones.
    "1f1b": (1, [0, 0], [1, 1]),
    "gpipe": (1, [0], [0]),  # of eight microbatches: a tick of its own
    "interleaved_1f1b": (1, [0, 0], [1, 1]),
    "1f1b_split": (2, [0, 1], [2, 1]),  # nothing waits for a W
    # Each device's one of F, I and W, in a branch each.
    "zb_v": (0, [0, 0], [3, 3]),
}


@pytest.mark.parametrize("schedule", STEADY)
def test_a_send_has_layers_to_run_beside(schedule: str) -> None:
    phase, direct, delayed = STEADY[schedule]
    for sends, expected in (("direct", direct), ("delayed", delayed)):
        _, bodies = phases(schedule, sends)
        assert beside(bodies[phase]) == expected, sends


def test_direct_sends_have_no_outbox_and_no_barrier() -> None:
    _, bodies = phases("1f1b", "direct")
    assert not any(list(found(body, "optimization_barrier")) for body in bodies)
    _, late = phases("1f1b", "delayed")
    # After each of the two sends of an iteration, which XLA else fuses with reads of other mail.
    assert [len(list(found(body, "optimization_barrier"))) for body in late] == [1, 2, 1]
    # One x of [4, 4] more is carried on.
    carried = [sum(v.aval.shape == (4, 4) for v in body.outvars) for body in (bodies[1], late[1])]
    assert carried[1] == carried[0] + 1
