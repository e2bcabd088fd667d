"""Checkpoints in a bucket of an emulated Google Cloud Storage, and what cannot be kept there.

pip install -e '.[test,gcs,gcs-emulator]' && python -m pytest -m gcs tests
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardlab.checkpoint import Checkpoints
from shardlab.cli import main
from shardlab.mesh.faults import DeclarationError
from shardlab.run.loop import train
from tests.run.tiny import tiny

ROOT = Path(__file__).parents[2]
LONG = 300
EMULATOR = """
import sys
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://bucket/run", "Orbax writes to directories and to gs:// alone; give gs://BUCKET/PATH, or a directory"),
        ("memory://run", "Orbax writes to directories and to gs:// alone"),
        ("gs://", "names no bucket; give gs://BUCKET/PATH"),
    ],
)
def test_what_cannot_be_kept_there_is_refused(place: str, said: str) -> None:
    with pytest.raises(DeclarationError) as told:
        Checkpoints(place)
    assert str(told.value).startswith(f"checkpoints {place!r}: {said}")


def test_what_reads_buckets_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeclarationError, match=r"needs gcsfs; run pip install 'shardlab\[gcs\]'"):
        Checkpoints("gs://bucket/run")


def test_a_run_is_local_and_no_directory_is_named_after_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(ROOT / "tests/run/tiny.py"), "--out", "gs://bucket/run"]) == 2
    assert "is no local directory; give one, and --checkpoints gs://bucket/run for" in capsys.readouterr().err
    assert main(["train", str(ROOT / "tests/run/tiny.py"), "--checkpoints", "elsewhere"]) == 2
    assert "--checkpoints: is given, and nothing is saved; give --checkpoint-every too" in capsys.readouterr().err
    assert main(["checkpoint", "s3://bucket/run"]) == 2
    assert "Orbax writes to directories and to gs:// alone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def emulator() -> Iterator[dict[str, str]]:
    """The variables of a process whose buckets are emulated."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", EMULATOR, str(port)], stderr=subprocess.DEVNULL)
    try:
        yield {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
            "GCE_METADATA_ROOT": "127.0.0.1:1",  # TensorStore looks for credentials there first
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google what kind of bucket it is
        }
    finally:
        server.kill()
        server.wait()


def shardlab(variables: dict[str, str], *arguments: str, status: int = 0) -> str:
    """What a command says, on standard output last."""
    command = [sys.executable, "-m", "shardlab", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, timeout=LONG, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr + done.stdout


def numbers(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def sent(variables: dict[str, str], verb: str, path: str, data: bytes | None = None) -> bytes:
    """What the emulator answers."""
    asked = urllib.request.Request(variables["STORAGE_EMULATOR_HOST"] + path, data=data, method=verb)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        found: bytes = answer.read()
    return found


TINY = ("tests/run/tiny.py", "--checkpoint-every", "2", "--keep", "9")


@pytest.mark.gcs
def test_a_run_saves_in_a_bucket_and_goes_on_from_it_in_more_processes(
    emulator: dict[str, str], tmp_path: Path
) -> None:
    place, out = "gs://bucket/run", tmp_path / "run"
    options = (*TINY, "--out", str(out), "--checkpoints", place)
    shardlab(emulator, "train", *options, "--steps", "4")
    assert numbers(out) == numbers(train(tiny("data=8", steps=4), tmp_path / "whole").directory)
    assert "go on with it by --resume" in shardlab(emulator, "train", *options, status=2)
    shardlab(emulator, "launch", *options, "--steps", "6", "--resume", "--mesh", "data=4,tensor=2")
    assert len(numbers(out)) == 6
    assert not (out / "checkpoints").exists()
    found = json.loads(shardlab(emulator, "checkpoint", place, "--verify", "--json").splitlines()[-1])
    assert found["directory"] == f"{place}/checkpoints"
    assert [(one["step"], one["faults"]) for one in found["checkpoints"]] == [(2, []), (4, []), (6, [])]
    assert (found["damaged"], found["unfinished"]) == ([], [])


@pytest.mark.gcs
def test_what_is_damaged_or_unfinished_there_is_told_and_passed_over(emulator: dict[str, str], tmp_path: Path) -> None:
    place, options = "gs://bucket/damaged", (*TINY, "--out", str(tmp_path), "--checkpoints", "gs://bucket/damaged")
    shardlab(emulator, "train", *options, "--steps", "6")
    name = "damaged%2Fcheckpoints%2F{}%2F{}".format
    sent(emulator, "DELETE", f"/storage/v1/b/bucket/o/{name(6, 'seal.json')}")
    file = name(4, "state%2Fmanifest.ocdbt")
    data = bytearray(sent(emulator, "GET", f"/storage/v1/b/bucket/o/{file}?alt=media"))
    data[7] ^= 1
    sent(emulator, "POST", f"/upload/storage/v1/b/bucket/o?uploadType=media&name={file}", bytes(data))
    told = shardlab(emulator, "checkpoint", place, "--verify", status=1)
    assert "state/manifest.ocdbt: its SHA-256 is another" in told
    assert "step 6: unfinished" in told
    told = shardlab(emulator, "train", *options, "--steps", "6", "--resume")
    assert told.count("passing over") == 2
    assert "going on from the checkpoint of step 2" in told


@pytest.mark.gcs
def test_what_another_process_has_saved_since_is_seen(emulator: dict[str, str], tmp_path: Path) -> None:
    options = [*TINY, "--out", str(tmp_path), "--checkpoints", "gs://bucket/seen"]
    look = f"""
import subprocess, sys
from shardlab.checkpoint import Checkpoints
store = Checkpoints("gs://bucket/seen")
for more in (["--steps", "2"], ["--steps", "4", "--resume"]):
    subprocess.run([sys.executable, "-m", "shardlab", "train", *{options}, *more], check=True, stdout=sys.stderr)
    print(store.steps())
"""
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, env=emulator, timeout=LONG, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[2]\n[2, 4]\n"


@pytest.mark.gcs
def test_a_bucket_that_is_not_there_is_told(emulator: dict[str, str], tmp_path: Path) -> None:
    options = (*TINY, "--out", str(tmp_path), "--checkpoints", "gs://nowhere/run")
    told = shardlab(emulator, "train", *options, status=2)
    assert "shardlab: checkpoint gs://nowhere/run/checkpoints/2: FileNotFoundError: nowhere" in told
    assert "Traceback" not in told
