"""Llama-3-70B, all 80 layers, compiled for 256 v5p chips on a machine that has none: its memory and what it sends.

    pip install 'shardlab[tpu]' && python benchmarks/llama_70b.py [--plan zero3|tensor] [--head auto] [--remat full]

2.1 M tokens a step (512 x 4096) in 8 microbatches, bfloat16 compute, float32 masters and AdamW, every block
rematerialised from what a stage keeps, its input; logits in parts of the vocabulary, with a loss made of
`shardlab.cross_entropy`. Two plans: stages 4 x data 64 with ZeRO 3, gradients reduce-scattered per layer and tick; and
stages 4 x tensor 2 x data 32 with ZeRO 1, whole float32 accumulators, two stages a device and their inputs kept in
halves. Of each: HBM as the compiler reports it (arguments + temporaries + outputs that alias nothing + code), and the
most that is live at once, arguments included; ring wire bytes a device and step with loops counted; seconds to plan,
trace and compile.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import shardlab
from shardlab.mesh.targets import parse_target
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.report.collectives import collective_rows
from shardlab.report.memory import memory
from shardlab.sharding.rules import Rule, Rules

TARGET = "tpu:v5p:4x8x8"
BATCH, TOKENS, MICROBATCHES = 512, 4096, 8
# The same model, chips, tokens and microbatches through MaxText: stage 4 (circular) x fsdp 64, August 2026.
MAXTEXT = ("MaxText, stage 4 x fsdp 64", "57.8", "1184")

PLANS: dict[str, dict[str, Any]] = {
    "zero3": {
        "axes": {"data": 64, "stage": 4},
        "tensor": None,
        "options": {"zero": 3, "gather": "step", "accumulate": "sharded"},
    },
    "tensor": {
        "axes": {"data": 32, "stage": 4, "tensor": 2},
        "tensor": "tensor",
        "options": {
            "zero": 1,
            "schedule": "interleaved_1f1b",
            "virtual": 2,
            "saved_activation": P("data", "tensor"),
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=(*PLANS, "both"), default="both")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--head", default="vocab", help="how embedding and head are spread over the stages")
    parser.add_argument("--remat", default="stage/full", help="what a stage keeps of a microbatch")
    parser.add_argument("--hlo", type=Path, help="a folder for the compiled programs")
    given = parser.parse_args()
    devices = shardlab.compile_devices(parse_target(TARGET))
    print(f"jax {jax.__version__}, compiled for {len(devices)} x {devices[0].device_kind}; {given.layers} layers")
    print(
        f"{'plan':<34}{'HBM GiB':>8}{'live':>7}{'wire GB':>9}{'plan s':>8}{'trace s':>9}{'compile s':>11}{'all s':>7}"
    )
    for name in PLANS if given.plan == "both" else (given.plan,):
        measure(name, devices, layers=given.layers, head=given.head, remat=given.remat, hlo=given.hlo)
    print("{:<34}{:>8}{:>16}".format(*MAXTEXT))


def measure(name: str, devices: list[jax.Device], *, layers: int, head: str, remat: str, hlo: Path | None) -> None:
    """A line of the table, and what it consists of."""
    chosen = PLANS[name]
    config = DecoderConfig(
        num_layers=layers,
        model_dim=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=28672,
        vocab_size=128256,
        query_chunk=256,
    )
    shape = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    batch, optimizer = {"tokens": shape, "targets": shape}, optax.adamw(3e-4)
    start = time.perf_counter()
    plan = shardlab.make_plan(
        config,
        mesh=shardlab.MeshSpec(chosen["axes"], batch="data", stage="stage", target=TARGET),
        rules=rules(chosen["tensor"], head),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optimizer,
        batch=batch,
        microbatches=MICROBATCHES,
        dtype="bfloat16",
        reduce_dtype="bfloat16",
        remat=remat,
        head=head,
        **chosen["options"],
    )
    planned = time.perf_counter()
    loss = vocabulary_loss if head == "vocab" else next_byte_loss
    step = shardlab.compile_train_step(config, loss, optimizer, plan, batch, devices=devices)
    done = time.perf_counter()
    text = step.text
    if hlo is not None:
        (hlo / f"{name}-{layers}.txt").write_text(text)
    found, live = memory(step.compiled), step.compiled.memory_analysis().peak_memory_in_bytes
    rows = collective_rows(text, plan.mesh.sizes)
    label = f"{' x '.join(f'{axis} {size}' for axis, size in chosen['axes'].items())}, ZeRO {plan.zero}"
    wire = sum(row["wire_bytes"] for row in rows)
    times = f"{planned - start:>8.1f}{step.trace_seconds:>9.1f}{step.compile_seconds:>11.1f}{done - start:>7.0f}"
    print(f"{label:<34}{found.total_bytes / 2**30:>8.1f}{live / 2**30:>7.1f}{wire / 1e9:>9.1f}{times}")
    kinds: dict[str, int] = defaultdict(int)
    for row in rows:
        kinds[f"{row['kind']} over {' x '.join(row['axes'])}"] += row["wire_bytes"]
    for kind, size in kinds.items():
        if size >= 1e8:
            print(f"    {kind:<38}{size / 1e9:>9.1f}")
    print(
        f"    arguments {found.argument_bytes / 2**30:.1f} GiB, temporaries {found.temp_bytes / 2**30:.1f}", flush=True
    )


def rules(tensor: str | None, head: str) -> Rules:
    """The decoder's own, and for a head over the vocabulary the output kernel cut by stages.

    Where data alone stores a parameter it cuts what XLA:TPU need not copy to gather or pad to scatter: not the inner
    dim of a wide kernel, nor the vocabulary.
    """
    stored = "data" if tensor is None else None
    own = [Rule("unembed/kernel", P(stored, ("stage", tensor) if tensor else "stage"))] if head == "vocab" else []
    if tensor is None:
        own += [Rule(f"blocks/*/mlp/{name}/kernel", P("data")) for name in ("gate", "up")]
        own += [Rule("tokens/embedding", P(None, "data"))]
    named = {rule.pattern for rule in own}
    return Rules((*own, *(rule for rule in decoder_rules(tensor).rules if rule.pattern not in named)))


def vocabulary_loss(logits: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    """`next_byte_loss` of a part of the vocabulary."""
    counted = (batch["targets"] >= 0).astype(jnp.float32)
    return jnp.sum(shardlab.cross_entropy(logits, batch["targets"]) * counted), jnp.sum(counted)


if __name__ == "__main__":
    main()
