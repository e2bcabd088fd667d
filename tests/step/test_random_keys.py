"""Keys of the examples: split, folded in by place or by number, and variates that split a key of their own accord."""

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
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.examples import check_rows_to_rows
from shardlab.step.random import batched_draws, rows_key, site_key
from shardlab.testing import assert_matches_reference

BATCH, ROWS, WIDTH = 12, 3, 5
Draw = Callable[[jax.Array, jax.Array], Any]
IDS = jnp.arange(BATCH) * 7 % 5


def drawn(draw: Draw, rows: int) -> frozenset[Any]:
    def traced(rows: int) -> Any:
        return jax.make_jaxpr(draw)(jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((rows,), jnp.int32))

    here, there = traced(rows), traced(2 * rows)
    return batched_draws(here.jaxpr, there.jaxpr, rows, "block") | check_rows_to_rows(here, there, "block", rows)[1]


DRAWS: dict[str, Draw] = {
    "split": lambda key, ids: jax.vmap(lambda k: jax.random.normal(k, (WIDTH,)))(jax.random.split(key, len(ids))),
    "split for tokens": lambda key, ids: jax.vmap(lambda k: jax.random.normal(k))(
        jax.random.split(key, 2 * len(ids))
    ).reshape(-1, 2),
    "split and split again": lambda key, ids: jax.vmap(
        lambda k: jax.random.uniform(jax.random.split(k, ROWS)[1], (ROWS, WIDTH))
    )(jax.random.split(key, len(ids))),
    "places": lambda key, ids: jax.vmap(
        lambda i: jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 3), i), (WIDTH,))
    )(jnp.arange(len(ids))),
    "places of tokens": lambda key, ids: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(
        jnp.arange(2 * len(ids))
    ).reshape(-1, 2),
    "places, and a draw of one shape with the batch": lambda key, ids: (
        jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (ROWS, WIDTH)))(jnp.arange(len(ids))),
        jax.random.normal(jax.random.fold_in(key, 5), (len(ids), WIDTH)),
    )[0],
    "numbers": lambda key, ids: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (WIDTH,)))(ids),
    "numbers of split keys": lambda key, ids: jax.vmap(
        lambda k, i: jax.random.normal(jax.random.fold_in(k, i), (WIDTH,))
    )(jax.random.split(key, len(ids)), ids),
    "numbers of layers": lambda key, ids: jax.vmap(
        lambda i: jax.random.normal(jax.random.fold_in(key, i), (len(ids), WIDTH))
    )(jnp.arange(4)).swapaxes(0, 1),
    "in a jit": jax.jit(
        lambda key, ids: jax.vmap(jax.jit(lambda i: jax.random.normal(jax.random.fold_in(key, i), (WIDTH,))))(
            jnp.arange(len(ids))
        )
    ),
    "in a scan": lambda key, ids: (
        jax.lax.scan(
            lambda key, _: (
                jax.random.fold_in(key, 1),
                jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(jnp.arange(len(ids))),
            ),
            key,
            None,
            length=2,
        )[1].T
    ),
    "gamma": lambda key, ids: jax.random.gamma(key, 0.4, (len(ids), 2)),
    "beta": lambda key, ids: jax.random.beta(key, 0.4, 0.7, (len(ids), 1)),
    "dirichlet": lambda key, ids: jax.random.dirichlet(key, jnp.ones(WIDTH), (len(ids),)),
    "student": lambda key, ids: jax.random.t(key, 3.0, (len(ids),)),
    "three gammas, beside three keys": lambda key, ids: (
        jax.random.gamma(key, 0.4, (len(ids),))
        + jax.random.normal(jax.random.split(key, ROWS)[0])
        + jax.random.gamma(key, 0.5)
    ),
    "a gamma for each example's number": lambda key, ids: jax.random.gamma(key, 1.0 + ids),
    "a gamma for all and one for each": lambda key, ids: (
        jax.random.gamma(key, 0.4, (len(ids), 2)) + jax.random.gamma(key, 0.5, (7,)).sum()
    ),
    "a gamma of a split key": lambda key, ids: jax.vmap(lambda k: jax.random.gamma(k, 0.4, (2,)))(
        jax.random.split(key, len(ids))
    ),
    "multivariate": lambda key, ids: jax.random.multivariate_normal(key, jnp.zeros(2), jnp.eye(2), (len(ids),)),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", DRAWS)
