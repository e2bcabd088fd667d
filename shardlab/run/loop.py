"""`train`: steps over data, from a `Config` to a `RunRecord`."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from shardlab.checkpoint.canonical import Canonical
from shardlab.checkpoint.store import Checkpoints
from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.processes import Agreement, by_first, check_all_joined, gathered, index, whole
from shardlab.plan.plan import Plan
from shardlab.report.curve import draw_curve
from shardlab.report.summary import step_facts
from shardlab.report.text import report_text
from shardlab.run.batches import Source
from shardlab.run.config import Config
from shardlab.run.evaluate import Evaluation
from shardlab.run.guards import Guards, Watch
from shardlab.run.instruments import Board, Profiler, stop_after_the_step
from shardlab.run.record import (
    CURVE,
    FILES,
    PLAN,
    REPORT,
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
    check_resumes,
    check_rows,
    drop_rows_after,
    refuse_to_replace,
    start_from,
)
from shardlab.run.rows import open_rows
from shardlab.run.steps import Beside, Saves, Steps
from shardlab.run.stragglers import HostTimes, seconds_by_process, straggler_text
from shardlab.run.view import Silent, View
from shardlab.run.watchdog import Watchdog
from shardlab.step.compile import CompiledStep, compile_train_step
from shardlab.step.state import TrainState, users_own

_InPhase = Callable[[str], contextlib.AbstractContextManager[None]]


def train(
    config: Config,
    out: str | Path,
    *,
    view: View | None = None,
    profile: int = 0,
    tensorboard: bool = False,
    saving: Saving | None = None,
    resume: bool = False,
    skip_batches: int = 0,
    guards: Guards | None = None,
    stuck_after: float = 0,
    about: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Trains, and leaves in `out` what `shardlab.run.record` lists.

    Ctrl-C or SIGTERM ends the run after the steps under way, with everything written and, where it saves, a checkpoint
    of the last of them; a second one ends it at once. Of several processes all end after the same step, whichever was
    asked; the first writes, shows and reports, the others only their parts of checkpoints.

    Args:
      config: the run.
      out: a local directory; made where it is not there. Its earlier run is replaced once this one is compiled: until
        then it is as it was, whatever happens.
      view: what is told of what happens; None shows nothing.
      profile: write a JAX profile of this many steps to ``out/profile``; 0 writes none.
      tensorboard: write the metrics to ``out/tensorboard`` as well.
      saving: when to save a checkpoint; None never.
      resume: go on from the last checkpoint in `out`, on whatever plan; from step 0 where there is none.
      skip_batches: of a run that goes on, leave out so many batches of its data first.
      guards: what else ends it.
      stuck_after: where no step ends for so many seconds, print the stack of every thread and end the process; what is
        no step, as compiling, reading or finishing a checkpoint, has ten times as long. 0 waits for ever.
      about: put into the report as it is: the config's path, what was overridden.

    Raises:
      DeclarationError: with every fault of the declaration, before anything is compiled or written; `out` holds
        checkpoints of an earlier run and this one does not resume.
      CheckpointError: a checkpoint cannot be written.
      NotFinite, LossSpike, ReplicasDiffer: what `guards` says.
    """
    guards = guards or Guards()
    if "://" in str(out):
        raise DeclarationError(
            f"out {str(out)!r}: is no local directory; give one, and --checkpoints {out} for what it saves"
        )
    view, out, saving = view if view is not None and index() == 0 else Silent(), Path(out), saving or Saving()
    begun = time.perf_counter()
    profiler = Profiler(out / "profile", steps=profile, of=config.steps)
    board = Board(out / "tensorboard") if tensorboard else None
    store = saving.store(out)
    with Watchdog(stuck_after) as watchdog, _saved_to_the_end(store):
        phase = functools.partial(_phase, view, watchdog)
        extra = [name for name, there in (("profile", profile), ("tensorboard", tensorboard)) if there]
        if by_first(lambda: _has_ended(config, out, store, extra, resume=resume, skip_batches=skip_batches)):
            view.say(f"the run in {out} has ended: all {config.steps} steps are done")
            return read_run(out)
        with phase("planning"):
            plan = config.plan()
            mesh = build_mesh(plan.mesh)  # says so where the devices are not there, before data is read
            check_all_joined()
        for note in plan.notes:
            view.say(f"note: {note}")
        weights = None if resume and store.steps() else config.open_weights(plan)  # refused before it compiles
        with phase("reading the data"):
            source = Source(config, plan, mesh)
            batches = source.batches(config.steps)
            held_out = config.data.held_out(config.batch_size, config.eval_batches) if config.eval_every else []
        if hasattr(config.data, "describe"):
            view.say(config.data.describe())
        if not resume and any((out / name).exists() for name in FILES):
            view.say(f"{out} holds an earlier run, which this one replaces at its first step")

        step, evaluation = _compiled(config, plan, held_out, phase, skip_nonfinite=guards.max_skipped > 0)
        canonical = Canonical(step.model, plan, step.optimizer, mesh) if saving.every or resume else None
        start, before = Start(), list[Row]()
        if resume and canonical is not None:
            with phase("reading the last checkpoint"):
                start = start_from(store, canonical, view)
            if start.state is not None:
                by_first(lambda: before.extend(_rows_up_to(out, start.step)))
                source = Source(config, plan, mesh)
                batches = source.batches(config.steps - start.step, start, skip_batches)
        state = start.state
        if state is None:
            with phase("creating the state, every array in its own sharding"):
                state = step.init(config.seed, None if weights is None else weights.onto(step.mesh))
                jax.block_until_ready(state)
        saves = None
        if canonical is not None and saving.every:
            saves = Saves(saving.every, store, canonical, source, plan)
            # Once now: what saving needs, in time to compile and in memory, does not come as a surprise between steps.
            with phase("compiling what saves"):
                jax.block_until_ready(canonical.arrays_of(state))
        by_first(lambda: _make_room(out, plan) if start.state is None else _cut_links(out))
        seconds_before = time.perf_counter() - begun

        with (
            open_rows(out, view, board, before) as rows,
            stop_after_the_step(view) as asked,
            profiler,
            view.steps(config.steps, config.unit, config.batch_size),
        ):
            beside = Beside(profiler, Agreement(mesh, asked), watchdog, HostTimes())
            watch = Watch(guards, plan, rows, store)
            steps = Steps(config, step, evaluation, rows, beside, saves, watch, start)
            state = steps.run(state, batches)
        if saves is not None:
            with phase("finishing the last checkpoint"):
                store.wait()
        with phase("writing the report"):
            _write_weights(out, plan, mesh, state)
            by_process = seconds_by_process(beside.times)
            told = {
                **(about or {}),
                "interrupted": beside.stop.to_stop(config.steps),
                "resumed_from": start.step if start.state is not None else None,
                "seconds_held_up_by_saving": sum(saves.seconds) if saves is not None else 0.0,
                "seconds_before_the_first_step": seconds_before,
                "seconds_by_process": by_process,
                "data": source.position(),
            }
            report = by_first(lambda: _report(out, config, step, store, rows.all, steps.initial_eval_loss, told))
    view.say(f"\n{report_text(report)}\n")
    if len(by_process) > 1:
        view.say(f"{straggler_text(by_process)}\n")
    view.say(f"in {out}: {', '.join([*FILES, *(f'{name}/' for name in extra)])}")
    return RunRecord(out, tuple(rows.all), report)


