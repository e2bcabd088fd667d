"""Flax Linen modules: paths, collections, parts run on their own parameters alone, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models.linen_decoder import LinenDecoder
from shardlab.module.initialise import recipes
from shardlab.module.model import Model, read_model
from shardlab.module.pipeline import Pipeline
from shardlab.sharding.annotations import Annotation
from shardlab.sharding.rules import Rules
from shardlab.testing import assert_matches_reference

BATCH = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)}
PARTS = Pipeline(before="embed", blocks="blocks", after="head")


class Block(nn.Module):
    rate: float = 0.0
    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x + nn.Dropout(self.rate, deterministic=not train)(jnp.tanh(nn.Dense(4, name="up")(x)))
        return nn.BatchNorm(use_running_average=not train)(x) if self.norm else x


class Net(nn.Module):
    make: Callable[[], Any] = lambda: [Block(), Block()]

    def setup(self) -> None:
        self.inputs = nn.Dense(4)
        self.blocks = self.make()
        self.outputs = nn.Dense(3)

    def __call__(self, batch: Any, train: bool = False) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x, train)
        return self.head(x)

    def embed(self, batch: Any) -> jax.Array:
        return self.inputs(batch["x"])

    def head(self, x: jax.Array) -> jax.Array:
        return self.outputs(x)


def net(**options: Any) -> Net:
    return Net(make=lambda: [Block(**options), Block(**options)])


def layer_of(model: Model, values: Any, index: int = 0) -> dict[str, Any]:
    assert model.parts is not None
    return {inside: values[path] for inside, path in model.parts.layers[index].items()}


def test_paths() -> None:
    model = read_model(Net(), BATCH, PARTS)
    assert model.name == "Net"
    assert list(model.parameters) == [
        *(f"blocks_{index}/up/{leaf}" for index in (0, 1) for leaf in ("bias", "kernel")),
        *(f"{part}/{leaf}" for part in ("inputs", "outputs") for leaf in ("bias", "kernel")),
    ]
    assert model.parameters["outputs/kernel"] == jax.ShapeDtypeStruct((4, 3), jnp.float32)
    assert model.parts is not None
    assert model.parts.layers == tuple(
        {f"up/{leaf}": f"blocks_{index}/up/{leaf}" for leaf in ("bias", "kernel")} for index in (0, 1)
    )
    tree = model.tree({path: path for path in model.parameters})
    assert tree["blocks_1"]["up"]["kernel"] == "blocks_1/up/kernel"
    assert model.flat(tree) == {path: path for path in model.parameters}


def test_layers_are_in_the_order_of_the_list() -> None:
    """Not in the order of the text: 10 comes after 9."""
    model = read_model(Net(make=lambda: [Block() for _ in range(12)]), BATCH, PARTS)
    assert model.parts is not None
    assert [layer["up/bias"] for layer in model.parts.layers] == [f"blocks_{index}/up/bias" for index in range(12)]


def test_blocks_may_have_names_of_their_own() -> None:
    model = read_model(Net(make=lambda: (Block(name="wide"), Block(name="deep"))), BATCH, PARTS)
    assert model.parts is not None
    assert [layer["up/bias"] for layer in model.parts.layers] == ["wide/up/bias", "deep/up/bias"]


def test_the_parts_compose_to_the_whole_each_on_its_own_parameters() -> None:
    module = Net()
    model, variables = read_model(module, BATCH, PARTS), module.init(jax.random.key(0), BATCH)
    values = model.initialise(jax.random.key(0))
    assert model.parts is not None
    outside = {path: values[path] for path in values if not path.startswith("blocks")}
    x = model.parts.before(outside, BATCH, None, True)
    for index in (0, 1):
        x = model.parts.blocks[0](layer_of(model, values, index), x, None, None, True)
    y = model.parts.after(outside, x, BATCH, None, True)
    np.testing.assert_array_equal(y, module.apply(variables, BATCH))
    np.testing.assert_array_equal(y, model.forward(values, BATCH, None, True)[0])


def test_a_compact_module_without_a_pipeline() -> None:
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, batch: Any) -> jax.Array:
            return nn.Dense(3)(batch["x"])

    model = read_model(Compact(), BATCH)
    assert list(model.parameters) == ["Dense_0/bias", "Dense_0/kernel"]
    assert model.parts is None


def test_annotations_and_the_parameters_out_of_their_boxes() -> None:
    class Annotated(nn.Module):
        @nn.compact
        def __call__(self, batch: Any) -> jax.Array:
            init = nn.initializers.lecun_normal()
            axes = nn.Dense(4, name="axes", kernel_init=nn.with_partitioning(init, (None, "tensor")))
            names = nn.Dense(4, name="names", kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")))
            rules = (("mlp", "tensor"),)
            ruled = nn.Dense(4, name="ruled", kernel_init=nn.with_logical_partitioning(init, ("mlp",), rules=rules))
            return ruled(names(axes(batch["x"])))

    module = Annotated()
    model = read_model(module, BATCH)
    assert model.annotations == {
        "axes/kernel": Annotation((None, "tensor"), "mesh"),
        "names/kernel": Annotation(("embed", "mlp"), "logical"),
        "ruled/kernel": Annotation(("mlp",), "logical", (("mlp", "tensor"),)),
    }
    assert model.parameters["axes/kernel"] == jax.ShapeDtypeStruct((4, 4), jnp.float32)
    values, variables = model.initialise(jax.random.key(0)), module.init(jax.random.key(0), BATCH)
    np.testing.assert_array_equal(values["names/kernel"], nn.unbox(variables)["params"]["names"]["kernel"])
    np.testing.assert_array_equal(model.forward(values, BATCH, None, True)[0], module.apply(nn.unbox(variables), BATCH))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_one_parameter_read_twice(tied: bool) -> None:
    module = LinenDecoder(vocab_size=7, num_layers=1, model_dim=4, num_heads=1, head_dim=4, mlp_dim=4, tied=tied)
    batch = {"tokens": jnp.zeros((2, 3), jnp.int32)}
    model = read_model(module, batch, Pipeline(before="embed", blocks="blocks", after="head", context="context"))
    outside = [path for path in model.parameters if "blocks" not in path and "norm" not in path]
    assert outside == (["tokens/embedding"] if tied else ["tokens/embedding", "unembed/kernel"])
    values, parts = model.initialise(jax.random.key(0)), model.parts
    assert parts is not None
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)

    def logits(embedding: jax.Array) -> jax.Array:
        return parts.after(values | {"tokens/embedding": embedding}, x, batch, None, True)

    moved = not np.array_equal(logits(values["tokens/embedding"]), logits(2 * values["tokens/embedding"]))
    assert moved is tied


def test_dropout_draws_when_the_model_trains_and_only_then() -> None:
    model, key, other = read_model(net(rate=0.5), BATCH, PARTS), jax.random.key(3), jax.random.key(4)
    values, parts = model.initialise(jax.random.key(0)), model.parts
    assert parts is not None
    undropped = read_model(Net(), BATCH, PARTS)
    assert undropped.parts is not None
    layer, x = layer_of(model, values), jnp.ones((5, 4))
    runs: dict[str, tuple[Callable[[Any, bool], Any], Any]] = {
        "whole": (
            lambda k, train: model.forward(values, BATCH, k, train)[0],
            undropped.forward(values, BATCH, None, True)[0],
        ),
        "block": (
            lambda k, train: parts.blocks[0](layer, x, None, k, train),
            undropped.parts.blocks[0](layer, x, None, None, True),
        ),
    }
    for run, quiet in runs.values():
        np.testing.assert_array_equal(run(key, False), quiet)
        np.testing.assert_array_equal(run(key, True), run(key, True))
        assert not np.allclose(run(key, True), quiet)
        assert not np.allclose(run(key, True), run(other, True))


class Told(Net):
    """Methods that ask for what they need."""

    def embed(self, batch: Any, train: bool = False) -> Any:
        return self.inputs(batch["x"]), train, self.has_rng("dropout")

    def context(self, batch: Any, *, key: Any) -> Any:
        return batch["x"], key

    def head(self, x: jax.Array, batch: Any = None, deterministic: bool = True) -> Any:
        return batch is BATCH, deterministic

    def __call__(self, batch: Any, deterministic: bool = True) -> Any:
        for block in self.blocks:
            block(self.inputs(batch["x"]))
        return deterministic


def test_a_method_is_told_whether_it_trains() -> None:
    parts_named = Pipeline(before="embed", blocks="blocks", after="head", context="context")
    model = read_model(Told(), BATCH, parts_named)
    values, parts, key = model.initialise(jax.random.key(0)), model.parts, jax.random.key(5)
    assert parts is not None
    assert parts.context is not None
    assert parts.before(values, BATCH, key, True)[1:] == (True, True)
    assert parts.before(values, BATCH, None, False)[1:] == (False, False)
    assert parts.context(values, BATCH, key, True) == (BATCH["x"], key)
    assert parts.after(values, BATCH["x"], BATCH, key, True) == (True, False)
    assert model.forward(values, BATCH, key, True)[0] is False


def test_batch_statistics_are_handed_back_as_flax_writes_them() -> None:
    module = net(norm=True)
    model, variables = read_model(module, BATCH), module.init(jax.random.key(0), BATCH)
    names = [f"batch_stats/blocks_{index}/BatchNorm_0/{leaf}" for index in (0, 1) for leaf in ("mean", "var")]
    assert list(model.buffers) == names
    assert not set(names) & set(model.parameters)
    values = model.initialise(jax.random.key(0))
    y, written = model.forward(values, BATCH, None, True)
    own: Any
    wanted, own = module.apply(variables, BATCH, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, wanted)
    assert list(written) == names
    for path in names:
        _, block, norm, leaf = path.split("/")
        np.testing.assert_array_equal(written[path], own["batch_stats"][block][norm][leaf])
        assert not np.array_equal(written[path], values[path])
    y, unwritten = model.forward(values | written, BATCH, None, False)
    np.testing.assert_array_equal(y, module.apply({"params": variables["params"], **own}, BATCH))
    assert unwritten == {}


def test_collections_in_a_stack_are_refused() -> None:
    with pytest.raises(DeclarationError) as error:
        read_model(net(norm=True), BATCH, PARTS)
    names = [f"batch_stats/blocks_{index}/BatchNorm_0/{leaf}" for index in (0, 1) for leaf in ("mean", "var")]
    assert str(error.value) == "4 faults in the declaration:\n" + "\n".join(
        f"  {number}. {path}: a collection beside the parameters is written by one microbatch of one shard at a time "
        "in a stack; train it without pipeline=, with microbatches=1 (all axes are then automatic)"
        for number, path in enumerate(names, start=1)
    )


class Growing(nn.Module):
    """Equal modules, other shapes: each is as wide as what comes in, and one more."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(x.shape[-1] + 1, name="up")(x)


