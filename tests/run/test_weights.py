"""A run that starts from weights of others, and writes its own for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from shardlab.checkpoint.safetensors import SINGLE, read_folder
from shardlab.cli import main
from shardlab.mesh.faults import DeclarationError
from shardlab.run.config import override
from shardlab.run.evaluate import evaluate
from shardlab.run.export import export
from shardlab.run.loop import train
from shardlab.run.record import RunRecord, read_arrays
from shardlab.run.resume import Saving
from tests.checkpoint.families import GOLDEN, LOGITS, tokens
from tests.run.weighted import config

FILE = str(Path(__file__).parent / "weighted.py")


def golden_loss() -> float:
    """The mean cross-entropy of transformers' logits."""
    logits = read_folder(GOLDEN / "llama" / LOGITS)["logits"].array().astype(np.float64)
    picked = np.take_along_axis(logits, tokens()[..., None], -1)[..., 0]
    return float(np.mean(np.log(np.exp(logits).sum(-1)) - picked))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """A step from the weights, saved."""
    return train(config(), tmp_path_factory.mktemp("run"), saving=Saving(1))


def test_a_run_starts_from_them(run: RunRecord) -> None:
    assert run.rows[0]["loss"] == pytest.approx(golden_loss(), rel=1e-5)
    assert run.rows[0]["grad_norm"]


def test_what_is_evaluated_without_a_run_is_them() -> None:
    found = evaluate(config())
    assert found["eval_loss"] == pytest.approx(golden_loss(), rel=1e-5)
    assert found["parameters"] == str(GOLDEN / "llama")


@pytest.mark.parametrize("saved", [True, False])
def test_what_a_run_came_to_is_written_by_their_names(run: RunRecord, saved: bool, tmp_path: Path) -> None:
    directory = run.directory
    if not saved:
        directory = tmp_path / "run"
        directory.mkdir()
        (directory / "parameters.npz").write_bytes((run.directory / "parameters.npz").read_bytes())
    (file,) = export(config(), directory, tmp_path / "out")
    first, found = (safetensors.numpy.load_file(one) for one in (GOLDEN / "llama" / SINGLE, file))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in found.items()}
    own = read_arrays(run.directory)
    for ours, theirs in (("mlp/down", "mlp.down"), ("attention/k", "self_attn.k")):
        value = found[f"model.layers.2.{theirs}_proj.weight"]
        np.testing.assert_array_equal(value, own[f"blocks/2/{ours}/kernel"].T)
        assert not np.array_equal(value, first[f"model.layers.2.{theirs}_proj.weight"])  # it has learnt


def test_what_cannot_be_is_refused_before_anything_is_compiled_or_written(
    run: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_(**changes: Any) -> Any:
        return override(config(), changes)

    with pytest.raises(
        DeclarationError, match=r"blocks/0/attention/q_norm/scale and 2 more like it: the table of names"
    ):
        train(dataclasses.replace(config(), model=dataclasses.replace(config().model, qk_norm=True)), tmp_path / "new")
    with pytest.raises(DeclarationError, match="weights 'nowhere': is no directory"):
        train(with_(weights="nowhere"), tmp_path / "new")
    with pytest.raises(DeclarationError, match="names: is ''; give one of llama"):
        evaluate(with_(names=""))
    assert not (tmp_path / "new").exists()
    assert main(["plan", FILE, "--names", "mixtral"]) == 2
    assert "tensor 'model.layers.0.mlp.down_proj.weight'" in capsys.readouterr().err
    with pytest.raises(DeclarationError, match=r"holds no parameters.npz"):
        export(config(), tmp_path, tmp_path / "out")
    other = dataclasses.replace(config(), model=dataclasses.replace(config().model, mlp_dim=24))
    with pytest.raises(DeclarationError, match=r"blocks/0/mlp/down/kernel.*: is \[20, 16\] in run"):
        export(other, run.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_need_them(run: RunRecord) -> None:
    again = train(override(config(), {"weights": "gone", "steps": 2}), run.directory, saving=Saving(1), resume=True)
    assert [row["step"] for row in again.rows] == [1, 2]
    assert (again.rows[1]["loss"] or 9e9) < (again.rows[0]["loss"] or 0)


def test_the_verb(run: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--run", str(run.directory), "--out", str(tmp_path / "out")]
    assert main(["export", FILE, *given, "--weights-dtype", "bfloat16", "--max-bytes", "9000", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert len(files) > 3
    assert {tensor.dtype for tensor in read_folder(tmp_path / "out").values()} == {"bfloat16"}
    assert main(["export", FILE, *given]) == 2
    assert "holds ['model-00001" in capsys.readouterr().err
    assert main(["export", FILE, "--run", str(run.directory)]) == 2
    assert "--out: is missing; give the folder to make" in capsys.readouterr().err
