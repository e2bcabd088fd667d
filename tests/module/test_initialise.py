"""Recipes: each leaf's own slice of the user's initialisation, the same for layers that differ in integers only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shardlab.module.initialise import Recipe, recipes
from shardlab.module.model import read_model


def check(initialise: Any) -> dict[str, Recipe]:
    """The recipes, each of which makes what the whole initialisation makes."""
    found, key = recipes(initialise), jax.random.key(2**31 + 7)
    expected = jax.jit(initialise)(key)
    assert set(found) == set(expected)
    # As `initial_values` passes them.
    integers = {path: np.asarray(one.integers, np.int64).astype(np.uint32) for path, one in found.items()}
    made = jax.jit(lambda key, given: {path: one.make(key, tuple(given[path])) for path, one in found.items()})
    for path, value in made(key, integers).items():
        assert value.dtype == expected[path].dtype
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    return found


def layers(key: jax.Array) -> dict[str, Any]:
    out = {}
    for index in range(4):
        mine = jax.random.fold_in(key, index)
        out[f"{index}/kernel"] = jax.random.normal(mine, (3, 5)) / 2
        out[f"{index}/bias"] = jnp.zeros(5)
    return out


def test_layers_share_a_program() -> None:
    found = check(layers)
    kernels = [found[f"{index}/kernel"] for index in range(4)]
    assert len({recipe.signature for recipe in kernels}) == 1
    assert len({recipe.integers for recipe in kernels}) == 4
    assert found["0/kernel"].signature != found["0/bias"].signature


def test_a_recipe_makes_any_layer() -> None:
    """The integers are arguments: layer 0's program makes layer 3 of layer 3's."""
    found, key = recipes(layers), jax.random.key(9)
    np.testing.assert_array_equal(found["0/kernel"].make(key, found["3/kernel"].integers), layers(key)["3/kernel"])


def test_a_slice_is_the_leafs_own() -> None:
    """A leaf's program has none of the other's draws."""
    found = recipes(layers)
    jaxpr = jax.make_jaxpr(lambda key: found["2/kernel"].make(key, found["2/kernel"].integers))(jax.random.key(0))
    assert str(jaxpr).count("random_bits") == 1


def test_keys_split_and_drawn_in_every_way() -> None:
    table = np.arange(6, dtype=np.float32).reshape(2, 3)

    def initialise(key: jax.Array) -> dict[str, Any]:
        one, two, *rest = jax.random.split(key, 5)
        negative = jax.random.fold_in(two, jnp.uint32(2**32 - 3))
        shared = jax.random.normal(rest[0], (4,))
        return {
            "uniform": jax.random.uniform(one, (3,), minval=-2.0),
            "negative": jax.random.randint(negative, (4,), -7, -2),
            "half": jax.random.normal(two, (3,), jnp.bfloat16),
            "scan": jax.lax.scan(lambda k, _: (jax.random.fold_in(k, 1), jax.random.normal(k)), rest[1], None, 3)[1],
            "table": jnp.asarray(table) * 2,
            "scalar": jax.random.normal(rest[2]),
            "first": shared + 1,
            "second": shared * shared.sum(),
            "count": jnp.int32(-5),
            "constant": jnp.full((2, 2), 0.1),
        }

    check(initialise)


def test_layers_of_other_constants_do_not_share() -> None:
    """Arrays that an inner program closes over do not show in its text."""

    def initialise(key: jax.Array) -> dict[str, Any]:
        def scaled(by: np.ndarray) -> Any:
            scale = jnp.asarray(by)
            return jax.jit(lambda key: jax.random.normal(key, (3,)) * scale)(key)

        return {"a": scaled(np.array([1.0, 2.0, 3.0], np.float32)), "b": scaled(np.array([4.0, 5.0, 6.0], np.float32))}

    found = check(initialise)
    assert found["a"].signature != found["b"].signature


def test_layers_of_other_scales_do_not_share() -> None:
    def initialise(key: jax.Array) -> dict[str, Any]:
        return {str(scale): jax.random.normal(key, (3,)) * scale for scale in (0.5, 0.25)}

    found = check(initialise)
    assert found["0.5"].signature != found["0.25"].signature


def test_an_nnx_module_of_many_layers() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(3)])

        def __call__(self, batch: Any) -> jax.Array:
            return batch["x"]

    found = check(read_model(Net, {"x": np.zeros((2, 3), np.float32)}).initialise)
    assert len({recipe.signature for path, recipe in found.items() if path.endswith("kernel")}) == 1
