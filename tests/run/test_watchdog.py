"""A watchdog ends its process when nothing goes on, and only then. In processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def ran(body: str) -> subprocess.CompletedProcess[str]:
    program = f"import time\nfrom shardlab.run.watchdog import Watchdog\n{body}"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_where_nothing_goes_on_every_stack_is_told_and_the_process_ends() -> None:
    ended = ran("def rest(): time.sleep(50)\nwith Watchdog(0.3) as dog:\n dog.beat('step 7 has ended')\n rest()")
    assert ended.returncode == 3
    assert ended.stderr.startswith("shardlab: nothing for 0.3 s; step 7 has ended; the stack of every thread:\n")
    assert 'File "<string>", line 3 in rest' in ended.stderr


def test_steps_that_end_keep_it_quiet_and_so_does_the_end_of_all() -> None:
    steps = "for k in range(8):\n  time.sleep(0.1)\n  dog.beat(f'step {k}')"
    ended = ran(f"with Watchdog(0.5) as dog:\n {steps}\ntime.sleep(1)\nprint('done')")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_a_phase_has_ten_times_as_long_and_its_name_is_told() -> None:
    ended = ran("with Watchdog(0.1) as dog:\n dog.phase('compiling')\n time.sleep(0.5)\n print('on')\n time.sleep(50)")
    assert (ended.returncode, ended.stdout) == (3, "on\n")
    assert ended.stderr.startswith("shardlab: nothing for 1 s; still compiling; the stack of every thread:\n")


def test_a_step_after_a_phase_has_no_longer_than_others() -> None:
    ended = ran("with Watchdog(0.5) as dog:\n dog.phase('compiling')\n dog.beat('step 1')\n time.sleep(50)")
    assert ended.returncode == 3
    assert ended.stderr.startswith("shardlab: nothing for 0.5 s; step 1; ")


def test_without_seconds_it_watches_nothing() -> None:
    ended = ran("with Watchdog(0) as dog:\n dog.beat('step 1')\n time.sleep(0.5)")
    assert (ended.returncode, ended.stderr) == (0, "")
