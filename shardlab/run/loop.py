"""`train`: steps over data, from a `Config` to a `RunRecord`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from shardlab.checkpoint.canonical import Canonical
from shardlab.checkpoint.store import Checkpoints
from shardlab.mesh.build import build_mesh
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
    PLAN,
    REPORT,
    MetricsFile,
    Row,
    RunRecord,
    plain,
    read_run,
    write_arrays,
    write_report,
)
from shardlab.run.resume import (
    Saving,
    Start,
    batches_after,
    check_resumes,
    check_rows,
    drop_rows_after,
    refuse_to_replace,
    start_from,
)
from shardlab.run.view import Silent, View
from shardlab.step.compile import CompiledStep, check_batch, compile_train_step
from shardlab.step.finite import not_finite
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
    saving: Saving | None = None,
    resume: bool = False,
    max_skipped: int = 0,
    about: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Trains, and leaves in `out` what `shardlab.run.record` lists.

    Ctrl-C or SIGTERM ends the run after the steps under way, with everything written and, where it saves, a checkpoint
    of the last of them; a second one ends it at once.

    Args:
      config: the run.
      out: a directory; made where it is not there. Its earlier run is replaced once this one is compiled: until then
        it is as it was, whatever happens.
      view: what is told of what happens; None shows nothing.
      profile: write a JAX profile of this many steps to ``out/profile``; 0 writes none.
      tensorboard: write the metrics to ``out/tensorboard`` as well.
      saving: when to save a checkpoint; None never.
      resume: go on from the last checkpoint in `out`, on whatever plan; from step 0 where there is none.
      max_skipped: make no update where the loss or a gradient is not finite, and stop after so many such steps in a
        row, with the parameters named; 0: every update is made.
      about: put into the report as it is: the config's path, what was overridden.

    Raises:
      DeclarationError: with every fault of the declaration, before anything is compiled or written; `out` holds
        checkpoints of an earlier run and this one does not resume.
      CheckpointError: a checkpoint cannot be written.
      NotFinite: `max_skipped` steps in a row had no finite loss and gradients.
    """
    view, out, saving = view or Silent(), Path(out), saving or Saving()
    begun = time.perf_counter()
    profiler = Profiler(out / "profile", steps=profile, of=config.steps)
    board = Board(out / "tensorboard") if tensorboard else None
    if max_skipped < 0:
        raise DeclarationError(f"max_skipped: is {max_skipped}; give a number of steps, or 0 to skip none")
    _check_place(out)
    store = saving.store(out)
    if not resume:
        refuse_to_replace(store, out)
    elif (out / REPORT).is_file() and config.steps in store.steps():
        view.say(f"the run in {out} has ended: all {config.steps} steps are done")
        return read_run(out)
    else:
        check_resumes(store, out, config.steps)
    with view.phase("planning"):
        plan = config.plan()
        build_mesh(plan.mesh)  # says so where the devices are not there, before data is read
    for note in plan.notes:
        view.say(f"note: {note}")
    with view.phase("reading the data"):
        source = config.data.train(config.batch_size, seed=config.seed)
        batches = _batches(iter(source), plan, config.steps)
        held_out = config.data.held_out(config.batch_size, config.eval_batches) if config.eval_every else []
    if hasattr(config.data, "describe"):
        view.say(config.data.describe())
    if not resume and any((out / name).exists() for name in FILES):
        view.say(f"{out} holds an earlier run, which this one replaces at its first step")

    with view.phase(f"compiling the train step for {plan.mesh}"):
        step = compile_train_step(
            config.model,
            config.loss,
            config.make_optimizer(),
            plan,
            config.abstract_batch(),
            compiler_options=config.options_of_xla(),
            skip_nonfinite=max_skipped > 0,
        )
    evaluation = None
    if held_out:
        with view.phase("compiling the evaluation"):
            evaluation = Evaluation(config, plan, held_out)
    canonical = Canonical(step.model, plan, step.optimizer, step.mesh) if saving.every or resume else None
    start, rows = Start(), []
    if resume and canonical is not None:
        with view.phase("reading the last checkpoint"):
            start = start_from(store, canonical, view)
        if start.state is not None:
            rows = check_rows(out, start.step)
            drop_rows_after(out, start.step)
            source = config.data.train(config.batch_size, seed=config.seed)
            batches = _batches(batches_after(source, start), plan, config.steps - start.step)
    state = start.state
    if state is None:
        with view.phase("creating the state, every array in its own sharding"):
            state = step.init(config.seed)
            jax.block_until_ready(state)
    if canonical is not None and saving.every:
        # Once now: what saving needs, in time to compile and in memory, does not come as a surprise between steps.
        with view.phase("compiling what saves"):
            jax.block_until_ready(canonical.arrays_of(state))
    before = time.perf_counter() - begun

    if start.state is None:
        _make_room(out, plan)
    else:
        _cut_links(out)
    with (
        MetricsFile(out, append=start.state is not None) as file,
        stop_after_the_step(view) as stopped,
        profiler,
        contextlib.closing(board) if board is not None else contextlib.nullcontext(),
    ):
        saves = _Saves(saving.every, store, canonical, source, plan) if canonical is not None and saving.every else None
        loop = _Loop(
            config, step, evaluation, view, file, board, profiler, stopped, start.step, rows, saves, max_skipped
        )
        if start.about is not None:
            loop.initial_eval_loss = start.about.get("initial_eval_loss")
        with view.steps(config.steps, config.unit, config.batch_size):
            state = loop.run(state, batches)
    if saves is not None:
        with view.phase("finishing the last checkpoint"):
            store.wait()
    with view.phase("writing the report"):
        write_arrays(out, users_own(plan, {**state.parameters, **state.buffers}))
        report = plain(
            {
                **(about or {}),
                **step_facts(step),
                **_results(config, loop.rows, loop.initial_eval_loss),
                "seed": config.seed,
                "interrupted": bool(stopped),
                "resumed_from": start.step if start.state is not None else None,
                "checkpoints": store.steps(),
                "seconds_held_up_by_saving": sum(saves.seconds) if saves is not None else 0.0,
                "seconds_before_the_first_step": before,
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
                "data": source.get_state() if hasattr(source, "get_state") else None,
            }
        )
        write_report(out, report)
        _draw(out, config, plan, loop.rows, loop.initial_eval_loss)
    view.say(f"\n{report_text(report)}\n")
    extra = [name for name, there in (("profile/", profile), ("tensorboard/", board)) if there]
    view.say(f"in {out}: {', '.join([*FILES, *extra])}")
    return RunRecord(out, tuple(loop.rows), report)


