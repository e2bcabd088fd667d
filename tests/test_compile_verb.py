"""The contract of `shardlab compile`: what other programs read of it, the files it writes, its exit status."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shardlab.cli import main
from shardlab.report.audit import Audit
from shardlab.report.lint_plan import CODES
from shardlab.run.config import load_config
from shardlab.search.plan_file import PlanFile, write_plan
from tests.report import audits

ROOT = Path(__file__).parent.parent
CONFIG = "tests/run/tiny.py"
SIZES = ("--mesh", "data=2,stage=2,tensor=2", "--microbatches", "4")
NOISE = re.compile(r"TPU|libtpu|absl|InitGoogle|cpu_aot|^[IWEF]\d{4} ", re.MULTILINE)


class Done(NamedTuple):
    """A `shardlab` in a process of its own that has ended."""

    status: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        """The JSON object on standard output, where nothing else may be."""
        return json.loads(self.out)


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shardlab", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> Done:
    try:
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def shardlab(*arguments: object) -> Done:
    return ended(started(*arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Done:
    """A pipeline on eight emulated devices, with every file that can be written."""
    files = ("--hlo", folder / "step.hlo", "--save", folder / "a.json", "--html", folder / "page.html")
    return shardlab("compile", CONFIG, *SIZES, *files, "--json")


def check_contract(facts: Any) -> None:
    """What other programs rely on."""
    assert isinstance(facts["hbm_bytes"], int)
    assert isinstance(facts["fits"], bool)
    assert facts["hbm_capacity_bytes"] is None or isinstance(facts["hbm_capacity_bytes"], int)
    assert facts["compile_seconds"] > 0
    for row in facts["collectives"]:
        assert isinstance(row["kind"], str)
        assert set(row["axes"]) <= set(facts["mesh"])
        assert all(isinstance(row[name], int) and row[name] > 0 for name in ("count", "payload_bytes", "wire_bytes"))
        assert isinstance(row["async"], bool)
        assert row["cause"].strip()
    assert facts["wire_bytes"] == sum(row["wire_bytes"] for row in facts["collectives"])
    assert facts["wire_bytes"] == sum(facts["wire_bytes_by_axis"].values())
    assert sum(facts["categories"].values()) == facts["hbm_bytes"]
    assert all({"code", "path", "message", "fix"} <= set(one) and one["code"] in CODES for one in facts["lints"])
    assert {"estimate_seconds", "mfu"} <= set(facts)
    if memory := facts["memory"]:
        held = memory["argument_bytes"] + memory["temp_bytes"] + memory["code_bytes"]
        assert facts["hbm_bytes"] == held + memory["output_bytes"] - memory["alias_bytes"]


def test_json_is_all_there_is_on_standard_output_and_holds_the_contract(compiled: Done) -> None:
    assert compiled.status == 0
    check_contract(compiled.facts)
    facts = compiled.facts
    assert (facts["target"], facts["fits"], facts["hbm_capacity_bytes"]) == ("cpu:8", True, None)
    assert {row["kind"] for row in facts["collectives"]} >= {"all-reduce", "all-gather", "collective-permute"}
    assert {axis for row in facts["collectives"] for axis in row["axes"]} == {"data", "stage", "tensor"}


def test_standard_error_says_the_phases_and_nothing_else(compiled: Done) -> None:
    assert not NOISE.search(compiled.err)
    phases = re.findall(r"^(\w[\w: ]+) \.\.\. [\d.]+ s$", compiled.err, re.MULTILINE)
    assert phases == ["planning", "compiling for cpu:8", "reading the compiled program"]
    others = [line for line in compiled.err.splitlines() if " ... " not in line]
    assert all(line.startswith("note: ") for line in others)


SHAPE = re.compile(r"(pred|[sufb]\w*?\d+)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r"^ *(?:ROOT )?%?[\w.-]+ = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\((.*)$"
)
CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)")


def size_of(shapes: str) -> int:
    """Bytes of all arrays in a text of shapes."""
    total = 0
    for dtype, dims in SHAPE.findall(shapes):
        width = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
        total += width * math.prod(int(dim) for dim in dims.split(",") if dim)
    return total


def group_size(text: str) -> int:
    """Devices of one group, in the three ways that HLO writes them."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    found = re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\},", text)
    assert found is not None, text
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))


