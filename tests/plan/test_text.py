"""The plan's table, exactly, and the words of its columns.

`tests/golden/plan_hybrid.txt` is the plan of a tiny decoder over data=2 x stage=2 x tensor=2 with ZeRO 1. After a
change of the text that is meant, write it anew and read the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/plan/test_text.py && git diff tests/golden
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig, decoder_rules
from shardlab.models.mlp import MLPConfig
from shardlab.module.functions import Functions
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.plan.text import columns, human_bytes, spec_text
from shardlab.sharding.rules import Rules

GOLDEN = Path(__file__).parents[1] / "golden" / "plan_hybrid.txt"


def test_the_table_of_a_hybrid_plan() -> None:
    plan = make_plan(
        DecoderConfig(vocab_size=16, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24),
        mesh=MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage"),
        rules=decoder_rules("tensor"),
        optimizer=optax.adamw(1e-2),
        batch={name: jax.ShapeDtypeStruct((8, 6), jnp.int32) for name in ("tokens", "targets")},
        pipeline=Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        zero=1,
        microbatches=4,
        remat="full",
    )
    text = f"{plan}\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_plan_without_parts_has_no_line_of_stages() -> None:
    plan = make_plan(
        Functions(init=lambda key: {"w": jnp.zeros((4, 2)), "scale": jnp.zeros(())}, apply=lambda p, b: b @ p["w"]),
        mesh=MeshSpec({"data": 2}, target="cpu:2"),
        rules=Rules((("w", P("data")), ("scale", None))),
        optimizer=optax.sgd(0.1),
        batch=jax.ShapeDtypeStruct((6, 4), jnp.float32),
        microbatches=3,
    )
    assert str(plan).splitlines() == [
        "mesh data=2 on cpu:2 (batch axes none; stage axis none)",
        "9 parameters, computed in float32, gradients summed in float32; ZeRO 0; remat none",
        "batch of 6, 3 microbatches of 2 a shard",
        "",
        "path   shape   dtype    spec       stored       optimizer state  from             a device",
        "-----  ------  -------  ---------  -----------  ---------------  ---------------  --------",
        'scale  scalar  float32  P()        as declared  P()              rule 2, "scale"       4 B',
        "w      4x2     float32  P('data')  as declared  P('data')        rule 1, \"w\"          16 B",
        "",
        "per device:",
        "  parameters                        20 B",
        "  gradients                         20 B",
        "  activations not estimated: the model is taken whole",
    ]


class Scaled(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.scale = nnx.Linear(4, 4, use_bias=False, rngs=rngs), jnp.ones(4)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.up(x) * self.scale


class Tabled(nnx.Module):
    """Arrays that are not trained, in its blocks and outside."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table, self.blocks = jnp.ones((4, 6)), nnx.List([Scaled(rngs) for _ in range(3)])

    def embed(self, batch: Any) -> jax.Array:
        return batch

    def head(self, x: jax.Array) -> jax.Array:
        return x @ self.table


def test_arrays_that_are_not_trained_are_listed_and_counted() -> None:
    plan = make_plan(
        Tabled,
        mesh=MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4"),
        rules=Rules((("table", P("data")), ("blocks/*/up/kernel", None))),
        optimizer=optax.sgd(0.1),
        batch=jax.ShapeDtypeStruct((8, 4), jnp.float32),
        pipeline=Pipeline(before="embed", blocks="blocks", after="head"),
    )
    assert Plan.from_json(plan.to_json()) == plan
    lines = str(plan).splitlines()
    assert [" ".join(line.split()) for line in lines[8:11]] == [
        'blocks/*/up/kernel x3 4x4 float32 P() as declared P() rule 2, "blocks/*/up/kernel" 64 B',
        "blocks/*/scale x3 4 float32 P() as declared not trained no rule: replicated 16 B",
        "table 4x6 float32 P('data') as declared not trained rule 1, \"table\" 48 B",
    ]
    # Two slots of blocks on a stage, one of them empty on the shorter.
    assert "  arrays not trained                80 B" in lines
    other = dataclasses.replace(plan, buffers=plan.buffers[1:])
    assert plan.diff(other) == ("buffers blocks/0/scale: only in the first plan",)


