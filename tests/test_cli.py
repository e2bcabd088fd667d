"""The command line: what other programs read of it, what it refuses and how, and which options reach which verb."""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import shardlab.pipeline.schedules
import shardlab.run.loop
import shardlab.step.verify
from shardlab.cli import HELP, VERBS, main
from shardlab.mesh.faults import DeclarationError
from shardlab.plan.plan import Plan
from shardlab.run.config import Config
from shardlab.run.record import FILES
from tests.run import tiny

ROOT = Path(__file__).parent.parent
CONFIG = tiny.__file__

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls `main`: the exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(text) for text in arguments])
        except SystemExit as error:  # by tyro, for help and for arguments that it cannot read
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def width_of_numbers() -> Iterator[None]:
    """Verbs in float64 make JAX wide, which a process that ends need not undo. JAX has its eight devices by then."""
    assert jax.device_count() == 8
    before = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", before)


def facts(call: Call, *arguments: object) -> Any:
    """The one JSON object on standard output."""
    status, out, _ = call(*arguments, "--json")
    assert status == 0
    assert out.count("\n") == 1
    return json.loads(out)


class Reached(BaseException):
    """What a verb would have run; no error, which would be told to the user."""

    def __init__(self, given: Any) -> None:
        self.given = given


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Calls a verb up to what it would run: the config that `train` is given, the plan that `verify` is."""

    def stop(place: int) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> None:
            raise Reached(given[place])

        return run

    monkeypatch.setattr(shardlab.run.loop, "train", stop(0))
    monkeypatch.setattr(shardlab.step.verify, "verify", stop(3))

    def run(*arguments: object) -> Any:
        with pytest.raises(Reached) as found:
            main([str(text) for text in arguments])
        return found.value.given

    return run


# --- help and what starts nothing


def test_help_names_every_verb(call: Call) -> None:
    assert call("--help") == call() == call("help") == (0, HELP, "")
    for verb in VERBS:
        assert f"\n  shardlab {verb} " in HELP


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help(call: Call, verb: str) -> None:
    status, out, err = call(verb, "--help")
    assert (status, err) == (0, "")
    assert "--json" in out
    assert "--debug" in out
    without = ("checkpoint", "report", "schedule", "diff", "targets")
    assert ("--batch-size" in out) == ("CONFIG" in out.splitlines()[0]) == (verb not in without)


def test_help_after_a_config_has_its_options_and_values(call: Call) -> None:
    status, out, _ = call("plan", CONFIG, "--help")
    assert status == 0
    flat = re.sub(r"[│\s]+", " ", out)  # a narrow terminal breaks lines
    assert "--model.num-layers INT" in flat
    assert "--batch-size INT global examples a step (default: 16)" in flat
    assert "--model.num-layers" not in call("plan", "--help")[1]


def test_help_and_schedules_start_no_jax() -> None:
    code = (
        "import sys\nfrom shardlab.cli import main\nmain(['--help'])\nmain(['schedule', '1f1b'])\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as error:\n    print(error.code, file=sys.stderr)\n"
        "print('jax' in sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "0\nFalse\n"


# --- targets


def test_the_targets_and_where_their_numbers_are_from(call: Call) -> None:
    rows = {f"{row['platform']}:{row['kind']}": row for row in facts(call, "targets")["targets"]}
    assert rows["tpu:v5p"]["usable_hbm_bytes"] == int(95.74 * 2**30)
    assert all(row["sources"] and isinstance(row["compiler_installed"], bool) for row in rows.values())
    status, out, _ = call("targets")
    assert status == 0
    lines = [line for line in out.splitlines() if line.startswith(("tpu:", "gpu:"))]
    assert [line.split()[0] for line in lines] == list(rows)
    assert "tpu:v5p         96   95.74  2.77           459  ICI 6 x 90 (3-D), DCN 6.25 " in out
    assert "gpu:gb200      186  184.31  7.93          2500  NVLink 900 (72 GPUs), network 50 " in out


def test_a_compiler_that_is_not_here_is_named_with_its_extra(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlab.mesh.offline._PLUGINS", {"tpu": ("no_libtpu",), "gpu": ("json",)})
    out = call("targets")[1]
    assert "\na compiler that is not here: pip install 'shardlab[tpu]' for tpu:\n" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("tpu:")] == ["no"] * 5
    assert {line.split()[-1] for line in out.splitlines() if line.startswith("gpu:")} == {"yes"}


def test_a_mesh_laid_on_a_target(call: Call) -> None:
    given = ("targets", "2*tpu:v5e:4x4", "--mesh", "data=2*4,tensor=4")
    found = facts(call, *given)
    assert [(axis["axis"], axis["tier"]) for axis in found["axes"]] == [("data", "dcn"), ("tensor", "ici")]
    assert sorted(found["order"]) == list(range(32))
    out = call(*given)[1]
    assert out.startswith("2*tpu:v5e:4x4: 2 slices joined by DCN, each of 4 x 4 chips, without wrap-around.")
    assert "\n  y 3 3.0 3.1 3.2 3.3\n" in out
    assert call("targets", "tpu:v5e:4x4")[1].startswith("tpu:v5e:4x4: a slice of 4 x 4 chips")


def test_a_target_that_is_not_known(call: Call) -> None:
    status, _, err = call("targets", "tpu:v9:4x4")
    assert (status, err[:40]) == (2, "shardlab: target 'tpu:v9:4x4': 'v9' is n")


# --- schedule


def test_schedules_side_by_side(call: Call) -> None:
    found = facts(call, "schedule", "--compare", "--stages", 2, "--microbatches", 4)
    assert (found["stages"], found["microbatches"]) == (2, 4)
    rows = {row["name"]: row for row in found["schedules"]}
    assert {"gpipe", "1f1b", "zb_v", "dualpipe_v"} < set(rows)
    assert rows["1f1b"]["makespan"] == (4 + 1) * 3
    status, out, _ = call("schedule", "--compare", "--stages", 2, "--microbatches", 4)
    assert status == 0
    assert len(out.splitlines()) == 2 + len(rows)


def test_delayed_sends_side_by_side(call: Call) -> None:
    given = ("schedule", "--compare", "--stages", 4, "--microbatches", 16, "--send", 0.5, "--delayed")
    rows = {(row["name"], row["delayed"]): row for row in facts(call, *given)["schedules"]}
    assert rows["1f1b", False]["makespan"] == 19 * 3 + 2 * 18 * 0.5
    assert rows["1f1b", True]["makespan"] == 19 * 3 + 2 * 3 * 0.5
    out = call(*given)[1]
    assert "\n1f1b " in out
    assert "\n1f1b, delayed " in out
    found = facts(call, "schedule", "automatic", *given[2:])
    assert found["sends"] == "delayed"
    assert found["lockstep"]["makespan"] <= min(row["makespan"] for row in rows.values())
    assert "\nthe best found: automatic, sends delayed; " in call("schedule", "automatic", *given[2:])[1]


def test_the_best_schedule_for_given_times(call: Call) -> None:
    given = ("--stages", 4, "--microbatches", 8, "--limit", 4)
    found = facts(call, "schedule", "automatic", *given)
    assert (found["name"], found["virtual"], found["lockstep"]["makespan"]) == ("zb_v", 2, 25.5)
    status, out, _ = call("schedule", "automatic", *given)
    assert status == 0
    assert "\nthe best found: zb_v; a stage's costs are its share of a device's\ntakes longer: zb_h1 27\n" in out
    assert "\nholds more than 4 microbatches: gpipe 8, 1f1b 7, " in out


def test_a_table_to_csv_and_back_drawn_and_traced(call: Call, tmp_path: Path) -> None:
    files = {suffix: tmp_path / f"mine.{suffix}" for suffix in ("csv", "png", "json")}
    status, out, _ = call(
        *("schedule", "zb_h1", "--stages", 2, "--microbatches", 3, "--to-csv", files["csv"]),
        *("--draw", files["png"], "--trace", files["json"]),
    )
    assert status == 0
    assert out.endswith(
        f"table written to {files['csv']}\ntrace written to {files['json']}\npicture written to {files['png']}\n"
    )
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "traceEvents" in json.loads(files["json"].read_text())
    original = facts(call, "schedule", "zb_h1", "--stages", 2, "--microbatches", 3)
    again = facts(call, "schedule", "--csv", files["csv"])
    assert again == {**original, "name": "mine"}


def test_a_table_of_ones_own_plans_and_verifies(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    call("schedule", "1f1b_split", "--stages", 2, "--microbatches", 2, "--to-csv", file)
    given = ("--mesh", "data=1,stage=2", "--target", "cpu:2", "--schedule", file, "--microbatches", 2)
    found = facts(call, "plan", CONFIG, *given)
    assert (found["schedule"], found["stages"]) == ("mine", 2)
    assert "mine: 2 devices, 2 microbatches" in call("plan", CONFIG, *given)[1]
    status, _, err = call("plan", CONFIG, *given, "--microbatches", 4)
    assert status == 2
    assert "schedule 'mine': is a table for 2 microbatches, a step has 4; use microbatches=2, or another table" in err


def test_a_table_with_delayed_sends(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    made = ("--stages", 2, "--microbatches", 2, "--delayed")
    call("schedule", "1f1b", *made, "--to-csv", file)
    assert (
        facts(call, "schedule", "--csv", file, "--delayed")["table"] == facts(call, "schedule", "1f1b", *made)["table"]
    )
    given = ("--mesh", "data=1,stage=2", "--target", "cpu:2", "--microbatches", 2, "--sends", "delayed")
    assert facts(call, "plan", CONFIG, *given, "--schedule", file)["sends"] == "delayed"
    assert "schedule mine, sends delayed, head over examples\n" in call("plan", CONFIG, *given, "--schedule", file)[1]
    assert "1f1b: 2 devices, 2 microbatches, 8 ticks, sends delayed\n" in call("plan", CONFIG, *given)[1]
    call("schedule", "1f1b", *made[:-1], "--to-csv", file)
    status, _, err = call("plan", CONFIG, *given, "--schedule", file)
    assert status == 2
    assert "1F0 needs 0F0, which runs in tick 0 on device 0 and, sent a tick later, arrives for tick 2" in err


def test_a_bad_table_is_printed_with_the_cell_marked(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    file.write_text("0F0,0B0\n,1F0,1B0\n")
    status, out, err = call("schedule", "--csv", file)
    assert (status, out) == (2, "")
    assert "\n   1  [0B0]    1F0       <-- 0B0 needs 1B0, which runs in tick 2 on device 1\n" in err
    # In order, device 0 waits.
    found = facts(call, "schedule", "--csv", file, "--in-order")
    assert (found["table"], found["name"]) == ([["0F0", None], [None, "1F0"], [None, "1B0"], ["0B0", None]], "bad")


def test_rows_in_order_are_of_a_table(call: Call) -> None:
    status, out, err = call("schedule", "1f1b", "--in-order")
    assert (status, out) == (2, "")
    assert err == "shardlab: --in-order: says how the rows of a table are read; give one with --csv FILE\n"


def test_a_schedule_as_json(call: Call) -> None:
    found = facts(call, "schedule", "1f1b", "--stages", 2, "--microbatches", 2)
    assert found["table"] == [
        *(["0F0", None], ["0F1", "1F0"], [None, "1B0"]),
        *([None, "1F1"], ["0B0", "1B1"], ["0B1", None]),
    ]
    # (M + P - 1) (F + B) with B = I + W = 2, and (P - 1) / (M + P - 1) of it idle
    for clock in ("lockstep", "async"):
        assert found[clock] == {"makespan": 9.0, "bubble_fraction": pytest.approx(1 / 3)}
    assert found["peak_in_flight"] == [2, 1]


def test_a_schedules_costs_and_defaults(call: Call) -> None:
    found = facts(call, "schedule", "gpipe", "--costs", "2,1,0.5", "--virtual", 1)
    assert (found["name"], found["stages"], found["microbatches"], found["virtual"]) == ("gpipe", 4, 8, 1)
    assert found["costs"] == {"F": 2.0, "I": 1.0, "W": 0.5, "send": 0.0}
    assert found["async"]["makespan"] == (8 + 4 - 1) * (2 + 1.5)
    assert found["peak_in_flight"] == [8, 8, 8, 8]


def test_a_schedule_drawn(call: Call) -> None:
    status, out, err = call("schedule", "1f1b", "--stages", 2, "--microbatches", 2)
    assert (status, err) == (0, "")
    assert out.splitlines()[2:] == [
        "tick       0  1  2  3  4  5",
        "device 0  F0 F1  .  . B0 B1",
        "device 1   . F0 B0 F1 B1  .",
        "in lockstep   makespan 9, bubble 33.3%",
        "asynchronous  makespan 9, bubble 33.3%",
        "microbatches in flight at most, by device: 2, 1",
    ]


# --- plan


def test_a_plan_as_json(call: Call) -> None:
    found = facts(call, "plan", CONFIG)
    assert found["mesh"] == {"data": 8, "stage": 1, "tensor": 1}
    assert found["num_parameters"] == 754
    assert found["bytes_per_device"]["parameters"] == 4 * 754
    assert (found["schedule"], found["bubble_fraction"], found["notes"]) == ("1f1b", 0.0, [])
    assert {row["path"] for row in found["parameters"]} >= {"blocks/0/up/kernel", "inputs/bias"}


def test_a_plan_as_text(call: Call) -> None:
    status, out, err = call("plan", CONFIG, "--mesh", "stage=2,data=4", "--microbatches", 2)
    assert (status, err) == (0, "")
    assert out.startswith("mesh data=4 x stage=2 x tensor=1 on cpu:8 (batch axes data; stage axis stage)\n")
    assert "device 1   . F0 B0 F1 B1  .\nbubble 33.3%; " in out


def test_a_plan_of_stages_as_listed(call: Call) -> None:
    given = ("--model.num-layers", 5, "--mesh", "stage=2,data=4")
    for text in ("E t | t*4 H", "1,4"):
        assert facts(call, "plan", CONFIG, *given, "--stages", text)["layers"] == [1, 4]
    status, out, _ = call("plan", CONFIG, *given, "--stages", "balanced")
    assert "\n2 stages of 3, 2 layers, schedule 1f1b, " in out
    assert "\nnote: stages balanced by estimated cost (" in out
    status, _, err = call("plan", CONFIG, *given, "--stages", "2")
    assert status == 2
    assert err == (
        "shardlab: stages: '2' lists 1 stage, and there are 2, virtual stages counted; list 2, or leave them out: as "
        "even as can be\n"
    )


def test_a_plan_needs_no_device(call: Call) -> None:
    found = facts(call, "plan", CONFIG, "--target", "tpu:v5p:4x8x8", "--mesh", "data=256", "--batch-size", 512)
    assert (found["mesh"]["data"], found["target"]) == (256, "tpu:v5p:4x8x8")


# --- options: on plan, train and verify alike

OPTIONS: dict[str, tuple[str, Any]] = {
    "--schedule": ("gpipe", "gpipe"),
    "--microbatches": ("4", 4),
    "--zero": ("2", 2),
    "--remat": ("full", "full"),
    "--dtype": ("bfloat16", "bfloat16"),
    "--batch-size": ("24", 24),
}
ALL = [part for name, (text, _) in OPTIONS.items() for part in (name, text)]
MESH = ("--mesh", "data=2,stage=2,tensor=2")


def test_the_options_on_plan(call: Call) -> None:
    found = facts(call, "plan", CONFIG, *MESH, *ALL, "--steps", 7, "--seed", 3)
    assert found["mesh"] == {"data": 2, "stage": 2, "tensor": 2}
    for name, (_, value) in OPTIONS.items():
        assert found[name.removeprefix("--").replace("-", "_")] == value


def test_the_options_on_train(reached: Callable[..., Config]) -> None:
    config = reached("train", CONFIG, *MESH, *ALL, "--steps", 7, "--seed", 3)
    assert config.mesh.sizes == {"data": 2, "stage": 2, "tensor": 2}
    assert (config.steps, config.seed) == (7, 3)
    for name, (_, value) in OPTIONS.items():
        assert getattr(config, name.removeprefix("--").replace("-", "_")) == value


def test_the_options_on_verify(reached: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    plan = reached("verify", CONFIG, *MESH, *ALL, "--steps", 7, "--seed", 3)
    names = {"--microbatches": "num_microbatches"}
    assert plan.mesh.sizes == {"data": 2, "stage": 2, "tensor": 2}
    for name, (_, value) in OPTIONS.items():
        assert getattr(plan, names.get(name, name.removeprefix("--").replace("-", "_"))) == value
    given: list[Any] = []

    def prove(*positional: Any, seed: int) -> None:
        given.append((len(positional[4]), seed, positional[3].dtype))
        raise DeclarationError("far enough")

    monkeypatch.setattr(shardlab.step.verify, "verify", prove)
    assert call("verify", CONFIG, "--steps", 7, "--seed", 3)[0] == call("verify", CONFIG)[0] == 2
    assert given == [(7, 3, "float64"), (5, 0, "float64")]  # and what it does unless told otherwise


def test_dotted_options_and_options_before_the_config(reached: Callable[..., Config]) -> None:
    config = reached("train", "--model.num-layers", 4, "--data.scale=0.5", CONFIG, "--optimizer.learning-rate", "0.25")
    assert (config.model.num_layers, config.data.scale, config.optimizer.learning_rate) == (4, 0.5, 0.25)  # type: ignore
    assert config.mesh == tiny.config().mesh


def test_an_axis_that_is_not_named_becomes_1(reached: Callable[..., Config]) -> None:
    config = reached("train", CONFIG, "--mesh", "tensor=8")
    assert config.mesh.sizes == {"data": 1, "stage": 1, "tensor": 8}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_with_one_stage_a_schedule_is_ignored_aloud(call: Call, schedule: str) -> None:
    note = f"schedule {schedule} is ignored: one stage only accumulates its microbatches"
    assert facts(call, "plan", CONFIG, "--schedule", schedule)["notes"] == [note]
    assert f"\nnote: {note}\n" in call("plan", CONFIG, "--schedule", schedule)[1]
    assert facts(call, "plan", CONFIG)["notes"] == []
    assert facts(call, "plan", CONFIG, "--schedule", schedule, "--mesh", "data=4,stage=2")["notes"] == []


def test_stages_are_listed(call: Call) -> None:
    found = facts(call, "plan", CONFIG, *MESH, "--model.num-layers", 4, "--stages", "E t | t*3 H")
    (note,) = found["notes"]
    assert note.startswith("stages of 1, 3 blocks: in a tick every stage computes 3 slots, ")
    text = call("plan", CONFIG, *MESH, "--model.num-layers", 4, "--stages", "E t | t*3 H")[1]
    assert "\n2 stages of 1, 3 layers, schedule 1f1b, head over examples\n" in text
    (note,) = facts(call, "plan", CONFIG, *MESH, "--stages=balanced")["notes"]
    assert note.startswith("stages balanced by estimated cost ")
    assert facts(call, "plan", CONFIG, "--stages", "1,1")["notes"] == [
        "stages are ignored: one stage holds every block"
    ]


def test_stages_that_cannot_be_read_are_pointed_at(call: Call) -> None:
    status, out, err = call("plan", CONFIG, *MESH, "--stages", "E t | t; H", "--head", "examples", "--zero", 7)
    assert (status, out) == (2, "")
    assert err == (
        "shardlab: 2 faults in the declaration:\n"
        "  1. zero=7: is not one of 0, 1, 2, 3; write one of them\n"
        "  2. stages: ';' is no part of a stage; write blocks as t or t*8, any lower-case word for t, E and H for what "
        "is before and after, | between stages\n"
        "    E t | t; H\n"
        "           ^\n"
    )


def test_stages_of_a_config_that_lists_numbers_are_overridden(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "numbers.py"
    file.write_text(
        "from tests.run import tiny\n\ndef config():\n    return tiny.tiny('data=4,stage=2', stages=(2, 0))\n"
    )
    assert "\n2 stages of 2, 0 layers, " in call("plan", file)[1]
    assert "\n2 stages of 1 layer each, " in call("plan", file, "--stages", "E t | t H")[1]


# --- train, eval, report


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "first"


@pytest.fixture(scope="module")
def trained(out: Path) -> tuple[str, str]:
    """Standard output and error of a run with all that a run can write here."""
    said, erred = io.StringIO(), io.StringIO()
    arguments = ["train", CONFIG, "--steps", "4", "--out", str(out), "--eval-every", "4", "--schedule", "1f1b"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(erred):
        assert main([*arguments, "--profile", "--model.num-layers", "3", "--json"]) == 0
    return said.getvalue(), erred.getvalue()


def test_training_writes_a_row_a_step_and_no_others(trained: tuple[str, str], out: Path) -> None:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert {"step", "loss", "grad_norm", "seconds", "tokens"} <= set(row)
    assert ["eval_loss" in row for row in rows] == [False, False, False, True]


def test_training_writes_a_report_and_prints_it(trained: tuple[str, str], out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert json.loads(trained[0]) == report
    assert trained[0].count("\n") == 1
    assert report["mesh"] == {"data": 8, "stage": 1, "tensor": 1}
    assert report["num_parameters"] == 754 + 8 * 16 + 16 + 16 * 8 + 8
    assert sum(report["bytes_per_device"].values()) > 0
    assert (report["schedule"], report["bubble_fraction"]) == ("1f1b", 0.0)
    for row in report["collectives"]:
        assert {"kind", "axes", "count", "payload_bytes", "wire_bytes"} <= set(row)
    assert [(row["kind"], row["axes"]) for row in report["collectives"]] == [("all-reduce", ["data"])]
    assert report["config"] == CONFIG
    # What was given, and only what differs from the config: it has four steps of its own.
    assert report["overrides"] == {"eval_every": 4, "model.num_layers": 3}


def test_what_a_person_sees_goes_to_standard_error_then(trained: tuple[str, str], out: Path) -> None:
    assert "note: schedule 1f1b is ignored: one stage only accumulates its microbatches\n" in trained[1]
    assert re.search(r"^step 4/4  loss \d+\.\d{3} nats  ", trained[1], re.MULTILINE)
    assert trained[1].endswith(f"in {out}: {', '.join(FILES)}, profile/\n")


def test_a_profile_is_a_trace(trained: tuple[str, str], out: Path) -> None:
    traces = list((out / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000


def test_a_run_is_evaluated_on_another_mesh(trained: tuple[str, str], out: Path, call: Call) -> None:
    report = json.loads((out / "report.json").read_text())
    again = facts(call, "eval", CONFIG, "--run", out, "--mesh", "data=2,tensor=4", "--model.num-layers", 3)
    assert again["eval_loss"] == pytest.approx(report["eval_loss"], rel=1e-6)
    assert again["parameters"] == str(out)


def test_a_run_is_reported(trained: tuple[str, str], out: Path, call: Call) -> None:
    assert facts(call, "report", out) == json.loads((out / "report.json").read_text())
    status, text, err = call("report", out)
    assert (status, err) == (0, "")
    assert text in trained[1]
    assert "\n  4 of 4 steps, " in text


def test_a_report_of_something_else_is_refused_in_a_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "report.json").write_text('{"mesh": 3}')
    status, text, err = call("report", tmp_path)
    assert (status, text) == (2, "")
    assert err.startswith(f"shardlab: run '{tmp_path}': report.json is not one that this version reads (")
    assert err.count("\n") == 1


def test_what_a_config_prints_is_no_part_of_the_json(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "prints.py"
    file.write_text(
        "from tests.run.tiny import config as made\nprint('read')\n"
        "def config():\n    print('made')\n    return made()\n"
    )
    assert facts(call, "plan", file)["zero"] == 0


def test_the_directory_is_named_after_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def run(config: Config, place: Any, **options: Any) -> None:
        given.append((str(place), options["profile"], options["tensorboard"]))
        raise DeclarationError("far enough")

    monkeypatch.setattr(shardlab.run.loop, "train", run)
    for more in ([], ["--profile"], ["--profile", "2", "--tensorboard"], ["--profile", "--out", "x"]):
        main(["train", CONFIG, *more])
    assert given == [("runs/tiny", 0, False), ("runs/tiny", 3, False), ("runs/tiny", 2, True), ("x", 3, False)]


# --- verify

PARTS_DIFFER = """
import dataclasses
from flax import nnx
from shardlab.models.mlp import MLP, MLPConfig
from tests.run import tiny

