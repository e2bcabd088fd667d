"""How much Python a call of `CompiledStep` costs over calling the bare jitted function with flat leaves.

    python benchmarks/step_overhead.py

Prints microseconds a call of both, and their difference; the promise is under 100. A model of 8 layers whose step
computes next to nothing on one CPU device, so that what is measured is the call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import shardlab

shardlab.emulate(1)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from shardlab.models import mlp  # noqa: E402

CALLS, ROUNDS = 200, 9


def main() -> None:
    config = mlp.MLPConfig(num_layers=8, model_dim=8, hidden_dim=8)
    batch: dict[str, Any] = {
        "features": np.zeros((2, config.num_features), np.float32),
        "labels": np.zeros(2, np.int32),
    }
    optimizer = optax.adamw(1e-3)
    mesh = shardlab.MeshSpec({"tensor": 1}, target="cpu:1")
    plan = shardlab.make_plan(config, mesh=mesh, rules=mlp.mlp_rules("tensor"), optimizer=optimizer, batch=batch)
    step = shardlab.compile_train_step(config, mlp.label_loss, optimizer, plan, batch)
    batch = jax.device_put(batch, step.batch_shardings)
    leaves, treedef = jax.tree.flatten((step.init(0), batch))
    num_state = len(leaves) - len(jax.tree.leaves(batch))

    def flat(*leaves: Any) -> Any:
        return jax.tree.leaves(step.jitted(*jax.tree.unflatten(treedef, leaves)))

    bare = jax.jit(flat, donate_argnums=tuple(range(num_state)))

    def call_bare(leaves: list[Any]) -> list[Any]:
        return [*bare(*leaves)[:num_state], *leaves[num_state:]]

    def call_step(state: Any) -> Any:
        return step(state, batch)[0]

    with jax.set_mesh(step.mesh):
        microseconds(call_bare, jax.tree.leaves((step.init(0), batch)))  # compiles
    ours, theirs = [], []
    for _ in range(ROUNDS):  # in turns, since the machine's pace changes
        ours.append(microseconds(call_step, step.init(0)))
        with jax.set_mesh(step.mesh):
            theirs.append(microseconds(call_bare, jax.tree.leaves((step.init(0), batch))))
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{len(leaves)} leaves, jax {jax.__version__}, median of {ROUNDS} x {CALLS} calls")
    print(f"CompiledStep {a:.0f} us a call, bare jitted function {b:.0f} us, difference {a - b:.0f} us")


def microseconds(call: Callable[[Any], Any], state: Any) -> float:
    """Microseconds a call; each call is waited for, so that none queues behind another."""
    for _ in range(10):
        state = jax.block_until_ready(call(state))
    start = time.perf_counter()
    for _ in range(CALLS):
        state = jax.block_until_ready(call(state))
    return (time.perf_counter() - start) / CALLS * 1e6


if __name__ == "__main__":
    main()
