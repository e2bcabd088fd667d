"""kill -9 at random moments of a run that saves every few steps, and whether it goes on as if nothing had been.

    python benchmarks/kills.py [--kills 100] [--every 3] [--seed 0] [--processes 1]

A run of `tests/run/tiny.py` on eight emulated devices is ended by SIGKILL, some time after its first new row, before,
during and after a commit; the same command goes on with `--resume`, again and again, until it has been killed as often
as asked; then it may end. Each start must be from the newest checkpoint that was sealed when the run was killed, and
the rows of the whole run are those of one that nothing ended, bit for bit, each step once and in order.

With --processes the devices are those of so many processes, of which any is killed; the others must end by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shardlab.checkpoint import Checkpoints
from shardlab.run.record import METRICS

ROOT = Path(__file__).parents[1]
LONGEST = 4.0  # seconds between the first new row of a run and its end
STARTS = 120  # seconds that a run may take to its first new row
ENDS = 60  # seconds that the other processes may take to end when one is killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often to kill it")
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="that share the devices")
    given = parser.parse_args()
    several = given.processes if given.processes > 1 else 0
    moments, begun = random.Random(given.seed), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shardlab-kills-") as folder:
        out = Path(folder, "killed")
        steps, saving, torn, lost = 10**6, 0, 0, 0
        for number in range(1, given.kills + 1):
            before = newest(out)
            run = started(out, steps, given.every, several)
            rows = wait_for_row(out, before, run)
            time.sleep(moments.uniform(0.0, LONGEST))
            killed = moments.choice(children(run.pid)) if several else run.pid
            os.kill(killed, signal.SIGKILL)
            said = run.communicate(timeout=ENDS)[0]
            status = 128 + signal.SIGKILL if several else -signal.SIGKILL
            assert run.returncode == status, f"kill {number}: ended by itself: {said}"
            told = re.search(r"going on from the checkpoint of step (\d+)", said)
            assert int(told[1] if told else 0) == before, f"kill {number}: did not start at step {before}: {said}"
            done, found = count(out), list(Checkpoints(out).found())
            torn += any(fault is not None for _, fault in found)
            saving += any(path.name.endswith("tmp") for path in (out / "checkpoints").glob("*"))
            lost = max(lost, done - newest(out))
            assert done >= rows
            print(f"kill {number}: at step {done}, the last checkpoint of step {newest(out)}", flush=True)
        last = count(out) + 1
        ended(started(out, last, given.every, several))
        whole = Path(folder, "whole")
        ended(started(whole, last, 0, several))
        assert told_by(out) == told_by(whole), "the rows are not those of a run that nothing ended"
        print(
            f"{given.kills} kills ({given.processes} processes), {saving} while arrays were written, {torn} before a "
            f"seal; {last} steps, all rows bit for bit; at most {lost} done again; {time.perf_counter() - begun:.0f} s"
        )


def children(pid: int) -> list[int]:
    """The processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def started(out: Path, steps: int, every: int, several: int = 0) -> subprocess.Popen[str]:
    verb = ["launch", "--processes", str(several)] if several else ["train"]
    options = ("--steps", str(steps), "--out", str(out), "--checkpoint-every", str(every), "--resume")
    return subprocess.Popen(
        [sys.executable, "-m", "shardlab", *verb, "tests/run/tiny.py", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(run: subprocess.Popen[str]) -> None:
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said


def wait_for_row(out: Path, before: int, run: subprocess.Popen[str]) -> int:
    """Until the run has written a row after the checkpoint that it went on from."""
    limit = time.monotonic() + STARTS
    was = (out / METRICS).stat().st_mtime_ns if (out / METRICS).is_file() else 0
    while time.monotonic() < limit and run.poll() is None:
        if (out / METRICS).is_file() and (out / METRICS).stat().st_mtime_ns != was and count(out) > before:
            return count(out)
        time.sleep(0.01)
    raise AssertionError(f"no row after step {before} within {STARTS} s")


def newest(out: Path) -> int:
    return max(Checkpoints(out).steps(), default=0)


def count(out: Path) -> int:
    """Whole rows of the metrics."""
    return (out / METRICS).read_text().count("\n")


def told_by(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [{name: row[name] for name in ("step", "loss", "grad_norm", "tokens")} for row in rows]


if __name__ == "__main__":
    main()
