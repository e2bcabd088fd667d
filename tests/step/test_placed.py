"""A host's arrays as global ones, and which rows of a batch a process must have."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shardlab.mesh.build import build_mesh
from shardlab.mesh.spec import MeshSpec
from shardlab.step.placed import placed, placed_rows, rows_here

MESH = MeshSpec({"data": 4, "tensor": 2})


def sharding(*spec: Any) -> NamedSharding:
    return NamedSharding(build_mesh(MESH), PartitionSpec(*spec))


def test_an_array_that_lies_there_stays() -> None:
    rows = sharding("data")
    array = placed(np.arange(8), rows)
    assert placed(array, rows) is array
    assert placed(array, sharding("tensor")).sharding == sharding("tensor")


@pytest.mark.parametrize("spec", [("data",), (("data", "tensor"),), (None, "tensor"), ()])
def test_rows_from_the_first_on_are_the_array(spec: tuple[Any, ...]) -> None:
    value = np.arange(32.0).reshape(8, 4)
    array = placed_rows(value, sharding(*spec), value.shape, 0)
    assert array.sharding == sharding(*spec)
    np.testing.assert_array_equal(array, value)


def test_rows_of_a_share_are_found_by_their_place_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the second of two processes, which is asked for the rows of its own devices alone."""
    asked: list[np.ndarray] = []

    def made(shape: tuple[int, ...], sharding: Any, part: Any) -> None:
        assert shape == (8, 4)
        asked.extend((part((slice(4, 6), slice(None))), part((slice(6, 8), slice(1, 3)))))

    monkeypatch.setattr(jax, "make_array_from_callback", made)
    whole = np.arange(32.0).reshape(8, 4)
    placed_rows(whole[4:], sharding("data"), whole.shape, 4)
    np.testing.assert_array_equal(asked[0], whole[4:6])
    np.testing.assert_array_equal(asked[1], whole[6:8, 1:3])


@pytest.mark.parametrize(
    ("processes", "index", "share"),
    [
        ([[(0, 4), (4, 8)], [(8, 12), (12, 16)]], 1, (1, 2)),  # data first
        ([[(0, 8), (8, 16)], [(0, 8), (8, 16)]], 1, (0, 1)),  # stages first: all rows in each
        ([[(0, 8)], [(0, 8)], [(8, 16)], [(8, 16)]], 2, (1, 2)),  # tensor over two processes
        ([[(0, 4), (8, 12)], [(4, 8), (12, 16)]], 0, (0, 1)),  # in turn
        ([[(0, 8)], [(8, 12)], [(8, 16)]], 1, (0, 1)),  # unlike
        ([[(0, 16)]], 0, (0, 1)),
    ],
)
def test_a_process_has_a_share_where_all_have_alike_ones(
    monkeypatch: pytest.MonkeyPatch, processes: list[list[tuple[int, int]]], index: int, share: tuple[int, int]
) -> None:
    places = [(SimpleNamespace(process_index=k), (slice(*rows),)) for k, held in enumerate(processes) for rows in held]
    fake: Any = SimpleNamespace(devices_indices_map=lambda shape: _Pairs(places))
    monkeypatch.setattr(jax, "process_index", lambda: index)
    assert rows_here(fake, (16,)) == share


class _Pairs:
    """A mapping whose keys need no hash."""

    def __init__(self, pairs: Any) -> None:
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs
