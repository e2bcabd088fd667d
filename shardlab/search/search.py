"""`search`: the plans of a config on a target, ranked by what they are estimated to take."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from shardlab.mesh.chips import chip_of
from shardlab.mesh.faults import DeclarationError
from shardlab.run.config import Config
from shardlab.search.candidates import candidates
from shardlab.search.choice import Choice, changed
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.subject import Subject


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      ranked: plans that fit, the fastest first; plans that `make_plan` refuses are not among the first.
      searched: how many plans were estimated.
      dropped: how many were not ranked, by reason.
      least: of those that do not fit, the one that lacks the least; None where one fits.
      piped, flat: the best with stages and the best without; None where there is none.
      seconds: that the search took.
    """

    ranked: tuple[Estimate, ...]
    searched: int
    dropped: dict[str, int]
    least: Estimate | None
    piped: Estimate | None
    flat: Estimate | None
    seconds: float
    confirmed: dict[Choice, Any] = field(default_factory=dict)


def search(config: Config, target: str, *, top: int = 10) -> tuple[Subject, Found]:
    """The best plans of a config on a target.

    Args:
      config: its mesh says which axes there are and what each is for; its sizes, and what `Choice` lists, are searched.
      target: as `shardlab.mesh.targets` reads it.
      top: how many of the first are made into plans, which `make_plan` may refuse.

    Raises:
      DeclarationError: what is wrong with the config whatever the plan.
    """
    start = time.perf_counter()
    subject = Subject(config, target)
    estimator = Estimator(subject)
    chip_of(subject.target)  # of emulated devices there is nothing to rank by
    room = subject.room
    dropped: Counter[str] = Counter()
    fitting: list[Estimate] = []
    least: Estimate | None = None
    searched = 0
    stage = config.mesh.stage
    for choice in candidates(subject):
        searched += 1
        refused = refusal(estimator, choice)
        if refused:
            dropped[refused] += 1
            continue
        found = estimator.estimate(choice)
        if found.hbm_bytes > room:
            dropped["does not fit"] += 1
            if least is None or found.hbm_bytes < least.hbm_bytes:
                least = found
            continue
        fitting.append(found)
    fitting.sort(key=lambda one: (one.total_seconds, one.hbm_bytes, one.choice.zero))
    ranked: list[Estimate] = []
    for found in fitting:
        if len(ranked) < top:
            problem = refused_by_make_plan(config, found.choice, target)
            if problem:
                dropped[f"make_plan: {problem}"] += 1
                continue
        ranked.append(found)

    def best(piped: bool) -> Estimate | None:
        if stage is None:
            return None if piped else next(iter(ranked), None)
        return next((one for one in ranked if (one.choice.sizes[stage] > 1) == piped), None)

    found_ = Found(
        ranked=tuple(ranked),
        searched=searched,
        dropped=dict(dropped.most_common()),
        least=None if ranked else least,
        piped=best(True),
        flat=best(False),
        seconds=time.perf_counter() - start,
    )
    return subject, found_


def refusal(estimator: Estimator, choice: Choice) -> str:
    """Why `make_plan` would refuse a plan, as far as that is cheap to know; empty if nothing is."""
    held = estimator.storage(choice.mesh, choice.zero, choice.whole, choice.head)
    if held.faults:
        return "a dim does not divide by its axes"
    if choice.gather == "layer" and not held.sharded:
        return "no block's parameters lie in shards"
    if choice.accumulate == "sharded" and not held.reduced:
        return "no block's gradients lie in shards"
    return ""


def refused_by_make_plan(config: Config, choice: Choice, target: str) -> str:
    """What `make_plan` says of a plan; empty if it makes it."""
    try:
        changed(config, choice.overrides(target)).plan()
    except DeclarationError as error:
        return str(error).partition("\n")[0]
    return ""
