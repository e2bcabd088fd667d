"""Which collectives run beside compute, how much of their time it hides, and how much the device waits for.

                 start                          done
    compute        |##########|#######|#####|     |
    collective     |===========================|..|        hidden while compute lasts; what is left at `done` is exposed

The model, simple and said aloud: instructions run in the order of the schedule, collectives move only while they are
between start and done, and those over the same links one after the other in the order they were started.  So one second
of compute hides one second of communication on each set of links.  What a collective still lacks at its done is waited
for, and that wait hides others as compute does.  A synchronous collective is waited for in whole.

Asynchronous are, in XLA's forms: `all-gather-start` and `-done` and their like, unless XLA:GPU says `is_sync`;
`async-start` and `async-done` around a collective; `send` and `send-done`; and XLA:TPU's chains, where copies of one
collective are fused with the matmuls beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from shardlab.hlo.collectives import Collective
from shardlab.hlo.loops import Visit, visits
from shardlab.hlo.parse import Computation, HloModule, Instruction
from shardlab.hlo.time import Times
from shardlab.hlo.work import scheduled

_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_IS_SYNC = re.compile(r'"is_sync":"?true')


@dataclass(frozen=True)
class Overlap:
    """One collective of a step, loops counted: seconds = hidden + exposed.

    Attributes:
      collective: which.
      asynchronous: whether it has a start and a done with room between them.
      seconds: it takes on its links.
      hidden_seconds: of them, beside compute (or beside the wait for another).
      exposed_seconds: of them, waited for.
    """

    collective: Collective
    asynchronous: bool
    seconds: float
    hidden_seconds: float
    exposed_seconds: float


@dataclass(frozen=True)
class Overlaps:
    """The collectives of a step, in the order they were given, and the compute they stand beside."""

    each: tuple[Overlap, ...]
    compute_seconds: float

    @property
    def seconds(self) -> float:
        """All collectives on their links."""
        return sum(one.seconds for one in self.each)

    @property
    def hidden_seconds(self) -> float:
        """Of them, beside compute."""
        return sum(one.hidden_seconds for one in self.each)

    @property
    def exposed_seconds(self) -> float:
        """Of them, waited for."""
        return sum(one.exposed_seconds for one in self.each)

    @property
    def step_seconds(self) -> float:
        """Compute and what is waited for."""
        return self.compute_seconds + self.exposed_seconds


def same_axes(one: Collective) -> Hashable:
    """Collectives over the same mesh axes share their links."""
    return one.axes


def overlaps(
    module: HloModule,
    found: Sequence[Collective],
    seconds: Callable[[Collective], float],
    compute: Times,
    *,
    links: Callable[[Collective], Hashable] = same_axes,
) -> Overlaps:
    """How the collectives of a step overlap with its compute.

    Args:
      found: `collectives(module, axes)`.
      seconds: of a collective, all its executions together, as its bytes are.
      compute: `times(module, rates)`.
      links: what collectives must have in common to share links; the mesh axes they cross.

    >>> from shardlab.hlo import Rates, collectives, parse, times
    >>> module = parse('''
    ... HloModule step, is_scheduled=true, num_partitions=2
    ... ENTRY %main (x: f32[4], y: f32[4]) -> (f32[8], f32[4]) {
    ...   %x = f32[4]{0} parameter(0)
    ...   %y = f32[4]{0} parameter(1)
    ...   %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}
    ...   %z = f32[4]{0} add(%y, %y)
    ...   %done = f32[8]{0} all-gather-done(%start)
    ...   ROOT %both = (f32[8]{0}, f32[4]{0}) tuple(%done, %z)
    ... }
    ... ''')
    >>> compute = times(module, Rates({}, 16.0, memory_efficiency=1.0))  # 48 bytes: 3 s
    >>> one = overlaps(module, collectives(module, {"data": 2}), lambda one: 5.0, compute).each[0]
    >>> one.asynchronous, one.hidden_seconds, one.exposed_seconds
    (True, 3.0, 2.0)
    """
    spans = _spans(module, found)
    pieces = {(piece.computation, piece.name): piece.seconds / piece.executions for piece in compute.pieces}
    step = visits(module, lambda where, i: pieces.get((where, i.name), 0.0))
    once = [seconds(one) / max(one.count, 1) for one in found]
    walk = _Walk(module, found, once, spans, step, pieces, links)
    total = walk.through(module.computations[module.entry])
    each = []
    for k, one in enumerate(found):
        exposed = walk.exposed.get(k, once[k]) * one.count
        whole = once[k] * one.count
        each.append(Overlap(one, spans[k].asynchronous if k in spans else False, whole, whole - exposed, exposed))
    return Overlaps(tuple(each), total.compute)


@dataclass(frozen=True)
class _Span:
    """Where a collective starts and is done: names of instructions of one scheduled computation."""

    computation: str
    start: str
    done: str | None  # None: synchronous; "" where it ends in another computation

    @property
    def asynchronous(self) -> bool:
        return self.done is not None


def _spans(module: HloModule, found: Sequence[Collective]) -> dict[int, _Span]:
    """The spans of collectives by their number in `found`."""
    numbers = {one.name: k for k, one in enumerate(found)}
    chains: dict[tuple[str, str, str], int] = {}
    spans: dict[int, _Span] = {}
    places = {computation.name: computation for computation in scheduled(module)}
    later: list[tuple[Computation, Instruction, tuple[str, str, str]]] = []
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            key = _chain(instruction)
            k = numbers.get(instruction.name)
            if k is not None and key is not None:
                chains[key] = k
            if key is not None:
                later.append((computation, instruction, key))
            elif k is not None and (at := _scheduled_at(module, places, computation, instruction)):
                spans[k] = _span(*at)
    ends: dict[int, list[tuple[str, str]]] = {}
    for computation, instruction, key in later:
        at = _scheduled_at(module, places, computation, instruction)
        if key in chains and at is not None:
            ends.setdefault(chains[key], []).append((at[0].name, at[1].name))
    for k, made in ends.items():
        where = made[0][0]
        order = {name: n for n, name in enumerate(module.computations[where].instructions)}
        here = sorted({name for place, name in made if place == where}, key=lambda name: order[name])
        spans[k] = _Span(where, here[0], here[-1] if len(here) > 1 else None)
    return spans


def _chain(instruction: Instruction) -> tuple[str, str, str] | None:
    if "chain_id" not in instruction.attribute_text:
        return None
    chain = _CHAIN.search(instruction.attributes.get("frontend_attributes", ""))
    return (instruction.opcode, instruction.attributes.get("channel_id", ""), chain[1]) if chain else None


def _scheduled_at(
    module: HloModule, places: Mapping[str, Computation], computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction] | None:
    """The instruction of a schedule that runs this one: itself, the fusion it is in, the `async-start` around it."""
    while True:
        callers = [at for at in module.callers.get(computation.name, ()) if at[1].opcode in ("fusion", "async-start")]
        if not callers:
            return (computation, instruction) if computation.name in places else None
        computation, instruction = callers[0]


def _span(computation: Computation, start: Instruction) -> _Span:
    if not (start.opcode.endswith("-start") or start.opcode == "send"):
        return _Span(computation.name, start.name, None)
    if _IS_SYNC.search(start.attribute_text):
        return _Span(computation.name, start.name, None)
    name = start.name
    while users := [u for u in computation.users.get(name, ()) if u.opcode.endswith(("-done", "-update"))]:
        name = users[0].name
        if users[0].opcode.endswith("-done"):
            return _Span(computation.name, start.name, name)
    return _Span(computation.name, start.name, "")


@dataclass
class _Run:
    """What a computation takes: its compute, and the seconds each set of links was busy beside it."""

    compute: float
    wait: float
    hidden: dict[Hashable, float]


class _Walk:
    """Through the schedule of each computation once; `exposed` is of one execution."""

    def __init__(
        self,
        module: HloModule,
        found: Sequence[Collective],
        once: Sequence[float],
        spans: Mapping[int, _Span],
        step: Mapping[str, Visit],
        compute: Mapping[tuple[str, str], float],
        links: Callable[[Collective], Hashable],
    ) -> None:
        self.module, self.found, self.once, self.step, self.compute, self.links = (
            module,
            found,
            once,
            step,
            compute,
            links,
        )
        self.exposed: dict[int, float] = {}
        self.runs: dict[str, _Run] = {}
        self.starts: dict[tuple[str, str], list[int]] = {}
        self.dones: dict[tuple[str, str], list[int]] = {}
        for k, span in spans.items():
            self.starts.setdefault((span.computation, span.start), []).append(k)
            if span.done:
                self.dones.setdefault((span.computation, span.done), []).append(k)
        self.asynchronous = {k for k, span in spans.items() if span.asynchronous}

    def through(self, computation: Computation) -> _Run:
        if computation.name in self.runs:
            return self.runs[computation.name]
        run = self.runs[computation.name] = _Run(0.0, 0.0, {})
        flying: dict[Hashable, dict[int, float]] = {}  # by links, in the order started: seconds that are left

        def passes(time: float, busy: Mapping[Hashable, float], but: Hashable = None) -> None:
            for link, queue in flying.items():
                left = 0.0 if link == but else time - busy.get(link, 0.0)
                for k in list(queue):
                    used = min(max(left, 0.0), queue[k])
                    queue[k] -= used
                    left -= used
                    run.hidden[link] = run.hidden.get(link, 0.0) + used

        def wait_for(k: int) -> None:
            link = self.links(self.found[k])
            queue = flying.get(link, {})
            for other in list(queue):
                rest = queue.pop(other)
                self.exposed[other] = self.exposed.get(other, 0.0) + rest
                run.wait += rest
                passes(rest, {}, but=link)
                if other == k:
                    return

        for instruction in computation.instructions.values():
            at = (computation.name, instruction.name)
            for k in self.dones.get(at, ()):
                # A chain's last piece is compute of its own, and done with it.
                if instruction.opcode == "fusion":
                    passes(self.compute.get(at, 0.0), {})
                if k in flying.get(self.links(self.found[k]), {}):
                    wait_for(k)
            for k in self.starts.get(at, ()):
                link = self.links(self.found[k])
                if k in self.asynchronous:
                    self.exposed.setdefault(k, 0.0)
                    flying.setdefault(link, {})[k] = self.once[k]
                else:
                    flying.setdefault(link, {})[k] = self.once[k]
                    wait_for(k)
            time = self.compute.get(at, 0.0)
            run.compute += time
            if at not in self.dones or instruction.opcode != "fusion":
                passes(time, {})
            for called, times in self._called(computation, instruction):
                inner = self.through(called)
                run.compute += inner.compute * times
                run.wait += inner.wait * times
                passes(
                    (inner.compute + inner.wait) * times, {link: busy * times for link, busy in inner.hidden.items()}
                )
        for queue in list(flying.values()):
            for k in list(queue):
                if k in queue:
                    wait_for(k)
        return run

    def _called(self, computation: Computation, instruction: Instruction) -> list[tuple[Computation, float]]:
        if instruction.opcode not in ("while", "conditional", "call"):
            return []
        names = [
            name
            for attribute in (
                "body",
                "condition",
                "branch_computations",
                "true_computation",
                "false_computation",
                "to_apply",
            )
            for name in instruction.callees(attribute)
        ]
        here = self.step[computation.name].executions if computation.name in self.step else 0
        found = []
        for name in names:
            visit = self.step.get(name)
            sites = len(self.module.callers.get(name, ())) or 1
            if visit is not None and here and name in self.module.computations:
                found.append((self.module.computations[name], visit.executions / here / sites))
        return found
