"""The program of a schedule: scans over phases, every value in a slot that lifetime analysis gave it.

Consecutive ticks of a uniform schedule make one *iteration* (an F tick, the B or I tick after it, the W tick after
that), of a divergent one each tick is an iteration. Iterations of the same kinds make one *phase*, a phase is one scan.
In an iteration every device does, masked where its index is -1:

    F part      x = the microbatch from `before` for stage 0, else mail[f_mail_slot]
                y, residuals = stage(x);  residual_buffer[f_residual_slot] = residuals
                y goes one device on, round the ring;  mail[onward_slot] = what arrived
    head        mail[head_slot] = d loss / d y, on the last stage's device
    B part      dx = backward(mail[b_mail_slot], residual_buffer[b_residual_slot])
                dx goes one device back, round the ring;  mail[back_slot] = what arrived
      or I      the same without the gradients of weights;  cut_buffer[b_cut_slot] = what they need beside residuals
    W part      gradients of weights, from residual_buffer[w_residual_slot] and cut_buffer[w_cut_slot]

In a divergent iteration a device does at most one of F, B, I and W. The head and all sends come after it, since they
concern every device: on a V what goes to the next stage may travel back round the ring, and what turns round at its
ends stays on the device, mail[local_slot].

With delayed sends what a tick has made stays in the *outbox* while the next tick runs; meanwhile a copy of it travels,
and is put into its slot when that tick ends:

    a tick     arrived = outbox, one device on or back;  the F, B, I or W part;  mail[slot] = arrived;  outbox = y or dx

so that nothing which a tick computes waits for what travels beside it. What the last tick of an iteration has made
travels during the first of the next. A tick in which nothing is computed is a part too, in which only that happens.
Where a phase begins with another kind in the outbox than its iterations leave there, that is sent before the scan.

Mail is what a stage receives: x from the stage before or a cotangent from the one after. An arrival is stored in the
iteration in which it is sent and read later; nothing is stored that no action reads. A value is live from the write
of its slot to its last read, and no slot is written while live, so that buffers are as small as the schedule allows,
whatever the number of microbatches.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shardlab.pipeline.actions import Action, Kind, ScheduleError, Tick
from shardlab.pipeline.cost import sends
from shardlab.pipeline.iterations import Cell, Iteration, is_delayed, iterations_of
from shardlab.pipeline.schedules import Schedule
from shardlab.pipeline.zero_bubble import in_ticks

PerDevice = tuple[tuple[int, ...], ...]
When = Literal["never", "sometimes", "always"]
NOTHING = -1

# When things happen within an iteration: the order of the reads and writes above. For a divergent iteration, in which
# all reads come first, it asks for more than is needed. The first and the last are of delayed sends alone.
_SENT_BEFORE, _READ_INPUT, _WRITE_FORWARD, _WRITE_HEAD, _READ_BACKWARD, _WRITE_BACKWARD, _READ_WEIGHTS = range(7)
_WRITE_WEIGHTS, _MOMENTS = 7, 8
_ENDS = (_WRITE_FORWARD, _WRITE_BACKWARD, _WRITE_WEIGHTS)  # of the F, the B or I, and the W part


@dataclass(frozen=True)
class Phase:
    """Consecutive iterations of the same kinds: one scan.

    Every table has `length` rows; `PerDevice` tables have a column per device; -1 means nothing.
    """

    cell: Cell
    """Kinds of an iteration, in order; of a divergent phase, those of which a device does one."""
    parts: tuple[Kind | None, ...]
    """The ticks of an iteration by their kinds; None where only delayed sends go on. Of a divergent phase, `cell`."""
    divergent: bool
    """Whether devices do different kinds of action in one iteration."""
    length: int
    before: When
    """In which iterations stage 0 runs a forward."""
    head: When
    """In which iterations the last stage runs a forward."""
    finish: When
    """In which iterations stage 0 runs a B or I."""
    kind: PerDevice
    """Of a divergent phase: which of `cell` a device does."""
    f_microbatch: PerDevice
    f_virtual: PerDevice
    """Which of the device's virtual stages runs."""
    f_mail_slot: PerDevice
    """-1 for stage 0, which takes its microbatch from `before`."""
    f_residual_slot: PerDevice
    b_microbatch: PerDevice
    """Of a B or an I."""
    b_virtual: PerDevice
    b_mail_slot: PerDevice
    b_residual_slot: PerDevice
    b_cut_slot: PerDevice
    w_microbatch: PerDevice
    w_virtual: PerDevice
    w_residual_slot: PerDevice
    w_cut_slot: PerDevice
    onward_slot: PerDevice
    """Where a device puts what comes to it round the ring from the device before it."""
    back_slot: PerDevice
    """Where it puts what comes from the device after it."""
    local_slot: PerDevice
    """Where it puts what it made itself for its next stage, at the turn of a V."""
    first_slot: tuple[int, ...]
    """Where it puts what is sent before the scan, from the outbox."""
    first_step: int
    """Which way round the ring that goes: 1 onwards, -1 back, 0 nothing is sent."""
    before_microbatch: tuple[int, ...]
    """The microbatch whose forward stage 0 runs."""
    head_microbatch: tuple[int, ...]
    """The microbatch whose forward the last stage runs."""
    head_slot: tuple[int, ...]
    """The mail slot of the last stage's device where the head puts that microbatch's cotangent."""
    finish_microbatch: tuple[int, ...]
    """The microbatch whose B or I stage 0 runs."""


