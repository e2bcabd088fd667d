"""`train`: steps over data, from a `Config` to a `RunRecord`."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from shardlab.mesh.faults import DeclarationError
from shardlab.plan.plan import Plan
from shardlab.report.curve import draw_curve
from shardlab.report.summary import step_facts
from shardlab.report.text import report_text
from shardlab.run.config import Config
from shardlab.run.evaluate import Evaluation
from shardlab.run.instruments import Board, Profiler, stop_after_the_step
from shardlab.run.record import (
    CURVE,
    FILES,
    METRICS,
    PLAN,
    MetricsFile,
    Row,
    RunRecord,
    plain,
    write_arrays,
    write_report,
)
from shardlab.run.view import Silent, View
from shardlab.step.compile import CompiledStep, compile_train_step
from shardlab.step.state import TrainState, users_own

# Steps handed to the devices before the metrics of an earlier one are waited for. Enough to keep them busy; many
# steps in flight can use up the threads of emulated devices, which ends the process.
RUN_AHEAD = 2


def train(
    config: Config,
    out: str | Path,
    *,
    view: View | None = None,
    profile: int = 0,
    tensorboard: bool = False,
    about: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Trains, and leaves in `out` what `shardlab.run.record` lists.

    Ctrl-C ends the run after the step it is in, with everything written; a second one ends it at once.

    Args:
      config: the run.
      out: a directory; made where it is not there, its earlier run replaced.
      view: what is told of what happens; None shows nothing.
      profile: write a JAX profile of this many steps to ``out/profile``; 0 writes none.
      tensorboard: write the metrics to ``out/tensorboard`` as well.
      about: put into the report as it is: the config's path, what was overridden.

    Raises:
      DeclarationError: with every fault of the declaration, before anything is compiled or written.
    """
    view, out = view or Silent(), Path(out)
    start = time.perf_counter()
    profiler = Profiler(out / "profile", steps=profile, of=config.steps)
    board = Board(out / "tensorboard") if tensorboard else None
    with view.phase("planning"):
        plan = config.plan()
    for note in plan.notes:
        view.say(f"note: {note}")
    with view.phase("reading the data"):
        batches = config.data.train(config.batch_size, seed=config.seed)
        held_out = config.data.held_out(config.batch_size, config.eval_batches) if config.eval_every else []
    if hasattr(config.data, "describe"):
        view.say(config.data.describe())
    _make_room(out, plan, view)

    with view.phase(f"compiling the train step for {plan.mesh}"):
        step = compile_train_step(config.model, config.loss, config.optimizer(), plan, config.abstract_batch())
    evaluation = None
    if held_out:
        with view.phase("compiling the evaluation"):
            evaluation = Evaluation(config, plan, held_out)
    with view.phase("creating the state, every array in its own sharding"):
        state = step.init(config.seed)
        jax.block_until_ready(state)
    before = time.perf_counter() - start

    with MetricsFile(out) as file, stop_after_the_step(view) as stopped, profiler:
        loop = _Loop(config, step, evaluation, view, file, board, profiler, stopped)
        with view.steps(config.steps, config.unit):
            state = loop.run(state, batches)
    if board is not None:
        board.close()
    with view.phase("writing the report"):
        write_arrays(out, users_own(plan, {**state.parameters, **state.buffers}))
        report = plain(
            {
                **(about or {}),
                **step_facts(step),
                **_results(config, loop.rows, loop.initial_eval_loss),
                "seed": config.seed,
                "interrupted": bool(stopped),
                "seconds_before_the_first_step": before,
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
                "data": batches.get_state() if hasattr(batches, "get_state") else None,
            }
        )
        write_report(out, report)
        _draw(out, config, plan, loop.rows, loop.initial_eval_loss)
    view.say(f"\n{report_text(report)}\n")
    extra = [name for name, there in (("profile/", profile), ("tensorboard/", board)) if there]
    view.say(f"in {out}: {', '.join([*FILES, *extra])}")
    return RunRecord(out, tuple(loop.rows), report)