class Scaled(MLP):
    def __call__(self, batch):
        return 2 * super().__call__(batch)

class ScaledConfig(MLPConfig):
    def __call__(self, rngs):
        return Scaled(self, rngs=rngs)

def config():
    return dataclasses.replace(tiny.config(), model=ScaledConfig(num_layers=1, model_dim=4, hidden_dim=4))
"""


@pytest.mark.parametrize("passes", [True, False])
def test_a_proof_and_its_exit_status(tmp_path: Path, call: Call, passes: bool) -> None:
    file = tmp_path / "differ.py"
    file.write_text(PARTS_DIFFER)
    status, out, err = call("verify", CONFIG if passes else file, "--steps", 2, "--schedule", "1f1b", "--json")
    found = json.loads(out)
    assert status == (0 if passes else 1)
    assert found["passed"] is passes
    for name, most in (("loss", 1e-12), ("grad", 1e-12), ("params", 1e-8)):
        assert 0 <= found[f"max_rel_err_{name}"] <= most
    assert found["max_rel_err_composition"] == (0 if passes else pytest.approx(0.5))
    assert found["dtype"] == "float64"
    assert out.count("\n") == 1
    assert err.startswith("planning ... ")
    assert "\nnote: schedule 1f1b is ignored: one stage only accumulates its microbatches\n" in err


# --- what is refused

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a verb": (
        ("trian", CONFIG),
        "'trian' is no verb of shardlab; did you mean 'train'? there are plan, compile, verify, ",
    ),
    "no config": (("plan",), "plan: CONFIG is missing; give a config file first: shardlab plan configs/quickstart.py"),
    "no such file": (("plan", "no.py"), "config 'no.py': there is no such file; "),
    "an axis": (
        ("plan", CONFIG, "--mesh", "data=4,tensr=2"),
        "mesh axis 'tensr': is not an axis of the mesh (data, stage, tensor); did you mean 'tensor'? ",
    ),
    "an axis on train": (("train", CONFIG, "--mesh", "dat=8"), "mesh axis 'dat': is not an axis of the mesh "),
    "an axis on verify": (("verify", CONFIG, "--mesh", "dat=8"), "mesh axis 'dat': is not an axis of the mesh "),
    "sizes": (("plan", CONFIG, "--mesh", "data=3"), "mesh: data=3 x stage=1 x tensor=1 is 3 devices, target cpu:8 has"),
    "no sizes": (("plan", CONFIG, "--mesh", "data"), "mesh 'data': 'data' is not axis=size; write it like "),
    "a target": (("plan", CONFIG, "--target", "cpu:x"), "target"),
    "a batch": (("plan", CONFIG, "--batch-size", "12"), "batch"),
    "zero": (("train", CONFIG, "--zero", "7"), "zero=7: is not one of 0, 1, 2, 3; "),
    "an option": (
        ("plan", CONFIG, "--mehs", "data=2", "--model.num-layer", "4", "--batch_size=8"),
        "2 faults in the declaration: 1. --mehs: is no option of shardlab plan CONFIG; did you mean '--mesh'? --help "
        "lists them 2. --model.num-layer: is no option of shardlab plan CONFIG; did you mean '--model.num-layers'? "
        "--help lists them",
    ),
    "a positional as an option": (
        ("report", "--run", "x"),
        "--run: is no option of shardlab report; --help lists them",
    ),
    "a level": (("plan", CONFIG, "--zero", "-1"), "zero=-1: is not one of 0, 1, 2, 3; write one of them"),
    "steps": (("train", CONFIG, "--steps", "0"), "steps: is 0; give a whole number, 1 or more"),
    "devices": (
        ("eval", CONFIG, "--mesh", "data=4", "--target", "cpu:4"),
        "emulate(4): JAX has already started, with 8",
    ),
    "profile": (("train", CONFIG, "--profile", "9"), "profile: 9 steps of a run of 4; give 1 to 4, or 0 for none"),
    "no run": (("report", "nowhere"), "run 'nowhere': is no directory; "),
    "no parameters": (("eval", CONFIG, "--run", "nowhere"), "run 'nowhere': holds no parameters.npz; "),
    "no schedule": (("schedule", "1f1c"), "schedule '1f1c'"),
    "no stages": (("schedule", "1f1b", "--stages", "0"), "stages is 0; a schedule needs at least 1 "),
    "virtual stages": (("schedule", "1f1b", "--virtual", "-1"), "virtual is -1; a schedule needs at least 1 "),
    "no such table": (("schedule", "--csv", "no.csv"), "schedule 'no.csv': there is no such file; give a CSV "),
    "no picture": (("schedule", "1f1b", "--draw", "x.doc"), "Format 'doc' is not supported"),
    "costs": (("schedule", "1f1b", "--costs", "1,2"), "costs '1,2': is not three times F,I,W; write them as 1,1,1"),
    "negative costs": (("schedule", "1f1b", "--costs=-1,1,1"), "costs: F is -1.0; give every cost as a finite time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_declaration_is_one_message_and_2(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    arguments, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments, *([] if name == "a verb" else ["--json"]))
    assert (status, out) == (2, "")
    *phases, said = re.sub(r"\n +", " ", err).splitlines()
    assert said.startswith(f"shardlab: {message}")
    assert all(" ... " in phase for phase in phases)
    assert "Traceback" not in err
    status, out, err = call(*arguments, "--debug")
    assert (status, out.count("Traceback")) == (2, 0)
    assert "Traceback (most recent call last):" in err
    assert said.removeprefix("shardlab: ")[:20] in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", CONFIG, "--steps", "many"), "many"),
        (("schedule", "--stages", "2"), "NAME"),
    ],
)
def test_arguments_that_cannot_be_read_are_2_too(call: Call, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = call(*arguments, "--json")
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_file_in_the_place_of_the_directory(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "file"
    file.write_text("the user's own")
    status, _, err = call("train", CONFIG, "--out", file, "--json")
    assert status == 2
    assert err.splitlines()[-1] == f"shardlab: out {str(file)!r}: is a file; give a directory"


def test_ctrl_c_before_the_steps_is_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shardlab.run.loop, "train", interrupt)
    status, out, err = call("train", CONFIG)
    assert (status, out) == (130, "")
    assert err == "\nshardlab: stopped by Ctrl-C; what was under way is not finished\n"
    status, _, err = call("train", CONFIG, "--debug")
    assert status == 130
    assert err.startswith("Traceback ")
    assert err.endswith("\nKeyboardInterrupt\n\nshardlab: stopped by Ctrl-C; what was under way is not finished\n")


FAILING = """
import dataclasses
import jax.numpy as jnp
from tests.run import tiny

