"""A watchdog: where nothing goes on for too long, every process says where it stands, and the run ends.

A collective waits for the slowest process, for ever: nothing in it can tell a slow one from one that will never come.
Each process has its own watchdog, a thread; since all wait for the same step, all find out at about the same time, and
what they write shows which of them is elsewhere than the others.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from shardlab.mesh.processes import count, index

STUCK = 3  # exit status
_OTHERS = 3.0  # seconds that are left to the other processes to find out too


class Watchdog:
    """Ends the process when `seconds` pass without a `beat`; 0 watches nothing.

    What is no step, as compiling, has ten times as long, from when its `phase` is told to the next phase or beat.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left = threading.Event()
        self.phase("starting")

    def beat(self, at: str) -> None:
        """Says what has been reached: ``step 7 has ended``."""
        self._watched(at, self._seconds)

    def phase(self, name: str) -> None:
        """Says what has begun: ``compiling the train step``."""
        self._watched(f"still {name}", 10 * self._seconds)

    def _watched(self, at: str, seconds: float) -> None:
        self._now = (time.monotonic() + seconds, at, seconds)
        if self._seconds:
            # A thread of C, for where Python's cannot run either.
            faulthandler.dump_traceback_later(seconds + 2 * _OTHERS, exit=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while (left := self._now[0] - time.monotonic()) > 0:
            if self._left.wait(min(left, self._seconds)):  # a step may follow a phase, and has less time
                return
        _, at, seconds = self._now
        who = f"process {index()} of {count()}: " if count() > 1 else ""
        write = sys.stderr.write
        write(f"shardlab: {who}nothing for {seconds:g} s; {at}; the stack of every thread:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if not self._left.wait(_OTHERS):
            os._exit(STUCK)
