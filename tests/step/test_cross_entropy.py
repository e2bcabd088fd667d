"""`cross_entropy` against optax, in plain JAX and over parts of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.module.inner import program_of
from shardlab.step.constraints import made_legal
from shardlab.step.cross_entropy import CLASSES, MAX, SUM, Vocabulary, cross_entropy, mark_of

RNG = np.random.default_rng(0)
SHAPES: dict[str, tuple[tuple[int, ...], float]] = {
    "tokens": ((2, 3, 7), 1.0),
    "one row": ((5,), 1.0),
    "one class": ((4, 1), 1.0),
    "nothing": ((0, 4), 1.0),
    "large": ((3, 8), 1e4),
}


def given(shape: tuple[int, ...], scale: float = 1.0) -> tuple[Any, Any]:
    return RNG.normal(size=shape) * scale, RNG.integers(0, shape[-1], shape[:-1]).astype(np.int32)


@pytest.mark.versions
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_optax(name: str) -> None:
    with jax.enable_x64(True):
        logits, labels = given(*SHAPES[name])
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-12, atol=1e-12)
        weights = RNG.normal(size=labels.shape)
        theirs, mine = (
            jax.grad(lambda logits, f=f: (weights * f(logits, labels)).sum())(logits)
            for f in (optax.softmax_cross_entropy_with_integer_labels, cross_entropy)
        )
        np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-12)


def test_second_derivatives() -> None:
    with jax.enable_x64(True):
        logits, labels = given((5,))
        probabilities = jax.nn.softmax(logits)
        expected = np.diag(probabilities) - np.outer(probabilities, probabilities)
        np.testing.assert_allclose(jax.hessian(lambda x: cross_entropy(x, labels))(logits), expected, atol=1e-14)


def test_a_label_that_is_no_class_gives_the_logsumexp() -> None:
    logits, _ = given((3, 4))
    wanted = np.asarray(jax.nn.logsumexp(logits.astype(np.float32), axis=-1))
    np.testing.assert_allclose(cross_entropy(logits, np.array([-1, 4, 1000])), wanted, rtol=1e-6)


def test_classes_that_are_ruled_out() -> None:
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [-jnp.inf, 0.0, -jnp.inf]])
    labels = jnp.array([2, 1])
    np.testing.assert_allclose(cross_entropy(logits, labels), np.log([2, 1]), rtol=1e-6)
    gradient = jax.grad(lambda x: cross_entropy(x, labels).sum())(logits)
    np.testing.assert_allclose(gradient, np.array([[0.5, 0, -0.5], [0, 0, 0]]), atol=1e-7)


def test_narrow_logits_are_summed_in_float32() -> None:
    """Of 4,096 equal logits each gives 1 to a sum that bfloat16 ends at 256."""
    logits = jnp.zeros((1, 4096), jnp.bfloat16)
    found = cross_entropy(logits, jnp.zeros(1, jnp.int32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.log(4096), rtol=1e-6)
    assert jax.grad(lambda x: cross_entropy(x, jnp.zeros(1, jnp.int32)).sum())(logits).dtype == jnp.bfloat16


BAD: dict[str, tuple[Any, Any, str]] = {
    "labels in a hot vector": (
        np.zeros((2, 3)),
        np.zeros((2, 3), np.int32),
        "cross_entropy: labels of shape [2, 3] for logits [2, 3]; give one label for every row of logits, classes in "
        "the last dim",
    ),
    "a number": (
        np.float32(1),
        np.int32(0),
        "cross_entropy: labels of shape [] for logits []; give one label for every row of logits, classes in the last "
        "dim",
    ),
    "labels that are no integers": (
        np.zeros((2, 3), np.float32),
        np.zeros(2, np.float32),
        "cross_entropy: logits are float32 and labels float32; give floating-point logits and a class number for each "
        "label",
    ),
    "logits that are integers": (
        np.zeros((2, 3), np.int32),
        np.zeros(2, np.int32),
        "cross_entropy: logits are int32 and labels int32; give floating-point logits and a class number for each "
        "label",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    logits, labels, message = BAD[name]
    with pytest.raises(DeclarationError) as error:
        cross_entropy(logits, labels)
    assert str(error.value) == message


def marks(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        if (mark := mark_of(equation)) is not None:
            yield mark
        for value in equation.params.values():
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if hasattr(program_of(one), "eqns"):
                    yield from marks(program_of(one))


TRANSFORMED: dict[str, Callable[[Any, Any], Any]] = {
    "as it is": cross_entropy,
    "jit": jax.jit(cross_entropy),
    "vmap": jax.vmap(cross_entropy),
    "scan": lambda x, y: jax.lax.scan(lambda c, one: (c, cross_entropy(*one)), 0, (x, y)),
    "checkpoint": jax.checkpoint(cross_entropy),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_its_marks_are_found_in_a_trace(name: str) -> None:
    logits, labels = given((3, 4))
    found = list(marks(jax.make_jaxpr(TRANSFORMED[name])(logits, labels).jaxpr))
    assert sorted(found) == sorted([CLASSES, MAX, SUM])


@pytest.mark.versions
@pytest.mark.parametrize("size", [16, 14, 9])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_over_parts_of_the_vocabulary(name: str, size: int) -> None:
    """Four parts of 16 classes, of which the last may be padding: beside a second manual and an automatic axis.

    Each device's cotangents are what its own logits give, the loss counted on one of them; the transpose of a psum is a
    psum.
    """
    with jax.enable_x64(True):
        mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 4, 2), ("data", "stage", "tensor"), (AxisType.Auto,) * 3)
        x, kernel = RNG.normal(size=(6, 4)), np.pad(RNG.normal(size=(4, size)), [(0, 0), (0, 16 - size)])
        labels = np.array([0, 5, 8, size - 1, -1, size], np.int32)
        weights = RNG.normal(size=6)
        losses = TRANSFORMED[name]
        picked = (lambda out: out[1]) if name == "scan" else (lambda out: out)
        vocabulary = Vocabulary("stage", 4, ((16, size),) if size < 16 else ())
        legal = made_legal(
            lambda logits, labels: picked(losses(logits, labels)),
            ("data", "stage"),
            ("data",),
            mesh.abstract_mesh,
            vocabulary=vocabulary,
        )

        def in_region(x: Any, kernel: Any) -> Any:
            def total(x: Any, kernel: Any) -> Any:
                return (weights * legal(x @ kernel, labels)).sum()

            value, pull = jax.vjp(total, x, kernel)
            dx, dkernel = pull(jnp.where(jax.lax.axis_index("stage") == 2, jnp.ones_like(value), 0))
            return value[None], jax.lax.psum(dx, "stage"), dkernel

        specs = P(), P(None, "stage")
        run = jax.shard_map(
            in_region,
            mesh=mesh,
            in_specs=specs,
            out_specs=(P("stage"), *specs),
            axis_names={"data", "stage"},
            check_vma=False,
        )
        with jax.set_mesh(mesh):
            kernels = jax.device_put(kernel, jax.NamedSharding(mesh, P(None, ("stage", "tensor"))))
            values, dx, dkernel = jax.jit(run)(x, kernels)

        def plain(x: Any, kernel: Any) -> Any:
            return (weights * picked(losses(x @ kernel, labels))).sum()

        value, (wanted_x, wanted_kernel) = jax.value_and_grad(plain, argnums=(0, 1))(x, kernel[:, :size])
        np.testing.assert_allclose(values, [value] * 4, rtol=1e-12)
        np.testing.assert_allclose(dx, wanted_x, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(dkernel[:, :size], wanted_kernel, rtol=1e-11, atol=1e-13)
        assert not np.any(dkernel[:, size:])
