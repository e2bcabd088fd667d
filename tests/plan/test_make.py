"""What `make_plan` decides by itself, and the note it leaves of each decision."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.module.pipeline import Pipeline
from shardlab.pipeline.schedules import make_schedule
from shardlab.pipeline.stages import LayerCosts
from shardlab.plan.make import for_optimizer, make_plan
from shardlab.plan.plan import Buffer, Plan
from shardlab.sharding.rules import Rule, Rules

MODEL = Functions(init=mlp.init, before=mlp.before, block=mlp.block, after=mlp.after)
REPLICATED = Rules((("**", None),))


def planned(model: Any = MODEL, *, batch: int = 8, mesh: dict[str, int] | None = None, **more: Any) -> Plan:
    sizes = {"data": 2, "stage": 2} if mesh is None else {"data": 1, "stage": 1} | mesh
    spec = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{math.prod(sizes.values())}")
    examples = {"features": np.zeros((batch, 12), np.float32), "labels": np.zeros(batch, np.int32)}
    given = {"rules": mlp.mlp_rules(None), "optimizer": optax.sgd(0.1), **more}
    return make_plan(model, mesh=spec, batch=examples, **given)


def test_nothing_is_noted_where_nothing_was_decided() -> None:
    plan = planned(microbatches=2)
    assert plan.notes == ()
    assert (plan.head, plan.update, plan.layers, plan.batch_axes_manual) == ("examples", "stacked", (2, 2), True)
    assert (plan.num_stages, plan.batch_size, plan.microbatch_rows) == (2, 8, 2)
    assert plan.table().num_microbatches == 2


def test_one_stage_has_no_use_for_a_schedule() -> None:
    plan = planned(mesh={"data": 2}, microbatches=2, schedule="gpipe")
    assert plan.notes == ("schedule gpipe is ignored: one stage only accumulates its microbatches",)
    assert (plan.layers, plan.head) == ((4,), "last_stage")


def test_a_parameter_that_zero_3_cannot_shard_is_said() -> None:
    plan = planned(mesh={"data": 5}, batch=10, zero=3)
    assert plan.notes == tuple(
        f"{p.path}: no dim of {list(p.shape)} divides by the batch axes; replicated over them"
        for p in plan.parameters
        if not any(size % 5 == 0 for size in p.shape)
    )
    # Of the classes, 10, the rest has dims of 12, 16 and 24.
    assert [p.path for p in plan.parameters if "data" in p.storage] == ["outputs/bias", "outputs/kernel"]


def test_the_head_falls_back_to_the_last_stage() -> None:
    plan = planned(microbatches=4)
    assert plan.head == "last_stage"
    assert plan.notes == ("head last_stage: a microbatch of 1 example a shard does not divide by 2 stages",)
    assert planned(microbatches=2, head="last_stage").notes == ()


class Scaled(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * self.scale[...], x)


class TimeMajor(nnx.Module):
    """x is [steps, examples, features], with as many steps as a microbatch has examples."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Scaled() for _ in range(2)])

    def embed(self, batch: Any) -> Any:
        return {"h": jnp.stack([batch["features"]] * 2)}

    def head(self, x: Any) -> jax.Array:
        return x["h"].sum(0)


class Remembering(TimeMajor):
    """x has an array that does not follow the examples."""

    def embed(self, batch: Any) -> Any:
        return batch["features"], jnp.zeros((3, 12))

    def head(self, x: Any) -> jax.Array:
        return x[0] + x[1].sum()


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (TimeMajor, "x h is [2, 2, 12] for 2 examples, and stages share x by example"),
        (Remembering, "x 1 is [3, 12] for 2 examples, and stages share x by example"),
    ],
)
def test_x_that_does_not_lead_with_the_examples(model: Any, problem: str) -> None:
    given: dict[str, Any] = {
        "rules": REPLICATED,
        "microbatches": 2,
        "pipeline": Pipeline(before="embed", blocks="blocks", after="head"),
    }
    plan = planned(model, **given)
    assert plan.head == "last_stage"
    assert plan.notes == (f"head last_stage: {problem}",)
    assert planned(model, head="last_stage", **given).notes == ()
    with pytest.raises(DeclarationError) as error:
        planned(model, head="examples", **given)
    assert str(error.value) == (
        f"head='examples': {problem}; use head='last_stage', or give every array of x the examples as its first dim"
    )


