"""How parameters and their optimizer state lie between steps, by hand."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.plan.layout import axes_in, optimizer_shapes, optimizer_specs, optimizer_tree, storage_of
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rules, canonical

THREE = Functions(
    init=lambda key: {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6), "scale": jnp.zeros(())},
    apply=lambda params, batch: (batch @ params["kernel"] + params["bias"]) * params["scale"],
)
MLP = Functions(
    init=lambda key: mlp.init(key, mlp.MLPConfig(num_layers=3)), before=mlp.before, block=mlp.block, after=mlp.after
)


def planned(model: Functions, rules: Rules, mesh: dict[str, int], batch: Any, **more: Any) -> Plan:
    spec = MeshSpec(mesh, batch="data", stage="stage" if "stage" in mesh else None, target=_target(mesh))
    return make_plan(model, mesh=spec, rules=rules, batch=batch, **{"optimizer": optax.adam(0.1), **more})


def specs_of(plan: Plan, which: str) -> dict[str, P]:
    """A spec of every parameter, without the trailing dims that no axis splits."""
    return {p.path: canonical(getattr(p, which)) for p in plan.parameters}


def _target(mesh: dict[str, int]) -> str:
    return f"cpu:{math.prod(mesh.values())}"


def three(zero: int, kernel: P | None = None) -> Plan:
    rules = Rules((("kernel", P(None, "tensor") if kernel is None else kernel), ("*", None)))
    return planned(THREE, rules, {"data": 2, "tensor": 3}, np.zeros((4, 8), np.float32), zero=zero)


WHOLE = {"kernel": P(None, "tensor"), "bias": P(), "scale": P()}
SHARD = {"kernel": P("data", "tensor"), "bias": P("data"), "scale": P()}


@pytest.mark.parametrize(
    ("zero", "storage", "state"), [(0, WHOLE, WHOLE), (1, WHOLE, SHARD), (2, WHOLE, SHARD), (3, SHARD, SHARD)]
)
def test_zero_levels_of_three_parameters(zero: int, storage: dict[str, P], state: dict[str, P]) -> None:
    plan = three(zero)
    assert specs_of(plan, "compute") == WHOLE
    assert specs_of(plan, "storage") == storage
    assert specs_of(plan, "state") == state
    moments = {leaf.path: canonical(leaf.spec) for leaf in plan.optimizer_state}
    assert moments == {"0/count": P()} | {f"0/{m}/{path}": spec for m in ("mu", "nu") for path, spec in state.items()}


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_declared_batch_axis_is_storage_at_every_level(zero: int) -> None:
    kernel = next(p for p in three(zero, P("data", "tensor")).parameters if p.path == "kernel")
    assert (kernel.storage, kernel.state, kernel.compute) == (SHARD["kernel"], SHARD["kernel"], WHOLE["kernel"])


def stages(zero: int, stage: int = 2, **more: Any) -> Plan:
    batch = {"features": np.zeros((8, 12), np.float32), "labels": np.zeros(8, np.int32)}
    return planned(MLP, mlp.mlp_rules(None), {"data": 2, "stage": stage}, batch, zero=zero, **more)


def test_what_every_stage_uses_is_lent_over_the_stages() -> None:
    """inputs [12, 16] and outputs [16, 10] take both axes on one dim, stage first; a bias of 10 has room for one."""
    both = P(("stage", "data"))
    across = {"inputs/kernel": P(None, ("stage", "data")), "outputs/kernel": both, "inputs/bias": both}
    lent = {"inputs/kernel": P(None, "stage"), "outputs/kernel": P("stage"), "inputs/bias": P("stage")}
    for zero, storage, state, bias in [
        (0, lent, lent, P()),
        (1, lent, across, P("data")),
        (3, across, across, P("data")),
    ]:
        plan = stages(zero)
        assert specs_of(plan, "storage").items() >= storage.items()
        assert specs_of(plan, "state").items() >= (state | {"outputs/bias": bias}).items()
        assert set(specs_of(plan, "compute").values()) == {P()}


def test_blocks_lie_on_their_stage_alone() -> None:
    plan = stages(1)
    stored = specs_of(plan, "storage")
    assert {stored[path] for path in stored if path.startswith("blocks/")} == {P()}
    assert specs_of(plan, "state")["blocks/2/up/kernel"] == P(None, "data")
    (up,) = [stack for stack in plan.stacks if stack.name == "blocks/*/up/kernel"]
    assert plan.layers == (2, 1)
    assert up.members == ("blocks/0/up/kernel", "blocks/1/up/kernel", "blocks/2/up/kernel", None)


def test_the_tree_the_optimizer_sees() -> None:
    plan = stages(1)
    specs = optimizer_specs(plan.parameters, plan.stacks, "stacked", plan.mesh)
    shapes = optimizer_shapes(plan.parameters, plan.stacks, "stacked")
    assert set(specs) == set(shapes)
    assert specs["blocks/*/up/kernel"] == P("stage", None, "data")
    assert shapes["blocks/*/up/kernel"] == jax.ShapeDtypeStruct((4, 16, 24), jnp.float32)
    assert specs["outputs/bias"] == P("data")


def test_per_layer_state_is_spread_over_the_stages_in_another_dim() -> None:
    plan = stages(1)
    specs = optimizer_specs(plan.parameters, plan.stacks, "per-layer", plan.mesh)
    shapes = optimizer_shapes(plan.parameters, plan.stacks, "per-layer")
    assert set(specs) == set(shapes) == {p.path for p in plan.parameters}
    assert specs["blocks/0/up/kernel"] == P("stage", "data")
    assert specs["blocks/0/down/kernel"] == P("data", "stage")
    assert specs["blocks/0/up/bias"] == P("data")  # one dim, and it is taken


def test_a_model_without_stacks_keeps_its_own_tree() -> None:
    from shardlab.module.functions import read_functions

    model = read_functions(THREE, jax.ShapeDtypeStruct((4, 8), "float32"), None)
    values = {"bias": 1, "kernel": 2, "scale": 3}
    assert optimizer_tree(model, values, (), "stacked") == values
    other = read_functions(MLP, {"features": jax.ShapeDtypeStruct((4, 12), "float32")}, None)
    tree = optimizer_tree(other, {path: path for path in other.parameters}, stages(0).stacks, "per-layer")
    assert [layer["up"]["bias"] for layer in tree["blocks"]] == [f"blocks/{i}/up/bias" for i in range(3)]


MESH = MeshSpec({"replica": 2, "data": 2, "stage": 2}, batch=("replica", "data"), stage="stage")


@pytest.mark.parametrize(
    ("spec", "shape", "lent", "storage", "state"),
    [
        (P(), (8, 4), (), P(("replica", "data")), P(("replica", "data"))),
        (P(), (8, 4), ("stage",), P(("stage", "replica", "data")), P(("stage", "replica", "data"))),
        # No dim divides by 8: the batch axes and the lent axis take a dim each.
        (P(), (4, 6), ("stage",), P(("replica", "data"), "stage"), P(("replica", "data"), "stage")),
        # Nothing divides by 4: only the lent axis finds a place.
        (P(), (6,), ("stage",), P("stage"), P("stage")),
        (P(), (3,), ("stage",), P(), P()),
        # One batch axis is declared: the others stay off.
        (P("data"), (8, 4), (), P("data"), P("data")),
    ],
)
def test_storage_of_everything_sharded(spec: P, shape: tuple[int, ...], lent: Any, storage: P, state: P) -> None:
    assert storage_of(spec, shape, MESH, lent, shard=True, shard_state=True) == (storage, state)


def test_storage_and_state_differ_by_batch_axes_alone() -> None:
    """Going from one to the other is then a local slice or a gather."""
    for shape in [(8, 4), (4, 6), (12, 12), (6,), (3, 5), ()]:
        for lent in ((), ("stage",)):
            storage, state = storage_of(P(), shape, MESH, lent, shard=False, shard_state=True)
            assert not axes_in(storage) & {"replica", "data"}
            for mine, theirs in zip(storage, state, strict=False):
                names = [axes if isinstance(axes, tuple) else (axes,) for axes in (mine, theirs)]
                assert mine is None or names[1][: len(names[0])] == names[0]