class Choosing(nn.Module):
    """Equal modules, other parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(5, name="up")(x)
        return nn.Dense(5, name="more")(x) if self.name == "blocks_1" else x


def lines_to_add(name: str, reason: str) -> str:
    return (
        f"pipeline blocks={name!r}: Net has no list of that name outside @nn.compact; add\n"
        f"    def setup(self):\n        self.{name} = [Block(...) for _ in range(...)]\n"
        f"and call them in Net.__call__ ({reason})"
    )


REFUSED: dict[str, tuple[Callable[[], Any], Pipeline, str]] = {
    "no methods": (
        lambda: [Block(), Block()],
        Pipeline(before="a", blocks="blocks", after="c", context="d"),
        "3 faults in the declaration:\n"
        "  1. pipeline before='a': Net has no method 'a'; add `def a(self, batch):` to Net\n"
        "  2. pipeline after='c': Net has no method 'c'; add `def c(self, x, batch):` to Net\n"
        "  3. pipeline context='d': Net has no method 'd'; add `def d(self, batch):` to Net",
    ),
    "a submodule is no method": (
        lambda: [Block(), Block()],
        Pipeline(before="inputs", blocks="blocks", after="head"),
        "pipeline before='inputs': Net has no method 'inputs'; add `def inputs(self, batch):` to Net",
    ),
    "no list": (
        lambda: [Block(), Block()],
        Pipeline(before="embed", blocks="b", after="head"),
        lines_to_add("b", '"Net" object has no attribute "b".'),
    ),
    "one module": (
        lambda: [Block(), Block()],
        Pipeline(before="embed", blocks="inputs", after="head"),
        lines_to_add("inputs", "'Dense' object is not iterable"),
    ),
    "no blocks": (list, PARTS, "pipeline blocks='blocks': the list is empty; a pipeline needs blocks"),
    "blocks of many kinds": (
        lambda: [Block(rate=index / 10) for index in range(9)],
        PARTS,
        "blocks/8: is a block of yet another kind, after 8 others (a layer index, or a function of its own?), and "
        "every kind is a program in every stage; pass what differs as an array",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, pipeline, message = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        read_model(Net(make=make), BATCH, pipeline)
    assert str(error.value) == message
    read_model(Net(make=make), BATCH)  # without a stack there is nothing to refuse


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda: [Block(), Block(rate=0.5), Block()], (0, 1, 0)),
        (lambda: [Growing(), Growing()], (0, 1)),
        (lambda: [Choosing(), Choosing()], (0, 1)),
    ],
    ids=["another rate", "another shape", "other parameters"],
)
def test_blocks_that_differ_are_of_several_kinds(make: Any, kinds: tuple[int, ...]) -> None:
    parts = read_model(Net(make=make), BATCH, PARTS).parts
    assert parts is not None
    assert (parts.kinds, len(parts.blocks)) == (kinds, 2)


# What Flax allows and a step must not trip over.


def squares(y: jax.Array, batch: Any) -> tuple[jax.Array, int]:
    return jnp.sum(y**2), y.shape[0]


ROWS = {"x": np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)}
DATA = MeshSpec({"data": 2}, batch="data", target="cpu:2")
STAGES = MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4")
ANYWHERE = Rules((("**", None),))


def rematerialised(**options: Any) -> Any:
    """A block of a class of its own, as `nn.remat` makes one whenever it is called; its flag is static."""
    return nn.remat(Block, static_argnums=(2,))(**options)


ONE_CLASS = nn.remat(Block, static_argnums=(2,))


@pytest.mark.parametrize("make", [ONE_CLASS, rematerialised], ids=["one class", "a class each"])
def test_rematerialised_blocks(make: Callable[..., Any]) -> None:
    module = Net(make=lambda: [make(rate=0.3) for _ in range(3)])
    assert_matches_reference(
        module, squares, optax.sgd(0.1), ROWS, mesh=STAGES, rules=ANYWHERE, pipeline=PARTS, microbatches=2, steps=2
    )


def test_rematerialised_layers_are_made_by_one_program() -> None:
    """A layer's parameters do not depend on the layers that ran before it."""
    model = read_model(Net(make=lambda: [rematerialised() for _ in range(3)]), BATCH)
    made = recipes(model.initialise)
    assert len({made[f"blocks_{index}/up/kernel"].signature for index in range(3)}) == 1
    values = model.initialise(jax.random.key(0))
    for path, recipe in made.items():
        np.testing.assert_array_equal(recipe.make(jax.random.key(0), recipe.integers), values[path])


