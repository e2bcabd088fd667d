"""Whether trace and compile time grow with the number of layers or of microbatches.

    python benchmarks/compile_time.py

A decoder on data=2 x stage=2 x tensor=2, eight emulated devices: seconds to plan, and of the step. Planning and the
step read the user's model, whose own constructors take their time for every layer; tracing and compiling must not.
"""

from __future__ import annotations

import time

import shardlab

shardlab.emulate(8)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss  # noqa: E402


def main() -> None:
    print(f"jax {jax.__version__}; seconds")
    print(f"{'layers':>6} {'microbatches':>12} {'plan':>6} {'step':>6} {'of it: trace and lower':>24} {'compile':>8}")
    measure(4, 4)  # the first pays for what JAX itself does once
    for layers, microbatches in ((4, 4), (32, 4), (128, 4), (4, 64), (128, 64)):
        plan, step, lower, compiled = measure(layers, microbatches)
        print(f"{layers:>6} {microbatches:>12} {plan:>6.1f} {step:>6.1f} {lower:>24.1f} {compiled:>8.1f}", flush=True)


def measure(layers: int, microbatches: int) -> tuple[float, float, float, float]:
    """Seconds of `make_plan`, of `compile_train_step`, and of its tracing and its compilation done once more."""
    config = DecoderConfig(num_layers=layers, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64)
    mesh = shardlab.MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage", target="cpu:8")
    shape = jax.ShapeDtypeStruct((4 * microbatches, 32), jnp.int32)
    batch, optimizer = {"tokens": shape, "targets": shape}, optax.adamw(1e-3)
    times = [time.perf_counter()]
    plan = shardlab.make_plan(
        config,
        mesh=mesh,
        rules=decoder_rules("tensor"),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optimizer,
        batch=batch,
        microbatches=microbatches,
    )
    times.append(time.perf_counter())
    step = shardlab.compile_train_step(config, next_byte_loss, optimizer, plan, batch)
    times.append(time.perf_counter())
    args, _ = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), step.lowered.args_info)
    jax.clear_caches()
    with jax.set_mesh(step.mesh):
        times.append(time.perf_counter())
        lowered = step.jitted.lower(*args)
        times.append(time.perf_counter())
        lowered.compile()
    times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1], times[4] - times[3], times[5] - times[4]


if __name__ == "__main__":
    main()
