"""The held-out loss: during a run, and of a run's parameters on any mesh afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardlab.mesh.faults import Fault, raise_faults
from shardlab.module.model import read_model
from shardlab.plan.plan import Plan
from shardlab.run.config import Config
from shardlab.run.record import read_arrays
from shardlab.run.view import Silent, View, loss_text
from shardlab.sharding.resolve import merged
from shardlab.step.compile import check_batch
from shardlab.step.forward import compile_forward
from shardlab.step.placed import placed
from shardlab.step.state import buffer_specs, initial_values, shardings, storage_specs


class Evaluation:
    """The compiled evaluation of some held-out batches: called with parameters and buffers, their loss.

    The loss is over all batches together: the sum of their sums over the sum of their weights.
    """

    def __init__(self, config: Config, plan: Plan, batches: Sequence[Any]) -> None:
        for batch in batches:
            check_batch(batch, plan.batch, "make data.abstract_batch say what data.held_out gives")
        self._forward = compile_forward(config.model, plan, config.abstract_batch(), config.loss)
        self._batches = batches
        self.mesh = self._forward.mesh

    def __call__(self, parameters: Any, buffers: Any) -> tuple[float, int]:
        """The loss, and how many tokens (or other weight) it is over."""
        total = weight = 0.0
        for batch in self._batches:
            # Reading the numbers waits for them, which bounds how many passes are in flight.
            part, counted = self._forward(parameters, buffers, batch)
            total, weight = total + float(part), weight + float(counted)
        # Of nothing there is no mean; a train step says the same.
        return total / weight if weight else math.nan, round(weight)


def evaluate(config: Config, run: str | Path | None = None, *, view: View | None = None) -> dict[str, Any]:
    """The held-out loss of a run's parameters on the config's mesh, which may be another than the run's.

    Args:
      config: with the run's model.
      run: the directory of a run; None takes the config's weights, or the parameters that its seed gives.
      view: what is told of what happens.

    Returns:
      ``eval_loss``, ``unit``, ``tokens``, ``batches``, ``batch_size``, and ``parameters``: the run, the weights, or
      "initial".

    Raises:
      DeclarationError: a faulty declaration, or the run of another model.
    """
    view = view or Silent()
    arrays = None if run is None else read_arrays(run)
    with view.phase("planning"):
        plan = config.plan()
    if arrays is not None:
        same_arrays(plan, arrays, str(run))
    weights = config.open_weights(plan) if arrays is None else None
    with view.phase("reading the data"):
        batches = config.data.held_out(config.batch_size, config.eval_batches)
    with view.phase(f"compiling the evaluation for {plan.mesh}"):
        evaluation = Evaluation(config, plan, batches)
    if arrays is None:
        given = weights.onto(evaluation.mesh) if weights is not None else {}
        which = f"the weights in {config.weights}" if given else f"the parameters that seed {config.seed} gives"
        view.say(f"no run is named: these are {which}, before any step")
        model = read_model(config.model, config.abstract_batch(), plan.pipeline)
        with jax.set_mesh(evaluation.mesh):
            values = given | initial_values(model, plan, evaluation.mesh, config.seed, without=given)
    else:
        values = _arranged(plan, evaluation.mesh, arrays)
    names = storage_specs(plan)
    with view.phase(f"evaluating {config.eval_batches} batches of {config.batch_size}"):
        loss, tokens = evaluation(
            {name: values[name] for name in names},
            {name: value for name, value in values.items() if name not in names},
        )
    view.say(f"held-out loss {loss_text(loss, config.unit)}")
    return {
        "eval_loss": loss,
        "unit": config.unit,
        "tokens": tokens,
        "batches": config.eval_batches,
        "batch_size": config.batch_size,
        "parameters": str(run or config.weights or "initial"),
    }


def same_arrays(plan: Plan, arrays: Mapping[str, Any], run: str) -> None:
    """That a run's arrays are those of the plan's model, by path and shape.

    Raises:
      DeclarationError: with every one that is not.
    """
    shapes: dict[str, Any] = {parameter.path: parameter.shape for parameter in plan.parameters}
    shapes |= {buffer.path: buffer.shape for buffer in plan.buffers}
    dtypes = {parameter.path: parameter.dtype for parameter in plan.parameters}
    dtypes |= {buffer.path: buffer.dtype for buffer in plan.buffers}
    way_out = "give the config, with the overrides, that the run was made with"
    faults = [Fault(path, f"run {run!r} has none", way_out) for path in shapes if path not in arrays]
    for path, array in arrays.items():
        if path not in shapes:
            faults.append(Fault(path, f"is in run {run!r} and not in the model", way_out))
        elif shapes[path] != array.shape:
            problem = f"is {list(array.shape)} in run {run!r} and {list(shapes[path])} in the model"
            faults.append(Fault(path, problem, way_out))
        elif np.iscomplexobj(array) and not jax.numpy.issubdtype(dtypes[path], jax.numpy.complexfloating):
            problem = f"is {array.dtype} in run {run!r} and {dtypes[path]} in the model"
            faults.append(Fault(path, problem, way_out))
    raise_faults(merged(faults))


def _arranged(plan: Plan, mesh: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arrays by the user's paths as the plan stores them: blocks stacked, pad slots zero, each in its sharding."""
    members = {stack.name: stack.members for stack in plan.stacks}
    dtypes = {parameter.path: parameter.dtype for parameter in plan.parameters}
    stored = {parameter.path: parameter.stored_shape for parameter in plan.parameters}

    def padded(path: str) -> np.ndarray:
        array = arrays[path]
        return np.pad(array, [(0, n - m) for m, n in zip(array.shape, stored.get(path, array.shape), strict=True)])

    arranged = {}
    for name, sharding in shardings(mesh, {**storage_specs(plan), **buffer_specs(plan)}).items():
        paths = members.get(name, (name,))
        first = next(path for path in paths if path)
        slots = [padded(path) if path else np.zeros_like(padded(first)) for path in paths]
        value = np.stack(slots) if name in members else slots[0]
        arranged[name] = placed(value.astype(dtypes.get(first, value.dtype)), sharding)
    return arranged
