"""Runs whose numbers go wrong end by name, with a checkpoint from before to go on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from shardlab.checkpoint import Checkpoints
from shardlab.mesh.faults import DeclarationError
from shardlab.run import steps
from shardlab.run.guards import WINDOW, Guards, LossSpike, NotFinite, ReplicasDiffer
from shardlab.run.loop import train
from shardlab.run.record import read_rows
from shardlab.run.resume import Saving
from shardlab.step.state import TrainState
from tests.run.test_loop import Heard
from tests.run.tiny import Points, tiny

SAVING = Saving(every=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_skipped": -1}, "max_skipped: is -1; give a number of steps, or 0 to skip none"),
        ({"max_spike": 1.0}, "max_spike: is 1.0; give more than 1, or 0 to let every loss pass"),
        ({"max_spike": float("nan")}, "max_spike: is nan; give more than 1"),
        ({"check_replicas": -2}, "check_replicas: is -2; give a number of steps, or 0 to compare none"),
    ],
)
def test_what_cannot_be_watched_for_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DeclarationError, match=said):
        Guards(**given)


class Spoilt(Points):
    """Points of which some batches hold a number that is not finite."""

    def train(self, batch_size: int, *, seed: int = 0) -> Any:
        for number, batch in enumerate(super().train(batch_size, seed=seed), start=1):
            if number in (3, 5, 6, 7):
                batch["features"][0, 0] = float("nan")
            yield batch


def test_updates_that_are_not_finite_are_skipped_until_too_many_are_in_a_row(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(NotFinite, match=r"steps 5 to 7: not finite: the loss, blocks/0/.*go on from the checkpoint of"):
        train(tiny(steps=9, data=Spoilt()), tmp_path, saving=SAVING, guards=Guards(max_skipped=3), view=heard)
    rows = list(read_rows(tmp_path))
    assert [row["step"] for row in rows if row.get("skipped")] == [3, 5, 6, 7]
    assert all((row["loss"] is None) == bool(row.get("skipped")) for row in rows)
    assert any(text.startswith("step 3: no update: not finite: the loss, blocks/0/") for text in heard.texts)
    # What was saved meanwhile is finite, and a run goes on from it.
    record = train(tiny(steps=9), tmp_path, saving=SAVING, guards=Guards(max_skipped=3), resume=True)
    assert record.rows[-1]["loss"] is not None


@dataclass(frozen=True)
class Leaping(Points):
    """Points of which one batch lies far from all others; some are left out."""

    at: int = 0
    without: tuple[int, ...] = ()

    def train(self, batch_size: int, *, seed: int = 0) -> Any:
        for number, batch in enumerate(super().train(batch_size, seed=seed), start=1):
            if number == self.at:
                batch["features"] *= 100
            if number not in self.without:
                yield batch


def test_a_loss_that_leaps_ends_the_run_before_anything_of_it_is_saved_and_its_data_can_be_left_out(
    tmp_path: Path,
) -> None:
    data, guards = Leaping(at=WINDOW + 4), Guards(max_spike=3)
    with pytest.raises(
        LossSpike, match=rf"^step {WINDOW + 4}: the loss is .* and max_spike is 3; go on from the checkpoint of step"
    ):
        train(tiny(steps=40, data=data), tmp_path, saving=SAVING, guards=guards)
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(1, WINDOW + 5))
    assert Checkpoints(tmp_path).steps()[-1] == WINDOW + 2
    again = tiny(steps=30, data=data)
    with pytest.raises(LossSpike):
        train(again, tmp_path, saving=SAVING, guards=guards, resume=True)
    record = train(again, tmp_path, saving=SAVING, guards=guards, resume=True, skip_batches=2)
    assert [row["step"] for row in record.rows] == list(range(1, 31))
    # Gone on with once more, the run does not come back to what it left out.
    longer = train(tiny(steps=34, data=data), tmp_path, saving=SAVING, guards=guards, resume=True)
    never = train(tiny(steps=34, data=Leaping(without=(WINDOW + 3, WINDOW + 4))), tmp_path / "never")
    assert [row["loss"] for row in longer.rows] == [row["loss"] for row in never.rows]


def test_a_leap_within_the_limit_or_before_there_is_a_median_passes(tmp_path: Path) -> None:
    train(tiny(steps=WINDOW, data=Leaping(at=WINDOW)), tmp_path / "early", guards=Guards(max_spike=3))
    train(tiny(steps=WINDOW + 6, data=Leaping(at=WINDOW + 4)), tmp_path / "wide", guards=Guards(max_spike=1e9))


def test_batches_are_left_out_after_a_checkpoint_alone(tmp_path: Path) -> None:
    for given in ({"skip_batches": 3}, {"skip_batches": 3, "resume": True}, {"skip_batches": -1, "resume": True}):
        with pytest.raises(DeclarationError, match=f"skip_batches: is {given['skip_batches']}; it leaves out batches"):
            train(tiny(steps=2), tmp_path, **given)  # type: ignore[arg-type]


def test_copies_that_differ_end_the_run_before_they_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of what one device holds flips after step 5."""
    compare = steps.Watch.compare

    def flipped(self: steps.Watch, number: int, state: TrainState) -> None:
        compare(self, number, _flipped(state) if number > 5 else state)

    monkeypatch.setattr(steps.Watch, "compare", flipped)
    with pytest.raises(
        ReplicasDiffer, match=r"^step 6: parameters/.*: of 2 copies .*go on from the checkpoint of step 4"
    ):
        train(tiny("data=2", steps=9), tmp_path, saving=SAVING, guards=Guards(check_replicas=4))
    assert Checkpoints(tmp_path).steps()[-1] == 4


def test_copies_that_are_equal_change_nothing(tmp_path: Path) -> None:
    plain = train(tiny(steps=5), tmp_path / "plain")
    watched = train(tiny(steps=5), tmp_path / "watched", guards=Guards(check_replicas=2, max_spike=5))
    assert [row["loss"] for row in plain.rows] == [row["loss"] for row in watched.rows]


def _flipped(state: TrainState) -> TrainState:
    name, array = next(iter(state.parameters.items()))
    shards = []
    for shard in array.addressable_shards:
        local = np.array(shard.data)
        if shard.device.id == 1:
            local.view(np.uint8).flat[0] ^= 1
        shards.append(jax.device_put(local, shard.device))
    broken = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
    return TrainState(state.step, state.key, {**state.parameters, name: broken}, state.buffers, state.optimizer)