def test_a_per_layer_optimizer_is_said() -> None:
    plan = planned(optimizer=optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)))
    assert plan.update == "per-layer"
    assert plan.notes == (
        "the optimizer runs per layer: on stacked layers its update of blocks/*/down/bias is not that of each layer",
    )


def test_a_plan_for_another_optimizer_says_what_one_made_for_it_says() -> None:
    per_layer = optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1))
    model = read_model(MODEL, {"features": np.zeros((8, 12), np.float32)})
    plain, other = planned(stages=(3, 1)), planned(stages=(3, 1), optimizer=per_layer)
    assert for_optimizer(plain, model, per_layer) == other
    assert for_optimizer(other, model, optax.sgd(0.1)) == plain


class Normed(nnx.Module):
    """A model with batch statistics."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(12, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.norm(self.layer(batch["features"]))


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, batch: Any, train: bool = True) -> jax.Array:
        return linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(batch["features"]))


@pytest.mark.parametrize(
    ("model", "first", "buffers"),
    [
        (Normed, "norm/mean", ("norm/mean", "norm/var")),
        (
            LinenNormed(),
            "batch_stats/BatchNorm_0/mean",
            ("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"),
        ),
    ],
    ids=["nnx", "linen"],
)
def test_a_model_with_buffers_gets_automatic_axes(model: Any, first: str, buffers: tuple[str, ...]) -> None:
    plan = planned(model, mesh={"data": 2}, rules=REPLICATED)
    assert plan.notes == (f"{first} follows the whole batch: all axes are automatic",)
    assert tuple(buffer.path for buffer in plan.buffers) == buffers
    assert not plan.batch_axes_manual
    assert plan.microbatch_rows == plan.batch_size == 8
    assert planned(model, mesh={"data": 2}, rules=REPLICATED, batch_axes="automatic").notes == ()


class Tabled(nnx.Module):
    """Arrays that are not trained and only read."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(12, 4, rngs=rngs)
        self.table = nnx.Variable(jnp.ones((4, 6)))
        self.scale = jnp.ones(())

    def __call__(self, batch: Any) -> jax.Array:
        return self.layer(batch["features"]) @ self.table[...] * self.scale


def test_arrays_that_are_only_read_leave_the_axes_manual() -> None:
    plan = planned(Tabled, mesh={"data": 2}, rules=REPLICATED, microbatches=2)
    assert plan.batch_axes_manual
    assert (plan.notes, plan.microbatch_rows) == ((), 2)


def test_every_array_that_is_not_trained_has_a_row() -> None:
    replicated = Rules((("layer/*", None),))
    plan = planned(Tabled, mesh={"data": 2}, rules=replicated, zero=3)
    assert plan.buffers == (
        Buffer("scale", (), "float32", P(), "no rule: replicated", 4),
        Buffer("table", (4, 6), "float32", P(), "no rule: replicated", 96),
    )
    assert plan.bytes_per_device()["buffers"] == 100
    table = Rule("table", P(None, "data"))
    plan = planned(Tabled, mesh={"data": 2}, rules=Rules((table, *replicated.rules)))
    assert plan.buffers[1] == Buffer("table", (4, 6), "float32", P(None, "data"), 'rule 1, "table"', 48)
    specs = {"table": P("data")}
    plan = planned(Tabled, mesh={"data": 2}, rules=replicated, specs=specs)
    assert plan.buffers[1] == Buffer("table", (4, 6), "float32", P("data"), "specs", 48)
    assert [parameter.path for parameter in plan.parameters] == ["layer/bias", "layer/kernel"]


