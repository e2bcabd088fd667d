"""The verbs on saved audits, as other programs call them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardlab.cli import main
from tests.report import audits

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls `main`: the exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(text) for text in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """Saves an audit as `compile --save` does."""

    def write(name: str, facts: dict[str, Any]) -> Path:
        (tmp_path / name).write_text(json.dumps(facts))
        return tmp_path / name

    return write


def test_equal_audits_exit_with_0(call: Call, save: Any) -> None:
    a, b = save("a.json", audits.fsdp()), save("b.json", audits.fsdp())
    assert call("diff", a, b) == (0, "llama3_70b on tpu:v5p:4x8x8: nothing changed\n", "")


def test_another_version_that_changes_nothing_exits_with_0(call: Call, save: Any) -> None:
    other = audits.fsdp()
    other["versions"]["jax"] = "0.12.0"
    status, out, _ = call("diff", save("a.json", audits.fsdp()), save("b.json", other))
    assert status == 0
    assert "jax: 0.10.2 -> 0.12.0" in out


@pytest.mark.parametrize("part", ["collectives", "memory", "findings"])
def test_what_matters_exits_with_1(call: Call, save: Any, part: str) -> None:
    other = audits.fsdp()
    if part == "collectives":
        other["collectives"][0]["async"] = False
    elif part == "memory":
        other["hbm_bytes"] += 2**30
    else:
        other["lints"] = []
    status, out, err = call("diff", save("a.json", audits.fsdp()), save("b.json", other))
    assert (status, err) == (1, "")
    assert f"\n{part}\n! " in out


def test_the_same_as_json(call: Call, save: Any) -> None:
    a, b = save("a.json", audits.fsdp()), save("b.json", audits.fsdp() | {"lints": [], "bound_by": "HBM"})
    status, out, _ = call("diff", a, b, "--json")
    facts = json.loads(out)
    assert status == 1
    assert (facts["same"], facts["matters"]) == (False, True)
    assert facts["differences"][0] == {
        "part": "time",
        "what": "bound by",
        "before": "compute",
        "after": "HBM",
        "text": "compute -> HBM",
        "matters": False,
    }
    assert facts["differences"][1]["what"] == "SL002 head/kernel"
    assert json.loads(call("diff", a, a, "--json")[1]) == {"same": True, "matters": False, "differences": []}


def test_a_file_that_is_no_audit_is_one_line(call: Call, save: Any, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("not JSON")
    status, out, err = call("diff", save("a.json", audits.fsdp()), tmp_path / "b.json")
    assert (status, out) == (2, "")
    assert err == (
        f"shardlab: audit '{tmp_path}/b.json': is not JSON (Expecting value in line 1, column 1); give a file that "
        "`shardlab compile --save` wrote\n"
    )
