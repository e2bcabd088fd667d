"""`launch`: a program in several processes on this machine, watched, told to stop, and reaped.

Each process emulates some of the devices and finds the others over the loopback, as the hosts of a pod find each other
over their network. What the first writes to standard output is shown; what any writes to standard error, with its name
before it. The first that ends with an error ends them all.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from shardlab.mesh import processes
from shardlab.mesh.emulate import environment
from shardlab.run.output import write


@dataclass(frozen=True)
class Launch:
    """What to start.

    Attributes:
      command: the program and its arguments, the same in every process.
      count: processes.
      devices: emulated devices of each.
      grace: seconds that they have to end by themselves once they are asked to, before they are killed.
      last_words: seconds that the others have to find out and say so, once one has ended with an error.
    """

    command: Sequence[str]
    count: int
    devices: int
    grace: float = 120.0
    last_words: float = 10.0


def launch(what: Launch) -> int:
    """Runs the processes to their end; the exit status: 0, or that of the first that ended with an error.

    The first Ctrl-C or SIGTERM is passed on as SIGTERM, the second kills all of them.
    """
    shown = _Shown()
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    address = f"127.0.0.1:{_free_port()}"
    running: dict[int, subprocess.Popen[str]] = {}
    asked: list[int] = []
    with _signals(asked):
        try:
            for index in range(what.count):
                running[index] = _started(what, index, address)
                _follow(running[index], index, shown, ended)
            names = ", ".join(f"{index} is {process.pid}" for index, process in running.items())
            shown.say(f"{what.count} processes of {what.devices} devices: process {names}")
            return _watch(what, running, ended, asked, shown)
        finally:
            for process in running.values():
                process.kill()
                process.wait()


def _watch(
    what: Launch,
    running: dict[int, subprocess.Popen[str]],
    ended: queue.Queue[tuple[int, int]],
    asked: list[int],
    shown: _Shown,
) -> int:
    """Until all have ended, by themselves or not; those that have are no longer among the running."""
    status, limit, passed_on = 0, float("inf"), 0
    while running:
        if len(asked) > passed_on:
            passed_on = len(asked)
            if passed_on == 1:
                shown.say("stopping after the steps under way; once more to stop at once")
                limit = min(limit, time.monotonic() + what.grace)
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            else:
                status, limit = status or 128 + asked[0], 0.0
        if time.monotonic() > limit:
            names = ", ".join(str(index) for index in running)
            shown.say(f"process {names}: still there; killed" if passed_on < 2 else "killed all processes")
            return status or 1
        try:
            index, code = ended.get(timeout=0.05)
        except queue.Empty:
            continue
        del running[index]
        if code and not status:
            # One that was killed takes others with it, and they may be heard of before it.
            time.sleep(0.2)
            killed = ((other, dead) for other, process in running.items() if (dead := process.poll() or 0) < 0)
            index, code = next(killed, (index, code))
            status = code if code > 0 else 128 - code
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            others = f"; ending the other {len(running)}" if running else ""
            shown.say(f"process {index} {how}{others}")
        if code:
            limit = min(limit, time.monotonic() + what.last_words)
        elif limit == float("inf"):  # all end together
            limit = time.monotonic() + what.grace
    return status


def _started(what: Launch, index: int, address: str) -> subprocess.Popen[str]:
    place = processes.place(index, what.count, address)
    return subprocess.Popen(
        what.command,
        env={**os.environ, **environment(what.devices), processes.PLACE: place},
        stdin=subprocess.DEVNULL,
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C of the terminal is passed on, once
    )


def _follow(process: subprocess.Popen[str], index: int, shown: _Shown, ended: queue.Queue[tuple[int, int]]) -> None:
    """Shows what a process says, and tells when it has ended, in threads of their own."""
    assert process.stderr is not None
    lines = process.stderr

    def listen() -> None:
        for line in lines:
            shown.line(index, line.rstrip("\n"))

    def wait() -> None:
        code = process.wait()
        listening.join(1.0)  # what it said last comes before that it has ended
        ended.put((index, code))

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    threading.Thread(target=wait, daemon=True).start()


class _Shown:
    """What is shown on standard error. A message of shardlab that several processes have is shown once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: dict[str, int] = {}
        self._repeating: set[int] = set()

    def line(self, index: int, text: str) -> None:
        with self._lock:
            said = self._said.setdefault(text, index) != index
            if said and text.startswith("shardlab: "):
                self._repeating.add(index)
            elif not said:
                self._repeating.discard(index)
            if text and index not in self._repeating and "connected peer ranks" not in text:
                write(f"process {index}: {text}", sys.stderr)

    def say(self, text: str) -> None:
        with self._lock:
            write(f"shardlab: {text}", sys.stderr)


@contextmanager
def _signals(asked: list[int]) -> Iterator[None]:
    """Until it is left, Ctrl-C and SIGTERM are noted."""
    note: Callable[..., None] = lambda number, frame: asked.append(number)  # noqa: E731
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