def loss(y, batch):
    return jnp.dot(y, batch["features"]), 1.0

class Data(tiny.Points):
    def train(self, batch_size, *, seed=0):
        yield from super().train(batch_size, seed=seed)

class Broken(tiny.Points):
    def train(self, batch_size, *, seed=0):
        return open("nowhere")

def config():
    return dataclasses.replace(tiny.config(), FIELD)
"""


@pytest.mark.parametrize("verb", ["train", "verify"])
@pytest.mark.parametrize(
    ("field", "line", "name", "message"),
    [
        ("loss=loss", 7, "loss", "TypeError: dot_general requires contracting dimensions to have the same shape, got "),
        ("data=Broken()", 15, "train", "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere'"),
    ],
)
def test_an_error_in_the_users_own_code_is_its_line_and_2(
    tmp_path: Path, call: Call, verb: str, field: str, line: int, name: str, message: str
) -> None:
    file = tmp_path / "failing.py"
    file.write_text(FAILING.replace("FIELD", field))
    status, _, err = call(verb, file, *(["--out", tmp_path / "out"] if verb == "train" else []))
    assert status == 2
    said = err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"shardlab: {file}:{line}, in {name}: {message}")
    assert said[0].endswith("; --debug shows the way there")
    assert not (tmp_path / "out").exists()
    status, _, err = call(verb, file, "--debug")
    assert status == 2
    assert err.startswith("Traceback ")
    assert f'File "{file}", line {line}, in {name}\n' in err


def test_an_error_of_shardlab_itself_is_a_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "plan", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        call("plan", CONFIG)
    monkeypatch.setattr(shardlab.pipeline.schedules, "SCHEDULES", {"broken": None})
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'virtual'"):
        call("schedule", "broken")


def test_data_that_ends_before_verify_does(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "short.py"
    file.write_text(
        "import dataclasses\nimport itertools\nfrom tests.run import tiny\n\nclass Short(tiny.Points):\n"
        "    def train(self, batch_size, *, seed=0):\n"
        "        return itertools.islice(super().train(batch_size, seed=seed), 3)\n\n"
        "def config():\n    return dataclasses.replace(tiny.config(), data=Short())\n"
    )
    status, _, err = call("verify", file)
    assert status == 2
    assert err == (
        "shardlab: data: train gives 3 batches, and verify is to run 5 steps; make it endless, or give fewer steps\n"
    )


def test_the_version(call: Call) -> None:
    assert call("--version") == (0, f"shardlab {importlib.metadata.version('shardlab')}\n", "")


def test_ctrl_c_while_a_config_is_read_waits_for_it(tmp_path: Path, call: Call) -> None:
    """NumPy, imported meanwhile, would make an ImportError of it."""
    file = tmp_path / "pressing.py"
    file.write_text(
        "import os\nimport signal\nfrom tests.run import tiny\n\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt as error:\n    raise ImportError('numpy') from error\n\nconfig = tiny.config\n"
    )
    before = signal.getsignal(signal.SIGINT)
    status, out, err = call("plan", file)
    assert (status, out) == (130, "")
    assert err == "\nshardlab: stopped by Ctrl-C; what was under way is not finished\n"
    assert signal.getsignal(signal.SIGINT) is before


# --- what only a process of its own can show


def shardlab_process(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """`python -m shardlab`, in an environment that says nothing of devices."""
    told = ("XLA_FLAGS", "PJRT_NPROC", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    clean = {name: value for name, value in os.environ.items() if name not in told}
    command = [sys.executable, "-m", "shardlab", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=clean | variables, stdout=pipe, stderr=pipe, text=True)


def test_the_module_is_the_command() -> None:
    for arguments, status, said in (
        (["schedule", "1f1b"], 0, ""),
        (["schedule", "1f1c"], 2, "shardlab: schedule '1f1c'"),
    ):
        ran = shardlab_process(*arguments)
        _, err = ran.communicate(timeout=120)
        assert ran.returncode == status
        assert err.startswith(said)
        assert err.count("\n") == bool(said)


def test_a_reader_that_leaves_ends_nothing() -> None:
    """As `| head` does. What was asked for has its exit status; Python has nothing to complain of at the end."""
    for arguments in (["schedule", "1f1b"], ["--help"], ["schedule", "1f1b", "--json"]):
        ran = shardlab_process(*arguments)
        assert ran.stdout is not None
        assert ran.stderr is not None
        ran.stdout.close()
        assert ran.stderr.read() == ""
        assert ran.wait(timeout=120) == 0


STARTED = """
import sys
import jax
from tests.run import tiny
print(f"started with {jax.device_count()} devices", file=sys.stderr)

