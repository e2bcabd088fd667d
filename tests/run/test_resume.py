"""A run that ends early goes on: bit for bit on its own plan, on any other as near as plans are."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills import ended, newest, started, told_by
from shardlab.checkpoint import Checkpoints
from shardlab.mesh.faults import DeclarationError
from shardlab.run.batches import batches_after
from shardlab.run.data import ByteText
from shardlab.run.loop import train
from shardlab.run.record import METRICS, RunRecord, read_rows, read_run
from shardlab.run.resume import Saving, Start
from tests.run.test_loop import Heard, numbers
from tests.run.tiny import tiny

SAVING = Saving(every=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Seven steps at once."""
    return train(tiny(steps=7, eval_every=3), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as far as its fifth step, with checkpoints of steps 4 and 5; no test may change it."""
    out = tmp_path_factory.mktemp("early")
    train(tiny(steps=5, eval_every=3), out, saving=SAVING)
    return out


@pytest.fixture
def run(early: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(early, tmp_path / "run"))


def losses(record: RunRecord) -> list[float | None]:
    return [row["loss"] for row in record.rows]


@pytest.mark.versions
def test_it_goes_on_as_if_it_had_never_ended(whole: RunRecord, run: Path) -> None:
    heard = Heard()
    record = train(tiny(steps=7, eval_every=3), run, saving=SAVING, resume=True, view=heard)
    assert "going on from the checkpoint of step 5" in heard.texts
    assert [row["step"] for row in read_rows(run)] == list(range(1, 8))
    # The early run's last step was evaluated too.
    assert numbers(record.rows)[5:] == numbers(whole.rows)[5:]
    assert losses(record) == losses(whole)
    assert record.report["resumed_from"] == 5
    assert record.report["initial_eval_loss"] == whole.report["initial_eval_loss"]
    assert record.report["checkpoints"] == [6, 7]
    assert (run / "parameters.npz").read_bytes() == (whole.directory / "parameters.npz").read_bytes()


@pytest.mark.parametrize("sizes", ["data=2,tensor=2", "stage=2,data=2"])
def test_it_goes_on_upon_another_plan(whole: RunRecord, run: Path, sizes: str) -> None:
    config = tiny(sizes, steps=7, zero=1, microbatches=2)
    record = train(config, run, saving=SAVING, resume=True)
    assert losses(record)[:5] == losses(whole)[:5]
    assert losses(record) == pytest.approx(losses(whole), rel=1e-5)


def test_rows_after_the_checkpoint_are_made_anew(whole: RunRecord, run: Path) -> None:
    with (run / METRICS).open("a") as file:
        file.write('{"step": 6, "loss": 99.0, "grad_norm": 0.0, "seconds": 1.0, "tokens": 16}\n{"step": 7, "lo')
    record = train(tiny(steps=7, eval_every=3), run, saving=SAVING, resume=True)
    assert losses(record) == losses(whole)
    assert [row["step"] for row in read_rows(run)] == list(range(1, 8))


def test_with_nothing_saved_it_starts_at_step_0(whole: RunRecord, tmp_path: Path) -> None:
    heard = Heard()
    record = train(tiny(steps=7, eval_every=3), tmp_path / "new", saving=SAVING, resume=True, view=heard)
    assert "nothing is saved yet: starting at step 0" in heard.texts
    assert numbers(record.rows) == numbers(whole.rows)
    assert record.report["resumed_from"] is None


def test_a_run_that_has_ended_stays_as_it_is(run: Path) -> None:
    heard, before = Heard(), (run / METRICS).read_text()
    record = train(tiny(steps=5, eval_every=3), run, saving=SAVING, resume=True, view=heard)
    assert f"the run in {run} has ended: all 5 steps are done" in heard.texts
    assert (run / METRICS).read_text() == before
    assert record.report["steps_done"] == 5


def test_fewer_steps_than_are_done_are_refused(run: Path) -> None:
    with pytest.raises(
        DeclarationError, match=r"steps: 3, and the checkpoint in .* is of step 5; give as many steps at least"
    ):
        train(tiny(steps=3), run, saving=SAVING, resume=True)


def test_a_new_run_does_not_take_the_place_of_one_with_checkpoints(run: Path) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(DeclarationError, match=r"holds a run with a checkpoint of step 5; go on with it by --resume"):
        train(tiny(steps=7), run, saving=SAVING)
    assert sorted(run.rglob("*")) == before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def test_a_damaged_checkpoint_is_passed_over_aloud(whole: RunRecord, run: Path) -> None:
    flip(next(path for path in (run / "checkpoints" / "5" / "state" / "d").iterdir()))
    heard = Heard()
    record = train(tiny(steps=7, eval_every=3), run, saving=SAVING, resume=True, view=heard)
    assert any(text.startswith("passing over: checkpoint") and "SHA-256" in text for text in heard.texts)
    assert "going on from the checkpoint of step 4" in heard.texts
    assert losses(record) == losses(whole)


def test_one_that_was_never_finished_and_one_that_was_removed_are_passed_over(whole: RunRecord, run: Path) -> None:
    (run / "checkpoints" / "5" / "seal.json").unlink()
    heard = Heard()
    record = train(tiny(steps=7, eval_every=3), run, saving=SAVING, resume=True, view=heard)
    assert any("never finished" in text for text in heard.texts)
    assert losses(record) == losses(whole)


def test_where_all_are_damaged_nothing_is_started(run: Path) -> None:
    for step in (4, 5):
        flip(next(path for path in (run / "checkpoints" / str(step) / "state" / "d").iterdir()))
    with pytest.raises(DeclarationError, match=r"none of the 2 checkpoints in .* can be read; the newest: checkpoint"):
        train(tiny(steps=7), run, saving=SAVING, resume=True)


def test_where_all_seals_are_damaged_nothing_is_started(run: Path) -> None:
    for step in (4, 5):
        (run / "checkpoints" / str(step) / "seal.json").write_text("{}")
    before = (run / METRICS).read_text()
    with pytest.raises(DeclarationError, match=r"none of the 2 checkpoints in .* can be read; the newest: checkpoint"):
        train(tiny(steps=7), run, saving=SAVING, resume=True)
    assert (run / METRICS).read_text() == before


def test_a_run_that_goes_on_writes_to_no_link(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("metrics.new", "report.json", "parameters.npz", "loss.png"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine)
    train(tiny(steps=7), run, saving=SAVING, resume=True)
    assert mine.read_text() == "mine"
    assert read_run(run).report["steps_done"] == 7


def test_a_position_that_the_data_does_not_know_is_refused() -> None:
    class Data:
        def set_state(self, position: Any) -> None:
            position["batches"] + 1

    start = Start(3, None, {"data": {"batches": "three"}})
    with pytest.raises(
        DeclarationError, match=r"^resume: the data cannot go on from the position in the checkpoint \(Typ"
    ):
        batches_after(Data(), start)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has 0 of the 5 rows before the checkpoint"),
        ('{"step": 2}\n', "line 1 is not the row of step 1"),
        ("no json\n", "line 1 is not the row of step 1"),
        ("[]\n", "line 1 is not the row of step 1"),
        ("[" * 100_000, "line 1 is not the row of step 1"),
    ],
)
def test_metrics_that_are_another_runs_are_refused(run: Path, text: str, said: str) -> None:
    (run / METRICS).write_text(text)
    with pytest.raises(DeclarationError, match=said):
        train(tiny(steps=7), run, saving=SAVING, resume=True)
    assert (run / METRICS).read_text() == text


def test_data_of_another_seed_is_refused(tmp_path: Path) -> None:
    data = ByteText(seq_len=8, max_megabytes=0.1)
    config = tiny(steps=2, **text_model(data))
    train(config, tmp_path, saving=SAVING)
    with pytest.raises(
        DeclarationError, match="data seed: is 5, and the stored position is one in data where it was 0"
    ):
        train(tiny(steps=4, seed=5, **text_model(data)), tmp_path, saving=SAVING, resume=True)


def text_model(data: ByteText) -> dict[str, Any]:
    from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
    from shardlab.module.pipeline import Pipeline

    return {
        "data": data,
        "model": DecoderConfig(
            vocab_size=256, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8
        ),
        "loss": next_byte_loss,
        "rules": decoder_rules("tensor"),
        "pipeline": Pipeline(before="embed", blocks="blocks", after="head", context="context"),
    }


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(whole: RunRecord, tmp_path: Path, name: str) -> None:
    class Stops(Heard):
        def step(self, row: Any) -> None:
            super().step(row)
            if row["step"] == 1:
                os.kill(os.getpid(), getattr(signal, name))

    out = tmp_path / "run"
    record = train(tiny(steps=7, eval_every=3), out, saving=Saving(every=100), view=Stops())
    done = record.report["steps_done"]
    assert 1 <= done < 7
    assert record.report["interrupted"]
    assert Checkpoints(out).steps() == [done]
    after = train(tiny(steps=7, eval_every=3), out, saving=Saving(every=100), resume=True)
    assert losses(after) == losses(whole)


def test_an_error_ends_the_run_and_not_what_it_is_saving(tmp_path: Path) -> None:
    class Fails(Heard):
        def step(self, row: Any) -> None:
            if row["step"] == 3:
                raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        train(tiny(steps=7), tmp_path, saving=SAVING, view=Fails())
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """In a process of its own, so that -9 ends it as a machine would; `benchmarks/kills.py` does it a hundred times."""
    ended(started(tmp_path / "whole", 60, 3))
    out = tmp_path / "killed"
    process = started(out, 60, 3)
    limit = time.monotonic() + 100
    while time.monotonic() < limit and process.poll() is None and not newest(out):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    ended(started(out, 60, 3))
    assert told_by(out) == told_by(tmp_path / "whole")
    assert len(told_by(out)) == 60