class NotFinite(DeclarationError):
    """Steps in a row whose loss or gradients were not finite."""


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
    done: int
    rows: list[Row]
    saves: _Saves | None
    max_skipped: int
    initial_eval_loss: float | None = None
    skipped: int = 0

    def run(self, state: TrainState, batches: Iterator[Any]) -> TrainState:
        """The state after the last step, or after the one in which the run was stopped."""
        every, last = self.config.eval_every, self.config.steps
        if self.evaluation is not None and not self.done:
            self.initial_eval_loss = self._evaluate(state)
            self.view.evaluation(0, self.initial_eval_loss)
        waiting: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._clock = time.perf_counter()
        for number in range(self.done + 1, last + 1):
            self.profiler.before(number)
            state, metrics = self.step(state, next(batches))
            waiting.append((number, metrics))
            while len(waiting) > RUN_AHEAD:
                self._write(self._row(*waiting.popleft()))
            # Asked after the wait, in which Ctrl-C is most likely pressed.
            ends = number == last or bool(self.stopped)
            due = self.evaluation is not None and (ends or number % every == 0)
            saved = self.saves is not None and (ends or number % self.saves.every == 0)
            while waiting and (ends or due or saved or self.profiler.ends_with(number)):
                row = self._row(*waiting.popleft())
                if due and not waiting:
                    row["eval_loss"] = self._evaluate(state)
                    self._clock = time.perf_counter()
                self._write(row)
            if self.saves is not None and saved:
                self.saves.save(state, self.initial_eval_loss)
                self._clock = time.perf_counter()
            self.profiler.after(number)
            if ends or (due and self.stopped):
                break
        return state

    def _row(self, number: int, metrics: Mapping[str, Any]) -> Row:
        """The row of a step, once it has ended: its seconds are those since the step before it ended."""
        loss, norm, weight = (float(metrics[name]) for name in ("loss", "grad_norm", "weight"))
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        row = Row(step=number, loss=loss, grad_norm=norm, seconds=seconds, tokens=round(weight))
        if self.max_skipped:
            self._skips(row, not_finite(metrics["finite"], self.step.plan))
        return row

    def _skips(self, row: Row, paths: Sequence[str]) -> None:
        """Counts the steps in a row that made no update; one too many ends the run, with its row written."""
        loss = [] if math.isfinite(row["loss"] or 0.0) else ["the loss"]
        if not (paths or loss):
            self.skipped = 0
            return
        self.skipped += 1
        row["skipped"] = True
        some = ", ".join([*loss, *paths[:3]]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        self.view.say(f"step {row['step']}: no update: not finite: {some} ({self.skipped} in a row)")
        if self.skipped >= self.max_skipped:
            self._write(row)
            saved: list[int] = []
            if self.saves is not None:
                self.saves.store.wait()
                saved = self.saves.store.steps()
            way = f"go on from the checkpoint of step {saved[-1]} with --resume" if saved else "start anew"
            raise NotFinite(
                f"steps {row['step'] - self.skipped + 1} to {row['step']}: not finite: {some}; parameters are as they "
                f"were before; look at the data and the learning rate of these steps, and {way}"
            )

    def _evaluate(self, state: TrainState) -> float:
        assert self.evaluation is not None
        return self.evaluation(state.parameters, state.buffers)[0]

    def _write(self, row: Row) -> None:
        row = plain(row)
        if row["loss"] is None and all(earlier["loss"] is not None for earlier in self.rows):
            self.view.say(f"step {row['step']}: the loss is not finite; a lower learning rate may help")
        self.rows.append(row)
        self.file.write(row)
        if self.board is not None:
            self.board.write(row)
        self.view.step(row)
        if "eval_loss" in row:
            self.view.evaluation(row["step"], row["eval_loss"])


@dataclass(frozen=True)
class _Saves:
    """What a run saves, and every how many steps; `seconds` are those for which each save held the steps up."""

    every: int
    store: Checkpoints
    canonical: Canonical
    source: Any
    plan: Plan
    seconds: list[float] = field(default_factory=list)

    def save(self, state: TrainState, initial_eval_loss: float | None) -> None:
        start = time.perf_counter()
        about = {
            "plan": json.loads(self.plan.to_json()),
            "data": self.source.get_state() if hasattr(self.source, "get_state") else None,
            "initial_eval_loss": initial_eval_loss,
            "jax": jax.__version__,
        }
        self.store.save(self.canonical, state, plain(about))
        self.seconds.append(time.perf_counter() - start)


def _batches(given: Iterable[Any], plan: Plan, steps: int) -> Iterator[Any]:
    """What `data.train` gives, the first batch looked at before anything is compiled.

    Raises:
      DeclarationError: the first batch is not as planned; later, there are no more batches.
    """
    iterator = iter(given)
    first = list(itertools.islice(iterator, 1))
    for batch in first:
        check_batch(batch, plan.batch, "make data.abstract_batch say what data.train gives")

    def counted() -> Iterator[Any]:
        number = 0
        for batch in itertools.chain(first, iterator):
            yield batch
            number += 1
        raise DeclarationError(
            f"data: train gives {number} batches, and the run has {steps} steps; make it endless, or give fewer steps"
        )

    return counted()


def _check_place(out: Path) -> None:
    """That the directory is there or can be made, and can be written to; nothing is made yet."""
    if out.is_file():
        raise DeclarationError(f"out {str(out)!r}: is a file; give a directory")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        code = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise DeclarationError(f"out {str(out)!r}: {os.strerror(code)}; give a directory that can be made")
    for name in FILES:
        if (out / name).is_dir():
            raise DeclarationError(f"out {str(out)!r}: {name} in it is a directory; give another place")


def _make_room(out: Path, plan: Plan) -> None:
    """The directory, without an earlier run's files: none of them may be taken for this run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeclarationError(f"out {str(out)!r}: {error.strerror}; give a directory that can be made") from error
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    (out / PLAN).write_text(plan.to_json() + "\n")


def _cut_links(out: Path) -> None:
    """Of a run that goes on, no file is a link: what is written to one lands elsewhere."""
    for name in FILES:
        if (out / name).is_symlink():
            (out / name).unlink()


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
