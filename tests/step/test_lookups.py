"""Lookups in arrays that lie over automatic axes beside stages: in another process, which XLA would end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = """
from shardlab.mesh.emulate import emulate

emulate(8)
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.step.verify import verify

PICKED = np.random.default_rng(0).integers(0, 6, (6, 6))

def init(key):
    table, other, pick, out = (jax.random.normal(k, (6, n)) for k, n in zip(jax.random.split(key, 4), (6, 6, 6, 1)))
    return {"table": table, "other": other, "blocks": [{"pick": pick}, {"pick": -pick}], "out": out}

model = Functions(
    init=init,
    before=lambda params, batch: (params["table"] * 3)[batch["x"]] + params["other"][batch["x"]],
    block=lambda layer, x: jnp.tanh(x @ jnp.take_along_axis(layer["pick"], PICKED, 1)),
    after=lambda params, x: x @ params["out"],
)
batch = {"x": np.arange(8, dtype=np.int32) % 6}
mesh = MeshSpec({"stage": 2, "tensor": 2, "expert": 2}, stage="stage", target="cpu:8")
rules = [("table", P("tensor", "expert")), ("other", P("tensor")), ("**/pick", P("tensor", "expert")), ("**", None)]
sgd, flow = optax.sgd(0.1), P(None, "expert")
plan = make_plan(model, mesh=mesh, rules=rules, optimizer=sgd, batch=batch, microbatches=2, activation=flow)
found = verify(model, lambda y, batch: (((y - 1) ** 2).sum(), jnp.float32(len(y))), sgd, plan, [batch])
assert found.passed, str(found)
print(*plan.notes, sep="\\n")
"""


@pytest.mark.versions
def test_a_lookup_beside_several_automatic_axes() -> None:
    """In a parameter whose dims lie over one each; in one whose result flows over the other; row by row, in blocks."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    why = "where it is looked up in, gathered over {} since no dim of [6, 6] divides"
    assert done.stdout.splitlines() == [
        f"blocks/0/pick: spec P('tensor', 'expert') is P('tensor') {why.format(repr('expert'))}",
        "other: spec P('tensor') is P(None, 'tensor') where it is looked up in",
        f"table: spec P('tensor', 'expert') is P(None, 'expert') {why.format(repr('tensor'))}",
    ]
