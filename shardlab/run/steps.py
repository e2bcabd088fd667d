"""The steps of a run: one after another, with what stands beside them."""

from __future__ import annotations

import functools
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from shardlab.checkpoint.canonical import Canonical
from shardlab.checkpoint.store import Checkpoints
from shardlab.mesh.processes import Agreement
from shardlab.plan.plan import Plan
from shardlab.run.batches import Source
from shardlab.run.config import Config
from shardlab.run.evaluate import Evaluation
from shardlab.run.guards import Watch
from shardlab.run.instruments import Profiler
from shardlab.run.record import Row, plain
from shardlab.run.resume import Start
from shardlab.run.rows import Rows
from shardlab.run.stragglers import HostTimes
from shardlab.run.watchdog import Watchdog
from shardlab.step.compile import CompiledStep
from shardlab.step.state import TrainState

# Steps handed to the devices before the metrics of an earlier one are waited for. Enough to keep them busy; many
# steps in flight can use up the threads of emulated devices, which ends the process.
RUN_AHEAD = 2


@dataclass(frozen=True)
class Beside:
    """What stands beside the steps: a profile of some, whether to stop, a watchdog, and the host's time."""

    profiler: Profiler
    stop: Agreement
    watchdog: Watchdog
    times: HostTimes


@dataclass(frozen=True)
class Saves:
    """What a run saves, and every how many steps; `seconds` are those for which each save held the steps up."""

    every: int
    store: Checkpoints
    canonical: Canonical
    source: Source
    plan: Plan
    seconds: list[float] = field(default_factory=list)

    def save(self, state: TrainState, initial_eval_loss: float | None) -> None:
        """Saves a state."""
        start = time.perf_counter()
        about = {
            "data": self.source.position(),
            "left_out": self.source.left_out,
            "initial_eval_loss": initial_eval_loss,
            "jax": jax.__version__,
        }
        self.store.save(self.canonical, state, {"plan": self._plan, **plain(about)})
        self.seconds.append(time.perf_counter() - start)

    @functools.cached_property
    def _plan(self) -> Any:
        return plain(json.loads(self.plan.to_json()))


class Steps:
    """The steps of a run after `start`.

    Attributes:
      initial_eval_loss: held-out loss before the first step, where there is an evaluation.
    """

    def __init__(
        self,
        config: Config,
        step: CompiledStep,
        evaluation: Evaluation | None,
        rows: Rows,
        beside: Beside,
        saves: Saves | None,
        watch: Watch,
        start: Start,
    ) -> None:
        self._config, self._step, self._evaluation = config, step, evaluation
        self._rows, self._beside, self._saves, self._watch = rows, beside, saves, watch
        self._done = start.step
        self.initial_eval_loss: float | None = start.about.get("initial_eval_loss") if start.about is not None else None

    def run(self, state: TrainState, batches: Iterator[Any]) -> TrainState:
        """The state after the last step, or after the one in which the run was stopped."""
        config, beside, last = self._config, self._beside, self._config.steps
        beside.watchdog.beat("the steps have begun")
        stop, taken, times = beside.stop, beside.times.taken, beside.times
        if self._evaluation is not None and not self._done:
            self.initial_eval_loss = self._evaluate(state)
            self._rows.view.evaluation(0, self.initial_eval_loss)
        waiting: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._clock = time.perf_counter()
        for number in range(self._done + 1, last + 1):
            beside.profiler.before(number)
            with taken(times.reading):
                batch = next(batches)
            with taken(times.handing):
                state, metrics = self._step(state, batch)
                stop.hand_over(number)
            waiting.append((number, metrics))
            while len(waiting) > RUN_AHEAD:
                self._rows.add(self._row(*waiting.popleft()))
            # Asked after the wait, in which Ctrl-C is most likely pressed.
            ends = number == last or stop.to_stop(number - RUN_AHEAD)
            due = self._evaluation is not None and (ends or number % config.eval_every == 0)
            saved = self._saves is not None and (ends or number % self._saves.every == 0)
            compares = self._watch.compares(number)
            while waiting and (ends or due or saved or compares or beside.profiler.ends_with(number)):
                row = self._row(*waiting.popleft())
                if due and not waiting:
                    row["eval_loss"] = self._evaluate(state)
                    self._clock = time.perf_counter()
                self._rows.add(row)
            # And after an evaluation, which may take long.
            ends = ends or (due and stop.to_stop(number))
            saved = self._saves is not None and (saved or ends)
            if saved or compares:
                self._watch.compare(number, state)
                self._clock = time.perf_counter()
            if self._saves is not None and saved:
                beside.watchdog.phase(f"saving step {number}")
                self._saves.save(state, self.initial_eval_loss)
                beside.watchdog.beat(f"step {number} is saved")
                self._clock = time.perf_counter()
            beside.profiler.after(number)
            if ends:
                break
        return state

    def _row(self, number: int, metrics: Mapping[str, Any]) -> Row:
        """The row of a step, once it has ended: its seconds are those since the step before it ended."""
        with self._beside.times.taken(self._beside.times.waiting):
            loss, norm, weight = (float(metrics[name]) for name in ("loss", "grad_norm", "weight"))
        self._beside.watchdog.beat(f"step {number} has ended")
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        row = Row(step=number, loss=loss, grad_norm=norm, seconds=seconds, tokens=round(weight))
        self._watch.look(row, metrics)
        return row

    def _evaluate(self, state: TrainState) -> float:
        assert self._evaluation is not None
        loss = self._evaluation(state.parameters, state.buffers)[0]
        self._beside.watchdog.beat("an evaluation has ended")
        return loss
