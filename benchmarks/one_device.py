"""What the engine costs where there is nothing to divide: a step on one device against a plain `jax.jit` step.

    python benchmarks/one_device.py                                   sizes for a GPU of 80 GB: 1.06 B parameters
    python benchmarks/one_device.py --size small --attention xla      sizes for a CPU

The plain step is what one would write without shardlab: `jax.value_and_grad` of the same model's loss in bfloat16 over
float32 masters, the same rematerialisation, the same AdamW, the gradient's norm, the state donated. It comes in two
forms, its layers stacked and scanned, or one after another as in the model. Beside each the step of a plan on one
device: the model cut into parts (the pipeline engine with one stage), or taken whole. Both run in turns, in the same
process; a line is the median of milliseconds a step and their ratio.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shardlab
from shardlab.models import decoder
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.module.model import Model, read_model
from shardlab.module.residuals import rematerialised
from shardlab.report.memory import memory

Step = Callable[[Any], Any]
"""``state -> state``."""

SIZES: dict[str, tuple[DecoderConfig, int, int]] = {
    "large": (
        DecoderConfig(
            vocab_size=32_000, num_layers=18, model_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, mlp_dim=5632
        ),
        8,
        2048,
    ),
    "medium": (
        DecoderConfig(
            vocab_size=32_000, num_layers=12, model_dim=768, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=2048
        ),
        32,
        1024,
    ),
    "small": (
        DecoderConfig(
            vocab_size=256, num_layers=4, model_dim=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=384
        ),
        8,
        64,
    ),
}
PARTS = shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context")
OPTIMIZER = optax.adamw(3e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--attention", choices=("cudnn", "xla"), default="cudnn")
    parser.add_argument("--remat", default="dots_saveable", help="none, full, or a policy of jax.checkpoint_policies")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    if given.attention == "cudnn":
        decoder.causal_attention = cudnn_attention
    config, examples, tokens = SIZES[given.size]
    keys = jax.random.split(jax.random.key(1))
    batch = {
        name: jax.random.randint(key, (examples, tokens), 0, config.vocab_size)
        for name, key in zip(("tokens", "targets"), keys, strict=True)
    }
    device = jax.devices()[0]
    model = read_model(config, batch, PARTS)
    count = sum(leaf.size for leaf in model.parameters.values())
    print(f"jax {jax.__version__}, {device.device_kind}; {count:,} parameters, {examples} x {tokens} tokens, {given}")
    print(f"{'plain step':<26}{'ms':>9}{'GiB':>7}   {'plan on one device':<26}{'ms':>9}{'GiB':>7}{'ratio':>8}")
    pairs = (
        ("layers scanned", 1, "in parts, 1 microbatch", 1, PARTS),
        ("layers scanned, 4 times", 4, "in parts, 4 microbatches", 4, PARTS),
        ("layers one by one", 1, "in parts, 1 microbatch", 1, PARTS),
        ("layers one by one", 1, "whole", 1, None),
    )
    for plain_name, times, name, microbatches, parts in pairs:
        scanned = plain_name.startswith("layers scanned")
        both = (
            functools.partial(plain, model, batch, given, times=times, scanned=scanned),
            functools.partial(planned, config, batch, given, microbatches=microbatches, parts=parts),
        )
        (base, base_bytes), (ours, our_bytes) = in_turns(both, given.steps, given.turns)
        sizes = [f"{size / 2**30:>7.1f}" for size in (base_bytes, our_bytes)]
        print(
            f"{plain_name:<26}{base:>9.2f}{sizes[0]}   {name:<26}{ours:>9.2f}{sizes[1]}{ours / base:>8.3f}", flush=True
        )


def in_turns(made: Any, steps: int, turns: int) -> list[tuple[float, int]]:
    """Median milliseconds a step of each, and the bytes the compiler says it needs."""
    held = [make() for make in made]
    states = [state for _, state, _ in held]
    times: list[list[float]] = [[] for _ in held]
    for turn in range(turns + 1):  # the first warms up
        for index, (step, _, _) in enumerate(held):
            start = time.perf_counter()
            for _ in range(steps):
                states[index] = step(states[index])
            jax.block_until_ready(states[index])
            if turn:
                times[index].append((time.perf_counter() - start) / steps * 1e3)
    return [(statistics.median(mine), size) for mine, (_, _, size) in zip(times, held, strict=True)]


def planned(config: DecoderConfig, batch: Any, given: Any, *, microbatches: int, parts: Any) -> tuple[Step, Any, int]:
    """The step of a plan, its state, and its bytes."""
    plan = shardlab.make_plan(
        config,
        mesh=shardlab.MeshSpec({"data": 1, "stage": 1}, batch="data", stage="stage", target="local"),
        rules=decoder_rules(None),
        pipeline=parts,
        optimizer=OPTIMIZER,
        batch=batch,
        microbatches=microbatches,
        remat=given.remat,
        dtype=given.dtype,
    )
    step = shardlab.compile_train_step(config, next_byte_loss, OPTIMIZER, plan, batch)
    placed = jax.device_put(batch, step.batch_shardings)
    return lambda state: step(state, placed)[0], step.init(0), memory(step.compiled).total_bytes


def plain(model: Model, batch: Any, given: Any, *, times: int, scanned: bool) -> tuple[Step, Any, int]:
    """The plain step, its state, and its bytes; gradients of `times` parts of the batch are added up."""
    parts = model.parts
    assert parts is not None
    before, context, after = parts.before, parts.context, parts.after
    assert context is not None
    block = rematerialised(lambda layer, x, c: parts.blocks[0](layer, x, c, None, True), given.remat)
    in_blocks = parts.block_paths

    def loss(masters: Any, examples: Any) -> Any:
        values = jax.tree.map(lambda value: value.astype(given.dtype), masters)
        x, c = before(values["rest"], examples, None, True), context(values["rest"], examples, None, True)
        if scanned:
            x, _ = jax.lax.scan(lambda x, layer: (block(layer, x, c), None), x, values["layers"])
        else:
            for layer in values["layers"]:
                x = block(layer, x, c)
        return next_byte_loss(after(values["rest"], x, examples, None, True), examples)

    def gradients(masters: Any) -> Any:
        if times == 1:
            return jax.grad(loss, has_aux=True)(masters, batch)
        several = jax.tree.map(lambda leaf: leaf.reshape(times, -1, *leaf.shape[1:]), batch)

        def add(total: Any, examples: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(loss, has_aux=True)(masters, examples)), None

        zeros = jax.tree.map(jnp.zeros_like, masters), jnp.zeros(())
        return jax.lax.scan(add, zeros, several)[0]

    def step(state: Any) -> Any:
        masters, optimizer, _ = state
        sums, weight = gradients(masters)
        gradient = jax.tree.map(lambda value: value / weight, sums)
        updates, optimizer = OPTIMIZER.update(gradient, optimizer, masters)
        return optax.apply_updates(masters, updates), optimizer, optax.tree.norm(gradient)

    @jax.jit
    def init() -> Any:
        values = model.initialise(jax.random.key(0))
        layers: Any = [{inner: values[path] for inner, path in layer.items()} for layer in parts.layers]
        if scanned:
            layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        masters = {"rest": {path: values[path] for path in values if path not in in_blocks}, "layers": layers}
        return masters, OPTIMIZER.init(masters), jnp.zeros(())

    state = init()
    compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
    return compiled, state, memory(compiled).total_bytes


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, query_chunk: int = 0) -> jax.Array:
    """`causal_attention` by cuDNN's fused kernels."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


if __name__ == "__main__":
    main()
