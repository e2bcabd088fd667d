"""`shardlab plan --search`: what is wrong with the call is told before the search takes its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardlab.cli import main
from tests.run import tiny


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The verb, where nothing may be searched: the exit status, standard output and standard error."""
    monkeypatch.setattr("shardlab.search.search.search", lambda *_, **__: pytest.fail("it searches"))
    monkeypatch.setattr("shardlab.mesh.offline.compiler_installed", lambda _: False)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["plan", tiny.__file__, *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "target cpu:8: has no speeds to rank plans by; give --target; shardlab targets lists machines"),
        (("--target", "tpu:v5e:2x4", "--top", "0"), "--top: is 0; give at least 1"),
        (("--target", "tpu:v5e:2x4", "--confirm", "-1"), "--confirm: is -1; give 0 or more"),
        (
            ("--target", "tpu:v5e:2x4", "--confirm", "2"),
            "--confirm 2: the compiler for tpu:v5e:2x4 is not installed; pip install 'shardlab[tpu]', or leave it out",
        ),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(call: Any, given: tuple[str, ...], said: str) -> None:
    assert call("--search", *given) == (2, "", f"shardlab: {said}\n")


def test_a_plan_file_that_cannot_be_written_is_refused(call: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert call("--search", "--target", "tpu:v5e:2x4", "--out", missing / "plan.json") == (
        2,
        "",
        f"shardlab: --out {missing}/plan.json: there is no directory {missing}; make it, or give another file\n",
    )


def test_options_of_a_search_without_one_are_refused(call: Any, tmp_path: Path) -> None:
    status, out, err = call("--confirm", "1", "--out", tmp_path / "plan.json")
    assert (status, out) == (2, "")
    assert "  1. --confirm: is of --search; give that too, or leave this out\n  2. --out: is of --search" in err
