"""What XLA:TPU makes of gradients that are scattered over an axis which covers three dims of the torus.

Needs libtpu, and no TPU:

    pip install 'shardlab[tpu]' && python -m pytest -m tpu
"""

from __future__ import annotations

import math
import re

import pytest

from tests.tpu import printed_by

pytestmark = pytest.mark.tpu
PROGRAM = """
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
import shardlab
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss

model = DecoderConfig(num_layers=2, model_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, mlp_dim=2048,
                      vocab_size=1024, splash=True, heads_axis="tensor")
batch = {name: jax.ShapeDtypeStruct((32, 512), jnp.int32) for name in ("tokens", "targets")}
devices = topologies.get_topology_desc(
    topology_name="v5:2x4x4", platform="tpu", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1),
    num_slices=1, wrap=(False, True, True),
).devices
for scatter in ("whole", "auto"):
    plan = shardlab.make_plan(
        model,
        mesh=shardlab.MeshSpec({"data": 32, "tensor": 1}, batch="data", target="tpu:v5p:2x4x4"),
        rules=decoder_rules("tensor"),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optax.adamw(1e-3), batch=batch, zero=3, dtype="bfloat16", reduce_dtype="bfloat16", remat="full",
        gather="auto", accumulate="auto", scatter=scatter,
    )
    step = shardlab.compile_train_step(model, next_byte_loss, optax.adamw(1e-3), plan, batch, devices=devices)
    print("=====", scatter, *step.scatters)
    print(step.compiled.as_text())
"""


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    """The compiled programs, by what was asked for."""
    printed = printed_by(PROGRAM, seconds=500)
    _, *texts = printed.split("===== ")
    return {text.split(" ", 1)[0]: text for text in texts}


def large(text: str, kind: str) -> list[str]:
    """The arrays that a kind of collective is of, of a quarter of a million numbers or more; several may be one."""
    types = re.findall(rf"= (\(.*?\)|\S+) {kind}(?:-start)?\(", text)
    found = [dims for one in types for dims in re.findall(r"\w\[([\d,]+)\]", one)]
    return [dims for dims in found if math.prod(map(int, dims.split(","))) >= 2**18]


def test_in_one_it_is_an_all_reduce_and_in_parts_it_is_not(programs: dict[str, str]) -> None:
    assert len(large(programs["whole"], "all-reduce")) >= 7  # of every kernel of a block
    assert large(programs["auto"], "all-reduce") == []
    assert programs["auto"].count(" reduce-scatter(") >= 14
    assert re.match(
        r"auto data \d+x\d+: reduce-scatters over dims \w and \w and then dim \w of the torus", programs["auto"]
    )


def test_attention_is_a_kernel_that_runs_forward_twice(programs: dict[str, str]) -> None:
    """For the forward pass and, rematerialised, for the backward."""
    kernels = re.findall(r"%(splash_mha_\w+?)(?:_residuals|_no_residuals)[.\d]* = ", programs["auto"])
    assert sorted(kernels) == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd", "splash_mha_fwd"]
