"""Several processes: the same numbers as one, one voice, one end; whatever happens to one of them.

Those marked slow start many processes; they take some minutes: pytest -m slow tests/run/test_launch.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardlab.checkpoint import Checkpoints
from shardlab.cli import main
from shardlab.run.loop import train
from shardlab.run.record import read_run
from shardlab.run.resume import Saving
from tests.run.tiny import tiny

ROOT = Path(__file__).parents[2]
STUCK = 3
# What a launcher and its processes may take to start and to end.
LONG = 240


def started(out: Path, *options: str, config: str = "tests/run/tiny.py", **variables: str) -> subprocess.Popen[str]:
    """`shardlab launch`, with errors and output in files beside `out`."""
    return subprocess.Popen(
        [sys.executable, "-m", "shardlab", "launch", config, "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=out.with_suffix(".out").open("w"),
        stderr=out.with_suffix(".err").open("w"),
        text=True,
    )


def said(out: Path) -> str:
    return out.with_suffix(".err").read_text()


def ended(process: subprocess.Popen[str], out: Path, status: int = 0) -> None:
    try:
        assert process.wait(LONG) == status, said(out)
    finally:
        process.kill()


def launched(out: Path, *options: str, **more: Any) -> None:
    ended(started(out, *options, **more), out)


def pids(out: Path) -> list[int]:
    """Of the processes, once they have been started."""
    limit = time.monotonic() + LONG
    while time.monotonic() < limit:
        found = re.findall(r"(\d) is (\d+)", said(out))
        if found:
            return [int(pid) for _, pid in found]
        time.sleep(0.05)
    raise AssertionError(said(out))


def wait_for_rows(out: Path, process: subprocess.Popen[str], count: int) -> None:
    limit = time.monotonic() + LONG
    while time.monotonic() < limit and process.poll() is None:
        if (out / "metrics.jsonl").is_file() and len((out / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(said(out))


def numbers(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def alive(pid: int) -> bool:
    """Whether there is such a process, one that has ended and is not reaped included."""
    return Path(f"/proc/{pid}").exists()


def running(pid: int) -> bool:
    """Whether it goes on; one that nobody reaps has ended."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# Two processes of one device each: a sum of two numbers is the same in whatever order.
TWO = ("--processes", "2", "--target", "cpu:2", "--mesh", "data=2")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    options = ("--steps", "6", "--eval-every", "2", "--checkpoint-every", "2")
    launched(out, *TWO, *options, config="tests/run/shared.py")
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, which reads whole batches."""
    return train(tiny("data=2", steps=6, eval_every=2), tmp_path_factory.mktemp("alone")).directory


@pytest.mark.versions
def test_two_processes_compute_what_one_does_bit_for_bit(two: Path, alone: Path) -> None:
    assert numbers(two) == numbers(alone)
    assert (two / "parameters.npz").read_bytes() == (alone / "parameters.npz").read_bytes()


def test_the_first_process_speaks_and_writes_for_all(two: Path) -> None:
    told = two.with_suffix(".out").read_text()
    assert told.count("step 6/6") == told.count("parameters on mesh") == told.count("waits\n") == 1
    assert "Gloo" not in told
    assert len(said(two).splitlines()) == 1  # which process is which
    report = read_run(two).report
    assert [row["process"] for row in report["seconds_by_process"]] == [0, 1]
    assert report["checkpoints"] == [4, 6]
    assert not report["interrupted"]


def test_what_two_processes_saved_is_whole_and_goes_on_in_one(two: Path, alone: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(two, tmp_path / "run"))
    store = Checkpoints(run)
    assert [store.faults(step) for step in store.steps()] == [[], []]
    shutil.rmtree(run / "checkpoints" / "6")
    record = train(tiny("data=2", steps=6, eval_every=2), run, saving=Saving(every=2), resume=True)
    assert record.report["resumed_from"] == 4
    assert numbers(run) == numbers(alone)
    assert (run / "parameters.npz").read_bytes() == (alone / "parameters.npz").read_bytes()


# The launcher, with programs that are there at once in place of training.

LAUNCHER = """
import sys
from shardlab.run.launch import Launch, launch
sys.exit(launch(Launch((sys.executable, "-c", sys.argv[1]), int(sys.argv[2]), 1, float(sys.argv[3]), 0.5)))
"""
WHICH = "import os, sys, time, signal; me = int(os.environ['SHARDLAB_PROCESS'].partition('/')[0])\n"


def launcher(program: str, count: int = 2, grace: float = 60.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WHICH + program, str(count), str(grace)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def heard(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit status, standard output, and the lines of standard error but the first."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.splitlines()[1:]


def test_output_is_the_firsts_and_errors_have_a_name() -> None:
    status, out, err = heard(launcher("print(f'out {me}'); print(f'err {me}', file=sys.stderr)", 3))
    assert (status, out) == (0, "out 0\n")
    assert sorted(err) == ["process 0: err 0", "process 1: err 1", "process 2: err 2"]


def test_a_message_that_all_have_is_shown_once_and_anything_else_as_often_as_it_is_said() -> None:
    program = "time.sleep(me); print('shardlab: 2 faults:\\n  1. a\\n  2. b\\nown\\n  1. a', file=sys.stderr)"
    _, _, err = heard(launcher(program.replace("own", "own' + str(me) + '")))
    assert err == [
        *("process 0: shardlab: 2 faults:", "process 0:   1. a", "process 0:   2. b"),
        *("process 0: own0", "process 0:   1. a", "process 1: own1", "process 1:   1. a"),
    ]


def test_each_process_has_its_devices_and_its_place() -> None:
    status, _, err = heard(launcher("print(os.environ['SHARDLAB_PROCESS'], os.environ['XLA_FLAGS'], file=sys.stderr)"))
    assert status == 0
    found = [re.search(r"(\d/2)@127\.0\.0\.1:(\d+) .*device_count=1$", line) for line in err]
    assert sorted(one[1] for one in found if one) == ["0/2", "1/2"]
    assert len({one[2] for one in found if one}) == 1


@pytest.mark.parametrize(
    ("ends", "status", "how"),
    [
        ("sys.exit(5)", 5, "process 1 ended with status 5; ending the other 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was ended by SIGKILL; ending the other 1"),
    ],
)
def test_one_that_ends_with_an_error_is_named_and_ends_all(ends: str, status: int, how: str) -> None:
    code, _, err = heard(launcher(f"if me: {ends}\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"))
    assert code == status
    assert err == [f"shardlab: {how}", "shardlab: process 0: still there; killed"]


def test_one_that_was_killed_is_named_though_another_that_ended_of_it_is_heard_of_first() -> None:
    """What holds the output of the one that was killed open keeps it from being heard of for a second."""
    program = """
import socket, subprocess
place = ("127.0.0.1", int(os.environ["SHARDLAB_PROCESS"].rpartition(":")[2]))
if me:
    while True:
        try:
            link = socket.create_connection(place)
            break
        except OSError:
            time.sleep(0.05)
    link.recv(1)  # until the other is gone
    sys.exit(2)
server = socket.create_server(place)
link = server.accept()
subprocess.Popen(["sleep", "3"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    code, _, err = heard(launcher(program))
    assert code == 137
    assert err[0] == "shardlab: process 0 was ended by SIGKILL; ending the other 1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_a_second_kills(number: int) -> None:
    program = """
count = [0]
def note(*_):
    count[0] += 1
    print(f"signal {count[0]}", file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
print("ready", file=sys.stderr, flush=True)
end = time.monotonic() + 300
while time.monotonic() < end: time.sleep(0.05)
"""
    process = launcher(program)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    until(lines, "ready", 2)
    process.send_signal(number)
    until(lines, "signal 1", 2)
    process.send_signal(number)
    rest = list(lines)
    assert process.wait(30) == 128 + number
    assert rest == ["shardlab: killed all processes\n"]


def until(lines: Iterator[str], text: str, count: int) -> None:
    for line in lines:
        count -= text in line
        if not count:
            return
    raise AssertionError(text)


def test_processes_that_end_when_asked_to_have_ended_well() -> None:
    process = launcher(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('ready', file=sys.stderr); time.sleep(300)"
    )
    assert process.stderr is not None
    until(iter(process.stderr.readline, ""), "ready", 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_those_that_do_not_end_in_time_are_killed() -> None:
    process = launcher(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', file=sys.stderr); time.sleep(300)", grace=0.5
    )
    assert process.stderr is not None
    until(iter(process.stderr.readline, ""), "ready", 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert process.stderr.read().endswith("shardlab: process 0, 1: still there; killed\n")


# The verb.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "launch: CONFIG is missing; give a config file"),
        (["tests/run/tiny.py", "--processes", "3"], "8 devices do not divide by 3 processes"),
        (["tests/run/tiny.py", "--processes", "0"], "--processes: is 0; give 1 or more"),
        (
            ["tests/run/tiny.py", "--devices-per-process", "2"],
            "2 processes of 2 devices are 4, and the target cpu:8 has 8",
        ),
        (
            ["tests/run/tiny.py", "--target", "gpu:h100:1x8", "--mesh", "data=8"],
            "the target is gpu:h100:1x8; give --target cpu:8",
        ),
        (["tests/run/tiny.py", "--stpes", "2"], "--stpes: is no option of shardlab launch CONFIG"),
    ],
)
def test_what_cannot_be_launched_is_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_one_of_several_does_not_run_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert main(["train", str(ROOT / "tests/run/tiny.py"), "--out", str(tmp_path)]) == 2
    assert "this is one of 4 (SLURM_STEP_NUM_TASKS)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# What takes minutes.


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on eight devices of two processes."""
    out = tmp_path_factory.mktemp("eight") / "run"
    launched(out, "--processes", "2", "--steps", "8", "--eval-every", "3")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_as_many_devices_give_the_same_bits_in_however_many_processes(eight: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "run"
    launched(out, "--processes", str(count), "--steps", "8", "--eval-every", "3")
    assert numbers(out) == numbers(eight)
    assert (out / "parameters.npz").read_bytes() == (eight / "parameters.npz").read_bytes()


@pytest.mark.slow
def test_without_processes_sums_are_taken_in_another_order(eight: Path, tmp_path: Path) -> None:
    """Gloo adds eight numbers in another order than XLA does within a process: float32 differs in its last bits."""
    record = train(tiny("data=8", steps=8, eval_every=3), tmp_path)
    for mine, theirs in zip(numbers(eight), record.rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,stage=2,tensor=2", "stage=2,data=4"])
def test_a_run_goes_on_in_another_number_of_processes_bit_for_bit(tmp_path: Path, mesh: str) -> None:
    options = ("--mesh", mesh, "--zero", "1", "--microbatches", "2", "--eval-every", "3", "--checkpoint-every", "2")
    whole, out = tmp_path / "whole", tmp_path / "run"
    launched(whole, *options, "--processes", "2", "--steps", "8")
    for count, steps in ((2, 3), (1, 5), (4, 7), (2, 8)):
        launched(out, *options, "--processes", str(count), "--steps", str(steps), "--resume")
    assert [row["loss"] for row in numbers(out)] == [row["loss"] for row in numbers(whole)]
    assert (out / "parameters.npz").read_bytes() == (whole / "parameters.npz").read_bytes()


@pytest.mark.slow
def test_text_is_read_in_shares_and_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    text = (
        "--data.seq-len",
        "16",
        "--data.max-megabytes",
        "0.3",
        "--model.num-layers",
        "2",
        "--batch-size",
        "16",
        "--microbatches",
        "2",
    )
    options = (*text, "--mesh", "data=8", "--eval-every", "0", "--checkpoint-every", "2")
    whole, out = tmp_path / "whole", tmp_path / "run"
    launched(whole, *options, "--processes", "1", "--steps", "6", config="configs/quickstart.py")
    for count, steps in ((2, 2), (4, 4), (1, 6)):
        launched(
            out, *options, "--processes", str(count), "--steps", str(steps), "--resume", config="configs/quickstart.py"
        )
    assert numbers(out) == numbers(whole)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step_and_saves_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, *TWO, "--steps", "100000", "--checkpoint-every", "100000")
    wait_for_rows(out, process, 5)
    os.kill(pids(out)[1], signal.SIGTERM)
    ended(process, out)
    report = read_run(out).report
    assert report["interrupted"]
    assert Checkpoints(out).steps() == [report["steps_done"]]
    assert Checkpoints(out).faults(report["steps_done"]) == []
    assert len(numbers(out)) == report["steps_done"] < 100000


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_killed_ends_the_others_and_the_run_goes_on(tmp_path: Path, which: int) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    process = started(out, *TWO, "--steps", "100000", "--checkpoint-every", "5")
    wait_for_rows(out, process, 16)  # saving step 15 waits for step 10: two are whole, and the newest is to be taken
    killed = pids(out)
    os.kill(killed[which], signal.SIGKILL)
    begun = time.monotonic()
    ended(process, out, 128 + signal.SIGKILL)
    assert time.monotonic() - begun < 30
    assert f"process {which} was ended by SIGKILL; ending the other 1" in said(out)
    assert not any(alive(pid) for pid in killed)
    before = max(Checkpoints(out).steps())
    launched(out, *TWO, "--steps", str(before + 7), "--checkpoint-every", "5", "--resume")
    assert read_run(out).report["resumed_from"] == before
    launched(whole, *TWO, "--steps", str(before + 7))
    assert numbers(out) == numbers(whole)


@pytest.mark.slow
def test_a_process_that_sleeps_is_found_by_every_watchdog(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, *TWO, "--stuck-after", "5", config="tests/run/uneven.py", UNEVEN="1:4:sleep 1000")
    ended(process, out, STUCK)
    text = said(out)
    assert "process 0: shardlab: process 0 of 2: nothing for 5 s; step 3 has ended; the stack of every thread:" in text
    assert "process 1: shardlab: process 1 of 2: nothing for 5 s; step " in text
    # Who waits for whom: one sleeps in its data, the other waits for its devices.
    assert re.search(r"^process 1: .*uneven\.py\", line \d+ in train", text, re.MULTILINE)
    assert re.search(r"^process 0: .*steps\.py\", line \d+ in _row", text, re.MULTILINE)


@pytest.mark.slow
def test_a_process_that_is_stuck_in_compiling_is_found_and_the_phase_is_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, *TWO, "--stuck-after", "4", config="tests/run/uneven.py", UNEVEN="1:0:sleep 1000")
    ended(process, out, STUCK)
    told = said(out)
    assert "process 1: shardlab: process 1 of 2: nothing for 40 s; still compiling the train step for " in told
    assert re.search(r"^process 1: .*uneven\.py\", line \d+ in loss", told, re.MULTILINE)


@pytest.mark.slow
def test_a_process_that_is_stopped_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, *TWO, "--steps", "100000", "--stuck-after", "5")
    wait_for_rows(out, process, 3)
    found = pids(out)
    os.kill(found[1], signal.SIGSTOP)
    ended(process, out, STUCK)
    assert "process 0 ended with status 3; ending the other 1\nshardlab: process 1: still there; killed" in said(out)
    assert not any(alive(pid) for pid in found)


@pytest.mark.slow
def test_an_error_of_one_process_has_its_name(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, *TWO, config="tests/run/uneven.py", UNEVEN="1:3:fail")
    ended(process, out, 2)
    assert re.search(
        r"^process 1: shardlab: .*uneven\.py:\d+, in train: OSError: the disk is gone", said(out), re.MULTILINE
    )
    assert "shardlab: process 1 ended with status 2" in said(out)


@pytest.mark.slow
def test_a_straggler_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    launched(out, *TWO, "--steps", "12", config="tests/run/uneven.py", UNEVEN="1:1:sleep 0.3")
    first, second = read_run(out).report["seconds_by_process"]
    assert second["reading"] == pytest.approx(0.3, abs=0.1)
    assert first["reading"] < 0.1 < second["reading"] < first["waiting"] + 0.1
    assert re.search(r"  1  .*the others wait 0\.[23]\d* s a step for it", out.with_suffix(".out").read_text())


@pytest.mark.slow
def test_none_outlives_its_launcher(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(out, *TWO, "--steps", "100000")
    wait_for_rows(out, process, 2)
    found = pids(out)
    process.kill()
    process.wait()
    limit = time.monotonic() + 20
    while any(running(pid) for pid in found) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(running(pid) for pid in found)


@pytest.mark.slow
def test_slurm_tells_each_process_its_place(tmp_path: Path) -> None:
    """With the variables that srun sets, on this host."""
    out = tmp_path / "run"
    variables = {
        "SLURM_JOB_ID": str(os.getpid() % 4096),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    tasks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "shardlab",
                "train",
                "tests/run/tiny.py",
                *TWO[2:],
                "--out",
                str(out),
                "--distributed",
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables, "SLURM_PROCID": task, "SLURM_LOCALID": task},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in ("0", "1")
    ]
    said = [task.communicate(timeout=LONG)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "step 4/4" in said[0]
    assert "step" not in said[1]
    assert len(read_run(out).report["seconds_by_process"]) == 2


@pytest.mark.slow
def test_a_run_goes_on_upon_other_plans_in_other_numbers_of_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    plans: list[tuple[int, tuple[str, ...]]] = [
        (2, ("--mesh", "data=8", "--zero", "3")),
        (4, ("--mesh", "stage=2,data=4", "--zero", "1", "--microbatches", "2")),
        (2, ("--mesh", "data=2,stage=2,tensor=2", "--microbatches", "2")),
    ]
    for number, (count, plan) in enumerate(plans, start=1):
        steps = ("--steps", str(2 * number), "--checkpoint-every", "2", "--resume")
        launched(out, *plan, *steps, "--processes", str(count))
        assert read_run(out).report["resumed_from"] == (2 * number - 2 or None)
    train(tiny("data=2,tensor=2", steps=8), out, saving=Saving(every=2), resume=True)
    whole = train(tiny(steps=8), tmp_path / "whole")
    for mine, theirs in zip(numbers(out), whole.rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
