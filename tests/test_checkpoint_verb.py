"""`shardlab checkpoint`: what a run has saved, and what of it is not what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import shardlab.cli
from shardlab.run.loop import train
from shardlab.run.resume import Saving
from tests.run.tiny import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "run"
    train(tiny(steps=3), out, saving=Saving(every=2))
    return out


def test_it_lists_what_is_sealed_and_finds_a_flipped_bit(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    (run / "checkpoints" / "7").mkdir()
    assert shardlab.cli.main(["checkpoint", str(run), "--verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in told["checkpoints"]] == [2, 3]
    assert [one["step"] for one in told["unfinished"]] == [7]
    assert all(one["faults"] == [] and one["bytes"] > 0 for one in told["checkpoints"])
    assert told["checkpoints"][0]["tree"]["parameters/blocks/0/up/kernel"]["dtype"] == "float32"
    flip(next((run / "checkpoints" / "3" / "state" / "d").iterdir()))
    assert shardlab.cli.main(["checkpoint", str(run), "--verify"]) == 1
    assert "its SHA-256 is another" in capsys.readouterr().out
    flip(run / "checkpoints" / "2" / "seal.json")
    assert shardlab.cli.main(["checkpoint", str(run)]) == 0
    text = capsys.readouterr().out
    assert "step 2: damaged: checkpoint" in text
    assert "step 7: unfinished" in text


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_where_nothing_was_saved_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shardlab.cli.main(["checkpoint", str(tmp_path)]) == 2
    assert "has no checkpoints; give the --out directory of a run that saves" in capsys.readouterr().err