def test_a_rule_for_an_array_that_is_not_trained_must_fit_it() -> None:
    with pytest.raises(DeclarationError) as error:
        planned(Tabled, mesh={"data": 4}, rules=Rules((Rule("table", P(None, "data")), ("**", None))))
    assert str(error.value) == (
        "table: dim 1 has size 6, not divisible by axis 'data' of size 4 (rule 1, \"table\"); shard another dim, pad "
        "it to 8 with Rule(..., pad=True), or replicate it on purpose with None"
    )
    with pytest.raises(DeclarationError) as error:
        planned(Tabled, mesh={"data": 4}, rules=Rules((Rule("table", P(None, "data"), pad=True), ("**", None))))
    assert str(error.value) == (
        'table (rule 1, "table"): pad=True pads parameters, and it is not trained; give it a rule of its own, before '
        'that one: ("table", None) replicates it'
    )


def test_automatic_axes_take_one_microbatch() -> None:
    with pytest.raises(DeclarationError) as error:
        planned(Normed, mesh={"data": 2}, rules=REPLICATED, microbatches=2)
    assert str(error.value) == (
        "microbatches=2: the model computes across examples, and a microbatch is not the batch; use microbatches=1"
    )


PADDED = Rules((Rule("outputs/bias", P("tensor"), pad=True), ("**", None)))


def test_padding_is_stored_and_never_a_parameter() -> None:
    plan = planned(mesh={"tensor": 4}, rules=PADDED)
    bias = {p.path: p for p in plan.parameters}["outputs/bias"]
    assert (bias.shape, bias.stored_shape) == ((10,), (12,))
    assert bias.bytes_per_device == 12
    assert plan.num_parameters == planned(mesh={"tensor": 4}, rules=REPLICATED).num_parameters


def test_padding_that_changes_the_update_is_refused() -> None:
    rules = Rules((Rule("outputs/kernel", P(None, "tensor"), pad=True), ("**", None)))
    assert planned(mesh={"tensor": 4}, rules=rules, optimizer=optax.adamw(0.1)).num_parameters
    with pytest.raises(DeclarationError) as error:
        planned(mesh={"tensor": 4}, rules=rules, optimizer=optax.adafactor(0.1, min_dim_size_to_factor=4))
    assert str(error.value) == (
        'outputs/kernel (rule 1, "outputs/kernel"): pad=True may change the optimizer\'s state of outputs/kernel: it '
        "looks at more than each number alone; shard another dim, or replicate it on purpose with None"
    )
    plan = planned(mesh={"tensor": 4}, rules=rules, optimizer=optax.adamw(0.1))
    model = read_model(MODEL, {"features": np.zeros((8, 12), np.float32)})
    with pytest.raises(DeclarationError) as again:
        for_optimizer(plan, model, optax.adafactor(0.1, min_dim_size_to_factor=4))
    assert str(again.value) == str(error.value)


def test_specs_come_before_the_rules() -> None:
    plan = planned(mesh={"tensor": 2}, rules=mlp.mlp_rules(), specs={"outputs": {"bias": P("tensor")}})
    found = {p.path: (p.spec, p.source) for p in plan.parameters}
    assert found["outputs/bias"] == (P("tensor"), "specs")
    assert found["outputs/kernel"] == (P(), 'rule 6, "outputs/*"')


def test_master_parameters_have_at_least_32_bits() -> None:
    def halves(key: jax.Array) -> Any:
        return {"w": jnp.zeros((12, 4), jnp.bfloat16), "scale": jnp.zeros(4)}

    def apply(params: Any, batch: Any) -> jax.Array:
        return batch["features"] @ params["w"] * params["scale"]

    plan = planned(Functions(init=halves, apply=apply), mesh={}, rules=REPLICATED, optimizer=optax.adam(0.1))
    assert {p.path: p.dtype for p in plan.parameters} == {"w": "float32", "scale": "float32"}
    assert {leaf.dtype for leaf in plan.optimizer_state} == {"float32", "int32"}
    assert plan.notes == ("w: declared in bfloat16, stored and updated in float32",)
    with jax.enable_x64(True):
        wide = planned(mesh={}, dtype="float64")
    assert {p.dtype for p in wide.parameters} == {"float64"}
    half = planned(mesh={}, dtype="bfloat16")
    assert {p.dtype for p in half.parameters} == {"float32"}
    assert half.dtype == "bfloat16"


