"""What a device really holds, made in its place, with the numbers that Flax's own initialisation gives."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.mesh.build import build_mesh
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.models.linen_decoder import LinenDecoder, linen_decoder_rules
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rule, Rules, canonical
from shardlab.step.compile import CompiledStep
from shardlab.step.state import TrainState, shardings, state_spec_tree, storage_specs, unstacked, users_own
from tests.equivalence.cases import LM, OPTIMIZERS, features, tokens

PARTS = Pipeline(before="embed", blocks="blocks", after="head")
MLP = mlp.MLPConfig(num_layers=3)
SPLIT = mlp.mlp_rules("tensor")
REPLICATED = Rules((("**", None),))


def begun(model: Any, optimizer: str = "adamw", *, mesh: dict[str, int], **more: Any) -> tuple[Plan, TrainState]:
    """The plan and the state before the first step; the step itself is not compiled."""
    sizes = {"data": 1, "stage": 1, "tensor": 1} | mesh
    spec = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    transformation = OPTIMIZERS[optimizer]()
    given = {"rules": SPLIT, "batch": features(8), "pipeline": PARTS, "microbatches": 2, **more}
    plan = make_plan(model, mesh=spec, optimizer=transformation, **given)
    read = read_model(model, given["batch"], plan.pipeline)
    devices = build_mesh(plan.mesh)
    wanted = shardings(devices, state_spec_tree(read, plan, transformation))
    loss: Any = mlp.label_loss
    step = CompiledStep(plan, devices, read, loss, transformation, wanted, None, None, None, None, 0.0, 0.0)
    state = step.init(5)
    for value, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert value.sharding.is_equivalent_to(sharding, value.ndim)
    return plan, state


def held(tree: Any) -> set[int]:
    """Bytes that the devices really hold; one number where all hold as much."""
    counted: Counter[Any] = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            counted[shard.device] += shard.data.nbytes
    return set(counted.values())


PADDED = Rules((Rule("blocks/*/up/kernel", P(None, "tensor"), pad=True), ("**", None)))
BYTES: dict[str, dict[str, Any]] = {
    "data 4, ZeRO 0": {"mesh": {"data": 4}, "zero": 0, "microbatches": 1},
    "data 4, ZeRO 3": {"mesh": {"data": 4}, "zero": 3, "microbatches": 1},
    "hybrid, ZeRO 1": {"mesh": {"data": 2, "stage": 2, "tensor": 2}, "zero": 1},
    "bfloat16, ZeRO 1": {"mesh": {"data": 2, "stage": 2}, "zero": 1, "dtype": "bfloat16"},
    "per layer, ZeRO 2": {"mesh": {"data": 2, "stage": 2}, "zero": 2, "optimizer": "muon"},
    "factored, ZeRO 1": {"mesh": {"data": 2, "tensor": 2}, "zero": 1, "optimizer": "adafactor"},
    "padded": {"mesh": {"tensor": 5}, "rules": PADDED},
}


@functools.cache
def cached(name: str) -> tuple[Plan, TrainState]:
    return begun(MLP, **BYTES[name])


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_the_plan(name: str) -> None:
    plan, state = cached(name)
    planned = plan.bytes_per_device()
    assert held(state.parameters) == {planned["parameters"]}
    assert held(state.optimizer) == {planned["optimizer_state"]}


def test_zero_1_shards_the_master_copy_of_a_bfloat16_step() -> None:
    _, state = cached("bfloat16, ZeRO 1")
    # [4, 16, 24], one slot a pad: by stages, and by data on the larger dim, which the rules cut over one device
    kernel = state.parameters["blocks/*/up/kernel"]
    assert kernel.dtype == jnp.float32
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 12)}
    moment = state.optimizer[0].mu["blocks"]["*"]["up"]["kernel"]
    assert (moment.dtype, moment.sharding) == (kernel.dtype, kernel.sharding)


@pytest.mark.parametrize("name", BYTES)
def test_nnx_parameters_are_flaxs_own(name: str) -> None:
    plan, state = cached(name)
    own = nnx.to_flat_state(nnx.state(MLP(nnx.Rngs(5)), nnx.Param))
    mine = users_own(plan, state.parameters)
    assert len(mine) == len(own) == 16
    for path, value in own:
        np.testing.assert_array_equal(mine["/".join(map(str, path))], value[...], err_msg=str(path))


def test_linen_parameters_are_flaxs_own() -> None:
    mesh = {"data": 2, "stage": 2, "tensor": 2}
    sizes: dict[str, Any] = {**LM, "num_layers": 3}
    model = LinenDecoder(**sizes)
    rules, parts = linen_decoder_rules("tensor"), Pipeline("embed", "blocks", "head", context="context")
    plan, state = begun(model, "sgd", mesh=mesh, zero=3, rules=rules, batch=tokens(8), pipeline=parts)
    # Compiled: XLA makes one product of a normal's two constant factors, which changes the last bit of eager numbers.
    own = jax.jit(model.init)(jax.random.key(5), tokens(8))["params"]
    mine = users_own(plan, state.parameters)
    leaves = jax.tree_util.tree_flatten_with_path(own)[0]
    assert len(leaves) == len(mine)
    for keys, value in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        np.testing.assert_array_equal(mine[path], value, err_msg=path)


def test_another_seed_gives_other_parameters() -> None:
    _, state = cached("data 4, ZeRO 0")
    other = MLP(nnx.Rngs(6)).inputs.kernel[...]
    assert not np.array_equal(state.parameters["inputs/kernel"], other)
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(5)))
    assert state.step == 0


Made = tuple[Any, str]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Memory and HLO of every program that is compiled from here on."""
    real, programs = jax.jit, list[Made]()

    def recording(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled: list[Any] = []

        def call(*args: Any) -> Any:
            if not compiled:
                compiled.append(real(function, **options).lower(*args).compile())
                programs.append((compiled[0].memory_analysis(), compiled[0].as_text()))
            return compiled[0](*args)

        return call

    monkeypatch.setattr(jax, "jit", recording)
    return programs


WIDE = mlp.MLPConfig(num_layers=2, model_dim=1024, hidden_dim=512)


@pytest.mark.parametrize(
    ("mesh", "zero"), [({"data": 8}, 3), ({"stage": 2, "tensor": 4}, 0)], ids=["ZeRO 3", "stages x tensor"]
)
def test_no_array_is_larger_than_its_shard(mesh: dict[str, int], zero: int, made: list[Made]) -> None:
    rules = Rules((Rule("blocks/*/*/kernel", P(None, "tensor")), ("**", None)))
    _, state = begun(WIDE, "sgd", mesh=mesh, zero=zero, rules=rules, microbatches=1)
    full, shard = 2 * 1024 * 512, 2 * 1024 * 512 // 8
    assert state.parameters["blocks/*/up/kernel"].size == full
    largest = 0
    for memory, text in made:
        shapes = re.findall(r"\b(?:f|u|s)\d+\[([\d,]+)\]", text)
        largest = max([largest, *(math.prod(map(int, shape.split(","))) for shape in shapes)])
        # Two kernels of the blocks in one program, each in its eighth.
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 4 * full
    # The two words that an element's number is hashed from lie behind one another.
    assert shard <= largest <= 2 * shard


def test_no_more_programs_for_more_layers(made: list[Made]) -> None:
    """In whole models too, whose layers are arrays of their own."""
    counts = []
    for layers in (2, 4):
        made.clear()
        config = mlp.MLPConfig(num_layers=layers)
        begun(config, "sgd", mesh={"data": 2}, rules=REPLICATED, pipeline=None)
        counts.append(len(made))
    assert counts[0] == counts[1] > 1


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.table = nnx.BatchStat(jax.random.normal(rngs.params(), (12,)))

    def __call__(self, batch: Any) -> jax.Array:
        return self.norm(batch["features"]) + self.table[...]


def test_buffers_are_made_too() -> None:
    plan, state = begun(Normed, mesh={"data": 2}, rules=REPLICATED, pipeline=None, microbatches=1)
    own = Normed(nnx.Rngs(5))
    assert set(state.buffers) == {buffer.path for buffer in plan.buffers} == {"norm/mean", "norm/var", "table"}
    assert set(state.parameters) == {"norm/scale", "norm/bias"}
    np.testing.assert_array_equal(state.buffers["table"], own.table[...])
    np.testing.assert_array_equal(state.buffers["norm/var"], np.ones(12))


def test_specs_of_what_is_stored() -> None:
    """Stacks have the stage axis first; what every stage uses is lent over the stages; state follows ZeRO."""
    plan, _ = cached("hybrid, ZeRO 1")

    def specs(name: str) -> list[P]:
        return [canonical(storage_specs(plan, which)[name]) for which in ("compute", "storage", "state")]

    # [slots, 24, 16], the 24 split over tensor by the rules
    assert specs("blocks/*/down/kernel") == [P("stage", "tensor"), P("stage", "tensor"), P("stage", "tensor", "data")]
    # [12, 16]
    assert specs("inputs/kernel") == [P(), P(None, "stage"), P(None, ("stage", "data"))]


def test_pad_slots_and_padding_are_left_out() -> None:
    plan, _ = cached("per layer, ZeRO 2")
    stack = next(stack for stack in plan.stacks if stack.name == "blocks/*/up/kernel")
    assert stack.members == ("blocks/0/up/kernel", "blocks/1/up/kernel", "blocks/2/up/kernel", None)
    stored = {stack.name: np.arange(4 * 16 * 24).reshape(4, 16, 24), "inputs/bias": np.arange(16)}
    found = unstacked(plan, stored)
    assert set(found) == {"blocks/0/up/kernel", "blocks/1/up/kernel", "blocks/2/up/kernel", "inputs/bias"}
    np.testing.assert_array_equal(found["blocks/2/up/kernel"], stored[stack.name][2])

    ones = Functions(
        init=lambda key: {"blocks": [{"w": jnp.ones(3)}] * 3},
        before=lambda params, batch: batch["features"][:, :3],
        block=lambda layer, x: x * layer["w"],
        after=lambda params, x: x,
    )
    _, state = begun(ones, "sgd", mesh={"stage": 2}, rules=REPLICATED, pipeline=None)
    np.testing.assert_array_equal(state.parameters["blocks/*/w"], [[1] * 3, [1] * 3, [1] * 3, [0] * 3])

    padded, state = cached("padded")
    assert state.parameters["blocks/*/up/kernel"].shape == (3, 16, 25)
    assert not np.any(state.parameters["blocks/*/up/kernel"][..., 24:])
    assert users_own(padded, state.parameters)["blocks/0/up/kernel"].shape == (16, 24)


def test_shardings_of_a_tree() -> None:
    mesh = build_mesh(MeshSpec({"data": 2}, batch="data", target="cpu:2"))
    assert shardings(mesh, {"a": P("data"), "b": [P()]}) == {
        "a": NamedSharding(mesh, P("data")),
        "b": [NamedSharding(mesh, P())],
    }
