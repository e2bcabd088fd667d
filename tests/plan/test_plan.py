"""A plan as data: its JSON, its differences, its bytes, and plans for machines that are not there."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.models.decoder import DecoderConfig, decoder_rules
from shardlab.module.functions import Functions
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan, shard_bytes

TINY = DecoderConfig(vocab_size=16, num_layers=4, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


@cache
def hybrid(zero: int = 1, microbatches: int = 2, remat: str = "none") -> Plan:
    """A tiny decoder over data=2 x stage=2 x tensor=2."""
    return make_plan(
        TINY,
        mesh=MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage"),
        rules=decoder_rules("tensor"),
        optimizer=optax.adamw(1e-2),
        batch={name: jax.ShapeDtypeStruct((8, 6), jnp.int32) for name in ("tokens", "targets")},
        pipeline=PARTS,
        zero=zero,
        microbatches=microbatches,
        remat=remat,
        activation=P("data", "tensor"),
    )


@cache
def residual(layers: int = 3, zero: int = 1, stage: int = 2, accumulate: str = "full") -> Plan:
    """A residual MLP over data=2 x stages x tensor=2."""
    config = mlp.MLPConfig(num_layers=layers)
    return make_plan(
        Functions(init=lambda key: mlp.init(key, config), before=mlp.before, block=mlp.block, after=mlp.after),
        mesh=MeshSpec({"data": 2, "stage": stage, "tensor": 2}, batch="data", stage="stage", target=f"cpu:{4 * stage}"),
        rules=mlp.mlp_rules("tensor"),
        optimizer=optax.adam(1e-2),
        batch={"features": jax.ShapeDtypeStruct((8, 12), jnp.float32), "labels": jax.ShapeDtypeStruct((8,), jnp.int32)},
        zero=zero,
        accumulate=accumulate,
        microbatches=2,
        remat="full",
        head="last_stage",
    )


@pytest.mark.parametrize("plan", [hybrid, residual])
def test_json_round_trip(plan: Any) -> None:
    there = plan().to_json()
    back = Plan.from_json(there)
    assert back == plan()
    assert back.diff(plan()) == ()
    assert back.to_json() == there
    assert str(back) == str(plan())
    assert json.loads(there)["zero"] == 1


def test_a_plan_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        hybrid().zero = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        hybrid().parameters[0].storage = P()  # type: ignore[misc]
    assert len({hybrid(), Plan.from_json(hybrid().to_json())}) == 1


def test_the_difference_of_two_plans() -> None:
    plan = residual()
    first, *rest = plan.parameters
    changed = dataclasses.replace(first, shape=(9,), storage=P("data"))
    assert (first.path, rest[0].path) == ("blocks/0/down/bias", "blocks/0/down/kernel")
    other = dataclasses.replace(
        plan, zero=2, head="examples", parameters=(changed, *rest[1:], dataclasses.replace(rest[0], path="new"))
    )
    assert plan.diff(other) == (
        "parameters blocks/0/down/bias: shape (16,) -> (9,)",
        f"parameters blocks/0/down/bias: storage {first.storage} -> {P('data')}",
        "parameters blocks/0/down/kernel: only in the first plan",
        "parameters new: only in the second plan",
        "zero: 1 -> 2",
        "head: last_stage -> examples",
    )


def test_the_difference_that_a_zero_level_makes() -> None:
    lines = hybrid(1).diff(hybrid(3))
    assert lines[-1] == "zero: 1 -> 3"
    assert {line.split(": ")[1].split(" ")[0] for line in lines[:-1]} == {"storage", "bytes_per_device"}


def test_bytes_per_device_by_hand() -> None:
    """Three layers on two stages, tensor=2, ZeRO 1 over data=2; float32.

    A block on a device: up 16 x 24/2 and 24/2, down 24/2 x 16 and 16. Outside: inputs 12 x 16 and 16, outputs
    16 x 10 and 10, lent over the stages but for the last, which has no dim for both axes.
    """
    block = 192 + 12 + 192 + 16
    state = 96 + 12 + 96 + 8  # of a block, over data where a dim is free: not the bias that tensor splits
    assert residual().bytes_per_device() == {
        "parameters": 4 * (192 // 2 + 16 // 2 + 160 // 2 + 10 + 2 * block),
        "buffers": 0,
        "working_copy": 4 * (192 + 16 + 160),  # whole again on every stage
        "gradients": 4 * (192 + 16 + 160 + 10 + 2 * block),
        "optimizer_state": 2 * 4 * (192 // 4 + 16 // 4 + 160 // 4 + 10 // 2 + 2 * state) + 4,  # and the count
        "activations": 2 * (2 * 4 * 2 * 16),  # two microbatches in flight: two blocks' x of two rows
        "padding": 4 * block,
    }


@pytest.mark.parametrize("zero", range(4))
def test_a_zero_level_shards_what_it_says(zero: int) -> None:
    held, none = residual(zero=zero).bytes_per_device(), residual(zero=0).bytes_per_device()
    assert (held["optimizer_state"] < none["optimizer_state"]) == (zero >= 1)
    assert (held["parameters"] < none["parameters"]) == (zero >= 3)
    assert held["gradients"] == none["gradients"]


def test_uneven_layers_have_pad_slots() -> None:
    plan = residual(layers=10, stage=4)
    assert plan.layers == (3, 3, 2, 2)
    for stack in plan.stacks:
        layers = [None if path is None else int(path.split("/")[1]) for path in stack.members]
        assert layers == [0, 1, 2, 3, 4, 5, 6, 7, None, 8, 9, None]
    held, block = plan.bytes_per_device(), 4 * (192 + 12 + 192 + 16)
    assert held["padding"] == block  # a device has one pad slot at most
    assert held["gradients"] - 3 * block == residual().bytes_per_device()["gradients"] - 2 * block
    assert residual(layers=12, stage=4).bytes_per_device()["padding"] == 0
    assert plan.num_parameters == 192 + 16 + 160 + 10 + 10 * (384 + 24 + 384 + 16)  # padding does not count


def test_a_4096_device_plan_needs_no_devices() -> None:
    """A decoder of 16 layers for a pod; the test machine has eight emulated devices."""
    began = time.process_time()
    plan = make_plan(
        DecoderConfig(
            vocab_size=32_000, num_layers=16, model_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14336
        ),
        mesh=MeshSpec({"data": 64, "stage": 8, "tensor": 8}, batch="data", stage="stage", target="tpu:v5p:16x16x16"),
        rules=decoder_rules("tensor"),
        optimizer=optax.adamw(3e-4),
        batch={name: jax.ShapeDtypeStruct((1024, 4096), jnp.int32) for name in ("tokens", "targets")},
        pipeline=PARTS,
        microbatches=16,
        zero=3,
        remat="full",
        dtype="bfloat16",
    )
    assert time.process_time() - began < 30
    assert plan.mesh.num_devices == 4096 > jax.device_count()
    assert (plan.num_stages, plan.layers, plan.microbatch_rows) == (8, (2,) * 8, 1)
    kernels = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert plan.num_parameters == 16 * (kernels + 2 * 4096) + 4096 + 2 * 32_000 * 4096
    held = plan.bytes_per_device()
    assert held["activations"] == 15 * 2 * 4096 * 4096 * 2  # 2 (8 - 1) + 1 microbatches, two layers, bfloat16
    # A block's kernels are cut by data x tensor, on one stage of eight; so is the embedding, whose 32,000 rows do not
    # divide by data x stage. The output kernel is cut by all three, what is left by data or data x stage.
    blocks = 2 * (kernels // 512 + 2 * 4096 // 64)
    outside = 32_000 * 4096 // 512 + 32_000 * 4096 // 4096 + 4096 // 512
    assert held["parameters"] == 4 * (blocks + outside)
    assert held["optimizer_state"] == 2 * held["parameters"] + 4  # and the count
    assert Plan.from_json(plan.to_json()) == plan


def test_sharded_accumulators_hold_the_pieces_of_the_blocks() -> None:
    """As above with ZeRO 2: gradients as the state lies, over data (outside blocks, stages too) where a dim is free."""
    block = 96 + 12 + 96 + 8
    bytes_of = residual(zero=2, accumulate="sharded").bytes_per_device()
    assert bytes_of["gradients"] == 4 * (192 // 4 + 16 // 4 + 160 // 4 + 10 // 2 + 2 * block)


def test_shard_bytes() -> None:
    sizes = {"data": 2, "tensor": 4}
    assert shard_bytes((8, 4), "float32", P(None, "tensor"), sizes) == 32
    assert shard_bytes((8, 4), "bfloat16", P(("data", "tensor")), sizes) == 8
    assert shard_bytes((), "float32", P(), sizes) == 4
    assert math.prod((8, 4)) * np.dtype("float64").itemsize == shard_bytes((8, 4), "float64", P(), sizes)
