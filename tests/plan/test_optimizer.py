"""Which spec each array of an optimizer's state gets, and which optimizers may not see stacked layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.models import mlp
from shardlab.module.functions import Functions, path_of, read_functions
from shardlab.pipeline.schedules import make_schedule
from shardlab.plan.layout import stacks_of
from shardlab.plan.optimizer import changed_by_padding, nest, stack, state_specs, unnest, why_per_layer
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
WARM = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 2000, 10000)


def of_layer_0(tree: Any) -> Any:
    paths = jax.tree_util.tree_map_with_path(lambda keys, _: path_of(keys), tree)
    return jax.tree.map(lambda path: "frozen" if path.startswith("blocks/0/") else "trained", paths)


def of_kernels(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, _: "a" if "kernel" in path_of(keys) else "b", tree)


def decay_of_matrices_from(step: int) -> optax.GradientTransformation:
    late = optax.add_decayed_weights(lambda count: 0.1 * (count >= step), mask=is_matrix)
    return optax.chain(optax.scale_by_adam(), late, optax.scale(-0.1))


# What is not the same on stacked layers, however late or little of it is seen: update or state, of what.
PER_LAYER: dict[str, tuple[optax.GradientTransformation, str]] = {
    "muon": (optax.contrib.muon(0.1), "state of blocks/*/down/kernel"),
    "muon, warmed up": (optax.contrib.muon(WARM), "state of blocks/*/down/kernel"),
    "muon, every 50 steps": (
        optax.MultiSteps(optax.contrib.muon(0.1), 50).gradient_transformation(),
        "state of blocks/*/down/kernel",
    ),
    "adafactor": (optax.adafactor(0.1), "state of blocks/*/down/bias"),
    "lamb, warmed up": (optax.lamb(WARM), "update of blocks/*/down/bias"),
    "novograd": (optax.novograd(0.1), "state of blocks/*/down/bias"),
    "decay of matrices": (optax.adamw(0.1, weight_decay=0.1, mask=is_matrix), "update of blocks/*/down/bias"),
    "decay of matrices, a little": (
        optax.adamw(WARM, weight_decay=1e-6, mask=is_matrix),
        "update of blocks/*/down/bias",
    ),
    "decay of matrices, late": (decay_of_matrices_from(10**5 + 7), "update of blocks/*/down/bias"),
    "a layer frozen": (
        optax.multi_transform({"trained": optax.adamw(WARM), "frozen": optax.set_to_zero()}, of_layer_0),
        "state of blocks/*/down/bias",
    ),
    "a layer frozen, without state": (
        optax.multi_transform({"trained": optax.sgd(WARM), "frozen": optax.set_to_zero()}, of_layer_0),
        "update of blocks/*/down/bias",
    ),
    "clip_by_block_rms": (optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)), "update of blocks/*/down/bias"),
    "noise": (optax.chain(optax.add_noise(0.1, 0.55, 0), optax.sgd(0.1)), "update of blocks/*/down/bias"),
    "centralized": (optax.chain(optax.centralize(), optax.sgd(0.1)), "update of blocks/*/down/bias"),
    "all in one vector": (optax.flatten(optax.sgd(0.1)), "update of blocks/*/down/bias"),
}

STACKED: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw, warmed up": optax.adamw(WARM),
    "adamw with a bfloat16 moment": optax.adamw(0.1, mu_dtype=jnp.bfloat16),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "adamax": optax.adamax(0.1),
    "adabelief": optax.adabelief(0.1),
    "nadamw": optax.nadamw(0.1),
    "clipped, each number": optax.chain(optax.clip(0.1), optax.sgd(0.1)),
    "clipped by the global norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1)),
    "by name": optax.multi_transform({"a": optax.adamw(WARM), "b": optax.set_to_zero()}, of_kernels),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation(),
    "MultiSteps that skips": optax.MultiSteps(
        optax.adam(0.1), 4, should_skip_update_fn=optax.transforms.skip_not_finite
    ).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "injected hyperparameters": optax.inject_hyperparams(optax.adamw)(learning_rate=WARM),
    "less on a plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
}


def stacks(*layers: int) -> Any:
    return stacks_of(MODEL, (0, 0, 0), layers, make_schedule("1f1b", stages=2, microbatches=2))


@pytest.mark.parametrize("layers", [(2, 1), (3,)])
@pytest.mark.parametrize("name", PER_LAYER)
def test_an_optimizer_that_tells_stacked_layers_apart_runs_per_layer(name: str, layers: tuple[int, ...]) -> None:
    optimizer, what = PER_LAYER[name]
    schedule = make_schedule("1f1b", stages=len(layers), microbatches=2)
    found = why_per_layer(optimizer, MODEL, MODEL.parameters, stacks_of(MODEL, (0, 0, 0), layers, schedule))
    assert found == f"on stacked layers its {what} is not that of each layer"


def test_an_optimizer_made_for_the_users_tree_runs_per_layer() -> None:
    optimizer = optax.masked(optax.sgd(0.1), MODEL.tree(dict.fromkeys(MODEL.parameters, True)))
    found = why_per_layer(optimizer, MODEL, MODEL.parameters, stacks(2, 1))
    assert found == "it does not accept a tree of stacked layers (ValueError)"


@pytest.mark.parametrize("layers", [(2, 1), (3,)])
@pytest.mark.parametrize("name", STACKED)
def test_an_elementwise_optimizer_runs_stacked(name: str, layers: tuple[int, ...]) -> None:
    schedule = make_schedule("1f1b", stages=len(layers), microbatches=2)
    assert why_per_layer(STACKED[name], MODEL, MODEL.parameters, stacks_of(MODEL, (0, 0, 0), layers, schedule)) is None


def test_what_fills_a_shorter_stage_stays_zero() -> None:
    """Yogi starts its first moment at 1e-6, which moves a parameter whose gradient is zero: with pad slots only."""
    even = stacks_of(MODEL, (0, 0, 0), (3,), make_schedule("1f1b", stages=1, microbatches=2))
    assert why_per_layer(optax.yogi(0.1), MODEL, MODEL.parameters, even) is None
    found = why_per_layer(optax.yogi(0.1), MODEL, MODEL.parameters, stacks(2, 1))
    assert found == "on stacked layers its update of blocks/*/down/bias is not that of each layer"


CALLED = (
    "; a step calls init(parameters) and update(gradients, state, parameters, value=loss, grad=gradients): use an "
    "optimizer that needs no more"
)
REFUSED: dict[str, tuple[optax.GradientTransformation, str]] = {
    "lbfgs": (optax.lbfgs(), "optimizer: needs value_fn"),
    "sophia": (
        optax.contrib.sophia(0.1),
        "optimizer: raises ValueError: obj_fn must be provided to hutchinson update function.",
    ),
    "lookahead": (
        optax.lookahead(optax.sgd(0.1), 3, 0.5),
        "optimizer: raises AttributeError: 'dict' object has no attribute 'fast'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_needs_more_than_a_step_knows_is_refused(name: str) -> None:
    optimizer, problem = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        why_per_layer(optimizer, MODEL, MODEL.parameters, ())
    assert str(error.value) == problem + CALLED


def test_an_update_that_changes_the_states_shapes_is_refused() -> None:
    optimizer = optax.GradientTransformation(lambda tree: jnp.zeros(1), lambda u, s, p=None: (u, jnp.zeros(2)))
    with pytest.raises(DeclarationError) as error:
        why_per_layer(optimizer, MODEL, MODEL.parameters, ())
    assert str(error.value) == (
        "optimizer: its update returns a state of another structure or other shapes than init does; return one of the "
        "same"
    )


@pytest.mark.parametrize(
    ("optimizer", "changed"),
    [
        (optax.adamw(WARM), None),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)), None),
        (optax.adafactor(WARM, min_dim_size_to_factor=4), "state of outputs/kernel"),
        (optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(WARM)), "update of outputs/kernel"),
    ],
    ids=["adamw", "global norm", "adafactor", "block rms"],
)
def test_padding_is_seen_by_an_optimizer_that_looks_at_a_whole_array(optimizer: Any, changed: str | None) -> None:
    found = changed_by_padding(optimizer, MODEL, MODEL.parameters, {"outputs/kernel": (16, 12)})
    assert found == changed


def test_nest_and_unnest() -> None:
    flat = {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nest(flat) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert unnest(nest(flat), flat) == flat


def test_stack_fills_pads_with_zeros() -> None:
    values = {"blocks/0/w": jnp.ones(2), "blocks/1/w": 2 * jnp.ones(2), "head": jnp.zeros(())}
    found = stack(values, [Stack("blocks/*/w", ("blocks/0/w", None, "blocks/1/w"))])
    assert set(found) == {"head", "blocks/*/w"}
    np.testing.assert_array_equal(found["blocks/*/w"], [[1, 1], [0, 0], [2, 2]])
