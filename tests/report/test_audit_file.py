"""Saved audits read back, and files that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.report.audit_file import read_audit
from tests.report import audits

WAY_OUT = "; give a file that `shardlab compile --save` wrote"


@pytest.fixture
def refused(tmp_path: Path) -> Any:
    """What is said of a file with this text."""

    def read(text: str | bytes) -> str:
        file = tmp_path / "a.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DeclarationError) as error:
            read_audit(file)
        said = str(error.value)
        assert said.startswith(f"audit '{file}': ")
        assert said.endswith(WAY_OUT)
        return said.removeprefix(f"audit '{file}': ").removesuffix(WAY_OUT)

    return read


@pytest.mark.parametrize("made", [audits.fsdp, audits.pipeline, audits.too_large, audits.unread, audits.cpu])
def test_an_audit_comes_back(made: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(made()))
    assert read_audit(tmp_path / "a.json") == made()


def test_a_file_that_is_not_there_with_the_nearest_that_is(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(DeclarationError) as error:
        read_audit(tmp_path / "audits.json")
    near = f"there is no such file; did you mean '{tmp_path}/audit.json'? give"
    assert near in str(error.value)
    with pytest.raises(DeclarationError, match="there is no such file; give a file"):
        read_audit(tmp_path / "no" / "audits.json")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=r"cannot be read \(.*Is a directory"):
        read_audit(tmp_path)


def test_what_is_not_json(refused: Any) -> None:
    assert refused('{"a": }') == "is not JSON (Expecting value in line 1, column 7)"
    assert refused("").startswith("is not JSON (Expecting value")
    assert refused(b"\xff\xfe").startswith("cannot be read (")


def test_json_that_is_no_audit(refused: Any) -> None:
    assert refused("[1]") == "is not an audit: a JSON array, not an object"
    assert refused("null") == "is not an audit: a JSON null, not an object"
    assert refused("true") == "is not an audit: a JSON truth value, not an object"
    said = refused('{"mesh": {"data": 2}, "collectives": []}')
    assert said.startswith("is not an audit: an object that lacks config, overrides, target,")


def test_an_audit_that_lacks_something(refused: Any) -> None:
    facts = audits.fsdp()
    del facts["lints"], facts["hbm_bytes"]
    assert refused(json.dumps(facts)) == "lacks hbm_bytes, lints"
    facts = audits.fsdp()
    del facts["collectives"][3]["cause"], facts["collectives"][3]["async"]
    assert refused(json.dumps(facts)) == "lacks async, cause in collectives[3]"


def test_json_without_end(refused: Any) -> None:
    assert refused("[" * 100_000).startswith("cannot be read (maximum recursion depth exceeded")
    assert refused("1" * 5000).startswith("cannot be read (Exceeds the limit")