@dataclass
class _Loop:
    config: Config
    step: CompiledStep
    evaluation: Evaluation | None
    view: View
    file: MetricsFile
    board: Board | None
    profiler: Profiler
    stopped: Sequence[Any]
    rows: list[Row] = field(default_factory=list)
    initial_eval_loss: float | None = None

    def run(self, state: TrainState, batches: Iterator[Any]) -> TrainState:
        """The state after the last step, or after the one in which the run was stopped."""
        every, last = self.config.eval_every, self.config.steps
        if self.evaluation is not None:
            self.initial_eval_loss = self._evaluate(0, state)
        waiting: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self._clock = time.perf_counter()
        for number in range(1, last + 1):
            self.profiler.before(number)
            state, metrics = self.step(state, next(batches))
            waiting.append((number, metrics))
            due = self.evaluation is not None and (number % every == 0 or number == last)
            catch_up = due or number == last or self.profiler.ends_with(number)
            while len(waiting) > (0 if catch_up or self.stopped else RUN_AHEAD):
                row = self._row(*waiting.popleft())
                if due and row["step"] == number and not self.stopped:
                    row["eval_loss"] = self._evaluate(number, state)
                    self._clock = time.perf_counter()
                self._write(row)
            self.profiler.after(number)
            if self.stopped:
                break
        while waiting:
            self._write(self._row(*waiting.popleft()))
        return state

    def _row(self, number: int, metrics: dict[str, jax.Array]) -> Row:
        """The row of a step, once it has ended: its seconds are those since the step before it ended."""
        loss, norm, weight = (float(metrics[name]) for name in ("loss", "grad_norm", "weight"))
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        return Row(step=number, loss=loss, grad_norm=norm, seconds=seconds, tokens=round(weight))

    def _evaluate(self, number: int, state: TrainState) -> float:
        assert self.evaluation is not None
        loss, _ = self.evaluation(state.parameters, state.buffers)
        self.view.evaluation(number, loss)
        return loss

    def _write(self, row: Row) -> None:
        row = plain(row)
        if row["loss"] is None and all(earlier["loss"] is not None for earlier in self.rows):
            self.view.say(f"step {row['step']}: the loss is not finite; a lower learning rate may help")
        self.rows.append(row)
        self.file.write(row)
        if self.board is not None:
            self.board.write(row)
        self.view.step(row)


def _make_room(out: Path, plan: Plan, view: View) -> None:
    """The directory, without an earlier run's files: none of them may be taken for this run's."""
    if out.exists() and not out.is_dir():
        raise DeclarationError(f"out {str(out)!r}: is a file; give a directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeclarationError(f"out {str(out)!r}: {error.strerror}; give a directory that can be made") from error
    if (out / METRICS).exists():
        view.say(f"{out} holds an earlier run, which this one replaces")
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    (out / PLAN).write_text(plan.to_json() + "\n")


def _results(config: Config, rows: Sequence[Row], initial_eval_loss: float | None) -> dict[str, Any]:
    # The median: compiling, evaluating and other programs on the machine stretch some steps.
    seconds = statistics.median(row["seconds"] for row in rows)
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return {
        "unit": config.unit,
        "steps": config.steps,
        "steps_done": len(rows),
        "initial_loss": rows[0]["loss"],
        "final_loss": rows[-1]["loss"],
        "initial_eval_loss": initial_eval_loss,
        "eval_loss": evaluated[-1] if evaluated else None,
        "seconds_per_step": seconds,
        "tokens_per_second": statistics.median(row["tokens"] for row in rows) / seconds,
    }


def _draw(out: Path, config: Config, plan: Plan, rows: Sequence[Row], initial_eval_loss: float | None) -> None:
    sizes = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.sizes.items())
    held_out = [(0, initial_eval_loss)] if initial_eval_loss is not None else []
    held_out += [(row["step"], loss) for row in rows if (loss := row.get("eval_loss")) is not None]
    draw_curve(
        out / CURVE,
        [(row["step"], loss) for row in rows if (loss := row["loss"]) is not None],
        held_out,
        unit=config.unit,
        title=f"{plan.num_parameters:,} parameters on {sizes} ({plan.mesh.target}), ZeRO {plan.zero}, {plan.dtype}",
    )