def config():
    return tiny.tiny("data=3", batch_size=6, pipeline=None)
"""


def test_a_config_that_has_started_jax_restarts_the_process_once(tmp_path: Path) -> None:
    file = tmp_path / "started.py"
    file.write_text(STARTED)
    ran = shardlab_process("eval", file, "--json")
    out, err = ran.communicate(timeout=300)
    assert ran.returncode == 0, err
    assert json.loads(out)["batch_size"] == 6
    assert re.findall(r"started with \d+ devices", err) == ["started with 1 devices", "started with 3 devices"]
    ran = shardlab_process("eval", file, SHARDLAB_RESTARTED="1")
    out, err = ran.communicate(timeout=300)
    assert (ran.returncode, out) == (2, "")
    assert "shardlab: emulate(3): JAX has already started, with 1 cpu device; " in err


SLOW = """
import time
from dataclasses import dataclass
from tests.run import tiny

@dataclass(frozen=True)
class Slow(tiny.Points):
    seconds: float = 0.0

    def train(self, batch_size, *, seed=0):
        for step, batch in enumerate(super().train(batch_size, seed=seed), start=1):
            time.sleep(0.05 if step < 5 else self.seconds)
            yield batch

def config():
    return tiny.tiny("data=1", steps=100_000, data=Slow(), pipeline=None)