def counted(text: str) -> dict[str, tuple[int, int, float]]:
    """Of each kind of collective how many a step runs, their payload and wire bytes: by regular expressions alone."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = found[2]
            bodies[name] = []
            entry = name if found[1] else entry
        elif name:
            bodies[name].append(line)
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            assert bool(trips) == (" while(" in line), line
            assert "branch_computations" not in line
            for called in CALLED.findall(line):
                visit(called, count * (int(trips[1]) if trips else 1))

    visit(entry, 1)
    found_: dict[str, tuple[int, int, float]] = {}
    for name, lines in bodies.items():
        for line in lines:
            if not (found := COLLECTIVE.match(line)) or not times[name]:
                continue
            kind, size = found[2], size_of(found[1])
            parts = 1 if kind == "collective-permute" else group_size(line)
            payload = size * parts if kind == "reduce-scatter" else size
            factor = {"collective-permute": 1.0, "all-reduce": 2 * (parts - 1) / parts}
            wire = payload * factor.get(kind, (parts - 1) / parts)
            count, all_payload, all_wire = found_.get(kind, (0, 0, 0.0))
            runs = times[name]
            found_[kind] = count + runs, all_payload + runs * payload, all_wire + runs * wire
    return found_


def test_the_program_it_writes_counted_by_other_means_gives_the_same_totals(compiled: Done, folder: Path) -> None:
    by_hand = counted((folder / "step.hlo").read_text())
    reported: dict[str, tuple[int, int, float]] = {}
    for row in compiled.facts["collectives"]:
        so_far = reported.get(row["kind"], (0, 0, 0.0))
        reported[row["kind"]] = (
            so_far[0] + row["count"],
            so_far[1] + row["payload_bytes"],
            so_far[2] + row["wire_bytes"],
        )
    assert set(by_hand) == {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
    assert reported == by_hand
    assert max(row["count"] for row in compiled.facts["collectives"]) > 1  # of a loop


def test_the_command_line_in_an_audit_names_the_plan_file(folder: Path) -> None:
    file, plan = folder / "plan.json", folder / "held.json"
    write_plan(plan, PlanFile(CONFIG, {}, {}, load_config(CONFIG).plan()))
    done = shardlab("compile", CONFIG, "--plan", plan, "--save", file)
    assert done.status == 0
    assert done.out.endswith(f"shardlab compile {CONFIG} --target cpu:8 --plan {plan}\n")


def test_what_it_saves_is_what_it_prints_and_equal_audits_do_not_differ(compiled: Done, folder: Path) -> None:
    assert json.loads((folder / "a.json").read_text()) == compiled.facts
    again = shardlab("compile", CONFIG, *SIZES, "--save", folder / "b.json")
    assert again.status == 0
    assert again.out.count("tiny on cpu:8: ") == 1
    same = shardlab("diff", folder / "a.json", folder / "b.json")
    assert (same.status, same.err) == (0, "")
    assert "nothing changed" in same.out
    other = shardlab("compile", CONFIG, "--mesh", "data=4,tensor=2", "--save", folder / "b.json")
    assert other.status == 0
    assert shardlab("diff", folder / "a.json", folder / "b.json").status == 1


def test_the_page_needs_no_network(compiled: Done, folder: Path) -> None:
    page = (folder / "page.html").read_text()
    assert compiled.status == 0
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)


TARGET = ("--target", "tpu:v5e:2x4")
TOO_LARGE = ("--model.num-layers", "2", "--batch-size", "4", "--mesh", "data=4", "--zero", "0")


@pytest.mark.tpu
def test_two_compilations_for_a_tpu_that_is_not_here_at_once(folder: Path) -> None:
    both = [started("compile", CONFIG, *SIZES, *TARGET, "--save", folder / f"{name}.json", "--json") for name in "cd"]
    for done in map(ended, both):
        assert (done.status, done.facts["fits"]) == (0, True)
        assert not NOISE.search(re.sub("compiling for tpu:v5e:2x4", "", done.err))
        check_contract(done.facts)
        assert done.facts["hbm_capacity_bytes"] == int(15.75 * 2**30)
        assert done.facts["memory"]["code_bytes"] > 0
        assert done.facts["estimate_seconds"] == pytest.approx(
            sum(p["seconds"] for p in done.facts["estimate"]["parts"])
        )
        assert 0 < done.facts["mfu"] < 1
        assert {axis for row in done.facts["collectives"] for axis in row["axes"]} == {"data", "stage", "tensor"}
    assert shardlab("diff", folder / "c.json", folder / "d.json").status == 0


@pytest.mark.parametrize("target", ["cpu:8", pytest.param("tpu:v5e:2x4", marks=pytest.mark.tpu)])
def test_what_the_partitioner_writes_of_its_last_resort_is_a_finding(target: str) -> None:
    done = shardlab("compile", "tests/report/recut.py", "--target", target, "--json")
    (found,) = (one for one in done.facts["lints"] if one["code"] == "SL005")
    assert "from {devices=[1,1,4]<=[4]} to {devices=[1,2,1,2]<=[4]" in found["message"]
    assert not NOISE.search(re.sub("compiling for tpu:v5e:2x4", "", done.err))


@pytest.mark.tpu
def test_what_does_not_fit_is_exit_status_1_with_what_would_help_and_all_the_rest() -> None:
    done = shardlab("compile", "configs/llama3_8b.py", *TOO_LARGE, "--target", "tpu:v5e:2x2", "--json")
    facts = done.facts
    assert (done.status, facts["fits"], facts["memory"]) == (1, False, None)
    check_contract(facts)
    needed, capacity = facts["hbm_bytes"], facts["hbm_capacity_bytes"]
    assert capacity == int(15.75 * 2**30) < needed
    # 1.49 B parameters and Adam's two moments, in float32, on every device; what the program names is nearly all.
    assert facts["categories"]["parameters"] + facts["categories"]["optimizer state"] == pytest.approx(17.8e9, rel=0.01)
    assert 0 <= facts["categories"]["rest of what the compiler needs"] < 0.05 * needed
    assert {row["kind"] for row in facts["collectives"]} == {"all-reduce"}
    first = facts["remedies"][0]
    assert (first["change"], first["fits"]) == ("--zero 3", True)
    assert first["hbm_bytes"] + first["saves_bytes"] == needed
    assert first["hbm_bytes"] < capacity


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The verb in this process, where nothing may be compiled: what is wrong is told before."""
    monkeypatch.setenv("SHARDLAB_COMPILING", str(tmp_path))
    monkeypatch.setattr("shardlab.cli.compile._compiled", lambda *_, **__: pytest.fail("it compiles"))

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["compile", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ("", 0, ""),
        ("SL001, SL007", 0, ""),
        ("SL002", 1, "shardlab: SL002 fired, and --fail-on names it\n"),
        ("any", 1, "shardlab: SL002 fired, and --fail-on names it\n"),
    ],
)
def test_a_finding_that_is_guarded_against_is_exit_status_1(
    call: Any, monkeypatch: pytest.MonkeyPatch, given: str, status: int, said: str
) -> None:
    assert {one["code"] for one in audits.fsdp()["lints"]} == {"SL002"}
    monkeypatch.setattr("shardlab.cli.compile._compiled", lambda *_, **__: (Audit(audits.fsdp()), ""))
    found = call(CONFIG, *(["--fail-on", given] if given else []))
    assert (found[0], found[2]) == (status, said)


