"""What is asked of a loss and of x, said plainly; one example at a time; order kept from function to function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import Functions
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.calls import scalars
from shardlab.step.compile import compile_train_step
from shardlab.step.forward import compile_forward
from shardlab.testing import assert_matches_reference

WIDTH, CLASSES = 6, 4
SGD = optax.sgd(0.1)
RULES = Rules((Rule("**", P()),))


def batch_of(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(size, WIDTH)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, size).astype(np.int32),
    }


def init(key: jax.Array) -> Any:
    keys = jax.random.split(key, 3)
    blocks = [{"w": jax.random.normal(key, (WIDTH, WIDTH)) * 0.3} for key in keys[:2]]
    return {"blocks": blocks, "out": jax.random.normal(keys[2], (WIDTH, CLASSES)) * 0.3}


def parts(**more: Any) -> Functions:
    given: dict[str, Any] = {
        "before": lambda params, batch: batch["x"],
        "block": lambda layer, x: x + jnp.tanh(x @ layer["w"]),
        "after": lambda params, x: x @ params["out"],
    }
    return Functions(init=init, **(given | more))


def whole(model: Functions) -> Functions:
    def apply(params: Any, batch: Any) -> Any:
        assert model.before is not None
        assert callable(model.block)
        assert model.after is not None
        outer = {"out": params["out"]}
        x = model.before(outer, batch)
        for layer in params["blocks"]:
            x = model.block(layer, x)
        return model.after(outer, x)

    return Functions(init=init, apply=apply)


def cross_entropy(y: Any, batch: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(y, batch["labels"])
    return losses.sum(), len(losses)


def mesh_of(data: int = 1, stage: int = 1) -> MeshSpec:
    return MeshSpec({"data": data, "stage": stage}, batch="data", stage="stage", target=f"cpu:{data * stage}")


ONE_ROW: dict[str, tuple[Functions, int, dict[str, Any]]] = {
    "a device": (whole(parts()), 4, {"mesh": mesh_of(4)}),
    "a microbatch": (whole(parts()), 4, {"mesh": mesh_of(), "microbatches": 4}),
    "a stage's share": (parts(), 8, {"mesh": mesh_of(2, 2), "microbatches": 2}),
    "one in all": (parts(), 2, {"mesh": mesh_of(1, 2), "microbatches": 2, "head": "last_stage"}),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", ONE_ROW)
def test_one_example(name: str) -> None:
    model, size, options = ONE_ROW[name]
    assert_matches_reference(model, cross_entropy, SGD, batch_of(size), rules=RULES, steps=2, **options)


def test_one_example_and_its_noise() -> None:
    def apply(params: Any, batch: Any, key: Any = None) -> Any:
        h = batch["x"]
        if key is not None:
            h = h * jax.random.bernoulli(key, 0.5, h.shape)
            h = h + jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(jax.random.split(key, len(h)))
            h = h + jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (WIDTH,)))(jnp.arange(len(h)))
        return h @ params["out"]

    model = Functions(init=init, apply=apply)
    assert_matches_reference(model, cross_entropy, SGD, batch_of(4), mesh=mesh_of(4), rules=RULES, steps=1)


def test_forward_of_one_example_a_device() -> None:
    model = whole(parts())
    plan = make_plan(model, mesh=mesh_of(4), rules=RULES, optimizer=SGD, batch=batch_of(8))
    compile_forward(model, plan, batch_of(4), cross_entropy)


def compiled(model: Functions, loss: Callable[..., Any] = cross_entropy, **options: Any) -> Any:
    given: dict[str, Any] = {"mesh": mesh_of(2)} | options
    plan = make_plan(model, rules=RULES, optimizer=SGD, batch=batch_of(8), **given)
    return compile_train_step(model, loss, SGD, plan, batch_of(8))


RETURNS = "return (sum, weight), the sum of the losses over the examples and how many (or how much weight) it is over: "
LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "a mean": (lambda y, batch: jnp.mean(y**2), "float32[]"),
    "a loss for each example": (lambda y, batch: (jnp.sum(y**2, -1), len(y)), "(float32[4], int32[])"),
    "metrics": (lambda y, batch: (jnp.sum(y**2), {"accuracy": jnp.sum(y)}), "(float32[], {'accuracy': float32[]})"),
    "three": (lambda y, batch: (jnp.sum(y**2), len(y), y), "(float32[], int32[], float32[4, 4])"),
    "nothing": (lambda y, batch: None, "None"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_returns(name: str) -> None:
    loss, shown = LOSSES[name]
    with pytest.raises(DeclarationError) as error:
        compiled(whole(parts()), loss, mesh=mesh_of(2))
    wanted = f"loss: returned {shown}; {RETURNS}two numbers, which add up over microbatches and devices"
    assert str(error.value) == wanted


def test_what_an_auxiliary_loss_is() -> None:
    with pytest.raises(DeclarationError) as error:
        scalars((jnp.ones(3), 1), "block")
    assert str(error.value) == (
        "block: returned (float32[3], int32[]); return (sum, weight), the sum of its auxiliary loss over the examples "
        "and how many (or how much weight) it is over: two numbers, which add up over microbatches and devices"
    )


COUNTER = parts(
    before=lambda params, batch: {"h": batch["x"], "count": jnp.zeros(())},
    block=lambda layer, x: {"h": x["h"] + jnp.tanh(x["h"] @ layer["w"]), "count": x["count"] + 1},
    after=lambda params, x: x["h"] @ params["out"] * x["count"],
)
TIME_MAJOR = parts(
    before=lambda params, batch: jnp.stack([batch["x"]] * 3),
    after=lambda params, x: x.sum(0) @ params["out"],
)


def test_x_that_does_not_lead_with_examples() -> None:
    """A scalar of x is no auxiliary loss, and time may come before the examples."""
    for model in (COUNTER, TIME_MAJOR):
        assert_matches_reference(model, cross_entropy, SGD, batch_of(8), mesh=mesh_of(2), rules=RULES, steps=2)
        stages: dict[str, Any] = {"mesh": mesh_of(2, 2), "microbatches": 2}
        assert_matches_reference(model, cross_entropy, SGD, batch_of(8), rules=RULES, steps=2, **stages)


def test_order_from_function_to_function() -> None:
    """Real and made examples go through the model together, and are taken apart in the loss."""

    def loss(y: Any, batch: Any) -> Any:
        real, made = jnp.split(y, 2)
        return jnp.sum((real - made) ** 2), len(real)

    model = parts(before=lambda params, batch: jnp.concatenate([batch["x"], 2 * batch["x"]]))
    for one in (model, whole(model)):
        assert_matches_reference(one, loss, SGD, batch_of(8), mesh=mesh_of(2), rules=RULES, steps=2)
    with pytest.raises(DeclarationError, match=r"loss: split at .* takes the examples apart"):
        compiled(parts(), loss)