@contextlib.contextmanager
def _phase(view: View, watchdog: Watchdog, text: str) -> Iterator[None]:
    """Around something long that is no step."""
    watchdog.phase(text)
    with view.phase(text):
        yield


@contextlib.contextmanager
def _saved_to_the_end(store: Checkpoints) -> Iterator[None]:
    """An error ends the run, and not what it is saving; Ctrl-C does."""
    try:
        yield
    except Exception:
        store.let_end()
        raise


def _has_ended(
    config: Config, out: Path, store: Checkpoints, extra: Sequence[str], *, resume: bool, skip_batches: int
) -> bool:
    """Whether the run in a directory has ended and is not to be run again; `extra` are directories that it makes there.

    Raises:
      DeclarationError: the directory cannot be used for this run.
    """
    _check_place(out, extra)
    if skip_batches < 0 or (skip_batches and not (resume and store.steps())):
        raise DeclarationError(
            f"skip_batches: is {skip_batches}; it leaves out batches after a checkpoint: give it with --resume where "
            f"{store.folder} has one, or 0"
        )
    if not resume:
        refuse_to_replace(store, out)
        return False
    if (out / REPORT).is_file() and config.steps in store.steps():
        return True
    check_resumes(store, out, config.steps)
    return False


def _compiled(
    config: Config, plan: Plan, held_out: Sequence[Any], phase: _InPhase, *, skip_nonfinite: bool
) -> tuple[CompiledStep, Evaluation | None]:
    """The train step, and the evaluation where there is something held out."""
    with phase(f"compiling the train step for {plan.mesh}"):
        step = compile_train_step(
            config.model,
            config.loss,
            config.make_optimizer(),
            plan,
            config.abstract_batch(),
            compiler_options=config.options_of_xla(),
            skip_nonfinite=skip_nonfinite,
        )
    if not held_out:
        return step, None
    with phase("compiling the evaluation"):
        return step, Evaluation(config, plan, held_out)