def step_of(kind: Kind | None) -> int:
    """Which way round the ring goes what an action makes: 1 onwards, -1 back, 0 nowhere.

    >>> step_of("F"), step_of("I"), step_of("W")
    (1, -1, 0)
    """
    return {"F": 1, "B": -1, "I": -1}.get(kind or "", 0)


@dataclass(frozen=True)
class Program:
    """The phases of a schedule, in order, and how many slots a device needs of each buffer."""

    schedule: Schedule
    phases: tuple[Phase, ...]
    num_mail_slots: int
    num_residual_slots: int
    num_cut_slots: int
    """0 where no backward is split."""

    @property
    def split(self) -> bool:
        """Whether some backward is split in I and W."""
        return self.num_cut_slots > 0

    @property
    def delayed(self) -> bool:
        """Whether sends are delayed; one device sends nothing."""
        return is_delayed(self.schedule)


def program(schedule: Schedule) -> Program:
    """The program of a schedule that the checker passes.

    Raises:
        ScheduleError: an action that would run before its data is there, or is missing.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> p = program(make_schedule("1f1b", stages=4, microbatches=32))
    >>> [(phase.cell, phase.head, phase.length) for phase in p.phases]
    [(('F',), 'never', 3), (('F', 'B'), 'always', 32), (('B',), 'never', 3)]
    >>> p.num_mail_slots, p.num_residual_slots, p.num_cut_slots
    (2, 7, 0)
    """
    iterations = iterations_of(schedule)
    arrivals = _arrivals(schedule, iterations)
    slots = _allocate(schedule, iterations, arrivals)
    return Program(
        schedule=schedule,
        phases=_phases(schedule, iterations, arrivals, slots),
        # At least 1: an array of no slots cannot be indexed.
        num_mail_slots=max(_num_slots(slots.mail), 1),
        num_residual_slots=_num_slots(slots.residuals),
        num_cut_slots=_num_slots(slots.cuts),
    )


def slot_counts(schedule: Schedule) -> tuple[int, int, int]:
    """Slots of a program's buffers for mail, residuals and cuts, as `program` has them, without its tables.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> slot_counts(make_schedule("1f1b", stages=4, microbatches=32))
    (2, 7, 0)
    """
    iterations = iterations_of(schedule)
    slots = _allocate(schedule, iterations, _arrivals(schedule, iterations))
    return max(_num_slots(slots.mail), 1), _num_slots(slots.residuals), _num_slots(slots.cuts)


def phase_iterations(schedule: Schedule) -> tuple[tuple[Iteration, ...], ...]:
    """The iterations of each phase of a program.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> [len(phase) for phase in phase_iterations(make_schedule("1f1b", stages=4, microbatches=32))]
    [3, 32, 3]
    """
    iterations = iterations_of(schedule)
    pairs = zip(iterations, _headless(schedule, iterations), strict=True)
    return tuple(tuple(iteration for iteration, _ in group) for _, group in itertools.groupby(pairs, key=_group))


def breadth_first(schedule: Schedule, *, microbatches: int) -> Schedule:
    """All forwards of a schedule's stages, then all backwards, on its devices, for any number of microbatches.

    Its sends are direct.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> breadth_first(make_schedule("zb_v", stages=1, microbatches=4), microbatches=1).table()
    [['0F0'], ['1F0'], ['1B0'], ['0B0']]
    """
    rows = []
    for device in range(schedule.num_devices):
        forwards = [
            Action(schedule.stage_of(device, virtual), "F", microbatch)
            for virtual in range(schedule.num_virtual)
            for microbatch in range(microbatches)
        ]
        backwards = [Action(forward.stage, "B", forward.microbatch) for forward in reversed(forwards)]
        rows.append([*forwards, *backwards])
    ticks = in_ticks(rows, num_stages=schedule.num_stages)
    return replace(schedule, num_microbatches=microbatches, ticks=ticks, delayed=False)


