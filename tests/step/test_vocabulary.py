"""With ``head="vocab"`` a stage sees a part of the classes: what may be done with it, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardlab
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.calls import Calls
from shardlab.step.region import make_region
from shardlab.testing import assert_matches_reference

WIDTH, CLASSES = 4, 12
SGD = optax.sgd(0.1)
RULES = Rules((Rule("out", P(None, "stage")), Rule("**", P())))


def batch_of(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    return {
        "x": rng.normal(size=(size, WIDTH)).astype(np.float32),
        "labels": labels,
        "soft": np.eye(CLASSES, dtype=np.float32)[labels],
    }


def init(key: jax.Array) -> Any:
    keys = jax.random.split(key, 4)
    blocks = [{"w": jax.random.normal(key, (WIDTH, WIDTH)) * 0.3} for key in keys[:3]]
    return {"blocks": blocks, "scale": jnp.ones(WIDTH), "out": jax.random.normal(keys[3], (WIDTH, CLASSES)) * 0.3}


def model(after: Callable[..., Any]) -> Functions:
    return Functions(
        init=init,
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: x + jnp.tanh(x @ layer["w"]),
        after=after,
    )


def logits(params: Any, x: jax.Array) -> Any:
    return (x * params["scale"]) @ params["out"]


def cross_entropy(y: Any, batch: Any) -> Any:
    return shardlab.cross_entropy(y, batch["labels"]).sum(), len(y)


def mesh_of(stages: int) -> MeshSpec:
    return MeshSpec({"data": 1, "stage": stages}, batch="data", stage="stage", target=f"cpu:{stages}")


def planned(this: Functions, *, stages: int = 2, **more: Any) -> Plan:
    given: dict[str, Any] = {"rules": RULES, "microbatches": 2, "head": "vocab", **more}
    return make_plan(this, mesh=mesh_of(stages), optimizer=SGD, batch=batch_of(8), **given)


def checked(after: Callable[..., Any], loss: Callable[..., Any], **more: Any) -> None:
    this, batch = model(after), batch_of(8)
    plan = planned(this, **more)
    Calls(read_model(this, batch), loss, plan, make_region(plan, shardlab.build_mesh(plan.mesh)), batch, train=True)


@jax.custom_vjp
def halved(x: jax.Array) -> jax.Array:
    return x


halved.defvjp(lambda x: (x, None), lambda _, dy: (dy / 2,))


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    return x


clipped.defvjp(lambda x: (x, None), lambda _, dy: (jnp.clip(dy, -1e-3, 1e-3),))


def one_by_one(y: Any, batch: Any) -> Any:
    pairs = y, batch["labels"]
    return jax.lax.map(lambda pair: jax.checkpoint(shardlab.cross_entropy)(*pair), pairs).sum(), len(y)


def with_z_loss(y: Any, batch: Any) -> Any:
    nothing = jnp.full_like(batch["labels"], -1)
    total = shardlab.cross_entropy(y, batch["labels"]) + 1e-2 * shardlab.cross_entropy(y, nothing) ** 2
    return total.sum(), len(y)


def dropped(params: Any, x: jax.Array, key: Any = None) -> jax.Array:
    kept = x if key is None else jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
    return logits(params, kept)


# What is right on a part of the classes, and counted once.
GOOD: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "logits": (logits, cross_entropy),
    "each example for itself": (
        logits,
        lambda y, batch: (jax.vmap(shardlab.cross_entropy)(y, batch["labels"]).sum(), len(y)),
    ),
    "one after another": (logits, one_by_one),
    "a loss of the normaliser": (logits, with_z_loss),
    "x beside the logits": (
        lambda params, x: {"logits": logits(params, x), "x": x * params["scale"]},
        lambda y, batch: (cross_entropy(y["logits"], batch)[0] + 0.1 * (y["x"] ** 2).sum(), len(y["x"])),
    ),
    "dropout of x, the same on all stages": (dropped, cross_entropy),
    "capped": (lambda params, x: 5 * jnp.tanh(logits(params, x) / 5), cross_entropy),
    "a derivative of its own": (lambda params, x: halved(logits(params, halved(x))), cross_entropy),
    "a matrix for each example": (
        lambda params, x: jnp.einsum("bd,dv->vb", x * params["scale"], params["out"]).T,
        cross_entropy,
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_on_a_part_of_the_classes(name: str) -> None:
    after, loss = GOOD[name]
    given: dict[str, Any] = {"rules": RULES, "microbatches": 2, "head": "vocab"}
    assert_matches_reference(model(after), loss, SGD, batch_of(8), mesh=mesh_of(3), steps=2, **given)


@pytest.mark.parametrize("head", ["examples", "last_stage"])
def test_with_another_head_the_stage_axis_is_storage(head: str) -> None:
    assert_matches_reference(
        model(logits), cross_entropy, SGD, batch_of(8), mesh=mesh_of(2), steps=2, rules=RULES, head=head
    )


def test_sums_over_the_batch_before_and_after_the_blocks() -> None:
    """Before them each stage has a share of the examples; after them all stages have the same."""

    def centred(x: jax.Array) -> jax.Array:
        return x - shardlab.batch_sum(x.sum(0)) / shardlab.batch_sum(jnp.ones(len(x), x.dtype).sum())

    this = Functions(
        init=init,
        before=lambda params, batch: centred(batch["x"] * params["scale"]),
        block=lambda layer, x: x + jnp.tanh(x @ layer["w"]),
        after=lambda params, x: logits(params, centred(x) + 0.1 * shardlab.batch_sum(x.sum(0))),
    )
    mesh = MeshSpec({"data": 2, "stage": 2}, batch="data", stage="stage", target="cpu:4")
    assert_matches_reference(this, cross_entropy, SGD, batch_of(8), mesh=mesh, steps=1, rules=RULES, head="vocab")


HELD = ", and with head='vocab' a stage has 6 of 12 classes"
WAY_OUT = "make nothing but shardlab.cross_entropy of the logits, or use head='examples'"


def soft_loss(y: Any, batch: Any) -> Any:
    assert y.shape == batch["soft"].shape, "a probability for every class"
    return (jax.nn.log_softmax(y) * batch["soft"]).sum(), len(y)


def optax_loss(y: Any, batch: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(y, batch["labels"]).sum(), len(y)


BAD: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "optax's cross-entropy": (logits, optax_loss, "loss: gather picks classes by their number"),
    "a softmax": (
        lambda params, x: jax.nn.softmax(logits(params, x)),
        cross_entropy,
        "after: reduce_max takes one value of all classes",
    ),
    "the largest": (
        logits,
        lambda y, batch: (y.argmax(-1).astype(jnp.float32).sum(), len(y)),
        "loss: argmax takes one value of all classes",
    ),
    "a sum over the classes": (
        logits,
        lambda y, batch: ((y**2).sum(), len(y)),
        "loss: its sum is of the classes at hand",
    ),
    "a mean over the classes": (
        logits,
        lambda y, batch: (cross_entropy(y, batch)[0] + y.mean(), len(y)),
        "loss: div takes a mean over the classes at hand",
    ),
    "a sum that after returns": (
        lambda params, x: logits(params, x).sum(-1),
        lambda y, batch: (y.sum(), len(y)),
        "after: what it returns is of the classes at hand",
    ),
    "a number of classes": (
        logits,
        lambda y, batch: (cross_entropy(y, batch)[0] / y.shape[-1], len(y)),
        "loss: its sum is of the classes at hand",
    ),
    "a weight by the classes": (
        logits,
        lambda y, batch: (cross_entropy(y, batch)[0], y.size),
        "loss: its weight is of the classes at hand",
    ),
    "some of the classes": (
        logits,
        lambda y, batch: cross_entropy(y[:, ::2], batch),
        "loss: shardlab.cross_entropy is given what is not one logit for each of the classes",
    ),
    "the first classes": (
        logits,
        lambda y, batch: (cross_entropy(y, batch)[0] + y[:, 0].sum(), len(y)),
        "loss: slice takes one value of all classes",
    ),
    "sorted classes": (logits, lambda y, batch: cross_entropy(jnp.sort(y), batch), "loss: sort orders the classes"),
    "classes by their numbers": (
        logits,
        lambda y, batch: cross_entropy(y * jnp.arange(y.shape[-1]), batch),
        "loss: mul uses the places of the classes at hand",
    ),
    "another dim": (
        lambda params, x: jnp.stack([logits(params, x)] * 2, -1),
        lambda y, batch: (shardlab.cross_entropy(y, jnp.zeros(y.shape[:2], jnp.int32)).sum(), len(y)),
        "loss: shardlab.cross_entropy is given what is not one logit for each of the classes",
    ),
    "classes twice": (
        lambda params, x: jnp.tile(logits(params, x), 2),
        cross_entropy,
        "loss: shardlab.cross_entropy is given what is not one logit for each of the classes",
    ),
    "soft labels": (
        logits,
        soft_loss,
        "loss: fails on a part of the vocabulary",
    ),
    "noise": (
        lambda params, x, key: logits(params, x) + jax.random.normal(key, (len(x), params["out"].shape[1])),
        cross_entropy,
        "after: random_bits draws for every class",
    ),
    "a derivative that is not linear": (
        lambda params, x: logits(params, clipped(x)),
        cross_entropy,
        "after: max goes on from a sum over the classes at hand",
    ),
    "its own derivative": (
        logits,
        lambda y, batch: (jax.grad(lambda y: cross_entropy(y, batch)[0])(y).sum(-1).sum(), len(y)),
        "loss: shardlab.cross_entropy is differentiated",
    ),
    "a loss of x alone": (
        lambda params, x: (logits(params, x), x),
        lambda y, batch: (shardlab.cross_entropy(y[1], batch["labels"] % WIDTH).sum(), len(y[1])),
        "loss: shardlab.cross_entropy is given what is not one logit for each of the classes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_on_a_part_of_the_classes(name: str) -> None:
    after, loss, message = BAD[name]
    with pytest.raises(DeclarationError) as error:
        checked(after, loss)
    found = re.sub(r" at \S+/test_vocabulary.py:\d+", "", str(error.value))
    shown = ": AssertionError: a probability for every class" if name == "soft labels" else ""
    assert found == f"{message}{HELD}{shown}; {WAY_OUT}"


def other_for_many(params: Any, x: jax.Array) -> Any:
    y = logits(params, x)
    return jnp.tanh(y) if y.shape[-1] > 10 else y


@pytest.mark.parametrize("stages", [2, 3])
def test_another_program_for_more_classes_is_refused(stages: int) -> None:
    """With three stages, 4 classes and 8 have the same; all 12 have not."""
    with pytest.raises(DeclarationError) as error:
        checked(other_for_many, cross_entropy, stages=stages)
    assert str(error.value) == (
        f"after: is another program for a part of the classes, and with head='vocab' a stage has {12 // stages} of 12 "
        "classes; let nothing but shapes follow the number of classes, or use head='examples'"
    )


def test_a_loss_that_fails_on_all_classes_too_raises_what_it_raises() -> None:
    with pytest.raises(ValueError, match="Incompatible shapes"):
        checked(logits, lambda y, batch: ((y * jnp.ones(5)).sum(), len(y)))


def test_one_class_a_stage() -> None:
    """JAX writes a program otherwise where a dim has size 1."""
    narrow = Functions(
        init=lambda key: init(key) | {"out": jax.random.normal(key, (WIDTH, 2))},
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: x + jnp.tanh(x @ layer["w"]),
        after=lambda params, x: logits(params, x) + jnp.broadcast_to(x[:, :1], (len(x), params["out"].shape[1])),
    )
    given: dict[str, Any] = {"rules": RULES, "microbatches": 2, "head": "vocab"}
    batch = batch_of(8)
    batch["labels"] %= 2
    assert_matches_reference(narrow, cross_entropy, SGD, batch, mesh=mesh_of(2), steps=1, **given)


def test_a_kernel_padded_in_both_dims() -> None:
    """4 x 11 on tensor=3 and stage=2, as 6 x 12: what pads the features is cut off, what pads the classes is not."""
    mesh = MeshSpec({"stage": 2, "tensor": 3}, stage="stage", target="cpu:6")
    rules = Rules((Rule("out", P("tensor", "stage"), pad=True), Rule("**", P())))
    odd = Functions(
        init=lambda key: init(key) | {"out": jax.random.normal(key, (WIDTH, CLASSES - 1))},
        before=lambda params, batch: batch["x"],
        block=lambda layer, x: x + jnp.tanh(x @ layer["w"]),
        after=logits,
    )
    batch = batch_of(8)
    batch["labels"] %= CLASSES - 1
    assert_matches_reference(odd, cross_entropy, SGD, batch, mesh=mesh, rules=rules, steps=2, head="vocab")
