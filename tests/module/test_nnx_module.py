"""Flax NNX modules: paths, kinds of variables, parts, streams of randomness, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig
from shardlab.module.model import Model, read_model
from shardlab.module.pipeline import Pipeline
from shardlab.sharding.annotations import Annotation
from shardlab.sharding.rules import Rules
from shardlab.testing import assert_matches_reference

BATCH = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)}
PARTS = Pipeline(before="embed", blocks="blocks", after="head")


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, rate: float = 0.0, norm: bool = False) -> None:
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs) if norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.drop(jnp.tanh(self.up(x)))
        return x if self.norm is None else self.norm(x)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, layers: int = 2, **options: Any) -> None:
        self.inputs = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, **options) for _ in range(layers)])
        self.outputs = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def embed(self, batch: Any) -> jax.Array:
        return self.inputs(batch["x"])

    def head(self, x: jax.Array) -> jax.Array:
        return self.outputs(x)


def net(**options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: Net(rngs, **options)


def changed(change: Callable[[Any, nnx.Rngs], Any], **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    """A factory of the net with something done to it."""

    def factory(rngs: nnx.Rngs) -> nnx.Module:
        model = Net(rngs, **options)
        change(model, rngs)
        return model

    return factory


def layer_of(model: Model, values: Any, index: int = 0) -> dict[str, Any]:
    assert model.parts is not None
    return {inside: values[path] for inside, path in model.parts.layers[index].items()}


def test_paths() -> None:
    model = read_model(Net, BATCH, PARTS)
    assert model.name == "Net"
    assert list(model.parameters) == [
        *(f"blocks/{index}/up/{leaf}" for index in (0, 1) for leaf in ("bias", "kernel")),
        *(f"{part}/{leaf}" for part in ("inputs", "outputs") for leaf in ("bias", "kernel")),
    ]
    assert model.parameters["outputs/kernel"] == jax.ShapeDtypeStruct((4, 3), jnp.float32)
    assert model.parts is not None
    assert model.parts.layers == tuple(
        {f"up/{leaf}": f"blocks/{index}/up/{leaf}" for leaf in ("bias", "kernel")} for index in (0, 1)
    )
    tree = model.tree({path: path for path in model.parameters})
    assert tree["blocks"][1]["up"]["kernel"] == "blocks/1/up/kernel"
    assert model.flat(tree) == {path: path for path in model.parameters}


def test_layers_are_in_the_order_of_the_list() -> None:
    """Not in the order of the text: 10 comes after 9."""
    model = read_model(net(layers=12), BATCH, PARTS)
    assert model.parts is not None
    assert [layer["up/bias"] for layer in model.parts.layers] == [f"blocks/{index}/up/bias" for index in range(12)]
    values = model.initialise(jax.random.key(0))
    own = Net(nnx.Rngs(0), layers=12)
    for index, block in enumerate(own.blocks):
        np.testing.assert_array_equal(layer_of(model, values, index)["up/kernel"], block.up.kernel[...])


def test_the_parts_compose_to_the_whole() -> None:
    model = read_model(Net, BATCH, PARTS)
    values = model.initialise(jax.random.key(0))
    assert model.parts is not None
    x = model.parts.before(values, BATCH, None, True)
    for index in (0, 1):
        x = model.parts.blocks[0](layer_of(model, values, index), x, None, None, True)
    y = model.parts.after(values, x, BATCH, None, True)
    np.testing.assert_allclose(y, Net(nnx.Rngs(0))(BATCH), rtol=1e-6)
    np.testing.assert_array_equal(y, model.forward(values, BATCH, None, True)[0])


def test_a_plain_list_of_blocks() -> None:
    """It has the paths of an `nnx.List`."""

    class Plain(Net):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            blocks: Any = [Block(rngs), Block(rngs)]
            self.blocks = nnx.data(blocks)

    plain, usual = read_model(Plain, BATCH, PARTS), read_model(Net, BATCH, PARTS)
    assert plain.parts is not None
    assert usual.parts is not None
    assert plain.parts.layers == usual.parts.layers


class Scale(nnx.Param):
    """A kind of parameter of the user's own."""


class Table(nnx.Variable):
    """A kind of variable that is not trained."""


