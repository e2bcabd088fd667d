"""Emulated devices under load: several programs in flight, each with collectives that wait at once.

    python benchmarks/emulation_stress.py [--devices 8 16 64] [--steps 2000] [--programs 3] [--ahead 16]
    python benchmarks/emulation_stress.py --devices 8 --steps 200 --pool 8 --warn 2 --kill 5

For each number of devices a process of its own: a mesh of data x stage x tensor, `--programs` compiled programs, and
`--steps` calls of each, dispatched in turn without waiting for one another; the results of a step are waited for when
`--ahead` more have been dispatched (`shardlab.run.loop` lets two). A program sums over each axis, independently of one
another, sends along the stages, gathers, and sums over all devices. The last results are compared to what they must be.

`--pool N` sets ``PJRT_NPROC`` to N in place of what `shardlab.emulate` gives, to see what it is for; ``--warn`` and
``--kill`` shorten XLA's timeouts of a rendezvous. Ends with an error where a process did, or took too long.

On two cores that other work had too, the first command passed on jax 0.10.2 (12 s, 28 s, 115 s) and on 0.12.0.1 (12 s,
16 s, 66 s). On 0.10.2 8 devices with ``--pool 8`` ended the process at 16, 24 and 32 steps ahead, 3 of 3, and not at 8;
with the pool of 16 that `emulate` gives them they passed at 32, 64 and 200. On 0.12.0.1 they passed with 8. 16 devices
with 16 and 24 threads, and 64 with 64, 72 and 96, passed 200 to 300 steps, at one try each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from shardlab.mesh.emulate import environment

MESHES = {8: (2, 2, 2), 16: (4, 2, 2), 64: (4, 4, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--steps", type=int, default=2000, help="calls of each program")
    parser.add_argument("--programs", type=int, default=3, help="how many, dispatched in turn")
    parser.add_argument("--ahead", type=int, default=16, help="steps dispatched before the first is waited for")
    parser.add_argument("--seconds", type=float, default=1800, help="that one number of devices may take")
    parser.add_argument("--pool", type=int, default=0, help="threads of the pool; 0: what emulate sets")
    parser.add_argument("--warn", type=int, default=0, help="seconds after which XLA warns of a rendezvous")
    parser.add_argument("--kill", type=int, default=0, help="seconds after which it ends the process")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        return stress(given.devices[0], given.steps, given.programs, given.ahead)
    failed = 0
    for count in given.devices:
        sizes = {"devices": count, "steps": given.steps, "programs": given.programs, "ahead": given.ahead}
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--here", *(f"--{name}={size}" for name, size in sizes.items())],
                env=variables(count, given.pool, given.warn, given.kill),
                timeout=given.seconds,
                check=False,
            )
            said = "passed" if done.returncode == 0 else f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            said = f"not done after {given.seconds:.0f} s"
        failed += said != "passed"
        load = f"{given.programs} x {given.steps} steps, {given.ahead} ahead"
        print(f"{count} devices, {load}: {said}, {time.perf_counter() - begun:.0f} s")
    if failed:
        raise SystemExit(1)


def variables(count: int, pool: int = 0, warn: int = 0, kill: int = 0) -> dict[str, str]:
    """The environment of a process with emulated devices, and another pool or timeouts in it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PJRT_NPROC", "XLA_FLAGS")}
    found = {**clean, **environment(count), "PYTHONPATH": str(Path(__file__).parents[1])}
    if pool:
        found["PJRT_NPROC"] = str(pool)
    for name, seconds in (("warn_stuck", warn), ("terminate", kill)):
        if seconds:
            found["XLA_FLAGS"] += f" --xla_cpu_collective_call_{name}_timeout_seconds={seconds}"
    return found


def stress(count: int, steps: int, programs: int, ahead: int) -> None:
    """Runs it in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    axes = ("data", "stage", "tensor")
    mesh = Mesh(np.array(jax.devices()).reshape(MESHES[count]), axes, axis_types=(AxisType.Auto,) * 3)
    spec = P(axes)
    stages = mesh.shape["stage"]
    ring = [(stage, (stage + 1) % stages) for stage in range(stages)]

    def local(x: jax.Array, scale: jax.Array) -> jax.Array:
        # Sums over different axes that do not depend on one another: all of them may wait at once.
        parts = [jax.lax.pmean(x * scale**power, axis) for power, axis in enumerate(axes)]
        sent = jax.lax.ppermute(x, "stage", ring)
        whole = jax.lax.all_gather(x, "tensor", tiled=True)
        # Of equal numbers the mean is the number: x comes out as it was, up to rounding.
        return (sum(parts) + sent + whole[: x.shape[0]]) / (len(axes) + 2) + 0 * jax.lax.pmean(x, axes)

    sharding = NamedSharding(mesh, spec)
    x = jax.device_put(jnp.ones((count * 4, 32)), sharding)
    made = [
        jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec, P()), out_specs=spec, check_vma=False))
        for _ in range(programs)
    ]
    one = jnp.float32(1)
    values, waiting = [x] * programs, deque[list[jax.Array]]()
    for _ in range(steps):
        values = [program(value, one) for program, value in zip(made, values, strict=True)]
        waiting.append(values)
        if len(waiting) > ahead:
            jax.block_until_ready(waiting.popleft())
    for value in values:
        np.testing.assert_allclose(np.asarray(value), np.asarray(x), rtol=1e-3)


if __name__ == "__main__":
    main()