def forward_program(schedule: Schedule) -> Program:
    """The program of a schedule's forwards alone, in its own order, to evaluate: mail, and nothing kept.

    Its sends are direct.
    """
    schedule = replace(schedule, delayed=False)
    rows = [[action for action in schedule.row(device) if action.kind == "F"] for device in range(schedule.num_devices)]
    ticks = in_ticks(rows, num_stages=schedule.num_stages)
    nothing: Tick = (None,) * schedule.num_devices
    divergent = schedule.placement == "v"
    iterations = [Iteration(tick, nothing, nothing, ((0, tick),), ("F",), ("F",), divergent) for tick in ticks]
    when = {action: index for index, iteration in enumerate(iterations) for action in iteration.actions}
    lives = {
        ("x", action.stage, action.microbatch): (
            when[Action(action.stage - 1, "F", action.microbatch)] * _MOMENTS + _WRITE_FORWARD,
            index * _MOMENTS + _READ_INPUT,
        )
        for action, index in when.items()
        if action.stage > 0
    }
    slots = _Slots(_slots(schedule, lives), {}, {})
    phases = _phases(schedule, iterations, _arrivals(schedule, iterations), slots)
    return Program(schedule, phases, max(_num_slots(slots.mail), 1), 0, 0)


def _headless(schedule: Schedule, iterations: Sequence[Iteration]) -> list[bool]:
    """Whether an iteration comes before the head's first: a scan of its own, which need not hold the head."""
    last = schedule.num_stages - 1
    first = next(
        (at for at, it in enumerate(iterations) if any(a.stage == last and a.kind == "F" for a in it.actions)),
        len(iterations),
    )
    return [at < first and not it.divergent for at, it in enumerate(iterations)]


def _group(pair: tuple[Iteration, bool]) -> tuple[tuple[Kind | None, ...], bool]:
    return pair[0].parts, pair[1]


# --- sends --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrivals:
    """When what is sent arrives.

    Attributes:
        moment: of the arrival of what an action makes, where it does not arrive when the action ends.
        during: of each iteration, the actions of which something arrives during it, by device, tick after tick.
        before: of each iteration, those of which something arrives before it.
    """

    moment: Mapping[Action, int]
    during: Sequence[Tick]
    before: Sequence[Tick]


def _arrivals(schedule: Schedule, iterations: Sequence[Iteration]) -> _Arrivals:
    def sent(tick: Tick) -> Tick:
        return tuple(action if action and sends(schedule, action) else None for action in tick)

    before: list[Tick] = [()] * len(iterations)
    if not is_delayed(schedule):
        during = [tuple(itertools.chain(*(_made(tick) for _, tick in iteration.ticks))) for iteration in iterations]
        return _Arrivals({}, during, before)
    groups = [_group(pair) for pair in zip(iterations, _headless(schedule, iterations), strict=True)]
    moment: dict[Action, int] = {}
    during = [()] * len(iterations)
    made: Tick = ()  # in the tick before
    for index, iteration in enumerate(iterations):
        begins = index > 0 and groups[index] != groups[index - 1] and not iteration.divergent
        for place, tick in iteration.ticks:
            steps = {step_of(action.kind) for action in made if action}
            if begins and steps - {step_of(iteration.parts[-1])}:
                before[index], at = made, _SENT_BEFORE
            else:
                during[index], at = during[index] + made, _WRITE_WEIGHTS if iteration.divergent else _ENDS[place]
            moment |= {action: index * _MOMENTS + at for action in made if action}
            made, begins = sent(tick), False
    return _Arrivals(moment, during, before)


def _made(tick: Tick) -> Tick:
    """The actions of a tick that make something for another stage."""
    return tuple(action if action and step_of(action.kind) else None for action in tick)


# --- lifetimes ----------------------------------------------------------------------------------------------

_Key = tuple[str, int, int]  # what, the stage that reads it, microbatch
_Life = tuple[int, int]  # moments of the write and of the last read


@dataclass(frozen=True)
class _Slots:
    """Slots on the device of the stage that reads them."""

    mail: Mapping[_Key, int]
    residuals: Mapping[_Key, int]
    cuts: Mapping[_Key, int]


