"""The optimizer on global arrays, acting as on the user's per-layer tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.module.model import Model
from shardlab.plan.layout import optimizer_specs, optimizer_tree
from shardlab.plan.optimizer import stack, unnest, updated
from shardlab.plan.plan import Plan
from shardlab.step.state import stage_axis, storage_specs, unstacked

Arrays = dict[str, jax.Array]


def make_update(
    model: Model, plan: Plan, mesh: Mesh, optimizer: optax.GradientTransformation
) -> Callable[[Arrays, Any, Arrays, jax.Array], tuple[Arrays, Any]]:
    """``(gradients, optimizer state, parameters, loss) -> (parameters, optimizer state)``, all in stored form.

    Gradients and parameters are first laid as the optimizer state is, so that every device updates the share whose
    state it holds; the new parameters go back to their own layout.
    """
    specs = optimizer_specs(plan.parameters, plan.stacks, plan.update, plan.mesh)
    storage = storage_specs(plan)

    def constrain(values: Mapping[str, Any], wanted: Mapping[str, PartitionSpec]) -> Arrays:
        return {
            name: jax.lax.with_sharding_constraint(value, NamedSharding(mesh, wanted[name]))
            for name, value in values.items()
        }

    def per_layer(values: Arrays) -> Arrays:
        """Stored arrays as the user's own: each layer spread over the stages in another dim first, so that taking
        a slot is local to every device."""
        stage = stage_axis(plan)
        out: dict[str, Any] = {}
        for name, value in values.items():
            members = next((s.members for s in plan.stacks if s.name == name), None)
            if members is not None and stage is not None:
                spec = specs[next(path for path in members if path)]
                value = jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec(None, *spec)))
            out[name] = value
        return constrain(unstacked(plan, out), specs)

    def update(gradients: Arrays, state: Any, parameters: Arrays, loss: jax.Array) -> tuple[Arrays, Any]:
        form = per_layer if plan.update == "per-layer" else lambda values: constrain(values, specs)
        mine = form(parameters)
        tree = optimizer_tree(model, mine, plan.stacks, plan.update)
        pushes = optimizer_tree(model, form(gradients), plan.stacks, plan.update)
        new, state = updated(optimizer, pushes, state, tree, loss)
        if plan.update == "per-layer" or not plan.stacks:
            flat = model.flat(new)
            trained = [s for s in plan.stacks if next(path for path in s.members if path) in flat]
            flat = stack(flat, trained)
        else:
            flat = unnest(new, mine)
        return constrain(flat, storage), state

    return update