def halved(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(
        nnx.Linear(12, 4, param_dtype=jnp.bfloat16, rngs=rngs), nnx.Linear(4, 4, param_dtype=jnp.bfloat16, rngs=rngs)
    )


def test_many_parameters_declared_narrow_are_said_once() -> None:
    plan = planned(halved, mesh={}, rules=REPLICATED)
    assert plan.notes == ("layers/0/bias and 3 more: declared in bfloat16, stored and updated in float32",)


def complex_wave(key: jax.Array) -> Any:
    return {"w": jax.lax.complex(jax.random.normal(key, (12, 4)), jnp.ones((12, 4))), "scale": jnp.ones(4)}


def test_complex_parameters_keep_both_parts() -> None:
    def apply(params: Any, batch: Any) -> jax.Array:
        return jnp.abs(batch["features"] @ params["w"]) * params["scale"]

    wave = Functions(init=complex_wave, apply=apply)
    plan = planned(wave, mesh={}, rules=REPLICATED)
    assert {p.path: (p.dtype, p.bytes_per_device) for p in plan.parameters} == {
        "w": ("complex64", 8 * 48),
        "scale": ("float32", 4 * 4),
    }
    assert plan.bytes_per_device()["gradients"] == 8 * 48 + 4 * 4
    assert plan.notes == ()
    with jax.enable_x64(True):
        wide = planned(wave, mesh={}, rules=REPLICATED, dtype="float64")
    assert {p.path: p.dtype for p in wide.parameters} == {"w": "complex128", "scale": "float64"}


def test_a_state_of_random_keys_has_bytes() -> None:
    plan = planned(optimizer=optax.chain(optax.add_noise(0.1, 0.55, jax.random.key(0)), optax.sgd(0.1)))
    rows = {leaf.path: (leaf.dtype, leaf.bytes_per_device) for leaf in plan.optimizer_state}
    assert rows["0/rng_key"] == ("key<fry>", 8)


def test_gradients_are_summed_in_what_they_accumulate_in() -> None:
    assert [planned(dtype=dtype).reduce_dtype for dtype in ("float32", "bfloat16")] == ["float32", "float32"]
    assert planned(reduce_dtype="bfloat16").reduce_dtype == "bfloat16"
    whole: Any = {"mesh": {"data": 2}, "batch_axes": "automatic"}
    assert planned(dtype="bfloat16", **whole).reduce_dtype == "bfloat16"
    with jax.enable_x64(True):
        assert planned(dtype="float64").reduce_dtype == "float64"


def test_bfloat16_shards_the_master_copy_from_level_1() -> None:
    """With a narrower working copy the fp32 parameters are optimizer state."""

    def sharded(**more: Any) -> bool:
        return all("data" in p.storage for p in planned(mesh={"data": 2}, **more).parameters)

    assert [sharded(dtype="bfloat16", zero=level) for level in range(4)] == [False, True, True, True]
    assert [sharded(dtype="float32", zero=level) for level in range(4)] == [False, False, False, True]


def test_a_batch_of_shapes_will_do() -> None:
    spec = MeshSpec({"data": 2}, batch="data", target="cpu:2")
    shapes = {"features": jax.ShapeDtypeStruct((8, 12), jnp.float32), "labels": jax.ShapeDtypeStruct((8,), jnp.int32)}
    plan = make_plan(MODEL, mesh=spec, rules=mlp.mlp_rules(None), optimizer=optax.sgd(0.1), batch=shapes)
    assert plan.batch == (("features", (8, 12), "float32"), ("labels", (8,), "int32"))


def test_activation_bytes_are_those_of_the_longest_stage() -> None:
    """A residual block x + down(tanh(up(x))) keeps x [2, 16], tanh [2, 24] and what its derivative needs."""
    plan = planned(microbatches=2)
    one = plan.activation_bytes // 2
    assert plan.activation_bytes == 2 * one
    assert one >= 4 * 2 * (16 + 24)
    full = planned(microbatches=2, remat="full").activation_bytes
    assert full == 2 * 4 * 2 * 16  # two blocks, fp32, two rows of x
    assert planned(microbatches=2, remat="full", dtype="bfloat16").activation_bytes == full // 2


def test_the_parts_of_a_whole_model_are_not_needed() -> None:
    plan = planned(mlp.MLPConfig(), mesh={"data": 2}, microbatches=2)
    assert (plan.pipeline, plan.layers, plan.stacks, plan.activation_bytes) == (None, (), (), 0)
    named = planned(mlp.MLPConfig(), mesh={"data": 2}, pipeline=Pipeline("embed", "blocks", "head"))
    assert named.layers == (4,)
    assert {stack.name for stack in named.stacks} == {
        f"blocks/*/{part}/{leaf}" for part in ("up", "down") for leaf in ("kernel", "bias")
    }


def test_sends_are_direct_unless_they_are_said_to_be_delayed() -> None:
    direct, late = planned(microbatches=4), planned(microbatches=4, sends="delayed")
    assert (direct.sends, late.sends) == ("direct", "delayed")
    assert direct == planned(microbatches=4, sends="direct")
    assert direct.diff(late) == ("sends: direct -> delayed",)
    assert late.table() == make_schedule("1f1b", stages=2, microbatches=4, delayed=True)
    assert Plan.from_json(late.to_json()) == late
    assert "2 stages of 2 layers each, schedule 1f1b, sends delayed, head over last stage\n" in str(late)
    assert "delayed" not in str(direct)


def test_when_weights_are_gathered_and_gradients_cut_follows_from_stages_and_zero() -> None:
    def found(mesh: dict[str, int], zero: int) -> tuple[str, str]:
        plan = planned(mesh=mesh, zero=zero, gather="auto", accumulate="auto", microbatches=2)
        return plan.gather, plan.accumulate

    assert [found({"data": 2}, zero) for zero in range(4)] == [
        *[("step", "full")] * 2,
        ("step", "sharded"),
        ("layer", "sharded"),
    ]
    assert found({"data": 2, "stage": 2}, 3) == ("step", "sharded")
    assert found({"stage": 2}, 3) == ("step", "full")  # no batch axis cuts anything
    assert found({"data": 1}, 3) == ("step", "full")


def test_a_table_says_whether_its_sends_are_delayed_if_nothing_else_does() -> None:
    late = make_schedule("1f1b", stages=2, microbatches=4, delayed=True)
    for sends, expected in (("auto", "delayed"), ("delayed", "delayed"), ("direct", "direct")):
        plan = planned(microbatches=4, schedule=late, sends=sends)
        assert plan.sends == expected
        # Its ticks leave what direct sends do not need: a table for delayed ones serves both.
        assert plan.table() == dataclasses.replace(late, delayed=expected == "delayed")
        assert Plan.from_json(plan.to_json()) == plan
    direct = make_schedule("1f1b", stages=2, microbatches=4)
    assert planned(microbatches=4, schedule=direct).sends == "direct"
    with pytest.raises(DeclarationError, match="and, sent a tick later, arrives for tick 2"):
        planned(microbatches=4, schedule=direct, sends="delayed")


def test_one_stage_has_nothing_to_send() -> None:
    plan = planned(mesh={"data": 2}, microbatches=2, sends="delayed")
    assert plan.notes == ("sends delayed is ignored: one stage sends nothing",)
    assert plan.sends == "direct"


# Stages.

TEN = mlp.MLPConfig(num_layers=10)
TEN_NAMED: dict[str, Any] = {"pipeline": Pipeline("embed", "blocks", "head"), "microbatches": 2}


def ten(**more: Any) -> Plan:
    return planned(TEN, mesh={"data": 1, "stage": 4}, **TEN_NAMED, **more)


@pytest.mark.parametrize("stages", ["E t*2 | t*3 | t*3 | t*2 H", "2,3,3,2", (2, 3, 3, 2)])
def test_stages_hold_what_is_listed(stages: Any) -> None:
    plan = ten(stages=stages)
    assert (plan.layers, plan.notes) == ((2, 3, 3, 2), ())
    assert Plan.from_json(plan.to_json()) == plan
    (kernel,) = (stack.members for stack in plan.stacks if stack.name == "blocks/*/up/kernel")
    held = [[path.split("/")[1] for path in kernel[at : at + 3] if path] for at in range(0, 12, 3)]
    assert held == [["0", "1"], ["2", "3", "4"], ["5", "6", "7"], ["8", "9"]]


def test_nothing_said_is_as_even_as_can_be() -> None:
    assert ten() == ten(stages=None) == ten(stages="")
    assert ten().layers == (3, 3, 2, 2)


def test_a_list_that_makes_every_stage_longer_is_said() -> None:
    plan = ten(stages="E | t*5 | t*5 | H")
    assert plan.layers == (0, 5, 5, 0)
    assert plan.notes == (
        "stages of 0, 5, 5, 0 blocks: in a tick every stage computes 5 slots, as many as the longest holds; even "
        "stages would compute 3",
    )
    assert plan.activation_bytes * 3 == ten().activation_bytes * 5


def test_stages_balanced_by_estimate() -> None:
    """A block multiplies r x 16 x 24 twice, three times with its gradients; the inputs have no gradient."""
    block, before, after = 3 * 2 * 16 * 24, 2 * 12 * 16, 3 * 16 * 10
    plan = ten(stages="balanced", head="last_stage")
    assert plan.layers == (2, 3, 3, 2)
    mean = (10 * block + before + after) / 4
    assert plan.notes == (
        f"stages balanced by estimated cost (before as {before / block:.2f} blocks, after as {after / block:.2f}): "
        f"2, 3, 3, 2 blocks; slowest stage {3 * block / mean:.2f} x the mean",
    )
    # Computing a block again makes it dearer: its first product only, for the second's result is not needed.
    again = ten(stages="balanced", head="last_stage", remat="full")
    assert f"before as {before / (block + 16 * 24):.2f} blocks" in again.notes[0]


def test_what_every_stage_has_a_share_of_counts_for_none() -> None:
    measured = LayerCosts(blocks=(2,) * 10, before=9, after=9)
    plan = ten(stages=measured, head="examples")
    assert plan.layers == (3, 3, 2, 2)
    assert plan.notes == (
        "stages balanced by given cost (before and after are spread over all stages): 3, 3, 2, 2 blocks; slowest stage "
        "1.20 x the mean",
    )
    plan = ten(stages=measured, head="last_stage")
    assert plan.layers == (2, 3, 3, 2)
    assert plan.notes[0].startswith("stages balanced by given cost (before as 4.50 blocks, after as 4.50): ")


def test_one_stage_has_no_use_for_a_list() -> None:
    for model in (MODEL, mlp.MLPConfig()):
        plan = planned(model, mesh={"data": 2}, stages="E t | t*3 H")
        assert plan.notes == ("stages are ignored: one stage holds every block",)


@pytest.mark.parametrize(("trained", "kept"), [(False, 1), (True, 2)])
def test_what_a_context_with_a_gradient_makes_a_block_keep(trained: bool, kept: int) -> None:
    """``x @ w * c`` keeps x, c as it is broadcast, and for the gradient of c the product.

    float32, 4 rows of 16 in each of 2 blocks.
    """

    def init(key: Any) -> Any:
        blocks = [{"w": jax.random.normal(key, (16, 16))} for _ in range(4)]
        return {"scale": jax.numpy.ones(16), "blocks": blocks}

    model = Functions(
        init=init,
        before=lambda params, batch: batch["features"] @ jax.numpy.ones((12, 16)),
        context=lambda params, batch: params["scale"] if trained else jax.numpy.ones(16),
        block=lambda layer, x, c: x @ layer["w"] * c,
        after=lambda params, x, batch: x * params["scale"],
    )
    plan = planned(model, mesh={"stage": 2}, microbatches=2, rules=[("**", None)], pipeline=None)
    assert plan.activation_bytes == 2 * 4 * 16 * (4 * kept + 1)