def test_rematerialised_blocks_that_differ() -> None:
    class Other(Block):
        """Another block."""

    other = nn.remat(Other, static_argnums=(2,))
    for one, two in ((rematerialised(), rematerialised(rate=0.5)), (rematerialised(), other()), (Block(), ONE_CLASS())):
        parts = read_model(Net(make=partial(list, (one, two))), BATCH, PARTS).parts
        assert parts is not None
        assert parts.kinds == (0, 1)


def test_what_a_module_sows_is_left_out() -> None:
    """`init` counts a collection of its own as a variable, and a call would make it longer."""

    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, batch: Any) -> jax.Array:
            x = nn.Dense(4)(batch["x"])
            self.sow("losses", "square", x**2)
            self.variable("constants", "table", lambda: jnp.arange(4.0))
            return nn.Dense(3)(jnp.tanh(x))

    module = Sowing()
    model, variables = read_model(module, BATCH), module.init(jax.random.key(0), BATCH)
    assert list(model.buffers) == ["constants/table"]
    values = model.initialise(jax.random.key(0))
    np.testing.assert_array_equal(values["constants/table"], np.arange(4))
    y, written = model.forward(values, BATCH, None, True)
    np.testing.assert_array_equal(y, module.apply(variables, BATCH))
    assert written == {}
    assert_matches_reference(module, squares, optax.sgd(0.1), ROWS, mesh=DATA, rules=ANYWHERE, steps=2)


