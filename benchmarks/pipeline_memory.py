"""Memory of a pipelined step as the TPU compiler reports it, schedule by schedule, on a machine without a TPU.

    pip install 'shardlab[tpu]' && python benchmarks/pipeline_memory.py [SCHEDULE:MICROBATCHES ...]

v5e-16, 4 stages x 4 tensor, 16 layers of 2048/8192, 512 tokens, bfloat16, every residual kept: MiB of temporaries a
device, beside the microbatches that the table says a device holds and the weights and gradients that the plan says.
With a schedule of few microbatches in flight the first does not grow with their number. `live` is the most of them that
is alive at once: the compiler lays out the scans of a schedule of several phases with gaps, which it reports as memory.
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import shardlab
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.pipeline.cost import cost
from shardlab.report.memory import memory

DEFAULT = ("1f1b:4", "1f1b:16", "1f1b:64", "gpipe:16", "interleaved_1f1b:16", "1f1b_split:16", "zb_h1:16", "zb_v:16")
CONFIG = DecoderConfig(
    num_layers=16, model_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, mlp_dim=8192, vocab_size=1024
)


def main(asked: list[str]) -> None:
    devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    print(f"jax {jax.__version__}, compiled for {devices[0].device_kind}")
    print(
        f"{'schedule':<18}{'microbatches':>13}{'held':>6}{'temporaries':>14}{'live':>10}{'planned':>10}{'seconds':>9}"
    )
    for text in asked or DEFAULT:
        name, _, count = text.partition(":")
        measure(name, int(count), devices)


def measure(name: str, microbatches: int, devices: list[jax.Device]) -> None:
    """A line of the table."""
    mesh = shardlab.MeshSpec({"stage": 4, "tensor": 4}, stage="stage", target="tpu:v5e:4x4")
    shape = jax.ShapeDtypeStruct((microbatches, 512), jnp.int32)
    batch, optimizer = {"tokens": shape, "targets": shape}, optax.sgd(1e-3)
    plan = shardlab.make_plan(
        CONFIG,
        mesh=mesh,
        rules=decoder_rules("tensor"),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optimizer,
        batch=batch,
        microbatches=microbatches,
        dtype="bfloat16",
        schedule=name,
        head="last_stage",
    )
    start = time.perf_counter()
    step = shardlab.compile_train_step(CONFIG, next_byte_loss, optimizer, plan, batch, devices=devices)
    seconds, found = time.perf_counter() - start, memory(step.compiled)
    held = max(cost(plan.table()).peak_in_flight) / plan.virtual
    live = step.compiled.memory_analysis().peak_memory_in_bytes - found.argument_bytes
    planned = sum(plan.bytes_per_device()[name] for name in ("working_copy", "gradients"))
    sizes = f"{found.temp_bytes / 2**20:>10.0f} MiB{live / 2**20:>6.0f} MiB{planned / 2**20:>6.0f} MiB"
    print(f"{name:<18}{microbatches:>13}{held:>6g}{sizes}{seconds:>9.0f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