def _allocate(schedule: Schedule, iterations: Sequence[Iteration], arrivals: _Arrivals) -> _Slots:
    # Plain tuples find actions: making thousands of those only to look one up takes longer than all else here.
    when: dict[tuple[int, str, int], int] = {
        action: index * _MOMENTS for index, iteration in enumerate(iterations) for action in iteration.actions
    }
    sent: dict[tuple[int, str, int], int] = dict(arrivals.moment.items())
    mail: dict[_Key, _Life] = {}
    residuals: dict[_Key, _Life] = {}
    cuts: dict[_Key, _Life] = {}
    last = schedule.num_stages - 1
    try:
        for microbatch in range(schedule.num_microbatches):
            x = cotangent = 0  # when they arrive
            for stage in range(schedule.num_stages):
                f = stage, "F", microbatch
                at = when[f]
                if stage > 0:
                    mail["x", stage, microbatch] = x, at + _READ_INPUT
                x = sent.get(f, at + _WRITE_FORWARD)
            for stage in range(last, -1, -1):
                f, w = (stage, "F", microbatch), (stage, "W", microbatch)
                b = stage, "I", microbatch
                if b not in when:
                    b = stage, "B", microbatch
                begins, at = when[f] + _WRITE_FORWARD, when[b]
                if stage == last:
                    cotangent = when[f] + _WRITE_HEAD
                mail["cotangent", stage, microbatch] = cotangent, at + _READ_BACKWARD
                end = at + _READ_BACKWARD
                if b[1] == "I":
                    end = when[w] + _READ_WEIGHTS
                    cuts["cut", stage, microbatch] = at + _WRITE_BACKWARD, end
                residuals["residuals", stage, microbatch] = begins, end
                cotangent = sent.get(b, at + _WRITE_BACKWARD)
    except KeyError as error:
        missing = Action(*error.args[0])
        raise ScheduleError(
            f"schedule '{schedule.name}': {missing} is missing; run the checker to see every fault"
        ) from None
    return _Slots(*(_slots(schedule, lives) for lives in (mail, residuals, cuts)))


def _slots(schedule: Schedule, lives: Mapping[_Key, _Life]) -> dict[_Key, int]:
    """A slot for every life (write, last read) on its device: in order of writing, the lowest free one.

    That uses as many slots as there are lives at once, the fewest possible (the lives are intervals).
    """
    slots: dict[_Key, int] = {}
    free: list[list[int]] = [[] for _ in range(schedule.num_devices)]
    busy: list[list[tuple[int, int]]] = [[] for _ in range(schedule.num_devices)]  # last read, slot
    device_of = [schedule.device_of(stage) for stage in range(schedule.num_stages)]
    for (what, stage, microbatch), (write, read) in sorted(lives.items(), key=lambda item: item[1]):
        if read < write:
            raise ScheduleError(
                f"schedule '{schedule.name}': stage {stage} reads what it needs of microbatch {microbatch} "
                "before it is there; run the checker to see every fault"
            )
        device = device_of[stage]
        while busy[device] and busy[device][0][0] < write:
            heapq.heappush(free[device], heapq.heappop(busy[device])[1])
        slot = heapq.heappop(free[device]) if free[device] else len(busy[device])
        heapq.heappush(busy[device], (read, slot))
        slots[what, stage, microbatch] = slot
    return slots


def _num_slots(slots: Mapping[_Key, int]) -> int:
    return max(slots.values(), default=NOTHING) + 1


# --- tables -------------------------------------------------------------------------------------------------


def _phases(
    schedule: Schedule, iterations: Sequence[Iteration], arrivals: _Arrivals, slots: _Slots
) -> tuple[Phase, ...]:
    groups = itertools.groupby(zip(iterations, _headless(schedule, iterations), strict=True), key=_group)
    phases, start = [], 0
    for _, group in groups:
        mine = [iteration for iteration, _ in group]
        during, first = arrivals.during[start : start + len(mine)], arrivals.before[start]
        phases.append(_phase(schedule, mine, during, first, slots))
        start += len(mine)
    return tuple(phases)


