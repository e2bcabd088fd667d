"""What a person sees: plain lines, and the live view as a terminal would show it."""

import io
import re
import time

import pytest

from shardlab.run.record import Row
from shardlab.run.view import LiveView, Pace, PlainView, Silent, View, duration, make_view


class Terminal(io.StringIO):
    """A terminal of 100 columns that keeps what was written."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich reads its terminal from the environment; that of the tests' caller may be any."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)


def row(step: int, *, loss: float | None = 2.5, seconds: float = 0.5, tokens: int = 4096) -> Row:
    return Row(step=step, loss=loss, grad_norm=None if loss is None else 1.25, seconds=seconds, tokens=tokens)


def lines(file: io.StringIO) -> list[str]:
    """What was ever shown, line by line, without the codes that move the cursor and colour."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def shown(view: View, rows: list[Row], *, of: int = 10) -> None:
    with view.steps(of, "nats", 16):
        for each in rows:
            view.step(each)


def test_a_terminal_gets_the_live_view_and_a_file_plain_lines() -> None:
    assert isinstance(make_view(Terminal()), LiveView)
    assert isinstance(make_view(io.StringIO()), PlainView)


def test_the_live_view_shows_step_loss_pace_and_time_left() -> None:
    file = Terminal()
    shown(LiveView(file), [row(4)])
    # 4,096 tokens in half a second; six steps of it are left.
    last = lines(file)[-1]
    assert re.fullmatch(r"step +4/10 \S+ +\S* *loss 2\.500 nats  8,192 tokens/s  3s left", last)
    assert len(last) <= 100


def test_the_live_view_says_what_is_not_finite() -> None:
    file = Terminal()
    shown(LiveView(file), [row(4, loss=None)])
    assert "loss not finite nats" in lines(file)[-1]


def test_a_held_out_loss_that_is_not_finite_reads_as_a_steps_does() -> None:
    for view in (PlainView(file := io.StringIO()), LiveView(live := Terminal())):
        with view.steps(10, "nats", 16):
            view.evaluation(3, float("nan"))
            view.evaluation(4, None)
            view.step(row(4))
    for said in (file, live):
        assert {"step 3: held-out loss not finite nats", "step 4: held-out loss not finite nats"} <= set(lines(said))
    assert "loss 2.500 nats, held-out not finite  8,192 tokens/s" in lines(live)[-1]


def test_the_first_step_which_warms_up_foretells_nothing() -> None:
    file = io.StringIO()
    shown(PlainView(file), [row(1, seconds=60), row(2)])
    first, second = file.getvalue().splitlines()
    assert first == "step 1/10  loss 2.500 nats  grad norm 1.25  68 tokens/s"
    assert second == "step 2/10  loss 2.500 nats  grad norm 1.25  8,192 tokens/s  4s left"


def test_the_live_view_keeps_evaluations_above_the_bar_and_beside_it() -> None:
    file = Terminal()
    view = LiveView(file)
    with view.steps(10, "nats", 16):
        view.evaluation(3, 2.125)
        view.step(row(4))
    assert "step 3: held-out loss 2.125 nats" in lines(file)
    assert "loss 2.500 nats, held-out 2.125  8,192 tokens/s" in lines(file)[-1]


def test_the_live_view_takes_no_text_for_markup_and_breaks_no_line() -> None:
    file = Terminal()
    view = LiveView(file)
    view.say("[red]runs/[1] " + "x" * 200)
    with view.phase("compiling [bold]"):
        pass
    said, *spinning, done = lines(file)
    assert said == "[red]runs/[1] " + "x" * 200
    assert spinning
    assert all("compiling [bold] 0:00:00" in line for line in spinning)
    assert re.fullmatch(r"compiling \[bold\]: \d+\.\d s", done)


def test_plain_lines_are_some_forty_of_the_steps() -> None:
    file = io.StringIO()
    shown(PlainView(file), [row(step) for step in range(1, 401)], of=400)
    assert [int(line.split()[1].partition("/")[0]) for line in lines(file)] == [1, 2, 3, *range(10, 401, 10)]


def test_plain_lines_show_a_short_run_whole_and_an_odd_last_step() -> None:
    for total, expected in ((5, [1, 2, 3, 4, 5]), (83, [1, 2, 3, *range(4, 83, 2), 83])):
        file = io.StringIO()
        shown(PlainView(file), [row(step) for step in range(1, total + 1)], of=total)
        assert [int(line.split()[1].partition("/")[0]) for line in lines(file)] == expected


def test_plain_lines_have_the_pace_so_far() -> None:
    file = io.StringIO()
    shown(PlainView(file), [row(4), row(5, loss=None, seconds=1.5)])
    assert file.getvalue() == (
        "step 4/10  loss 2.500 nats  grad norm 1.25  8,192 tokens/s  3s left\n"
        "step 5/10  loss not finite nats  grad norm not finite  2,731 tokens/s  8s left\n"
    )


def test_a_plain_phase_is_one_line_unless_something_is_said() -> None:
    file = io.StringIO()
    view = PlainView(file)
    with view.phase("planning"):
        assert file.getvalue() == "planning ... "
        time.sleep(0.11)
    with view.phase("compiling"):
        view.say("a note")
    view.evaluation(3, 2.125)
    seconds = re.match(r"planning \.\.\. (\d+\.\d) s\n", file.getvalue())
    assert seconds is not None
    assert 0.1 <= float(seconds[1]) < 60
    rest = re.sub(r"\d+\.\d s", "T", file.getvalue())
    assert rest == "planning ... T\ncompiling ... \na note\ncompiling: T\nstep 3: held-out loss 2.125 \n"


def test_a_plain_phase_that_fails_says_so() -> None:
    file = io.StringIO()
    view = PlainView(file)
    with pytest.raises(KeyError), view.phase("planning"):
        raise KeyError

    def interrupted() -> None:
        with view.phase("compiling"):
            view.say("a note")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    view.say("after")
    assert file.getvalue() == "planning ... failed\ncompiling ... \na note\ncompiling: failed\nafter\n"


def test_the_silent_view_takes_everything() -> None:
    view = Silent()
    view.say("x")
    with view.phase("x"), view.steps(3, "nats", 16):
        view.step(row(1))
        view.evaluation(1, 2.0)


def test_the_pace_is_a_mean_at_first_and_follows_a_change_later() -> None:
    pace = Pace(64)
    assert pace.tokens_per_second == 0.0
    pace.add(row(1, seconds=9.0, tokens=64))
    assert (pace.seconds, pace.text(1, 10)) == (9.0, "7 examples/s")
    for seconds in (1.0, 2.0, 3.0):  # the first warms up, and is forgotten
        pace.add(row(1, seconds=seconds, tokens=64))
    assert pace.seconds == pytest.approx(2.0)
    assert pace.tokens_per_second == pytest.approx(32.0)
    assert pace.text(4, 10) == "32 examples/s  12s left"
    for _ in range(300):
        pace.add(row(1, seconds=8.0, tokens=64))
    # The first steps weigh (29/30)^273 of what they did.
    assert pace.seconds == pytest.approx(8.0, rel=1e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (60, "1m 00s"),
        (3599, "59m 59s"),
        (3600, "1h 00m"),
        (90061, "25h 01m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
