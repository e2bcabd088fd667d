"""Gradients outside blocks that add up in pieces stay in pieces in what XLA:TPU compiles.

Needs libtpu, and no TPU:

    pip install 'shardlab[tpu]' && python -m pytest -m tpu
"""

from __future__ import annotations

import re

import pytest

from tests.tpu import printed_by

pytestmark = pytest.mark.tpu
PROGRAM = """
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
import shardlab
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss

model = DecoderConfig(num_layers=2, model_dim=256, num_heads=2, num_kv_heads=2, head_dim=128, mlp_dim=512,
                      vocab_size=1024)
batch = {name: jax.ShapeDtypeStruct((16, 256), jnp.int32) for name in ("tokens", "targets")}
plan = shardlab.make_plan(
    model,
    mesh=shardlab.MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4"),
    rules=decoder_rules(None),
    pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
    optimizer=optax.adamw(1e-3), batch=batch, microbatches=4, zero=3, dtype="bfloat16", reduce_dtype="bfloat16",
    accumulate="sharded", remat="full",
)
devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
step = shardlab.compile_train_step(model, next_byte_loss, optax.adamw(1e-3), plan, batch, devices=devices)
print(step.compiled.as_text())
"""


def test_no_loop_over_microbatches_holds_a_whole_gradient() -> None:
    """Of the embedding [1024, 256] and the output kernel [256, 1024] every device holds one piece of four.

    XLA:TPU moves a sum over devices out of a loop that adds it up, and holds half of the vocabulary's or all.
    """
    printed = printed_by(PROGRAM)
    loops = [line.partition(" while(")[0] for line in printed.splitlines() if " while(" in line]
    carried = {tuple(map(int, one)) for line in loops for one in re.findall(r"f32\[(\d+),(\d+)\]", line)}
    sizes = {rows * columns for rows, columns in carried if min(rows, columns) >= 256}
    assert sizes == {1024 * 256 // 4}, carried
