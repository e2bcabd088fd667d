"""What a process alone does of what several agree on; several are in tests/run/test_launch.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shardlab.mesh import processes
from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.processes import Agreement, by_first, check_all_joined, check_not_alone, losses_named, of_all, whole
from shardlab.mesh.spec import MeshSpec
from shardlab.step.placed import placed


def test_a_process_alone_is_the_first_of_one_and_decides_for_itself() -> None:
    assert (processes.joined(), processes.count(), processes.index()) == (False, 1, 0)
    thing = object()
    assert by_first(lambda: thing) is thing
    assert of_all(lambda: thing) == [thing]


def test_alone_it_stops_as_soon_as_it_is_asked() -> None:
    asked: list[int] = []
    stop = Agreement(build_mesh(MeshSpec({"data": 8})), asked)
    stop.hand_over(1)
    assert not stop.to_stop(1)
    asked.append(15)
    assert stop.to_stop(0)


def test_a_whole_array_comes_from_its_shards() -> None:
    from jax.sharding import NamedSharding, PartitionSpec

    mesh, value = build_mesh(MeshSpec({"data": 8})), np.arange(8.0)
    for spec in (PartitionSpec("data"), PartitionSpec()):
        array = placed(value, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(whole(array, mesh), value)


def test_errors_of_a_process_alone_stay_what_they_are() -> None:
    import jax

    with pytest.raises(jax.errors.JaxRuntimeError), losses_named():
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo")


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_several_may_not_run_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    check_not_alone()
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        DeclarationError, match=f"one of 2 .{name}., and each would run alone and write over the others"
    ):
        check_not_alone()


def test_processes_that_jax_sees_must_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    check_all_joined()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(DeclarationError, match=r"one of 4, as JAX sees them, .* give --distributed"):
        check_all_joined()


def test_where_there_is_no_cluster_it_says_so_at_once() -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", "shardlab", "train", "tests/run/tiny.py", "--distributed"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(
        "shardlab: --distributed: coordinator_address should be defined.; start every process by"
    )
