"""What a backward costs in two halves, I and W, against the same backward whole.

    python benchmarks/split_backward.py

One block of a decoder on one CPU device, every residual kept: milliseconds of B, I and W, and FLOPs as XLA counts them.
The promise is that I + W is within 10 % of B.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import shardlab

shardlab.emulate(1)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from shardlab.models.decoder import DecoderConfig  # noqa: E402
from shardlab.module.model import read_model  # noqa: E402
from shardlab.module.residuals import BlockVjp  # noqa: E402
from shardlab.module.split import Split  # noqa: E402

BATCH, SEQ, ROUNDS = 4, 256, 15


def main() -> None:
    config = DecoderConfig(num_layers=1, model_dim=256, num_heads=8, num_kv_heads=4, head_dim=32, mlp_dim=768)
    shape = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32)
    parts = shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context")
    model = read_model(config, {"tokens": shape, "targets": shape}, parts)
    assert model.parts is not None
    values = model.initialise(jax.random.key(0))
    layer = {inner: values[path] for inner, path in model.parts.layers[0].items()}
    assert model.parts.context is not None
    c = model.parts.context(values, {"tokens": jnp.zeros((BATCH, SEQ), jnp.int32)}, None, True)
    x = jax.random.normal(jax.random.key(1), (BATCH, SEQ, config.model_dim))
    dy = jax.random.normal(jax.random.key(2), x.shape)
    size = sum(value.size for value in layer.values())
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; a block of {size:,} parameters")
    print(f"{'remat':<16}{'B':>9}{'I':>9}{'W':>9}{'I + W over B':>14}{'the same in FLOPs':>19}")
    for remat in ("none", "dots_saveable", "full"):
        measure(remat, model.parts.blocks[0], layer, x, c, dy)


def measure(remat: str, block: Callable[..., Any], layer: Any, x: Any, c: Any, dy: Any) -> None:
    """A line of the table."""
    vjp = BlockVjp(lambda layer, x, c, extra: (block(layer, x, c, None, True), None), remat, context=False)
    _, stored = jax.jit(lambda layer, x, c: vjp.forward(layer, x, c, ()))(layer, x, c)

    def backward(kept: Any, dy: Any) -> tuple[Any, Any]:
        stored, layer, c = kept
        dlayer, dx, _ = vjp.backward(stored, layer, c, (), dy)
        return dx, dlayer

    kept = stored, layer, c
    split = Split(backward, kept, dy)
    whole, first, second = (jax.jit(f) for f in (backward, split.first, split.second))
    _, cut = first(kept, dy)
    programs = {"B": (whole, (kept, dy)), "I": (first, (kept, dy)), "W": (second, (kept, cut))}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):  # in turns, since the machine's pace changes
        for name, (function, args) in programs.items():
            jax.block_until_ready(function(*args))
            start = time.perf_counter()
            for _ in range(5):
                jax.block_until_ready(function(*args))
            times[name].append((time.perf_counter() - start) / 5 * 1e3)
    b, i, w = (statistics.median(times[name]) for name in "BIW")
    flops = {
        name: function.lower(*args).compile().cost_analysis()["flops"] for name, (function, args) in programs.items()
    }
    share = (flops["I"] + flops["W"]) / flops["B"]
    print(f"{remat:<16}{b:>6.1f} ms{i:>6.1f} ms{w:>6.1f} ms{(i + w) / b:>14.2f}{share:>19.3f}", flush=True)


if __name__ == "__main__":
    main()