@pytest.mark.parametrize(
    ("given", "batch", "stages"),
    [
        ({"microbatches": 1}, "batch of 8, 1 microbatch of 4 a shard", "2 stages of 1 layer each, schedule 1f1b, "),
        ({"microbatches": 2}, "batch of 8, 2 microbatches of 2 a shard", "2 stages of 1 layer each, schedule 1f1b, "),
    ],
)
def test_one_is_no_plural(given: dict[str, int], batch: str, stages: str) -> None:
    lines = str(small(**given)).splitlines()
    assert lines[2] == batch
    assert lines[3].startswith(stages)
    assert not any("not estimated" in line for line in lines)


@pytest.mark.parametrize("zero", range(4))
def test_that_gradients_accumulate_whole_is_noted_where_their_parts_were_asked_for(zero: int) -> None:
    note = (
        f"note: ZeRO {zero}: gradients accumulate whole over the microbatches of a step, and are cut once they are "
        "reduced; accumulate='sharded' keeps a piece on each device"
    )
    assert (note in str(small(zero=zero)).splitlines()) is (zero > 1)
    if zero > 1:
        assert "accumulate whole" not in str(small(zero=zero, accumulate="sharded"))


def test_the_cost_of_each_choice_is_printed_beforehand() -> None:
    lines = str(small(zero=3, microbatches=2, accumulate="sharded")).splitlines()
    first = lines.index("per device, by choice:")
    assert lines[first - 1 : first + 7] == [
        "",
        "per device, by choice:",
        "  choice                of          held  sent a step  held in all",
        "  --------------------  ---------  -----  -----------  -----------  ------",
        '  gather="step"         weights    568 B        376 B      1.1 KiB  chosen',
        '  gather="layer"        weights    568 B        776 B      1.1 KiB',
        '  accumulate="full"     gradients  568 B        396 B      1.5 KiB',
        '  accumulate="sharded"  gradients  192 B      1.0 KiB      1.1 KiB  chosen',
    ]
    assert "by choice" not in str(small(zero=1))


def test_the_time_that_stages_are_idle() -> None:
    """Of 2 stages and 2 microbatches a third; where one holds 2 of 3 blocks' slots, half of the time."""
    assert str(small(microbatches=2)).splitlines()[4] == "6 ticks, idle 33.3% in lockstep"
    lines = str(small(microbatches=2, layers=3)).splitlines()
    assert lines[3].startswith("2 stages of 2, 1 layers, ")
    assert lines[4] == "6 ticks, idle 50.0% in lockstep: a bubble of 33.3%, and slots of shorter stages"


def small(*, layers: int = 2, **given: Any) -> Plan:
    return make_plan(
        MLPConfig(num_layers=layers, model_dim=4, hidden_dim=4),
        mesh=MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4"),
        rules=[("**", None)],
        optimizer=optax.sgd(0.1),
        batch={
            "features": jax.ShapeDtypeStruct((8, 12), jnp.float32),
            "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
        },
        pipeline=Pipeline(before="embed", blocks="blocks", after="head"),
        **given,
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 1024**3 // 2, "2.5 GiB"),
        (2048 * 1024**4, "2048.0 TiB"),
    ],
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text


def test_specs_are_written_as_python() -> None:
    for spec in (P(), P(None, "data"), P(("data", "tensor"), None), P("x")):
        assert eval(spec_text(spec), {"P": P}) == spec


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert columns(("a", "long"), [("xyz", "1"), ("", "22")], right=(1,)) == [
        "a    long",
        "---  ----",
        "xyz     1",
        "       22",
    ]