def test_a_step_that_does_not_fit_is_exit_status_1(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlab.cli.compile._compiled", lambda *_, **__: (Audit(audits.too_large()), ""))
    assert call(CONFIG)[0] == 1


def test_a_code_that_no_lint_has_is_refused_before_anything_is_compiled(call: Any) -> None:
    known = ", ".join([*CODES, "any"])
    assert call(CONFIG, "--fail-on", "SL001,SL099") == (
        2,
        "",
        f"shardlab: --fail-on: 'SL099' is the code of no lint; did you mean 'SL009'? there are {known}\n",
    )


@pytest.mark.parametrize("name", ["hlo", "save", "html"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_compiled(
    call: Any, tmp_path: Path, name: str
) -> None:
    missing = tmp_path / "missing"
    assert call(CONFIG, f"--{name}", tmp_path) == (
        2,
        "",
        f"shardlab: --{name} {tmp_path}: is a directory; give a file\n",
    )
    assert call(CONFIG, f"--{name}", missing / "a") == (
        2,
        "",
        f"shardlab: --{name} {missing}/a: there is no directory {missing}; make it, or give another file\n",
    )


def test_a_file_that_must_not_be_written_is_refused(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    status, _, err = call(CONFIG, "--save", tmp_path / "a", "--hlo", tmp_path / "b")
    assert status == 2
    assert "2 faults in the declaration:" in err
    assert f"--save {tmp_path}/a: must not be written; give another file" in err
