"""Seals that lie although their SHA-256 is right, and checkpoints that are made of links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from shardlab.checkpoint.seal import SEAL, CheckpointError, Seal, faults_of_files, hashes, read_seal, write_seal

LEAF = {"shape": [2, 3], "dtype": "float32", "digest": "00ff"}
GOOD: dict[str, Any] = {"step": 3, "about": {}, "tree": {"step": LEAF}, "files": {"state/d": "00"}}


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    (tmp_path / "3").mkdir()
    return epath.Path(tmp_path / "3")


def sealed(folder: epath.Path, **changes: Any) -> None:
    write_seal(folder, Seal(**{**GOOD, **changes}))


def test_a_true_one_is_read(folder: epath.Path) -> None:
    sealed(folder)
    assert read_seal(folder) == Seal(**GOOD)


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "of another step": ({"step": 4}, "it is that of step 4"),
    "of a step that is no number": ({"step": "3"}, "it is that of step '3'"),
    "about nothing": ({"about": None}, "about is no object"),
    "a list of files": ({"files": []}, "files is no object"),
    "a file without a hash": ({"files": {"state/d": 5}}, "the SHA-256 of a file is no text"),
    "no arrays": ({"tree": 7}, "tree is no object"),
    "an array of nothing": ({"tree": {"step": None}}, "step has no shape"),
    "a shape below 0": ({"tree": {"step": {**LEAF, "shape": [-1]}}}, "step has no shape"),
    "a shape without end": ({"tree": {"step": {**LEAF, "shape": [10**30]}}}, "step has no shape"),
    "a shape that is text": ({"tree": {"step": {**LEAF, "shape": "23"}}}, "step has no shape"),
    "a dtype of nothing": ({"tree": {"step": {**LEAF, "dtype": "os.system"}}}, "step has dtype 'os.system'"),
    "a dtype of objects": ({"tree": {"step": {**LEAF, "dtype": "O"}}}, "step has dtype 'O'"),
    "a digest that is none": ({"tree": {"step": {**LEAF, "digest": 5}}}, "step has no dtype or no digest"),
}


@pytest.mark.parametrize("lie", LIES)
def test_one_that_lies_is_damaged(folder: epath.Path, lie: str) -> None:
    changes, said = LIES[lie]
    sealed(folder, **changes)
    with pytest.raises(CheckpointError) as told:
        read_seal(folder)
    assert str(told.value) == f"checkpoint {folder}: seal.json is damaged ({said}); use another"


BROKEN = {
    "nothing": b"",
    "text": b"no json",
    "no UTF-8": b"\xff\xfe",
    "without end": b"[" * 100_000,
    "a list": b"[]",
    "an object of nothing": b"{}",
    "a number of thousands of digits": b"1" * 5000,
    "more than a seal": json.dumps({"sha256": "", **GOOD, "more": 1}).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_that_is_no_seal_is_damaged(folder: epath.Path, name: str) -> None:
    (folder / SEAL).write_bytes(BROKEN[name])
    with pytest.raises(CheckpointError, match=r"seal\.json is damaged \("):
        read_seal(folder)


def test_files_elsewhere_are_not_looked_at(folder: epath.Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    lying = Seal(**{**GOOD, "files": {"../secret": "00", "/etc/passwd": "00"}})
    assert faults_of_files(folder, lying) == ["../secret: is missing", "/etc/passwd: is missing"]


@pytest.mark.parametrize("target", ["..", "/etc/passwd", "nowhere"])
def test_no_link_is_followed(folder: epath.Path, target: str) -> None:
    sealed(folder)
    (Path(folder) / "state").mkdir()
    (Path(folder) / "state" / "d").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"3/state: d is a link, and none was written; use another"):
        faults_of_files(folder, read_seal(folder))


def test_shares_are_all_files_once_and_as_large(folder: epath.Path) -> None:
    """As Orbax names them: of every process a large file and a small one."""
    sizes = {f"{process}/{name}": size for process in "0123" for name, size in (("data", 1000), ("manifest", 10))}
    for name, size in sizes.items():
        (Path(folder) / name).parent.mkdir(exist_ok=True)
        (Path(folder) / name).write_bytes(name.encode() * size)
    shares = [hashes(folder, share, 4) for share in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert {name: one for share in shares for name, one in share.items()} == hashes(folder)
    assert [sum(sizes[name] for name in share) for share in shares] == [1010] * 4
