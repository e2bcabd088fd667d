"""The optimizer on the mesh: what it sees, and the numbers it gives on the user's own tree."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardlab.mesh.build import build_mesh
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.module.model import Model, read_model
from shardlab.plan.make import make_plan
from shardlab.plan.optimizer import nest, stack
from shardlab.plan.plan import Plan
from shardlab.step.state import shardings, storage_specs, users_own
from shardlab.step.update import make_update
from tests.equivalence.cases import OPTIMIZERS, features

CONFIG = mlp.MLPConfig(num_layers=3)
MODEL = Functions(init=functools.partial(mlp.init, config=CONFIG), before=mlp.before, block=mlp.block, after=mlp.after)


def planned(optimizer: Any, **more: Any) -> tuple[Plan, Model]:
    sizes = {axis: more.pop(axis, 1) for axis in ("data", "stage", "tensor")}
    mesh = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    batch = features(8)
    plan = make_plan(
        MODEL, mesh=mesh, rules=mlp.mlp_rules("tensor"), optimizer=optimizer, batch=batch, dtype="float64", **more
    )
    return plan, read_model(MODEL, batch)


def draws(model: Model, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{path: rng.normal(size=leaf.shape) for path, leaf in model.parameters.items()} for _ in range(count)]


def watched(optimizer: optax.GradientTransformation, seen: list[Any]) -> optax.GradientTransformation:
    """`optimizer`, which notes the shapes of the trees that it is given."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        seen.append([jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (updates, params)])
        return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "stacked": ("adamw", {"data": 2, "stage": 2, "zero": 1}),
    "per layer": ("muon", {"data": 2, "stage": 2, "tensor": 2, "zero": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_users_own_tree(name: str) -> None:
    """Three layers on two stages: one slot is a pad."""
    with jax.enable_x64(True):
        kind, options = CASES[name]
        optimizer = OPTIMIZERS[kind]()
        plan, model = planned(optimizer, **options)
        assert plan.update == name.replace(" ", "-")
        mesh, seen = build_mesh(plan.mesh), list[Any]()
        wanted = shardings(mesh, storage_specs(plan))
        update = jax.jit(make_update(model, plan, mesh, watched(optimizer, seen)))

        plain, start = jax.jit(optimizer.update), jax.jit(optimizer.init)
        first, *gradients = draws(model, 3)
        tree, state = model.tree(first), start(model.tree(first))
        mine = jax.device_put(stack(first, plan.stacks), wanted)
        my_state = start(nest(mine)) if plan.update == "stacked" else state
        for gradient in gradients:
            updates, state = plain(model.tree(gradient), state, tree)
            tree = jax.tree.map(jnp.add, tree, updates)
            stored = jax.device_put(stack(gradient, plan.stacks), shardings(mesh, storage_specs(plan, "state")))
            mine, my_state = update(stored, my_state, mine, 1.0)

        found, expected = users_own(plan, mine), model.flat(tree)
        assert set(found) == set(expected)
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, rtol=1e-10, atol=1e-12, err_msg=path)
        for each in plan.stacks:
            assert mine[each.name].sharding.is_equivalent_to(wanted[each.name], mine[each.name].ndim)
            for slot, member in enumerate(each.members):
                assert member is not None or not np.any(mine[each.name][slot])

        shapes, _ = seen[0]
        assert all(given == shapes for given in seen[0])
        if plan.update == "per-layer":
            assert [layer["up"]["kernel"] for layer in shapes["blocks"]] == [(16, 24)] * 3
        else:
            assert shapes["blocks"]["*"]["up"]["kernel"] == (4, 16, 24)


def test_every_device_updates_the_share_whose_state_it_holds() -> None:
    """With ZeRO 1 parameters are sliced, updated and gathered: nothing of the state crosses the mesh."""
    optimizer = optax.adam(0.1)
    with jax.enable_x64(True):
        plan, model = planned(optimizer, data=4, zero=1)
        mesh = build_mesh(plan.mesh)
        first, gradient = draws(model, 2)
        laid = shardings(mesh, storage_specs(plan, "state"))
        mine = jax.device_put(stack(first, plan.stacks), shardings(mesh, storage_specs(plan)))
        state = optimizer.init(nest(mine))
        given = jax.device_put(stack(gradient, plan.stacks), laid)
        moments = nest(laid)
        placed = {name: jax.device_put(getattr(state[0], name), moments) for name in ("mu", "nu")}
        state = (state[0]._replace(**placed), *state[1:])
        lowered = jax.jit(make_update(model, plan, mesh, optimizer)).lower(given, state, mine, 1.0)
        text = str(lowered.compile().as_text())
        gathers = text.count(" all-gather(") + text.count(" all-gather-start(")
        assert gathers == sum(value.ndim > 0 for value in mine.values()) - sum(
            laid[name].is_fully_replicated for name in mine
        )
        assert " all-reduce(" not in text
        assert " all-to-all(" not in text
