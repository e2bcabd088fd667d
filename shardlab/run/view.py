"""What a person sees while a run goes on: a live view on a terminal, plain lines anywhere else.

A run tells a `View` what happens; a view decides what is shown.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import IO, Protocol

from shardlab.run.output import write
from shardlab.run.record import Row


class View(Protocol):
    """What a run calls."""

    def say(self, text: str) -> None:
        """Shows a line, or several."""

    def phase(self, text: str) -> AbstractContextManager[None]:
        """Says that something long has begun, and how long it took."""

    def steps(self, total: int, unit: str, batch_size: int) -> AbstractContextManager[None]:
        """Around the steps: how many, what the loss is counted in, examples of each."""

    def step(self, row: Row) -> None:
        """A step has ended."""

    def evaluation(self, step: int, loss: float | None) -> None:
        """An evaluation on held-out data has ended."""


def make_view(file: IO[str]) -> View:
    """The live view where `file` is a terminal, plain lines where it is not."""
    return LiveView(file) if file.isatty() else PlainView(file)


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def phase(self, text: str) -> AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()

    def steps(self, total: int, unit: str, batch_size: int) -> AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()

    def step(self, row: Row) -> None:
        """Nothing."""

    def evaluation(self, step: int, loss: float | None) -> None:
        """Nothing."""


class PlainView:
    """Plain lines: every phase, every evaluation, and some forty of the steps.

    >>> import sys
    >>> view = PlainView(sys.stdout)
    >>> with view.steps(100, "nats", 16):
    ...     view.step(Row(step=2, loss=5.5, grad_norm=1.25, seconds=0.5, tokens=4096))
    step 2/100  loss 5.500 nats  grad norm 1.25  8,192 tokens/s  49s left
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._open = False  # whether a phase's line waits for its seconds
        self._total, self._unit, self._pace = 0, "", Pace(0)

    def say(self, text: str) -> None:
        """The text."""
        write("\n" * self._open + text, self._file)
        self._open = False

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """A line, begun with the phase and ended with it."""
        write(f"{text} ... ", self._file, end="")
        self._open, start = True, time.perf_counter()
        try:
            yield
        except BaseException:
            write("failed" if self._open else f"{text}: failed", self._file)
            self._open = False
            raise
        taken = f"{time.perf_counter() - start:.1f} s"
        write(taken if self._open else f"{text}: {taken}", self._file)
        self._open = False

    @contextlib.contextmanager
    def steps(self, total: int, unit: str, batch_size: int) -> Iterator[None]:
        """Nothing of its own."""
        self._total, self._unit, self._pace = total, unit, Pace(batch_size)
        yield

    def step(self, row: Row) -> None:
        """A line for the first steps, the last, and every fortieth part of the way."""
        self._pace.add(row)
        number = row["step"]
        if number <= 3 or number == self._total or number % max(self._total // 40, 1) == 0:
            self.say(
                f"step {number}/{self._total}  loss {loss_text(row['loss'], self._unit)}  "
                f"grad norm {_number(row['grad_norm'], '#.3g')}  {self._pace.text(number, self._total)}"
            )

    def evaluation(self, step: int, loss: float | None) -> None:
        """A line."""
        self.say(f"step {step}: held-out loss {loss_text(loss, self._unit)}")


class LiveView:
    """A bar that moves, with step, loss, tokens a second and time left; evaluations stay as lines above it."""

    def __init__(self, file: IO[str]) -> None:
        from rich.console import Console

        self._console = Console(file=file, highlight=False)
        self._unit, self._pace = "", Pace(0)
        self._held_out = ""

    def say(self, text: str) -> None:
        """The text, above the bar where there is one."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """A spinner with the seconds so far, then a line."""
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        start = time.perf_counter()
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            progress.add_task(text, total=None)
            yield
        self.say(f"{text}: {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def steps(self, total: int, unit: str, batch_size: int) -> Iterator[None]:
        """The bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._unit, self._pace = unit, Pace(batch_size)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self._console,
            expand=True,
        )
        with self._progress:
            self._task = self._progress.add_task("", total=total, facts="")
            yield

    def step(self, row: Row) -> None:
        """Moves the bar."""
        self._pace.add(row)
        total = int(self._progress.tasks[0].total or 0)
        facts = f"loss {loss_text(row['loss'], self._unit)}{self._held_out}  {self._pace.text(row['step'], total)}"
        self._progress.update(self._task, completed=row["step"], facts=facts)

    def evaluation(self, step: int, loss: float | None) -> None:
        """A line that stays, and a number beside the bar."""
        text = loss_text(loss, self._unit)
        self._held_out = f", held-out {text.removesuffix(self._unit).rstrip()}"
        self.say(f"step {step}: held-out loss {text}")


class Pace:
    """Seconds and tokens of a step, averaged over the last thirty or so; of the first, which warms up, only at first.

    Args:
      batch_size: examples of a step: where a step learns from as many tokens, they are called examples.
    """

    def __init__(self, batch_size: int) -> None:
        self.seconds = 0.0
        self._batch_size = batch_size
        self._tokens = 0.0
        self._count = 0

    def add(self, row: Row) -> None:
        """Takes a step into the averages."""
        self._count += 1
        share = max(1 / max(self._count - 1, 1), 1 / 30)
        self.seconds += share * (row["seconds"] - self.seconds)
        self._tokens += share * (row["tokens"] - self._tokens)

    @property
    def tokens_per_second(self) -> float:
        """The averages' quotient."""
        return self._tokens / self.seconds if self.seconds else 0.0

    def text(self, step: int, total: int) -> str:
        """What a line says of it after a step; time left from the second step on."""
        name = "examples" if round(self._tokens) == self._batch_size else "tokens"
        left = f"  {duration(self.seconds * (total - step))} left" if step > 1 else ""
        return f"{self.tokens_per_second:,.0f} {name}/s{left}"


def loss_text(loss: float | None, unit: str) -> str:
    """A loss with its unit.

    >>> loss_text(2.5, "nats"), loss_text(float("nan"), "nats")
    ('2.500 nats', 'not finite nats')
    """
    return f"{_number(loss, '.3f')} {unit}"


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(7.4), duration(83), duration(7400)
    ('7s', '1m 23s', '2h 03m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m {whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h {whole % 3600 // 60:02}m"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)