"""


def lines_of(file: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Waits until the file has so many lines."""
    end = time.monotonic() + 300
    while not (file.is_file() and file.read_text().count("\n") >= count):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_ends_a_run_after_its_step_and_twice_at_once(tmp_path: Path, times: int) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    out = tmp_path / "out"
    # Pressed once: some step soon ends. Twice: the fifth would take as long as the test may.
    ran = shardlab_process("train", tmp_path / "slow.py", "--out", out, "--data.seconds", 0.05 if times == 1 else 600)
    lines_of(out / "metrics.jsonl", 2, ran)
    ran.send_signal(signal.SIGINT)
    if times == 2:
        assert ran.stdout is not None
        while "once more to stop at once" not in (line := ran.stdout.readline()):
            assert line
        ran.send_signal(signal.SIGINT)
    said, err = ran.communicate(timeout=300)
    if times == 1:
        assert ran.returncode == 0, err
        assert "Ctrl-C: stopping after the steps under way; once more to stop at once" in said
        report = json.loads((out / "report.json").read_text())
        assert report["interrupted"]
        assert report["steps_done"] == (out / "metrics.jsonl").read_text().count("\n") < 100_000
    else:
        assert ran.returncode == 130
        assert err == "\nshardlab: stopped by Ctrl-C; what was under way is not finished\n"
        assert not (out / "report.json").exists()
