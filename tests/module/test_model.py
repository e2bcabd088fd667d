"""One view of three kinds of models: the same paths, numbers and meaning, and what is no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.module.functions import Functions
from shardlab.module.model import abstract, accepted, as_held, call, call_after, flowing, read_model, split_auxiliary
from shardlab.module.pipeline import Pipeline
from shardlab.sharding.annotations import to_spec

BATCH = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)}
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="shift")
NAMES = ("embed", "mlp")  # of the dims of every kernel, in both libraries


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        kernel = nnx.with_metadata(nnx.initializers.lecun_normal(), out_sharding=NAMES)
        self.up = nnx.Linear(4, 4, kernel_init=kernel, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.up(x) + c)


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inputs = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.outputs = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x, self.shift(batch))
        return self.head(x)

    def embed(self, batch: Any) -> jax.Array:
        return self.inputs(batch["x"])

    def shift(self, batch: Any) -> jax.Array:
        return batch["x"] ** 2

    def head(self, x: jax.Array) -> jax.Array:
        return self.outputs(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        kernel = linen.with_logical_partitioning(linen.initializers.lecun_normal(), NAMES)
        return x + jnp.tanh(linen.Dense(4, kernel_init=kernel, name="up")(x) + c)


class LinenNet(linen.Module):
    def setup(self) -> None:
        self.inputs = linen.Dense(4)
        self.blocks = [LinenBlock() for _ in range(2)]
        self.outputs = linen.Dense(3)

    def __call__(self, batch: Any) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x, self.shift(batch))
        return self.head(x)

    def embed(self, batch: Any) -> jax.Array:
        return self.inputs(batch["x"])

    def shift(self, batch: Any) -> jax.Array:
        return batch["x"] ** 2

    def head(self, x: jax.Array) -> jax.Array:
        return self.outputs(x)


def affine(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def dense(outputs: int) -> dict[str, jax.Array]:
    return {"kernel": jnp.ones((4, outputs)), "bias": jnp.zeros(outputs)}


def whole(params: Any, batch: Any) -> jax.Array:
    x = affine(params["inputs"], batch["x"])
    for layer in params["blocks"]:
        x = x + jnp.tanh(affine(layer["up"], x) + batch["x"] ** 2)
    return affine(params["outputs"], x)


FUNCTIONS = Functions(
    init=lambda key: {"inputs": dense(4), "blocks": [{"up": dense(4)}, {"up": dense(4)}], "outputs": dense(3)},
    apply=whole,
    before=lambda params, batch: affine(params["inputs"], batch["x"]),
    block=lambda layer, x, c: x + jnp.tanh(affine(layer["up"], x) + c),
    after=lambda params, x: affine(params["outputs"], x),
    context=lambda params, batch: batch["x"] ** 2,
)
KINDS: dict[str, Any] = {"functions": FUNCTIONS, "nnx": NnxNet, "linen": LinenNet()}
PATHS = (
    *(f"blocks/{index}/up/{leaf}" for index in (0, 1) for leaf in ("bias", "kernel")),
    *(f"{part}/{leaf}" for part in ("inputs", "outputs") for leaf in ("bias", "kernel")),
)


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = read_model(FUNCTIONS, BATCH).parameters
    return {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_in_three_kinds(kind: str) -> None:
    model = read_model(KINDS[kind], BATCH, PARTS)
    spelled = {path: path.replace("blocks/", "blocks_") if kind == "linen" else path for path in PATHS}
    assert list(model.parameters) == list(spelled.values())
    values = {spelled[path]: value for path, value in drawn().items()}
    usual = read_model(FUNCTIONS, BATCH)
    wanted = usual.forward(drawn(), BATCH, None, True)[0]
    np.testing.assert_allclose(model.forward(values, BATCH, None, True)[0], wanted, rtol=1e-5)
    assert model.parts is not None
    assert model.parts.context is not None
    x, c = (part(values, BATCH, None, True) for part in (model.parts.before, model.parts.context))
    for index, layer in enumerate(model.parts.layers):
        assert layer == {f"up/{leaf}": spelled[f"blocks/{index}/up/{leaf}"] for leaf in ("bias", "kernel")}
        x = model.parts.blocks[0]({inside: values[path] for inside, path in layer.items()}, x, c, None, True)
    np.testing.assert_allclose(model.parts.after(values, x, BATCH, None, True), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_logical_names_mean_the_same_in_both_libraries(kind: str) -> None:
    annotations = read_model(KINDS[kind], BATCH).annotations
    assert [path.replace("_", "/") for path in annotations] == ["blocks/0/up/kernel", "blocks/1/up/kernel"]
    # The first rule takes the axis, and the second rule of the name that lost it is its fallback.
    logical = (("mlp", "tensor"), ("embed", "tensor"), ("embed", "data"))
    for annotation in annotations.values():
        assert to_spec(annotation, logical=logical, axes=("data", "tensor")) == (P("data", "tensor"), [])


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_a_batch_will_do(kind: str) -> None:
    model, known = read_model(KINDS[kind], abstract(BATCH), PARTS), read_model(KINDS[kind], BATCH, PARTS)
    assert (model.parameters, model.treedef) == (known.parameters, known.treedef)
    assert model.initialise(jax.random.key(0)).keys() == model.parameters.keys()


HUGE = 2_000_000  # a kernel of 16 TB
TOO_LARGE: dict[str, Any] = {
    "functions": Functions(
        init=lambda key: {"kernel": jax.random.normal(key, (HUGE, HUGE))},
        apply=lambda p, batch: batch["x"] @ p["kernel"],
    ),
    "nnx": lambda rngs: nnx.Linear(HUGE, HUGE, use_bias=False, rngs=rngs),
    "linen": linen.Dense(HUGE, use_bias=False),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_nothing_is_computed(kind: str) -> None:
    batch = jax.ShapeDtypeStruct((2, HUGE), jnp.float32)
    model = read_model(TOO_LARGE[kind], {"x": batch} if kind == "functions" else batch)
    assert dict(model.parameters) == {"kernel": jax.ShapeDtypeStruct((HUGE, HUGE), jnp.float32)}


def test_a_model_already_read_is_itself() -> None:
    model = read_model(FUNCTIONS, BATCH)
    assert read_model(model, BATCH) is model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            3,
            "model: int is no model; pass a function nnx.Rngs -> nnx.Module, a Linen module, or "
            "shardlab.Functions(init=..., apply=...)",
        ),
        (
            linen.FrozenDict({"w": 1}),
            "model: FrozenDict is no model; pass a function nnx.Rngs -> nnx.Module, a Linen module, or "
            "shardlab.Functions(init=..., apply=...)",
        ),
        (
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            "model: an instance of Linear already holds its parameters, and shardlab creates them sharded from a seed; "
            "pass the function that makes it: lambda rngs: Linear(..., rngs=rngs)",
        ),
    ],
    ids=["a number", "parameters", "an instance"],
)
def test_no_model(model: Any, message: str) -> None:
    with pytest.raises(DeclarationError) as error:
        read_model(model, BATCH)
    assert str(error.value) == message


def test_the_dtypes_of_a_batch_are_those_jax_would_hold() -> None:
    wide: dict[str, Any] = {"a": np.zeros((2, 3)), "b": [np.zeros(2, np.int64), 1.5], "key": jax.random.key(0)}
    found = abstract(wide)
    assert found["a"] == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert found["b"] == [jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)]
    assert found["key"].dtype == wide["key"].dtype
    with jax.enable_x64(True):
        assert abstract(wide)["a"] == jax.ShapeDtypeStruct((2, 3), jnp.float64)


def test_what_flows_between_blocks_is_in_the_dtype_of_the_step() -> None:
    x = flowing({"h": jnp.ones((2, 3), jnp.float32), "g": (jnp.ones(2, jnp.float16),)}, "bfloat16")
    assert jax.tree.map(lambda leaf: leaf.dtype, x) == {"h": jnp.bfloat16, "g": (jnp.bfloat16,)}
    with pytest.raises(DeclarationError) as error:
        flowing({"h": jnp.ones(2), "positions": [jnp.arange(2)]}, "float32")
    assert str(error.value) == (
        "before: x positions/0 has dtype int32; what flows between blocks is floating point, other arrays belong in "
        "context(batch)"
    )


@pytest.mark.parametrize(
    ("x", "out", "expected"),
    [
        (1.0, 2.0, (2.0, None)),
        (1.0, (2.0, (3.0, 4)), (2.0, (3.0, 4))),
        ((1.0, 1.0), (2.0, 3.0), ((2.0, 3.0), None)),
        ((1.0, 1.0), ((2.0, 2.5), (3.0, 4)), ((2.0, 2.5), (3.0, 4))),
        # x is itself shaped like an output with a loss: then it is x.
        ((1.0, (1.0, 1.0)), (2.0, (3.0, 4)), ((2.0, (3.0, 4)), None)),
        # What is neither is left as it is, for whoever knows the block to refuse.
        (1.0, (2.0, 3.0, 4.0), ((2.0, 3.0, 4.0), None)),
        ({"h": 1.0}, (2.0, (3.0, 4)), ((2.0, (3.0, 4)), None)),
    ],
)
def test_an_auxiliary_loss_is_told_from_x_by_the_structure_of_x(x: Any, out: Any, expected: Any) -> None:
    assert split_auxiliary(x, out) == expected


@pytest.mark.parametrize(
    ("beside", "structure"),
    [(3.0, "PyTreeDef(*)"), ((3.0, 4, 5), "PyTreeDef((*, *, *))"), ([3.0, 4], "PyTreeDef([*, *])")],
)
def test_what_a_block_returns_beside_x_is_a_sum_and_its_weight(beside: Any, structure: str) -> None:
    with pytest.raises(DeclarationError) as error:
        split_auxiliary({"h": 1.0}, ({"h": 2.0}, beside))
    assert str(error.value) == (
        f"block: returns x and {structure} beside it; beside x there is room for an auxiliary loss alone, as its sum "
        "and the weight that it is over: return (x, (sum, weight))"
    )


def test_a_function_is_offered_what_it_names() -> None:
    assert call(lambda x: x, 1, key="k", train=True) == 1
    assert call(lambda x, train, key, deterministic: (x, train, key, deterministic), 1, key="k", train=True) == (
        1,
        True,
        "k",
        False,
    )
    assert call(lambda x, **more: (x, more), 1, key="k", train=True) == (1, {})


def test_flags_come_by_position_where_they_can() -> None:
    """A function that takes them as static arguments of `jax.checkpoint` takes them in no other way."""

    def kept(x: Any, mask: Any = None, train: bool = False) -> Any:
        return x if train else -x

    checkpointed = jax.checkpoint(kept, static_argnums=(1, 2))
    assert [float(call(checkpointed, 1.0, train=train)) for train in (True, False)] == [1.0, -1.0]
    assert call(lambda x, /, train, *, deterministic: (x, train, deterministic), 1, train=True) == (1, True, False)
    assert accepted(lambda x, missing, train: x, (1,), {"train": True}) == ((1,), {"train": True})


AFTER: dict[str, tuple[Callable[..., Any], Any]] = {
    "x alone": (lambda x: x, "x"),
    "x and the batch": (lambda x, batch: (x, batch), ("x", "b")),
    "another name": (lambda x, examples: (x, examples), ("x", "b")),
    "an option is no place for it": (lambda x, scale=1.0: (x, scale), ("x", 1.0)),
    "after an option": (lambda x, scale=1.0, batch=None: (x, scale, batch), ("x", 1.0, "b")),
    "x has its name": (lambda batch: batch, "x"),
    "a flag is no place for it": (lambda x, train: (x, train), ("x", False)),
    "nor is a key": (lambda x, key=None: (x, key), ("x", "k")),
    "between flags": (lambda x, train, batch=None: (x, train, batch), ("x", False, "b")),
    "keyword only": (lambda x, *, batch=None: (x, batch), ("x", "b")),
    "positional only": (lambda x, batch=None, /: (x, batch), ("x", "b")),
}


@pytest.mark.parametrize("name", AFTER)
def test_the_batch_goes_where_it_is_named_or_needed(name: str) -> None:
    function, expected = AFTER[name]
    assert call_after(function, "x", batch="b", key="k", train=False) == expected


def test_what_is_written_keeps_dtype_and_shape() -> None:
    held = jax.ShapeDtypeStruct((3,), jnp.float16)
    assert as_held("norm/mean", jnp.ones(3), held).dtype == jnp.float16
    with pytest.raises(DeclarationError) as error:
        as_held("norm/mean", jnp.ones((2, 3)), held)
    assert str(error.value) == (
        "norm/mean: the model writes [2, 3] to it, and it is [3]; keep its shape: a step is compiled once"
    )


def test_a_tree_keeps_the_order_of_the_users_own() -> None:
    @dataclasses.dataclass
    class Reversed:
        """Flattens with its fields in another order than the paths sort."""

        z: Any
        a: Any

    jax.tree_util.register_dataclass(Reversed, ["z", "a"], [])
    model = read_model(Functions(init=lambda key: Reversed(jnp.ones(2), jnp.ones(3)), apply=lambda p, b: p), BATCH)
    assert list(model.parameters) == ["z", "a"]
    assert model.tree({"a": 1, "z": 2}) == Reversed(z=2, a=1)
    assert model.flat(Reversed(z=2, a=1)) == {"z": 2, "a": 1}