def _rows_up_to(out: Path, step: int) -> list[Row]:
    """The rows before a checkpoint; those after it are dropped from the file."""
    rows = check_rows(out, step)
    drop_rows_after(out, step)
    return rows


def _write_weights(out: Path, plan: Plan, mesh: Mesh, state: TrainState) -> None:
    """Writes parameters and buffers; of several processes the first, from one whole array at a time."""

    def arrays() -> Iterator[tuple[str, np.ndarray | None]]:
        for name, value in {**state.parameters, **state.buffers}.items():
            for path, array in users_own(plan, {name: value}).items():
                yield path, whole(array, mesh)

    gathered(arrays(), lambda arrays: write_arrays(out, arrays))


def _check_place(out: Path, extra: Sequence[str]) -> None:
    """That the directory is there or can be made, and can be written to, `extra` ones in it too; nothing is made yet.

    Raises:
      DeclarationError: it cannot be used for this run.
    """
    if out.is_file():
        raise DeclarationError(f"out {str(out)!r}: is a file; give a directory")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        code = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise DeclarationError(f"out {str(out)!r}: {os.strerror(code)}; give a directory that can be made")
    for name in FILES:
        if (out / name).is_dir():
            raise DeclarationError(f"out {str(out)!r}: {name} in it is a directory; give another place")
    for name in extra:
        if (out / name).is_file():
            raise DeclarationError(f"out {str(out)!r}: {name} in it is a file; give another place")
        for path in (out / name, *(out / name).rglob("*")):
            if path.is_symlink():
                raise DeclarationError(
                    f"out {str(out)!r}: {path.relative_to(out)} in it is a link, and what is written there lands "
                    "elsewhere; remove it, or give another place"
                )


def _make_room(out: Path, plan: Plan) -> None:
    """The directory, without an earlier run's files: none of them may be taken for this run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeclarationError(f"out {str(out)!r}: {error.strerror}; give a directory that can be made") from error
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    (out / PLAN).write_text(plan.to_json() + "\n")


def _report(
    out: Path,
    config: Config,
    step: CompiledStep,
    store: Checkpoints,
    rows: Sequence[Row],
    initial_eval_loss: float | None,
    told: Mapping[str, Any],
) -> Any:
    """Writes the report and the picture; gives the report."""
    report = plain(
        {
            **told,
            **step_facts(step),
            **_results(config, rows, initial_eval_loss),
            "seed": config.seed,
            "checkpoints": store.steps(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        }
    )
    write_report(out, report)
    _draw(out, config, step.plan, rows, initial_eval_loss)
    return report


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
