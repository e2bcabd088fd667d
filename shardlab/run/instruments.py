"""Around the steps of a run: a profile of some, the metrics to TensorBoard, and Ctrl-C after the step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.processes import index
from shardlab.run.record import Row
from shardlab.run.view import View


class Profiler:
    """A JAX profile of `steps` steps of a run of `of`, the first two left out where there are enough.

    Of several processes the first makes one, of its own devices.

    Raises:
      DeclarationError: more steps than the run has.
    """

    def __init__(self, directory: Path, *, steps: int, of: int) -> None:
        if not 0 <= steps <= of:
            raise DeclarationError(f"profile: {steps} steps of a run of {of}; give 1 to {of}, or 0 for none")
        steps = steps if index() == 0 else 0
        self._directory = directory
        self._first = min(3, of - steps + 1) if steps else 0
        self._last = self._first + steps - 1
        self._running = False

    def before(self, step: int) -> None:
        """Called before a step is handed over."""
        if step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def ends_with(self, step: int) -> bool:
        """Whether the profile's last step is this one, which must then be waited for."""
        return self._running and step == self._last

    def after(self, step: int) -> None:
        """Called when a step was handed over, and waited for where `ends_with` says so."""
        if self.ends_with(step):
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop()


class Board:
    """Metrics for TensorBoard.

    Raises:
      DeclarationError: the extra that writes them is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise DeclarationError(
                "tensorboard: tensorboardX is not installed; pip install 'shardlab[tensorboard]', or leave out "
                "--tensorboard"
            ) from None
        self._make, self._directory = SummaryWriter, directory

    @cached_property
    def _writer(self) -> Any:
        # Made with the first row: until then a run may still be refused, and has written nothing.
        return self._make(str(self._directory))

    def write(self, row: Row) -> None:
        """Adds a row."""
        for name in ("loss", "grad_norm", "eval_loss", "seconds"):
            value = row.get(name)
            if value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is left; nothing where there was no row."""
        if "_writer" in vars(self):
            self._writer.close()


@contextlib.contextmanager
def stop_after_the_step(view: View) -> Iterator[Sequence[Any]]:
    """Until it is left, the first Ctrl-C or SIGTERM only fills the sequence; the second does what it always did.

    In a thread that is not the main one, which gets no signals, both stay what they were.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        view.say(f"{name}: stopping after the steps under way; once more to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