class Kinds(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.scale = Scale(jnp.ones(4))
        self.table = Table(jnp.arange(4.0))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.drop(batch["x"] * self.scale[...] + self.table[...])


def test_what_is_trained_what_is_held_and_what_is_random() -> None:
    model = read_model(Kinds, BATCH)
    assert list(model.parameters) == ["scale"]
    assert list(model.buffers) == ["table"]
    values = model.initialise(jax.random.key(0))
    assert set(values) == {"scale", "table"}
    y, written = model.forward(values | {"table": jnp.full(4, 2.0)}, BATCH, None, False)
    np.testing.assert_array_equal(y, BATCH["x"] + 2)
    assert written == {}


def test_annotations() -> None:
    class Annotated(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            def kernel(**metadata: Any) -> Any:
                return nnx.with_metadata(nnx.initializers.lecun_normal(), **metadata)

            self.names = nnx.Linear(4, 4, kernel_init=kernel(out_sharding=("embed", "mlp")), rngs=rngs)
            rules = {"out_sharding": P(None, "mlp"), "sharding_rules": (("mlp", "tensor"),)}
            self.ruled = nnx.Linear(4, 4, kernel_init=kernel(**rules), rngs=rngs)
            self.table = Table(jnp.ones(4), out_sharding=("embed",))

        def __call__(self, batch: Any) -> jax.Array:
            return self.ruled(self.names(batch["x"]))

    assert read_model(Annotated, BATCH).annotations == {
        "names/kernel": Annotation(("embed", "mlp"), "logical"),
        "ruled/kernel": Annotation((None, "mlp"), "logical", (("mlp", "tensor"),)),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_one_parameter_read_twice(tied: bool) -> None:
    config = DecoderConfig(
        vocab_size=7, num_layers=1, model_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4, tied=tied
    )
    parts = Pipeline(before="embed", blocks="blocks", after="head", context="context")
    model, batch = read_model(config, {}, parts), {"tokens": jnp.zeros((2, 3), jnp.int32)}
    outside = [path for path in model.parameters if "blocks" not in path and "norm" not in path]
    assert outside == (["tokens/embedding"] if tied else ["tokens/embedding", "unembed/kernel"])
    values = model.initialise(jax.random.key(0))
    parts_of = model.parts
    assert parts_of is not None
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)

    def logits(embedding: jax.Array) -> jax.Array:
        return parts_of.after(values | {"tokens/embedding": embedding}, x, batch, None, True)

    moved = not np.array_equal(logits(values["tokens/embedding"]), logits(2 * values["tokens/embedding"]))
    assert moved is tied


def test_an_embedding_computes_in_the_dtype_of_its_parameter() -> None:
    """`nnx.Embed` fixes its dtype when it is made; one that was chosen stays."""

    class Embedding(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.follows = nnx.Embed(3, 4, rngs=rngs)
            self.chosen = nnx.Embed(3, 4, dtype=jnp.float16, rngs=rngs)

        def __call__(self, batch: Any) -> Any:
            return self.follows(batch), self.chosen(batch)

    model = read_model(Embedding, {})
    values = {path: jnp.zeros(leaf.shape, jnp.bfloat16) for path, leaf in model.parameters.items()}
    follows, chosen = model.forward(values, jnp.zeros(2, jnp.int32), None, True)[0]
    assert (follows.dtype, chosen.dtype) == (jnp.bfloat16, jnp.float16)


class Noisy(Net):
    """Dropout in two places and a mode of the user's own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs, rate=0.5)
        self.first, self.second = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))

    def head(self, x: jax.Array) -> Any:
        return self.first(jnp.ones_like(x)), self.second(jnp.ones_like(x))


def test_dropout_draws_when_the_model_trains_and_only_then() -> None:
    model, key = read_model(net(rate=0.5), BATCH, PARTS), jax.random.key(3)
    values = model.initialise(jax.random.key(0))
    quiet = model.forward(values, BATCH, key, False)[0]
    np.testing.assert_array_equal(quiet, read_model(Net, BATCH).forward(values, BATCH, None, False)[0])
    one, again, other = (model.forward(values, BATCH, k, True)[0] for k in (key, key, jax.random.key(4)))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, quiet)
    assert not np.allclose(one, other)


def test_dropout_in_the_parts() -> None:
    model, key = read_model(Noisy, BATCH, PARTS), jax.random.key(3)
    values, parts = model.initialise(jax.random.key(0)), model.parts
    assert parts is not None
    x = jnp.ones((5, 4))
    quiet, one, other = (
        parts.blocks[0](layer_of(model, values), x, None, k, train)
        for k, train in ((key, False), (key, True), (jax.random.key(4), True))
    )
    layer = layer_of(model, values)
    np.testing.assert_allclose(quiet, x + jnp.tanh(x @ layer["up/kernel"] + layer["up/bias"]), rtol=1e-6)
    assert not np.allclose(one, quiet)
    assert not np.allclose(one, other)
    # Two sites draw two masks from the one key, and each mask changes with it.
    first, second = parts.after(values, jnp.ones((5, 4)), BATCH, key, True)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, parts.after(values, jnp.ones((5, 4)), BATCH, jax.random.key(4), True)[0])
    np.testing.assert_array_equal(parts.after(values, x, BATCH, key, False), jnp.ones((2, 5, 4)))


def test_a_method_is_told_whether_it_trains() -> None:
    seen: list[tuple[Any, ...]] = []

    class Told(Net):
        def embed(self, batch: Any, train: bool = False) -> jax.Array:
            seen.append(("embed", train))
            return super().embed(batch)

        def context(self, batch: Any, *, key: Any) -> Any:
            seen.append(("context", key))

        def head(self, x: jax.Array, batch: Any = None, deterministic: bool = True) -> jax.Array:
            seen.append(("head", batch is BATCH, deterministic))
            return super().head(x)

        def __call__(self, batch: Any, train: bool = False) -> jax.Array:
            seen.append(("model", train))
            return batch["x"]

    model = read_model(Told, BATCH, Pipeline(before="embed", blocks="blocks", after="head", context="context"))
    values, parts, key = model.initialise(jax.random.key(0)), model.parts, jax.random.key(5)
    assert parts is not None
    assert parts.context is not None
    x = parts.before(values, BATCH, key, True)
    parts.context(values, BATCH, key, True)
    parts.after(values, x, BATCH, key, True)
    model.forward(values, BATCH, key, True)
    assert seen == [("embed", True), ("context", key), ("head", True, False), ("model", True)]


def test_batch_statistics_are_handed_back_as_flax_writes_them() -> None:
    model = read_model(net(norm=True), BATCH)
    assert list(model.buffers) == [f"blocks/{index}/norm/{leaf}" for index in (0, 1) for leaf in ("mean", "var")]
    values, own = model.initialise(jax.random.key(0)), Net(nnx.Rngs(0), norm=True)
    y, written = model.forward(values, BATCH, None, True)
    np.testing.assert_allclose(y, own(BATCH), rtol=1e-5)
    assert set(written) == set(model.buffers)
    for index, block in enumerate(own.blocks):
        assert block.norm is not None
        np.testing.assert_allclose(written[f"blocks/{index}/norm/mean"], block.norm.mean[...], rtol=1e-6)
        np.testing.assert_allclose(written[f"blocks/{index}/norm/var"], block.norm.var[...], rtol=1e-6)
    own.eval()
    y, unwritten = model.forward(values | written, BATCH, None, False)
    np.testing.assert_allclose(y, own(BATCH), rtol=1e-5)
    assert unwritten == {}


ALONE = "the model writes to it, and a stack of blocks sees one microbatch of one shard at a time"
WAY_OUT = "train it without pipeline=, with microbatches=1 (all axes are then automatic)"


def test_batch_statistics_in_a_stack_are_refused_where_they_are_written() -> None:
    model = read_model(net(norm=True), BATCH, PARTS)
    values, parts = model.initialise(jax.random.key(0)), model.parts
    assert parts is not None
    assert set(parts.layers[0]) == {"up/bias", "up/kernel", "norm/mean", "norm/var", "norm/scale", "norm/bias"}
    layer, x = layer_of(model, values), jnp.ones((5, 4))
    assert parts.blocks[0](layer, x, None, None, False).shape == x.shape  # reads them only
    with pytest.raises(DeclarationError) as error:
        parts.blocks[0](layer, x, None, None, True)
    assert str(error.value) == (
        "2 faults in the declaration:\n"
        f"  1. blocks/*/norm/mean: {ALONE}; {WAY_OUT}\n"
        f"  2. blocks/*/norm/var: {ALONE}; {WAY_OUT}"
    )


def test_what_is_written_outside_the_stack_is_refused_too() -> None:
    class Counting(Net):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.count = nnx.Variable(jnp.zeros(()))

        def embed(self, batch: Any) -> jax.Array:
            self.count[...] += 1
            return super().embed(batch)

    model = read_model(Counting, BATCH, PARTS)
    assert model.parts is not None
    with pytest.raises(DeclarationError) as error:
        model.parts.before(model.initialise(jax.random.key(0)), BATCH, None, True)
    assert str(error.value) == f"count: {ALONE}; {WAY_OUT}"


def replace(name: str, **options: Any) -> Callable[[Any, nnx.Rngs], None]:
    """The second block's layer, made with other options."""
    given: dict[str, Any] = {"in_features": 4, "out_features": 4, **options}
    return lambda model, rngs: setattr(model.blocks[1], name, nnx.Linear(**given, rngs=rngs))


def share_between_blocks(model: Any, rngs: nnx.Rngs) -> None:
    model.blocks[1].up = model.blocks[0].up


def share_with_the_rest(model: Any, rngs: nnx.Rngs) -> None:
    model.blocks[1].up.kernel = model.inputs.kernel


def number(model: Any, rngs: nnx.Rngs) -> None:
    for index, block in enumerate(model.blocks):
        block.index = index


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "no blocks": (net(layers=0), "pipeline blocks='blocks': the list is empty; a pipeline needs blocks"),
    "a parameter of two blocks": (
        changed(share_between_blocks),
        "2 faults in the declaration:\n"
        "  1. blocks/1/up/bias: is the same parameter as blocks/0/up/bias; give each block its own\n"
        "  2. blocks/1/up/kernel: is the same parameter as blocks/0/up/kernel; give each block its own",
    ),
    "a parameter of a block and the rest": (
        changed(share_with_the_rest),
        "blocks/1/up/kernel: is the same parameter as inputs/kernel; use it in inputs only, or copy it",
    ),
    "a layer index": (
        changed(number, layers=9),
        "blocks/8: is a block of yet another kind, after 8 others (a layer index, or a function of its own?), and "
        "every kind is a program in every stage; pass what differs as an array",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    factory, message = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        read_model(factory, BATCH, PARTS)
    assert str(error.value) == message
    read_model(factory, BATCH)  # without a stack there is nothing to refuse


OF_TWO_KINDS: dict[str, Callable[..., Any]] = {
    "one block lacks a parameter": changed(replace("up", use_bias=False)),
    "one block has more": changed(replace("more")),
    "another shape": changed(replace("up", out_features=5, use_bias=True)),
    "another dtype": changed(replace("up", param_dtype=jnp.bfloat16)),
    "an attribute": changed(number),
    "another rate": changed(lambda model, rngs: setattr(model.blocks[1].drop, "rate", 0.5)),
}


@pytest.mark.parametrize("name", OF_TWO_KINDS)
def test_blocks_that_differ_are_of_two_kinds(name: str) -> None:
    parts = read_model(OF_TWO_KINDS[name], BATCH, PARTS).parts
    assert parts is not None
    assert (parts.kinds, len(parts.blocks)) == ((0, 1), 2)


def test_each_kind_runs_its_own_program_on_its_own_arrays() -> None:
    model = read_model(changed(replace("up", use_bias=False)), BATCH, PARTS)
    values, parts = model.initialise(jax.random.key(0)), model.parts
    assert parts is not None
    assert "up/bias" in parts.layers[0]
    assert "up/bias" not in parts.layers[1]
    x = parts.before(values, BATCH, None, True)
    for index, layer in enumerate(parts.layers):
        mine = {inner: values[path] for inner, path in layer.items()}
        x = parts.blocks[parts.kinds[index]](mine, x, None, None, True)
    y = parts.after(values, x, BATCH, None, True)
    np.testing.assert_array_equal(y, model.forward(values, BATCH, None, True)[0])


def test_every_part_that_the_module_lacks_is_told_at_once() -> None:
    with pytest.raises(DeclarationError) as error:
        read_model(Net, BATCH, Pipeline(before="a", blocks="b", after="c", context="d"))
    assert str(error.value) == (
        "4 faults in the declaration:\n"
        "  1. pipeline before='a': Net has no attribute 'a'; add it to Net, or name another\n"
        "  2. pipeline blocks='b': Net has no attribute 'b'; add it to Net, or name another\n"
        "  3. pipeline after='c': Net has no attribute 'c'; add it to Net, or name another\n"
        "  4. pipeline context='d': Net has no attribute 'd'; add it to Net, or name another"
    )


def nothing(rngs: nnx.Rngs) -> None:
    """Returns no module."""


def test_a_factory_of_something_else() -> None:
    with pytest.raises(DeclarationError) as error:
        read_model(nothing, BATCH)
    assert str(error.value) == f"model: {nothing!r} returned NoneType, not an nnx.Module"


# What Flax allows and a step must not trip over.


def squares(y: jax.Array, batch: Any) -> tuple[jax.Array, int]:
    return jnp.sum(y**2), y.shape[0]


ROWS = {"x": np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)}
DATA = MeshSpec({"data": 2}, batch="data", target="cpu:2")
STAGES = MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4")
ANYWHERE = Rules((("**", None),))


class Masked(nnx.Module):
    """Arrays that are attributes and no `nnx.Variable`: one made in JAX, one in NumPy, one of a container."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.mask = jnp.linspace(0, 1, 4)
        self.shift = np.arange(4, dtype=np.float32)
        self.more = nnx.List([jnp.full(4, 0.5)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.up(x) + self.shift) * self.mask * self.more[0]


class MaskedNet(Net):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        blocks = [Masked(rngs) for _ in range(3)]
        blocks[2].mask = jnp.ones(4)
        self.blocks: Any = nnx.List(blocks)


def test_an_array_that_is_an_attribute_is_held_by_path() -> None:
    model = read_model(Masked, BATCH)
    assert list(model.parameters) == ["up/bias", "up/kernel"]
    assert {path: leaf.dtype for path, leaf in model.buffers.items()} == dict.fromkeys(
        ("mask", "more/0", "shift"), jnp.float32
    )
    values = model.initialise(jax.random.key(0))
    np.testing.assert_array_equal(values["mask"], np.linspace(0, 1, 4, dtype=np.float32))
    y, written = model.forward(values, BATCH["x"], None, True)
    np.testing.assert_allclose(y, Masked(nnx.Rngs(0))(BATCH["x"]), rtol=1e-6)
    assert written == {}


def test_arrays_that_are_attributes_may_differ_between_blocks() -> None:
    assert_matches_reference(
        MaskedNet, squares, optax.adam(1e-2), ROWS, mesh=STAGES, rules=ANYWHERE, pipeline=PARTS, microbatches=2, steps=2
    )
    assert_matches_reference(
        MaskedNet, squares, optax.adam(1e-2), ROWS, mesh=DATA, rules=ANYWHERE, microbatches=2, steps=2
    )


class Stacked(nnx.Module):
    """Layers that Flax itself stacks: their dropout's keys and counts have a dim of layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Block(rngs, rate=0.4), in_axes=0, out_axes=0))
        self.inputs, self.layers = nnx.Linear(4, 4, rngs=rngs), make(rngs)

    def __call__(self, batch: Any) -> jax.Array:
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return run(self.layers, self.inputs(batch["x"]))


def test_streams_of_layers_that_flax_stacks() -> None:
    """Each layer has its own key, and a device draws the rows that it holds."""
    model, key = read_model(Stacked, ROWS), jax.random.key(3)
    values = model.initialise(key)
    one, again, other = (model.forward(values, ROWS, k, True)[0] for k in (key, key, jax.random.key(4)))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    zeros = {path: jnp.zeros_like(value) for path, value in values.items()}
    ones = zeros | {"inputs/bias": jnp.ones(4), "layers/up/bias": jnp.full((3, 4), 20.0)}
    drawn = np.asarray(model.forward(ones, {"x": jnp.zeros((200, 4))}, key, True)[0])
    # 1, and 1 / 0.6 for every layer that is not dropped: of three independent masks some have one, some have two.
    assert len(np.unique(np.round(drawn, 3))) == 4
    assert_matches_reference(Stacked, squares, optax.adam(1e-2), ROWS, mesh=DATA, rules=ANYWHERE, steps=2)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_module_sows_is_left_out() -> None:
    class Sowing(Block):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "seen", x)
            return super().__call__(x)

    class SowingNet(Net):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.blocks = nnx.List([Sowing(rngs) for _ in range(2)])

    model, values = read_model(SowingNet, BATCH, PARTS), read_model(Net, BATCH).initialise(jax.random.key(0))
    y, written = model.forward(values, BATCH, None, True)
    np.testing.assert_array_equal(y, read_model(Net, BATCH).forward(values, BATCH, None, True)[0])
    assert written == {}
    assert model.parts is not None
    assert model.parts.blocks[0](layer_of(model, values), jnp.ones((5, 4)), None, None, True).shape == (5, 4)


class Reading(nnx.Module):
    """Under `nnx.remat` what is only read comes back as a new value."""

    def __init__(self, rngs: nnx.Rngs, *, write: bool = False) -> None:
        self.up, self.write = nnx.Linear(4, 4, rngs=rngs), write
        self.scale, self.seen = nnx.Variable(jnp.full(4, 0.7)), nnx.Variable(jnp.zeros(()))

    @nnx.remat
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.write:
            self.seen[...] += 1
        return x + jnp.tanh(self.up(x)) * self.scale[...] + self.seen[...]


def reading(write: bool) -> Callable[[nnx.Rngs], nnx.Module]:
    return changed(
        lambda model, rngs: setattr(model, "blocks", nnx.List([Reading(rngs, write=write) for _ in range(2)]))
    )


def test_reading_under_remat_is_not_writing() -> None:
    assert_matches_reference(
        reading(False), squares, optax.sgd(0.1), ROWS, mesh=STAGES, rules=ANYWHERE, pipeline=PARTS, steps=2
    )
    model = read_model(reading(True), BATCH, PARTS)
    assert model.parts is not None
    with pytest.raises(DeclarationError) as error:
        model.parts.blocks[0](layer_of(model, model.initialise(jax.random.key(0))), jnp.ones((5, 4)), None, None, True)
    assert str(error.value) == f"blocks/*/seen: {ALONE}; {WAY_OUT}"


def one_module(kind: str) -> Callable[[Any, nnx.Rngs], None]:
    def change(model: Any, rngs: nnx.Rngs) -> None:
        if kind == "Sequential":
            model.blocks = nnx.Sequential(*model.blocks)
        else:
            model.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)

    return change


@pytest.mark.parametrize("kind", ["Sequential", "Block"])
def test_blocks_that_are_no_list(kind: str) -> None:
    with pytest.raises(DeclarationError) as error:
        read_model(changed(one_module(kind)), BATCH, PARTS)
    assert str(error.value) == (
        f"pipeline blocks='blocks': Net.blocks is {kind}, no list of modules; write\n"
        "    self.blocks = nnx.List([Block(...) for _ in range(...)])\n"
        "and call them one after another in Net.__call__"
    )


def test_a_module_made_to_be_frozen_beside_others_that_are_not() -> None:
    class Frozen(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, *, others: bool) -> None:
            self.frozen = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.free = nnx.BatchNorm(4, use_running_average=others, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.free(self.frozen(self.drop(x), use_running_average=True))

    with pytest.raises(DeclarationError) as error:
        read_model(lambda rngs: Frozen(rngs, others=False), BATCH)
    assert str(error.value) == (
        "frozen: is made with use_running_average=True and free with False, and training sets both to False; freeze it "
        "where it is called, (x, use_running_average=True), and leave the argument out where it is made"
    )
    # Made for evaluation as a whole: training is what `nnx.Module.train` makes of it, but for what the call says.
    model, key = read_model(lambda rngs: Frozen(rngs, others=True), BATCH), jax.random.key(0)
    y, written = model.forward(model.initialise(key), BATCH["x"], key, True)
    assert list(written) == ["free/mean", "free/var"]
    assert not np.allclose(y, model.forward(model.initialise(key), BATCH["x"], jax.random.key(1), True)[0])


def test_written_arrays_keep_their_shape() -> None:
    class Growing(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.seen = nnx.Variable(jnp.zeros(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.seen.set_value(jnp.zeros(3))
            return x

    with pytest.raises(DeclarationError) as error:
        read_model(Growing, BATCH).forward({"seen": jnp.zeros(2)}, BATCH["x"], None, True)
    assert str(error.value) == (
        "seen: the model writes [3] to it, and it is [2]; keep its shape: a step is compiled once"
    )
