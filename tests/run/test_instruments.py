"""Which steps a profile is of, what TensorBoard is given, and what Ctrl-C does."""

import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.run.instruments import Board, Profiler, stop_after_the_step
from shardlab.run.record import Row
from shardlab.run.view import Silent

NOT_INSTALLED = (
    "tensorboard: tensorboardX is not installed; pip install 'shardlab[tensorboard]', or leave out --tensorboard"
)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What JAX's profiler is told, in order, among the steps."""
    told: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: told.append(f"start in {directory}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


@pytest.mark.parametrize(
    ("steps", "of", "expected"),
    [
        (0, 5, []),
        (1, 1, [1]),
        (3, 9, [3, 4, 5]),  # the first two, which warm up, are left out
        (3, 4, [2, 3, 4]),
        (4, 4, [1, 2, 3, 4]),
        (1, 9, [3]),
    ],
)
def test_the_steps_of_a_profile(traced: list[str], steps: int, of: int, expected: list[int]) -> None:
    waited = []
    with Profiler(Path("x"), steps=steps, of=of) as profiler:
        for step in range(1, of + 1):
            profiler.before(step)
            traced.append(str(step))
            if profiler.ends_with(step):
                waited.append(step)
            profiler.after(step)
    assert waited == expected[-1:]
    if not expected:
        assert traced == [str(step) for step in range(1, of + 1)]
        return
    start, stop = traced.index("start in x"), traced.index("stop")
    assert traced[start + 1 : stop] == [str(step) for step in expected]
    assert len(traced) == of + 2


def test_a_profile_is_written_when_a_step_fails(traced: list[str]) -> None:
    profiler = Profiler(Path("x"), steps=3, of=9)
    profiler.before(3)
    with pytest.raises(KeyError), profiler:
        raise KeyError
    assert traced == ["start in x", "stop"]


@pytest.mark.parametrize("steps", [-1, 6])
def test_a_profile_of_steps_that_are_not_there(steps: int) -> None:
    message = f"profile: {steps} steps of a run of 5; give 1 to 5, or 0 for none"
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        Profiler(Path("x"), steps=steps, of=5)


def test_tensorboard_without_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(DeclarationError, match=f"^{re.escape(NOT_INSTALLED)}$"):
        Board(tmp_path / "tensorboard")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_given_what_is_a_number_and_nothing_before_the_first_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            told.append(("made", directory))

        def add_scalar(self, *given: Any) -> None:
            told.append(given)

        def close(self) -> None:
            told.append(("closed",))

    module = ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    Board(tmp_path).close()  # of a run that was refused
    board = Board(tmp_path)
    assert told == []
    board.write(Row(step=1, loss=2.5, grad_norm=None, seconds=0.5, tokens=64))
    board.write(Row(step=2, loss=1.5, grad_norm=0.0, seconds=0.25, tokens=64, eval_loss=2.0))
    board.close()
    assert told == [
        ("made", str(tmp_path)),
        *(("loss", 2.5, 1), ("seconds", 0.5, 1)),
        *(("loss", 1.5, 2), ("grad_norm", 0.0, 2), ("eval_loss", 2.0, 2), ("seconds", 0.25, 2)),
        ("closed",),
    ]


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def test_the_first_ctrl_c_is_noted_and_the_second_interrupts() -> None:
    view, before = Heard(), signal.getsignal(signal.SIGINT)
    with stop_after_the_step(view) as stopped:
        assert not stopped
        os.kill(os.getpid(), signal.SIGINT)
        assert len(stopped) == 1
        assert view.texts == ["Ctrl-C: stopping after the steps under way; once more to stop at once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_what_it_was_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), stop_after_the_step(Silent()):
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_left_alone_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with stop_after_the_step(Silent()) as stopped:
            seen.append((signal.getsignal(signal.SIGINT), list(stopped)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, [])]
