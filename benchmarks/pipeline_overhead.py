"""What a pipeline's collectives cost on emulated devices: a step over the same stage calls without them.

    python benchmarks/pipeline_overhead.py [--stages 4] [SCHEDULE:MICROBATCHES ...]

The base is the same program, traced once more with every collective of the manual region replaced by something local
of the same shape: the same ticks, masks, buffers and blocks on the same devices, and numbers that mean nothing. Both
run in turns, in one process; the ratio is of the medians. The promise is under 1.15. The same of the processor's time,
which leaves out what devices wait, for each other and for whatever else the machine does.

Emulated devices share the machine's cores: this shows what the engine adds to its blocks, not what a link takes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import shardlab

shardlab.emulate(4)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from shardlab.hlo import collectives  # noqa: E402
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss  # noqa: E402
from shardlab.step.compile import CompiledStep  # noqa: E402

DEFAULT = ("1f1b:8", "1f1b:32", "interleaved_1f1b:8", "1f1b_split:8", "zb_h1:8", "zb_v:8")
ROUNDS = 7
# On four stages a tick is two blocks of 256 x 768 on 4 examples of 128 tokens.
CONFIG = DecoderConfig(num_layers=8, model_dim=256, num_heads=8, num_kv_heads=8, head_dim=32, mlp_dim=768)
EXAMPLES, TOKENS = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, choices=(2, 4), default=4)
    parser.add_argument("schedules", nargs="*", default=DEFAULT, metavar="SCHEDULE:MICROBATCHES")
    given = parser.parse_args()
    print(f"jax {jax.__version__}, {given.stages} emulated devices on {os.cpu_count()} cores, one a stage")
    print(f"{'schedule':<18}{'microbatches':>13}{'step':>10}{'without':>10}{'ratio':>8}{'processor':>11}")
    for text in given.schedules:
        name, _, count = text.partition(":")
        measure(name, int(count), given.stages)


def measure(name: str, microbatches: int, stages: int) -> None:
    """A line of the table."""
    step = compiled(name, microbatches, stages)
    with without_collectives():
        base = compiled(name, microbatches, stages)
    left = [one.kind for one in collectives(base.compiled.as_text(), base.plan.mesh.sizes) if one.count > 4]
    assert not left, f"collectives are left in the base: {left}"
    both = [ready(step), ready(base)]
    times: list[list[float]] = [[], []]
    busy: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):  # the first warms up
        for wall, processor, run in zip(times, busy, both, strict=True):
            start, used = time.perf_counter(), time.process_time()
            run()
            if turn:
                wall.append(time.perf_counter() - start)
                processor.append(time.process_time() - used)
    ours, theirs = map(statistics.median, times)
    more = statistics.median(busy[0]) / statistics.median(busy[1])
    print(
        f"{name:<18}{microbatches:>13}{ours * 1e3:>7.0f} ms{theirs * 1e3:>7.0f} ms{ours / theirs:>8.3f}{more:>11.3f}",
        flush=True,
    )


def compiled(name: str, microbatches: int, stages: int) -> CompiledStep:
    """The step of a plan on so many stages."""
    mesh = shardlab.MeshSpec({"data": 1, "stage": stages}, batch="data", stage="stage", target=f"cpu:{stages}")
    shape = jax.ShapeDtypeStruct((EXAMPLES * microbatches, TOKENS), jnp.int32)
    batch, optimizer = {"tokens": shape, "targets": shape}, optax.sgd(1e-3)
    plan = shardlab.make_plan(
        CONFIG,
        mesh=mesh,
        rules=decoder_rules(None),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optimizer,
        batch=batch,
        microbatches=microbatches,
        schedule=name,
    )
    return shardlab.compile_train_step(CONFIG, next_byte_loss, optimizer, plan, batch)


def ready(step: CompiledStep) -> Callable[[], None]:
    """A call that runs one step and waits for it."""
    state = step.init(0)
    shapes = {path: (shape, dtype) for path, shape, dtype in step.plan.batch}
    batch = jax.device_put({path: jnp.zeros(*kind) for path, kind in shapes.items()}, step.batch_shardings)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, batch)[0])

    return run


@contextlib.contextmanager
def without_collectives() -> Iterator[None]:
    """While it holds, a collective is traced as something local of the shape that it has on a device."""

    def size(axes: Any) -> int:
        return jax.lax.axis_size(axes)

    def all_gather(x: Any, axis_name: Any, *, axis: int = 0, tiled: bool = False) -> Any:
        assert tiled
        return jnp.concatenate([x] * size(axis_name), axis=axis)

    def psum_scatter(x: Any, axis_name: Any, *, scatter_dimension: int = 0, tiled: bool = False) -> Any:
        assert tiled
        return jax.lax.slice_in_dim(x, 0, x.shape[scatter_dimension] // size(axis_name), axis=scatter_dimension)

    local = {
        "ppermute": lambda x, axis_name, perm: x,
        "psum": lambda x, axis_name: x,
        "all_to_all": lambda x, axis_name, split_axis, concat_axis, tiled: x,
        "all_gather": all_gather,
        "psum_scatter": psum_scatter,
    }
    with contextlib.ExitStack() as patched:
        for name, function in local.items():
            patched.enter_context(mock.patch.object(jax.lax, name, function))
        yield


if __name__ == "__main__":
    main()
