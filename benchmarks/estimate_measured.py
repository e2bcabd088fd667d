"""The audit's estimate beside a clock: train steps on the GPUs of this machine, compiled and run.

    python benchmarks/estimate_measured.py --kind h100                 one GPU and, where there are two, both
    python benchmarks/estimate_measured.py --kind h200 --layers 9

A line for each model and plan: estimated and measured seconds a step (median of ten, on data of the same shapes), the
memory that the audit counts and what the device says it held at most. Estimates come from a roofline for each
operation: XLA:GPU prints no cycles.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shardlab
from shardlab.models import decoder
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss

STEPS = 10


def plans(devices: int) -> dict[str, dict[str, Any]]:
    """What is declared for so many devices; on one, what holds more comes later: a device tells the most so far."""
    if devices == 1:
        return {
            "one device, remat full": {"axes": {"data": 1}, "remat": "full"},
            "one device, 4 microbatches": {"axes": {"data": 1}, "microbatches": 4},
            "one device": {"axes": {"data": 1}},
        }
    return {
        f"data {devices}": {"axes": {"data": devices}},
        f"FSDP {devices}": {"axes": {"data": devices}, "zero": 3, "gather": "layer"},
        f"tensor {devices}": {"axes": {"data": 1, "tensor": devices}, "tensor": "tensor"},
        f"stage {devices}, 8 microbatches": {
            "axes": {"data": 1, "stage": devices},
            "stage": "stage",
            "microbatches": 8,
        },
    }


def measure(name: str, chosen: dict[str, Any], *, target: str, layers: int) -> None:
    """A line of the table."""
    chosen = dict(chosen)
    axes, tensor, stage = chosen.pop("axes"), chosen.pop("tensor", None), chosen.pop("stage", None)
    model = DecoderConfig(
        vocab_size=32_000,
        num_layers=layers,
        model_dim=2048,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=5632,
    )
    shape = jax.ShapeDtypeStruct((8, 2048), jnp.int32)
    batch, optimizer = {"tokens": shape, "targets": shape}, optax.adamw(3e-4)
    plan = shardlab.make_plan(
        model,
        mesh=shardlab.MeshSpec(axes, batch="data", stage=stage, target=target),
        rules=decoder_rules(tensor),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optimizer,
        batch=batch,
        dtype="bfloat16",
        **chosen,
    )
    step = shardlab.compile_train_step(model, next_byte_loss, optimizer, plan, batch)
    facts = shardlab.report(step).facts
    state = step.init(0)
    tokens = jax.random.randint(jax.random.key(1), shape.shape, 0, model.vocab_size)
    given = jax.device_put({"tokens": tokens, "targets": tokens}, step.batch_shardings)
    seconds = []
    for number in range(STEPS + 2):
        start = time.perf_counter()
        state, metrics = step(state, given)
        jax.block_until_ready(metrics)
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    found = statistics.median(seconds)
    held = max(device.memory_stats()["peak_bytes_in_use"] for device in step.mesh.devices.flat)
    error = facts["estimate_seconds"] / found - 1
    print(
        f"{name:<30}{facts['estimate_seconds'] * 1e3:>11.1f}{found * 1e3:>10.1f}{error:>+8.1%}{facts['mfu']:>7.1%}"
        f"{facts['hbm_bytes'] / 2**30:>9.1f}{held / 2**30:>9.1f}  {facts['bound_by']}",
        flush=True,
    )


def attention(q: Any, k: Any, v: Any, *, query_chunk: int = 0, implementation: Any = None) -> Any:
    """`causal_attention` by a kernel of the vendor's."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", required=True, help="of the GPU, as shardlab targets names it")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--attention", choices=("cudnn", "xla"), default="cudnn")
    given = parser.parse_args()
    if given.attention == "cudnn":
        decoder.causal_attention = functools.partial(attention, implementation="cudnn")
    if given.attention == "cudnn":
        decoder.causal_attention = functools.partial(attention, implementation="cudnn")
    found = jax.devices()
    about = f"{given.layers} layers, {given.attention} attention"
    print(f"jax {jax.__version__}, {len(found)} x {found[0].device_kind}; {about}")
    print(f"{'plan':<30}{'estimate ms':>11}{'clock ms':>10}{'':>8}{'MFU':>7}{'HBM GiB':>9}{'held':>9}  bound by")
    for name, chosen in plans(len(found)).items():
        measure(name, chosen, target=f"gpu:{given.kind}:1x{len(found)}", layers=given.layers)


if __name__ == "__main__":
    main()
