"""Which spec each array of an optimizer's state gets, and which optimizers may not see stacked layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.models import mlp
from shardlab.module.functions import Functions, path_of, read_functions
from shardlab.pipeline.schedules import make_schedule
from shardlab.plan.layout import stacks_of
from shardlab.plan.optimizer import nest, stack, state_specs, unnest, why_per_layer
from shardlab.plan.plan import Stack

SHAPES = {"layer": {"kernel": jax.ShapeDtypeStruct((8, 6), "float32"), "bias": jax.ShapeDtypeStruct((6,), "float32")}}
SPECS = {"layer": {"kernel": P("data", "tensor"), "bias": P("tensor")}}
KERNEL, BIAS = P("data", "tensor"), P("tensor")


def is_matrix(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def kind(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree)


def both(*roots: str) -> dict[str, P]:
    """The arrays under these roots that have a parameter's shape."""
    return {f"{root}/layer/{name}": spec for root in roots for name, spec in (("kernel", KERNEL), ("bias", BIAS))}


# name: (optimizer, specs of every array that is not replicated)
STATES: dict[str, tuple[optax.GradientTransformation, dict[str, P]]] = {
    "sgd": (optax.sgd(0.1), {}),
    "adamw": (optax.adamw(0.1), both("0/mu", "0/nu")),
    "lion": (optax.lion(0.1), both("0/mu")),
    # The mean over rows of [8, 6] is [6], and lies as dim 1; that over columns as dim 0. No vector is factored.
    "adafactor": (
        optax.adafactor(0.1, min_dim_size_to_factor=4),
        {"0/v_row/layer/kernel": P("tensor"), "0/v_col/layer/kernel": P("data"), "0/v/layer/bias": BIAS},
    ),
    "adafactor, not factored": (optax.adafactor(0.1), both("0/v")),
    "muon": (
        optax.contrib.muon(0.1),
        {
            "inner_states/muon/inner_state/0/mu/layer/kernel": KERNEL,
            "inner_states/adam/inner_state/0/mu/layer/bias": BIAS,
            "inner_states/adam/inner_state/0/nu/layer/bias": BIAS,
        },
    ),
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.0, 10)), optax.ema(0.9)),
        both("1/0/mu", "1/0/nu", "2/ema"),
    ),
    "masked": (
        optax.masked(optax.adam(0.1), is_matrix),
        {"inner_state/0/mu/layer/kernel": KERNEL, "inner_state/0/nu/layer/kernel": KERNEL},
    ),
    "multi_transform": (
        optax.multi_transform({"matrix": optax.adam(0.1), "vector": optax.sgd(0.1, momentum=0.9)}, kind),
        {
            "inner_states/matrix/inner_state/0/mu/layer/kernel": KERNEL,
            "inner_states/matrix/inner_state/0/nu/layer/kernel": KERNEL,
            "inner_states/vector/inner_state/0/trace/layer/bias": BIAS,
        },
    ),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(0.1), every_k_schedule=2).gradient_transformation(),
        both("inner_opt_state/0/mu", "inner_opt_state/0/nu", "acc_grads"),
    ),
    "injected hyperparameters": (
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        both("inner_state/0/mu", "inner_state/0/nu"),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_state_lies_as_its_parameters(name: str) -> None:
    optimizer, expected = STATES[name]
    state = jax.eval_shape(optimizer.init, SHAPES)
    found = state_specs(state, SHAPES, SPECS)
    leaves = jax.tree_util.tree_flatten_with_path(found, is_leaf=lambda leaf: isinstance(leaf, P))[0]
    specs = {path_of(keys): spec for keys, spec in leaves}
    assert len(specs) == len(jax.tree.leaves(state))
    assert {path: spec for path, spec in specs.items() if spec != P()} == expected


def test_the_longest_place_owns_a_state_leaf() -> None:
    """Two parameters whose names end alike: each state array finds its own."""
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 6), "float32"), "a": {"kernel": jax.ShapeDtypeStruct((4,), "float32")}}
    specs = {"kernel": P("data"), "a": {"kernel": P("tensor")}}
    found = state_specs(jax.eval_shape(optax.adam(0.1).init, shapes), shapes, specs)
    assert found[0].mu == specs


def test_a_parameter_tree_of_one_array() -> None:
    shapes = jax.ShapeDtypeStruct((8, 6), "float32")
    found = state_specs(jax.eval_shape(optax.adam(0.1).init, shapes), shapes, P("data"))
    assert (found[0].count, found[0].mu, found[0].nu) == (P(), P("data"), P("data"))


MODEL = read_functions(
    Functions(
        init=lambda key: mlp.init(key, mlp.MLPConfig(num_layers=3)), before=mlp.before, block=mlp.block, after=mlp.after
    ),
    {"features": jax.ShapeDtypeStruct((4, 12), "float32")},
    None,
)
STACKS = stacks_of(MODEL, (2, 1), make_schedule("1f1b", stages=2, microbatches=2))

PER_LAYER: dict[str, tuple[optax.GradientTransformation, str]] = {
    "muon": (optax.contrib.muon(0.1), "on stacked layers its update of blocks/*/"),
    "adafactor": (optax.adafactor(0.1), "on stacked layers its update of blocks/*/"),
    "decay of matrices": (
        optax.adamw(0.1, weight_decay=0.1, mask=is_matrix),
        "on stacked layers its update of blocks/*/down/bias differs by ",
    ),
    "clip_by_block_rms": (
        optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
        "on stacked layers its update of blocks/*/down/bias differs by ",
    ),
    "a mask that is the user's tree": (
        optax.masked(optax.sgd(0.1), MODEL.tree(dict.fromkeys(MODEL.parameters, True))),
        "it does not accept a tree of stacked layers (ValueError)",
    ),
}

STACKED: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "clipped by the global norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)),
}


@pytest.mark.parametrize("name", PER_LAYER)
def test_an_optimizer_that_tells_stacked_layers_apart_runs_per_layer(name: str) -> None:
    optimizer, reason = PER_LAYER[name]
    assert (why_per_layer(optimizer, MODEL, STACKS) or "").startswith(reason)


@pytest.mark.parametrize("name", STACKED)
def test_an_elementwise_optimizer_runs_stacked(name: str) -> None:
    assert why_per_layer(STACKED[name], MODEL, STACKS) is None


def test_nest_and_unnest() -> None:
    flat = {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nest(flat) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert unnest(nest(flat), flat) == flat


def test_stack_fills_pads_with_zeros() -> None:
    values = {"blocks/0/w": jnp.ones(2), "blocks/1/w": 2 * jnp.ones(2), "head": jnp.zeros(())}
    found = stack(values, [Stack("blocks/*/w", ("blocks/0/w", None, "blocks/1/w"))])
    assert set(found) == {"head", "blocks/*/w"}
    np.testing.assert_array_equal(found["blocks/*/w"], [[1, 1], [0, 0], [2, 2]])
