"""What the sends of a pipelined step run beside, as the TPU compiler schedules them, on a machine without a TPU.

    pip install 'shardlab[tpu]' && python benchmarks/delayed_sends.py [SCHEDULE:MICROBATCHES ...]

v5e-4, 4 devices of 4 layers of 1024/4096, 4 x 512 tokens a microbatch, bfloat16. For each schedule, with direct and
with delayed sends: of the collective-permutes of a step (loops counted), those between whose start and end a stage's
layers run, that is, a loop over layers or a branch with one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import shardlab
from shardlab.hlo.loops import visits
from shardlab.hlo.parse import Computation, HloModule, Instruction, parse
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.report.memory import memory

DEFAULT = ("1f1b:8", "gpipe:24", "interleaved_1f1b:8", "1f1b_split:8", "zb_h2:8", "zb_v:8")
CONFIG = DecoderConfig(
    num_layers=16, model_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, mlp_dim=4096, vocab_size=1024
)


def main(asked: list[str]) -> None:
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    print(f"jax {jax.__version__}, compiled for {devices[0].device_kind}")
    print(f"{'schedule':<18}{'microbatches':>13}{'sent':>9}{'a step':>8}{'beside layers':>15}{'temporaries':>14}")
    for text in asked or DEFAULT:
        name, _, count = text.partition(":")
        for sends in ("direct", "delayed"):
            measure(name, int(count), sends, devices)


def measure(name: str, microbatches: int, sends: str, devices: list[jax.Device]) -> None:
    """A line of the table."""
    mesh = shardlab.MeshSpec({"stage": 4}, stage="stage", target="tpu:v5e:2x2")
    shape = jax.ShapeDtypeStruct((4 * microbatches, 512), jnp.int32)
    batch, optimizer = {"tokens": shape, "targets": shape}, optax.sgd(1e-3)
    plan = shardlab.make_plan(
        CONFIG,
        mesh=mesh,
        rules=decoder_rules(None),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optimizer,
        batch=batch,
        microbatches=microbatches,
        dtype="bfloat16",
        schedule=name,
        head="last_stage",
        sends=sends,
    )
    start = time.perf_counter()
    step = shardlab.compile_train_step(CONFIG, next_byte_loss, optimizer, plan, batch, devices=devices)
    seconds = time.perf_counter() - start
    module = parse(step.compiled.as_text())
    times = visits(module, cost=lambda *_: 1.0)
    pairs = [
        (times[computation.name].executions, between)
        for computation in module.computations.values()
        if computation.name in times
        for between in beside(module, computation)
    ]
    of = f"{sum(count for count, _ in pairs):>8}{sum(count for count, layers in pairs if layers):>15}"
    temporary = f"{memory(step.compiled).temp_bytes / 2**20:>10.0f} MiB"
    print(f"{name:<18}{microbatches:>13}{sends:>9}{of}{temporary}   ({seconds:.0f} s to compile)", flush=True)


def beside(module: HloModule, computation: Computation) -> Iterator[bool]:
    """For every collective-permute of a computation, whether a loop of layers stands between its start and end."""
    order = list(computation.instructions.values())
    place = {instruction.name: index for index, instruction in enumerate(order)}
    for index, instruction in enumerate(order):
        if instruction.opcode == "collective-permute-done":
            start = place[instruction.operands[0]]
            yield any(has_layers(module, other) for other in order[start:index])


def has_layers(module: HloModule, instruction: Instruction) -> bool:
    """Whether an instruction is a loop, or a branch with one in it: head and embedding have none."""
    if instruction.opcode != "conditional":
        return instruction.opcode == "while"
    names = [
        name
        for key in ("branch_computations", "true_computation", "false_computation")
        for name in instruction.callees(key)
    ]
    return any(has_layers(module, other) for name in names for other in module.computations[name].instructions.values())


if __name__ == "__main__":
    main(sys.argv[1:])
