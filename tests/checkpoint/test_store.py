"""Checkpoints that are not what was written: flipped bits, cut files, steps that were never finished."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.checkpoint import Canonical, CheckpointError, Checkpoints
from shardlab.checkpoint.seal import SEAL
from shardlab.step.compile import CompiledStep
from tests.equivalence.cases import case, compiled


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    return compiled(case("mlp", data=2, zero=3))


@pytest.fixture(scope="module")
def canonical(step: CompiledStep) -> Canonical:
    return Canonical(step.model, step.plan, step.optimizer, step.mesh)


@pytest.fixture(scope="module")
def whole(step: CompiledStep, canonical: Canonical, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, which no test may change."""
    store = Checkpoints(tmp_path_factory.mktemp("whole"))
    store.save(canonical, step.init(0), {"data": {"position": 0}})
    store.wait()
    return Path(store.folder).parent


def files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file())


def damage(file: Path, rng: np.random.Generator, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        del data[int(rng.integers(len(data))) :]
    else:
        place = int(rng.integers(len(data)))
        data[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(data))


TRIES = [pytest.param(number, marks=() if number < 15 else pytest.mark.slow, id=f"{number}") for number in range(1000)]


@pytest.mark.parametrize("number", TRIES)
def test_no_flipped_bit_and_no_cut_file_loads(whole: Path, canonical: Canonical, tmp_path: Path, number: int) -> None:
    """Every file in turn; a cut that leaves the file as it is, of an empty one, is none."""
    rng = np.random.default_rng(number)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    there = [file for file in files(run) if file.stat().st_size]
    file = there[number % len(there)]
    damage(file, rng, "cut" if number % 5 == 4 else "flip")
    store = Checkpoints(run)
    with pytest.raises(CheckpointError) as told:
        store.load(canonical, 0)
    assert str(store.folder / "0") in str(told.value)
    assert store.faults(0) if file.name != SEAL else not store.steps()


def test_an_array_that_another_took_the_place_of_is_named(
    step: CompiledStep, canonical: Canonical, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right shape with the wrong layer: what its files say is true, and its digest is another's."""
    arrays_of = canonical.arrays_of

    def swapped(state: object) -> object:
        arrays, digests = arrays_of(state)  # type: ignore[arg-type]
        a, b = "parameters/blocks/0/up/kernel", "parameters/blocks/1/up/kernel"
        return {**arrays, a: arrays[b], b: arrays[a]}, digests

    monkeypatch.setattr(canonical, "arrays_of", swapped)
    store = Checkpoints(tmp_path)
    store.save(canonical, step.init(0), {})
    store.wait()
    with pytest.raises(CheckpointError, match="parameters/blocks/0/up/kernel, parameters/blocks/1/up/kernel: what is"):
        store.load(canonical, 0)
    assert [fault.partition(":")[0] for fault in store.faults(0)] == [
        "parameters/blocks/0/up/kernel",
        "parameters/blocks/1/up/kernel",
    ]


def test_a_whole_one_has_no_fault(whole: Path, canonical: Canonical) -> None:
    store = Checkpoints(whole)
    assert store.steps() == [0]
    assert store.faults(0) == []
    assert int(store.load(canonical, 0).step) == 0


def test_a_step_without_a_seal_is_none_and_says_so(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "0" / SEAL).unlink()
    store = Checkpoints(run)
    assert store.steps() == []
    ((step, fault),) = store.found()
    assert step == 0
    assert fault is not None
    assert "was never finished" in str(fault)


def test_a_file_that_is_of_no_checkpoint_is_told(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "0" / "more").write_text("?")
    assert Checkpoints(run).faults(0) == ["more: is of no checkpoint"]


def test_what_is_kept_is_the_last_ones_and_every_so_many_steps(
    step: CompiledStep, canonical: Canonical, tmp_path: Path
) -> None:

    store = Checkpoints(tmp_path, keep=2, keep_every=4)
    state = step.init(0)
    for number in range(1, 8):
        store.save(canonical, dataclasses.replace(state, step=jnp.int32(number)), {})
        store.wait()
    assert store.steps() == [4, 6, 7]


def test_what_unfinished_saves_left_behind_goes_with_the_next_one(
    step: CompiledStep, canonical: Canonical, tmp_path: Path
) -> None:
    store = Checkpoints(tmp_path)
    for name in ("7", "3.orbax-checkpoint-tmp", "mine"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    # What was sealed once and is damaged now may still be of use to somebody.
    (tmp_path / "checkpoints" / "8").mkdir()
    (tmp_path / "checkpoints" / "8" / SEAL).write_text("{")
    store.save(canonical, step.init(0), {})
    store.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "8", "mine"]


def test_a_full_disk_is_told_and_what_was_there_stays(
    step: CompiledStep, canonical: Canonical, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    store = Checkpoints(tmp_path)
    store.save(canonical, step.init(0), {})
    store.wait()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shardlab.checkpoint.store.write_seal", full)

    store.save(canonical, dataclasses.replace(step.init(0), step=jnp.int32(5)), {})
    with pytest.raises(CheckpointError, match=r"checkpoints/5: No space left on device"):
        store.wait()
    assert store.steps() == [0]


def test_what_a_link_leads_to_is_not_removed(step: CompiledStep, canonical: Canonical, tmp_path: Path) -> None:
    """A sealed step, one that was never finished and the one to be saved are links to elsewhere."""
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    store, state = Checkpoints(elsewhere), step.init(0)
    store.save(canonical, dataclasses.replace(state, step=jnp.int32(1)), {})
    store.wait()
    (elsewhere / "mine").mkdir()
    before = sorted(elsewhere.rglob("*"))
    (run / "1").symlink_to(elsewhere / "checkpoints" / "1")
    (run / "2").symlink_to(elsewhere / "mine")
    (run / "3").symlink_to(elsewhere)
    store = Checkpoints(run.parent, keep=1)
    store.save(canonical, dataclasses.replace(state, step=jnp.int32(3)), {})
    store.wait()
    assert store.steps() == [3]
    assert [(path.name, path.is_symlink()) for path in run.iterdir()] == [("3", False)]
    assert sorted(elsewhere.rglob("*")) == before


def test_checkpoints_that_are_a_link_are_not_written_to(
    step: CompiledStep, canonical: Canonical, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="checkpoints: is a link, and steps are removed from what it leads to"):
        Checkpoints(tmp_path).save(canonical, step.init(0), {})
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["7"]
