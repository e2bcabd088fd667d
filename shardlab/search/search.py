"""`search`: the plans of a config on a target, ranked by what they are estimated to take."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from shardlab.mesh.chips import chip_of
from shardlab.mesh.faults import DeclarationError
from shardlab.run.config import Config
from shardlab.search.candidates import candidates, elsewhere, simplified, variations
from shardlab.search.choice import Choice, changed
from shardlab.search.estimate import Estimate, Estimator, schedule_of
from shardlab.search.subject import Subject
from shardlab.search.ticks import counting_beside, size

VARIED = 100
"""Of how many of the best plans the variations are looked at."""
MESHES = 20
"""Of how many meshes other links and stages are, for the best plan of each."""
REFINED = 3
"""Of how many plans with stages, and how many without, blocks with a kind of parameter whole, which take longer."""
ROUNDS = 2
"""How often: a refinement may be refined again."""
GAIN = 0.001
"""What these must gain of a step's time to be plans of their own."""


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


def search(config: Config, target: str, *, planned: int = 1) -> tuple[Subject, Found]:
    """The best plans of a config on a target.

    Args:
      config: its mesh says which axes there are and what each is for; its sizes, and what `Choice` lists, are searched.
      target: as `shardlab.mesh.targets` reads it.
      planned: how many of the first are made into plans, which `make_plan` may refuse; `refusal` knows most reasons.

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

    def look(choices: Iterable[Choice], faster_than: float = math.inf) -> None:
        nonlocal searched, least
        for choice in choices:
            searched += 1
            if refused := refusal(estimator, choice):
                dropped[refused] += 1
                continue
            found = estimator.estimate(choice)
            if found.total_seconds >= faster_than:
                dropped["varies a better plan"] += 1
                continue
            if found.needed_bytes <= room:
                fitting.append(found)
                continue
            dropped["does not fit"] += 1
            if least is None or found.needed_bytes < least.needed_bytes:
                least = found

    with_keys = [(schedule_of(choice, config.mesh.stage), choice) for choice in candidates(subject)]
    with_keys.sort(key=lambda pair: size(pair[0]))
    with counting_beside(key for key, _ in with_keys):
        look(choice for _, choice in with_keys)
    best = heapq.nsmallest(VARIED, fitting, key=_rank) or ([least] if least else [])
    for one in best:
        look(variations(subject, one.choice))
    stage = config.mesh.stage
    looked: set[Choice] = set()
    for _ in range(ROUNDS):
        more = [
            *(
                (one, elsewhere(one.choice, estimator.links.layout(one.choice.placed).spec, estimator.layers))
                for one in _best_of_meshes(fitting)
            ),
            *((one, simplified(subject, one.choice)) for one in _leaders(fitting, stage)),
        ]
        for one, others in more:
            fresh = [choice for choice in others if choice not in looked]
            looked.update(fresh)
            look(fresh, one.total_seconds * (1 - GAIN))
    fitting.sort(key=_rank)
    ranked: list[Estimate] = []
    for found in fitting:
        if len(ranked) < planned:
            problem = refused_by_make_plan(subject, found.choice)
            if problem:
                dropped[f"make_plan: {problem}"] += 1
                continue
        ranked.append(found)

    def first(piped: bool) -> Estimate | None:
        if stage is None:
            return None if piped else next(iter(ranked), None)
        return next((one for one in ranked if (one.choice.sizes[stage] > 1) == piped), None)

    return subject, Found(
        ranked=tuple(ranked),
        searched=searched,
        dropped=dict(dropped.most_common()),
        least=None if ranked else least,
        piped=first(True),
        flat=first(False),
        seconds=time.perf_counter() - start,
    )


def _rank(one: Estimate) -> tuple[float, float, int]:
    """The fastest first; of equally fast ones that which takes less memory."""
    return one.total_seconds, one.needed_bytes, one.choice.zero


def _leaders(fitting: Iterable[Estimate], stage: str | None) -> list[Estimate]:
    """The best plans with stages and the best without: whether pipelining pays is told of refined ones."""
    sides: dict[bool, list[Estimate]] = {True: [], False: []}
    for one in fitting:
        sides[stage is not None and one.choice.sizes[stage] > 1].append(one)
    return [one for side in sides.values() for one in heapq.nsmallest(REFINED, side, key=_rank)]


def _best_of_meshes(fitting: Iterable[Estimate]) -> list[Estimate]:
    """The best plan of each of the best meshes."""
    best: dict[Any, Estimate] = {}
    for one in fitting:
        key = one.choice.mesh, one.choice.dcn
        if key not in best or _rank(one) < _rank(best[key]):
            best[key] = one
    return heapq.nsmallest(MESHES, best.values(), key=_rank)


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


def refused_by_make_plan(subject: Subject, choice: Choice) -> str:
    """What `make_plan` says of a plan; empty if it makes it."""
    # The model has been read.
    config = replace(subject.config, model=subject.model)
    try:
        changed(config, choice.overrides(subject.target.text)).plan()
    except DeclarationError as error:
        return str(error).partition("\n")[0]
    return ""
