"""A watchdog: where no step ends for too long, every process says where it stands, and the run ends.

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
    """Ends the process when `seconds` pass without a `beat`; from the first to when it is left. 0 watches nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._beat, self._at = time.monotonic(), "no step has ended"
        self._left = threading.Event()

    def beat(self, at: str) -> None:
        """Says what has been reached: ``step 7 has ended``."""
        self._beat, self._at = time.monotonic(), at
        if self._seconds:
            # A thread of C, for where Python's cannot run either.
            faulthandler.dump_traceback_later(self._seconds + 2 * _OTHERS, exit=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self.beat(self._at)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while (left := self._beat + self._seconds - time.monotonic()) > 0:
            if self._left.wait(left):
                return
        who = f"process {index()} of {count()}: " if count() > 1 else ""
        write = sys.stderr.write
        write(f"shardlab: {who}nothing for {self._seconds:g} s; {self._at}; the stack of every thread:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if not self._left.wait(_OTHERS):
            os._exit(STUCK)