def test_rows_of_the_whole(name: str) -> None:
    draw, key = DRAWS[name], site_key(jax.random.key(11), 4)
    batched = drawn(draw, ROWS)
    whole = np.asarray(jax.jit(draw)(key, IDS))
    shard = jax.jit(lambda first, ids: draw(rows_key(key, first, ROWS, batched), ids))
    found = [shard(jnp.int32(first), IDS[first : first + ROWS]) for first in range(0, BATCH, ROWS)]
    assert len(np.unique(whole)) > 2
    np.testing.assert_allclose(np.concatenate(found), whole, rtol=1e-6)


@pytest.mark.versions
def test_once_for_all_is_the_plain_keys() -> None:
    def draw(key: jax.Array, ids: jax.Array) -> Any:
        layers = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(jnp.arange(4))
        places = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(jnp.arange(len(ids)))
        return layers, places, jax.random.gamma(key, 0.5, (4,))

    key = jax.random.key(2)
    rows = draw(rows_key(key, jnp.int32(6), ROWS, drawn(draw, ROWS)), IDS[:ROWS])
    whole = draw(key, IDS)
    np.testing.assert_allclose(rows[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(rows[1], whole[1][6 : 6 + ROWS], rtol=1e-6)
    np.testing.assert_allclose(rows[2], whole[2], rtol=1e-6)


REFUSED: dict[str, tuple[Draw, str]] = {
    "gamma along another dim": (
        lambda key, ids: jax.random.gamma(key, 0.4, (2, len(ids))).T,
        "block: a random draw of shape [2, 3] for 3 examples has shape [2, 6] for 6; the batch must be its leading "
        "dim, so that each device can draw its own rows",
    ),
    "a split for all and for each": (
        lambda key, ids: (
            jax.random.key_data(jax.random.split(key, len(ids))) + jax.random.key_data(jax.random.split(key, 3)[0])
        ),
        "block: with 3 examples a device, shape [3] is drawn once per example and once for all; use another batch size "
        "or number of microbatches so that the two shapes differ",
    ),
    "a gamma for all beside three keys": (
        lambda key, ids: jax.random.key_data(jax.random.split(key, len(ids))) + jax.random.gamma(key, 0.5),
        "block: with 3 examples a device, shape [3] is drawn once per example and once for all; use another batch size "
        "or number of microbatches so that the two shapes differ",
    ),
    "layers and places": (
        lambda key, ids: (
            jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(jnp.arange(len(ids)))
            + jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(jnp.arange(3)).sum()
        ),
        "block: with 3 examples a device, numbers of shape [3] are folded into a key both per example and otherwise; "
        "use another batch size or number of microbatches so that the two shapes differ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    draw, message = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        drawn(draw, ROWS)
    assert str(error.value) == message


Noise = Callable[[jax.Array, jax.Array], jax.Array]
MODELS: dict[str, Noise] = {
    "split": lambda key, h: jax.vmap(lambda k, row: row * jax.random.bernoulli(k, 0.5, row.shape))(
        jax.random.split(key, len(h)), h
    ),
    "places": lambda key, h: jax.vmap(
        lambda i, row: row * jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, row.shape)
    )(jnp.arange(len(h)), h),
    "beta": lambda key, h: h * jax.random.beta(key, 0.4, 0.4, (len(h), 1)),
}


@pytest.mark.versions
@pytest.mark.parametrize(("devices", "microbatches"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_step_on_any_mesh(name: str, devices: int, microbatches: int) -> None:
    def apply(params: Any, batch: Any, key: Any = None) -> jax.Array:
        h = jnp.tanh(batch["x"] @ params["w"])
        return h if key is None else MODELS[name](key, h)

    model = Functions(init=lambda key: {"w": jax.random.normal(key, (3, WIDTH))}, apply=apply)
    mesh = MeshSpec({"data": devices}, batch="data", target=f"cpu:{devices}")
    batch = {"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}
    assert_matches_reference(
        model,
        lambda y, batch: (jnp.sum(y**2), len(y)),
        optax.sgd(0.1),
        batch,
        mesh=mesh,
        rules=Rules((Rule("w", P()),)),
        microbatches=microbatches,
        steps=2,
    )