def test_batch_statistics_keep_their_dtype() -> None:
    """Flax holds them in float32 and writes what it computed in, which no second step would take."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, batch: Any, train: bool = False) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(batch["x"]))

    assert_matches_reference(Normed(), squares, optax.sgd(0.1), ROWS, mesh=DATA, rules=ANYWHERE, steps=3)
    with jax.enable_x64(True):
        model = read_model(Normed(), ROWS)
        values = {path: jnp.ones(leaf.shape) for path, leaf in model.parameters.items()}
        values |= {path: jnp.ones(leaf.shape, leaf.dtype) for path, leaf in model.buffers.items()}
        written = model.forward(values, ROWS, None, True)[1]
    assert {path: leaf.dtype for path, leaf in written.items()} == dict.fromkeys(model.buffers, jnp.float32)


def test_a_collection_that_is_only_read_is_refused_in_a_stack_for_what_it_is() -> None:
    class Scaled(Block):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            scale = self.variable("constants", "scale", lambda: jnp.ones(4))
            return x + jnp.tanh(nn.Dense(4, name="up")(x)) * scale.value

    module = Net(make=lambda: [Scaled(), Scaled()])
    with pytest.raises(DeclarationError) as error:
        read_model(module, BATCH, PARTS)
    assert str(error.value) == "2 faults in the declaration:\n" + "\n".join(
        f"  {number}. constants/blocks_{number - 1}/scale: a stack of blocks is given its parameters, and no other "
        "collection; compute it where it is used, or train it without pipeline="
        for number in (1, 2)
    )
    assert_matches_reference(module, squares, optax.sgd(0.1), ROWS, mesh=DATA, rules=ANYWHERE, microbatches=2, steps=2)
