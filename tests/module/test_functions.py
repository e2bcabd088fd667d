"""Models that are plain functions: what they are given, how they are cut, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.module.functions import Functions
from shardlab.module.model import Model, read_model
from shardlab.module.pipeline import Pipeline

BATCH = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)}


def layer(index: int) -> dict[str, Any]:
    return {"mlp": {"kernel": jnp.full((4, 4), 0.1 * (index + 1))}, "scale": jnp.ones(4)}


def init(key: jax.Array) -> dict[str, Any]:
    return {"inputs": jnp.eye(4), "blocks": [layer(0), layer(1)], "outputs": jnp.ones((4, 2))}


def before(params: Any, batch: Any) -> jax.Array:
    return batch["x"] @ params["inputs"]


def block(layer: Any, x: jax.Array) -> jax.Array:
    return x * layer["scale"] + jnp.tanh(x @ layer["mlp"]["kernel"])


def after(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["outputs"]


def cut(**changes: Any) -> Functions:
    given: dict[str, Any] = {"init": init, "before": before, "block": block, "after": after, **changes}
    return Functions(**given)


def composed(model: Model, values: Any, batch: Any, key: Any = None, train: bool = False) -> Any:
    """What the parts make of a batch, one after the other."""
    assert model.parts is not None
    x = model.parts.before(values, batch, key, train)
    c = None if model.parts.context is None else model.parts.context(values, batch, key, train)
    for paths in model.parts.layers:
        x = model.parts.blocks[0]({inside: values[path] for inside, path in paths.items()}, x, c, key, train)
    return model.parts.after(values, x, batch, key, train)


def test_paths() -> None:
    model = read_model(cut(), BATCH)
    inside = ("mlp/kernel", "scale")
    assert list(model.parameters) == [
        *(f"blocks/{index}/{path}" for index in (0, 1) for path in inside),
        "inputs",
        "outputs",
    ]
    assert model.parts is not None
    assert model.parts.layers == tuple({path: f"blocks/{index}/{path}" for path in inside} for index in (0, 1))
    assert model.parts.block_paths == {f"blocks/{index}/{path}" for index in (0, 1) for path in inside}
    assert (model.name, dict(model.buffers), dict(model.annotations)) == ("block", {}, {})
    assert model.parameters["outputs"] == jax.ShapeDtypeStruct((4, 2), jnp.float32)


def test_the_parts_get_their_own_parameters() -> None:
    model = read_model(cut(), BATCH)
    x = before({"inputs": jnp.eye(4)}, BATCH)
    for index in (0, 1):
        x = block(layer(index), x)
    np.testing.assert_array_equal(
        composed(model, model.initialise(jax.random.key(0)), BATCH), after({"outputs": jnp.ones((4, 2))}, x)
    )


def test_the_parts_outside_do_not_see_the_blocks() -> None:
    seen = []

    def looking(params: Any, batch: Any) -> jax.Array:
        seen.append(sorted(params))
        return before(params, batch)

    model = read_model(cut(before=looking, context=lambda params, batch: seen.append(sorted(params))), BATCH)
    assert model.parts is not None
    assert model.parts.context is not None
    values = model.initialise(jax.random.key(0))
    model.parts.before(values, BATCH, None, False)
    model.parts.context(values, BATCH, None, False)
    assert seen == [["inputs", "outputs"]] * 2


def test_the_list_of_layers_may_have_another_name_and_be_a_tuple() -> None:
    def named(key: jax.Array) -> Any:
        made = init(key)
        return {"stack": tuple(made.pop("blocks")), **made}

    model, usual = read_model(cut(init=named, blocks="stack"), BATCH), read_model(cut(), BATCH)
    assert model.parts is not None
    assert model.parts.layers[1] == {"mlp/kernel": "stack/1/mlp/kernel", "scale": "stack/1/scale"}
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        composed(model, model.initialise(key), BATCH), composed(usual, usual.initialise(key), BATCH)
    )


@pytest.mark.parametrize("train", [True, False])
def test_each_function_is_given_what_its_signature_asks_for(train: bool) -> None:
    """By keyword, wherever they stand; the batch comes last in `after`, and the context in `block`."""
    seen: dict[str, Any] = {}

    def asking_before(params: Any, batch: Any, *, deterministic: bool) -> Any:
        seen["before"] = deterministic
        return before(params, batch)

    def asking_context(params: Any, batch: Any, train: bool) -> Any:
        seen["context"] = train
        return 2.0

    def asking_block(layer: Any, x: Any, c: Any, key: Any, train: bool, deterministic: bool) -> Any:
        seen["block"] = (c, key, train, deterministic)
        return block(layer, x)

    def asking_after(params: Any, x: Any, batch: Any, key: Any = None) -> Any:
        seen["after"] = (batch is BATCH, key)
        return after(params, x)

    functions = cut(before=asking_before, context=asking_context, block=asking_block, after=asking_after)
    model, key = read_model(functions, BATCH), jax.random.key(1)
    composed(model, model.initialise(key), BATCH, key, train)
    assert seen == {
        "before": not train,
        "context": train,
        "block": (2.0, key, train, not train),
        "after": (True, key),
    }


def test_apply_alone_is_a_whole_model() -> None:
    def apply(params: Any, batch: Any, key: Any, train: bool) -> Any:
        return after(params, before(params, batch)), key, train

    model, key = read_model(Functions(init=init, apply=apply), BATCH), jax.random.key(2)
    assert model.name.endswith("apply")
    assert model.parts is None
    values = model.initialise(key)
    (y, got, train), written = model.forward(values, BATCH, key, True)
    np.testing.assert_array_equal(y, after(init(key), before(init(key), BATCH)))
    assert (got is key, train, written) == (True, True, {})


def test_a_tree_that_is_no_dict() -> None:
    model = read_model(Functions(init=lambda key: (jnp.ones(2), [jnp.ones(3)]), apply=lambda params, batch: params), {})
    assert list(model.parameters) == ["0", "1/0"]
    first, (second,) = model.forward({"0": 5, "1/0": 6}, {}, None, False)[0]
    assert (first, second) == (5, 6)


def without(*names: str) -> Callable[[jax.Array], Any]:
    return lambda key: {name: tree for name, tree in init(key).items() if name not in names}


NEEDED = "model: Functions needs apply=, or all of before=, block= and after="
NO_LIST = (
    "model: params has no list of layers under 'blocks'; return {'blocks': [layer, ...], ...} from init, or name the "
    "list's key with Functions(blocks=...)"
)
REFUSED: dict[str, tuple[Functions, Pipeline | None, str]] = {
    "nothing to call": (Functions(init=init), None, NEEDED),
    "no before": (cut(before=None), None, NEEDED),
    "no after": (cut(after=None), None, NEEDED),
    "no block": (cut(block=None), None, NEEDED),
    "a pipeline of one function": (
        Functions(init=init, apply=lambda params, batch: batch),
        Pipeline(before="before", blocks="blocks", after="after"),
        "pipeline: these Functions have no blocks; give before=, block= and after=",
    ),
    "params that are one array": (
        Functions(init=lambda key: jnp.ones((4, 2)), apply=lambda params, batch: batch["x"] @ params),
        None,
        "model: init returns an array and no tree of them; give it a name: {'kernel': array}",
    ),
    "no layers": (cut(init=without("blocks")), None, NO_LIST),
    "layers that are no list": (cut(init=lambda key: init(key) | {"blocks": layer(0)}), None, NO_LIST),
    "params that are no dict": (cut(init=lambda key: [layer(0)]), None, NO_LIST),
    "the list has another name": (
        cut(blocks="layers"),
        None,
        "model: params has no list of layers under 'layers'; return {'layers': [layer, ...], ...} from init, or name "
        "the list's key with Functions(blocks=...)",
    ),
    "an empty list of layers": (
        cut(init=lambda key: init(key) | {"blocks": []}),
        None,
        "model: the list params['blocks'] is empty; a pipeline needs blocks",
    ),
    "functions for other layers": (
        cut(block=[block]),
        None,
        "model: block= has 1 functions and params['blocks'] 2 layers; give one for every layer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    functions, pipeline, message = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        read_model(functions, BATCH, pipeline)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "functions",
    [
        cut(init=lambda key: init(key) | {"blocks": [layer(0), layer(1), {"mlp": layer(2)["mlp"]}]}),
        cut(init=lambda key: init(key) | {"blocks": [layer(0), layer(1), layer(2)]}, block=[block, block, before]),
    ],
    ids=["another tree", "another function"],
)
def test_layers_that_differ_are_of_two_kinds(functions: Functions) -> None:
    parts = read_model(functions, BATCH).parts
    assert parts is not None
    assert (parts.kinds, len(parts.blocks)) == ((0, 0, 1), 2)
