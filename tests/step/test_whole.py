"""What XLA gets wrong along cut dims equals the reference: in another process, which XLA would end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CODE = """
import sys
from shardlab.mesh.emulate import emulate

emulate(8)
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.step.verify import verify

jax.config.update("jax_enable_x64", True)


@jax.custom_vjp
def halved(x):
    return x[:, ::2]

def spaced(x):
    return jax.lax.pad(x, 0.0, ((0, 0, 0), (0, 1, 1), (0, 0, 0), (0, 0, 0)))

halved.defvjp(lambda x: (halved(x), None), lambda _, dy: (spaced(dy),))

def convolved(kernel, x):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

# Cut along the rows of its images, or whole.
def laid(x, rows):
    return jax.lax.with_sharding_constraint(x, P("data" if "data" in MESHES[mesh][0] else None, rows))

def whole(x):
    return laid(x, None)

def twice(x):
    return jnp.repeat(whole(x), 2, axis=1)

OPERATIONS = {
    "convolutions": convolved,
    "strided slices": lambda kernel, x: twice(x[:, ::2]),
    "a rule of its own": lambda kernel, x: twice(halved(x)),
    "paddings between entries": lambda kernel, x: spaced(whole(x[:, :4])),
    "strided sums over windows": lambda kernel, x: twice(
        jax.lax.reduce_window(laid(x, "tensor"), 0.0, jax.lax.add, (1, 2, 1, 1), (1, 2, 1, 1), "SAME")
    ),
    "cumulative maxima and products": lambda kernel, x: whole(jax.lax.cummax(x, axis=1)),
    "Fourier transforms": lambda kernel, x: whole(jnp.abs(jnp.fft.fft(x, axis=1))),
}
MESHES = {
    "two beside stages": (
        {"stage": 2, "tensor": 2, "expert": 2}, {"stage": "stage"}, {"activation": P(None, "tensor")}
    ),
    "two": ({"tensor": 2, "expert": 2}, {}, {"activation": P(None, None, "tensor")}),
    "one beside data": ({"data": 2, "tensor": 2}, {"batch": "data"}, {"activation": P(None, "tensor")}),
    "the batch's too": (
        {"data": 2, "tensor": 2}, {"batch": "data"}, {"activation": P(None, "tensor"), "batch_axes": "automatic"}
    ),
}
batch = {"x": np.random.default_rng(0).normal(size=(4, 8, 8, 2))}
sgd = optax.sgd(0.1)


def compared(name, mesh):
    sizes, more, options = MESHES[mesh]

    def init(key):
        kernels = [jax.random.normal(one, (2, 3, 2, 2)) / 4 for one in jax.random.split(key, 3)]
        return {"patches": kernels[0], "blocks": [{"kernel": kernel} for kernel in kernels[1:]]}

    model = Functions(
        init=init,
        before=lambda params, batch: convolved(params["patches"], batch["x"]),
        block=lambda layer, x: x + jnp.tanh(OPERATIONS[name](layer["kernel"], x) * layer["kernel"][0, 0, 0]),
        after=lambda params, x: x,
    )
    spec = MeshSpec(sizes, target=f"cpu:{int(np.prod(list(sizes.values())))}", **more)
    rules = [("patches", P("tensor")), ("**", P(None, None, "tensor"))]
    plan = make_plan(model, mesh=spec, rules=rules, optimizer=sgd, batch=batch, dtype="float64", **options)
    found = verify(model, lambda y, batch: ((y**2).sum(), jnp.float64(y.size)), sgd, plan, [batch])
    return "equal" if found.passed else str(found), plan


mesh, *names = sys.argv[1:]
for name in names:
    said, plan = compared(name, mesh)
    print(name, said, *[note for note in plan.notes if "along whole" in note], sep=": ", flush=True)
"""

SAID = {"convolutions": "", "strided slices": "strided slices", "a rule of its own": "strided slices"}
SAID |= {name: name for name in ("paddings between entries", "strided sums over windows")}
SAID |= {name: name for name in ("cumulative maxima and products", "Fourier transforms")}


@pytest.mark.versions
def test_equals_the_reference() -> None:
    check("two beside stages", 2, "convolutions", "strided slices")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "axes"), [("two beside stages", 2), ("two", 2), ("one beside data", 1), ("the batch's too", 2)]
)
def test_each_equals_the_reference(mesh: str, axes: int) -> None:
    check(mesh, axes, *SAID)


def check(mesh: str, axes: int, *names: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, mesh, *names], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [line(name, axes) for name in names]


def line(name: str, axes: int) -> str:
    # One axis may cut the images of a convolution, of which every model has one.
    said = sorted({"convolutions"} - {"" if axes > 1 else "convolutions"} | {SAID[name]} - {""}, key=str.lower)
    why = "are computed with the dims that they go along whole: XLA gets them wrong where those are cut"
    return ": ".join([name, "equal", *([f"{' and '.join(said)} {why}"] if said else [])])