def _phase(
    schedule: Schedule, iterations: Sequence[Iteration], during: Sequence[Tick], first: Tick, slots: _Slots
) -> Phase:
    last, count = schedule.num_stages - 1, schedule.num_devices
    cell, divergent = iterations[0].cell, iterations[0].divergent

    def of_kinds(tick: Tick, kinds: str) -> Tick:
        return tuple(action if action and action.kind in kinds else None for action in tick)

    forwards = [of_kinds(it.f, "F") for it in iterations]
    backwards = [of_kinds(it.b, "BI") for it in iterations]
    weights = [of_kinds(it.w, "W") for it in iterations]

    def microbatches(ticks: Sequence[Tick]) -> PerDevice:
        return tuple(tuple(NOTHING if a is None else a.microbatch for a in tick) for tick in ticks)

    def virtual(ticks: Sequence[Tick]) -> PerDevice:
        return tuple(tuple(NOTHING if a is None else a.stage // count for a in tick) for tick in ticks)

    def slot(ticks: Sequence[Tick], held: Mapping[_Key, int], what: str) -> PerDevice:
        def of(action: Action | None) -> int:
            return NOTHING if action is None else held.get((what, action.stage, action.microbatch), NOTHING)

        return tuple(tuple(of(a) for a in tick) for tick in ticks)

    def at_stage(ticks: Sequence[Tick], stage: int) -> tuple[int, ...]:
        return tuple(next((a.microbatch for a in tick if a and a.stage == stage), NOTHING) for tick in ticks)

    def arrivals(ticks: Sequence[Tick], shift: int) -> PerDevice:
        """Per device, the slot for what the device `shift` before it on the ring sends; 0: what it makes itself."""
        return tuple(
            tuple(_arrival(schedule, tick, device, shift, slots.mail) for device in range(count)) for tick in ticks
        )

    first_step = next((step_of(action.kind) for action in first if action), 0)
    (first_slot,) = arrivals([first], first_step)

    before, head, finish = at_stage(forwards, 0), at_stage(forwards, last), at_stage(backwards, 0)
    return Phase(
        cell=cell,
        parts=iterations[0].parts,
        divergent=divergent,
        length=len(iterations),
        before=_when(before),
        head=_when(head),
        finish=_when(finish),
        kind=tuple(
            tuple(cell.index(a.kind) if a and divergent else NOTHING for a in iteration.f) for iteration in iterations
        ),
        f_microbatch=microbatches(forwards),
        f_virtual=virtual(forwards),
        f_mail_slot=slot(forwards, slots.mail, "x"),
        f_residual_slot=slot(forwards, slots.residuals, "residuals"),
        b_microbatch=microbatches(backwards),
        b_virtual=virtual(backwards),
        b_mail_slot=slot(backwards, slots.mail, "cotangent"),
        b_residual_slot=slot(backwards, slots.residuals, "residuals"),
        b_cut_slot=slot(backwards, slots.cuts, "cut"),
        w_microbatch=microbatches(weights),
        w_virtual=virtual(weights),
        w_residual_slot=slot(weights, slots.residuals, "residuals"),
        w_cut_slot=slot(weights, slots.cuts, "cut"),
        onward_slot=arrivals(during, 1),
        back_slot=arrivals(during, -1),
        local_slot=arrivals([f + b for f, b in zip(forwards, backwards, strict=True)], 0),
        first_slot=first_slot,
        first_step=first_step,
        before_microbatch=before,
        head_microbatch=head,
        head_slot=tuple(slots.mail.get(("cotangent", last, microbatch), NOTHING) for microbatch in head),
        finish_microbatch=finish,
    )


def _arrival(schedule: Schedule, actions: Tick, device: int, shift: int, mail: Mapping[_Key, int]) -> int:
    """The slot on `device` for what the device `shift` before it on the ring makes for one of its stages."""
    count = schedule.num_devices
    for place, action in enumerate(actions):
        sender = place % count
        if action is None:
            continue
        to = action.stage + (1 if action.kind == "F" else -1)
        if not 0 <= to < schedule.num_stages or schedule.device_of(to) != device:
            continue
        if _shift(schedule, sender, device, forward=action.kind == "F") == shift:
            return mail["x" if action.kind == "F" else "cotangent", to, action.microbatch]
    return NOTHING


def _shift(schedule: Schedule, sender: int, receiver: int, *, forward: bool) -> int:
    """Which way round the ring a value goes: 1 onwards, -1 back, 0 nowhere, at the turn of a V.

    A ring of one or two devices goes either way: then x goes onwards and a cotangent back.
    """
    count = schedule.num_devices
    if sender == receiver and schedule.placement == "v":
        return 0
    onwards, backwards = (sender + 1) % count == receiver, (sender - 1) % count == receiver
    if onwards and backwards:
        return 1 if forward else -1
    return 1 if onwards else -1


def _when(microbatches: Sequence[int]) -> When:
    there = [microbatch >= 0 for microbatch in microbatches]
    return "always" if all(there) else "sometimes" if any(there) else "never"
