"""The program of a uniform schedule: scans over phases, every value in a slot that lifetime analysis gave it.

Consecutive F and B ticks make one *iteration*, iterations of the same kinds make one *phase*, a phase is one
scan. In an iteration every device does, masked where its index is -1:

    F part      x = the microbatch from `before` on stage 0, else input_buffer[f_input_slot]
                y, residuals = stage(x);  residual_buffer[f_residual_slot] = residuals
                y goes one device on, round the ring;  input_buffer[f_arrival_slot] = what arrived
    head        where phase.head, on the last device:  cotangent_buffer[head_slot] = d loss / d y
    B part      dx = backward(cotangent_buffer[b_cotangent_slot], residual_buffer[b_residual_slot])
                dx goes one device back, round the ring;  cotangent_buffer[b_arrival_slot] = what arrived

An arrival is stored in the iteration that sent it and read in a later one; nothing is stored that no action
reads. A value is live from the write of its slot to its last read, and no slot is written while live, so that
buffers are as small as the schedule allows, whatever the number of microbatches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardlab.pipeline.actions import Action, Kind, ScheduleError
from shardlab.pipeline.schedules import Schedule, Tick

Cell = tuple[str, ...]
PerDevice = tuple[tuple[int, ...], ...]
NOTHING = -1

# When things happen within an iteration: the order of the reads and writes above.
_READ_INPUT, _WRITE_FORWARD, _WRITE_HEAD, _READ_BACKWARD, _WRITE_BACKWARD, _MOMENTS = range(6)


@dataclass(frozen=True)
class Phase:
    """Consecutive iterations of the same kinds: one scan.

    Every table has `length` rows; `PerDevice` tables have a column per device; -1 means nothing.
    """

    cell: Cell
    """Kinds of an iteration, in order: ("F",), ("F", "B") or ("B",)."""
    head: bool
    """Whether the last stage runs a forward in every iteration of this phase; else it does in none."""
    length: int
    f_microbatch: PerDevice
    f_virtual: PerDevice
    """Which of the device's virtual stages runs."""
    f_input_slot: PerDevice
    """-1 for stage 0, which takes its microbatch from `before`."""
    f_residual_slot: PerDevice
    f_arrival_slot: PerDevice
    b_microbatch: PerDevice
    b_virtual: PerDevice
    b_cotangent_slot: PerDevice
    b_residual_slot: PerDevice
    b_arrival_slot: PerDevice
    before_microbatch: tuple[int, ...]
    """The microbatch whose forward stage 0 runs."""
    head_microbatch: tuple[int, ...]
    """The microbatch whose forward the last stage runs."""
    head_slot: tuple[int, ...]
    """The slot of the last device's cotangent buffer where the head puts that microbatch's cotangent."""
    finish_microbatch: tuple[int, ...]
    """The microbatch whose backward stage 0 runs."""


@dataclass(frozen=True)
class Program:
    """The phases of a schedule, in order, and how many slots a device needs of each buffer."""

    num_devices: int
    num_virtual: int
    num_microbatches: int
    phases: tuple[Phase, ...]
    num_input_slots: int
    num_cotangent_slots: int
    num_residual_slots: int

    @property
    def num_stages(self) -> int:
        """The number of stages on all devices."""
        return self.num_devices * self.num_virtual


@dataclass(frozen=True)
class _Iteration:
    f: Tick
    b: Tick
    cell: Cell
    head: bool

    @property
    def group(self) -> tuple[Cell, bool]:
        return self.cell, self.head


def program(schedule: Schedule) -> Program:
    """The program of a uniform schedule of forwards and whole backwards that the checker passes.

    Raises:
        ScheduleError: a tick in which two kinds of action stand, a split backward (I, W), or an action that
            would run before its data is there.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> p = program(make_schedule("1f1b", stages=4, microbatches=32))
    >>> [(phase.cell, phase.head, phase.length) for phase in p.phases]
    [(('F',), False, 3), (('F', 'B'), True, 32), (('B',), False, 3)]
    >>> p.num_input_slots, p.num_cotangent_slots, p.num_residual_slots
    (1, 1, 7)
    """
    iterations = _iterations(schedule)
    inputs, cotangents, residuals = _allocate(schedule, iterations)
    groups = itertools.groupby(enumerate(iterations), key=lambda pair: pair[1].group)
    phases = tuple(_phase(schedule, list(group), inputs, cotangents, residuals) for _, group in groups)
    return Program(
        num_devices=schedule.num_devices,
        num_virtual=schedule.num_virtual,
        num_microbatches=schedule.num_microbatches,
        phases=phases,
        num_input_slots=_num_slots(inputs),
        num_cotangent_slots=_num_slots(cotangents),
        num_residual_slots=_num_slots(residuals),
    )


def is_uniform(schedule: Schedule) -> bool:
    """Whether in every tick all devices that work do the same kind of action."""
    return all(len({action.kind for action in tick if action}) <= 1 for tick in schedule.ticks)


def simulate(program: Program) -> tuple[tuple[Action, ...], ...]:
    """What each device ran, in order, when the program runs on symbols in place of arrays.

    Every device computes and sends in every iteration, as in the compiled step: from garbage where its index
    is -1, and buffers start as garbage.

    Raises:
        ScheduleError: an action that reads anything but its own input, residuals or cotangent.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> p = program(make_schedule("1f1b", stages=2, microbatches=2))
    >>> [" ".join(map(str, row)) for row in simulate(p)]
    ['0F0 0F1 0B0 0B1', '1F0 1B0 1F1 1B1']
    """
    return _Simulation(program).run()


class _Simulation:
    """The devices' buffers, filled with symbols; None is garbage."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.last = program.num_stages - 1
        self.ran: list[list[Action]] = [[] for _ in range(program.num_devices)]
        self.inputs = self._buffer(program.num_input_slots)
        self.cotangents = self._buffer(program.num_cotangent_slots)
        self.residuals = self._buffer(program.num_residual_slots)

    def _buffer(self, num_slots: int) -> list[list[_Symbol | None]]:
        return [[None] * num_slots for _ in range(self.program.num_devices)]

    def run(self) -> tuple[tuple[Action, ...], ...]:
        for phase in self.program.phases:
            for index in range(phase.length):
                if "F" in phase.cell:
                    self._forward(phase, index)
                if phase.head:
                    self._head(phase, index)
                if "B" in phase.cell:
                    self._backward(phase, index)
        return tuple(map(tuple, self.ran))

    def _stage(self, device: int, virtual: int) -> int:
        return virtual * self.program.num_devices + device

    def _forward(self, phase: Phase, index: int) -> None:
        sent: list[_Symbol | None] = []
        for device, microbatch in enumerate(phase.f_microbatch[index]):
            if microbatch == NOTHING:
                sent.append(None)
                continue
            stage = self._stage(device, phase.f_virtual[index][device])
            slot = phase.f_input_slot[index][device]
            x: _Symbol | None
            if stage == 0:
                x = ("x", 0, phase.before_microbatch[index])
            else:
                x = None if slot == NOTHING else self.inputs[device][slot]
            action = Action(stage, "F", microbatch)
            self._expect(action, x, ("x", stage, microbatch))
            self.ran[device].append(action)
            self.residuals[device][phase.f_residual_slot[index][device]] = ("residuals", stage, microbatch)
            sent.append(("x", stage + 1, microbatch))
        self._receive(sent[-1:] + sent[:-1], phase.f_arrival_slot[index], self.inputs)

    def _head(self, phase: Phase, index: int) -> None:
        microbatch = phase.head_microbatch[index]
        virtual = phase.f_virtual[index][-1]
        if (virtual, phase.f_microbatch[index][-1]) != (self.program.num_virtual - 1, microbatch):
            forward = Action(self.last, "F", microbatch)
            raise ScheduleError(f"the head of microbatch {microbatch} runs in an iteration without {forward}")
        self.cotangents[-1][phase.head_slot[index]] = ("cotangent", self.last, microbatch)

    def _backward(self, phase: Phase, index: int) -> None:
        sent: list[_Symbol | None] = []
        for device, microbatch in enumerate(phase.b_microbatch[index]):
            if microbatch == NOTHING:
                sent.append(None)
                continue
            stage = self._stage(device, phase.b_virtual[index][device])
            action = Action(stage, "B", microbatch)
            cotangent = self.cotangents[device][phase.b_cotangent_slot[index][device]]
            residuals = self.residuals[device][phase.b_residual_slot[index][device]]
            self._expect(action, cotangent, ("cotangent", stage, microbatch))
            self._expect(action, residuals, ("residuals", stage, microbatch))
            self.ran[device].append(action)
            if stage == 0 and phase.finish_microbatch[index] != microbatch:
                raise ScheduleError(f"{action} finishes microbatch {phase.finish_microbatch[index]}")
            sent.append(("cotangent", stage - 1, microbatch))
        self._receive(sent[1:] + sent[:1], phase.b_arrival_slot[index], self.cotangents)

    def _expect(self, action: Action, value: _Symbol | None, expected: _Symbol) -> None:
        if value != expected:
            raise ScheduleError(f"{action} reads {_text(value)}, not {_text(expected)}")

    def _receive(
        self, arrived: list[_Symbol | None], slots: tuple[int, ...], buffers: list[list[_Symbol | None]]
    ) -> None:
        for device, slot in enumerate(slots):
            if slot != NOTHING:
                buffers[device][slot] = arrived[device]


_Symbol = tuple[str, int, int]  # (what, the stage that reads it, microbatch)


def _text(value: _Symbol | None) -> str:
    return "garbage" if value is None else f"{value[0]} of microbatch {value[2]} for stage {value[1]}"


# --- from ticks to iterations -------------------------------------------------------------------------------


def _iterations(schedule: Schedule) -> list[_Iteration]:
    """The ticks as iterations: an F tick and the B tick right after it are one."""
    kinds = [_kind_of(schedule, index) for index in range(len(schedule.ticks))]
    ticks = [(kind, tick) for kind, tick in zip(kinds, schedule.ticks, strict=True) if kind is not None]
    idle: Tick = (None,) * schedule.num_devices

    def iteration(f: Tick | None, b: Tick | None) -> _Iteration:
        cell: Cell = ("F",) * (f is not None) + ("B",) * (b is not None)
        head = any(action is not None and action.stage == schedule.num_stages - 1 for action in f or ())
        return _Iteration(f or idle, b or idle, cell, head)

    merged: list[_Iteration] = []
    index = 0
    while index < len(ticks):
        kind, tick = ticks[index]
        pair = kind == "F" and index + 1 < len(ticks) and ticks[index + 1][0] == "B"
        if pair:
            merged.append(iteration(tick, ticks[index + 1][1]))
        else:
            merged.append(iteration(tick, None) if kind == "F" else iteration(None, tick))
        index += 2 if pair else 1
    # Where all forwards precede all backwards, one F tick and one B tick meet at the turn: merged, they would
    # be a scan of their own, compiled apart. They stay apart wherever that makes fewer scans.
    for at in range(len(merged) - 1, -1, -1):
        one = merged[at]
        if one.cell == ("F", "B"):
            apart = [*merged[:at], iteration(one.f, None), iteration(None, one.b), *merged[at + 1 :]]
            if _num_groups(apart) < _num_groups(merged):
                merged = apart
    return merged


def _num_groups(iterations: Sequence[_Iteration]) -> int:
    return sum(1 for _ in itertools.groupby(iterations, key=lambda iteration: iteration.group))


def _kind_of(schedule: Schedule, index: int) -> Kind | None:
    kinds = sorted({action.kind for action in schedule.ticks[index] if action is not None})
    if len(kinds) > 1:
        raise ScheduleError(
            f"schedule '{schedule.name}': tick {index} has kinds {' and '.join(kinds)}; one program for all "
            "devices needs one kind in a tick, so put each in a tick of its own"
        )
    if kinds and kinds[0] not in ("F", "B"):
        raise ScheduleError(
            f"schedule '{schedule.name}': tick {index} has kind {kinds[0]}; a program has forwards F and "
            "whole backwards B, so join each I and W into a B"
        )
    return kinds[0] if kinds else None


# --- lifetimes ----------------------------------------------------------------------------------------------

_Slots = Mapping[tuple[int, int], int]  # (stage that reads, microbatch) -> slot on that stage's device


def _allocate(schedule: Schedule, iterations: Sequence[_Iteration]) -> tuple[_Slots, _Slots, _Slots]:
    """The slots of inputs, cotangents and residuals, each by the stage that reads it and the microbatch."""
    when = {
        action: index
        for index, iteration in enumerate(iterations)
        for action in iteration.f + iteration.b
        if action is not None
    }

    def moment(action: Action, offset: int) -> int:
        if action not in when:
            raise ScheduleError(f"schedule '{schedule.name}': {action} is missing; run the checker to see every fault")
        return when[action] * _MOMENTS + offset

    inputs: dict[tuple[int, int], tuple[int, int]] = {}
    cotangents, residuals = dict(inputs), dict(inputs)
    last = schedule.num_stages - 1
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            key = (stage, microbatch)
            forward, backward = Action(stage, "F", microbatch), Action(stage, "B", microbatch)
            if stage > 0:
                sent = moment(Action(stage - 1, "F", microbatch), _WRITE_FORWARD)
                inputs[key] = sent, moment(forward, _READ_INPUT)
            residuals[key] = moment(forward, _WRITE_FORWARD), moment(backward, _READ_BACKWARD)
            if stage == last:
                written = moment(forward, _WRITE_HEAD)
            else:
                written = moment(Action(stage + 1, "B", microbatch), _WRITE_BACKWARD)
            cotangents[key] = written, moment(backward, _READ_BACKWARD)
    return _slots(schedule, inputs), _slots(schedule, cotangents), _slots(schedule, residuals)


def _slots(schedule: Schedule, lives: Mapping[tuple[int, int], tuple[int, int]]) -> _Slots:
    """A slot for every life (write, last read) on its device: in order of writing, the lowest free one.

    That uses as many slots as there are lives at once, the fewest possible (the lives are intervals).
    """
    slots: dict[tuple[int, int], int] = {}
    last_read: list[list[int]] = [[] for _ in range(schedule.num_devices)]
    for (stage, microbatch), (write, read) in sorted(lives.items(), key=lambda item: item[1]):
        if read < write:
            raise ScheduleError(
                f"schedule '{schedule.name}': stage {stage} reads what it needs of microbatch {microbatch} "
                "before it is there; run the checker to see every fault"
            )
        busy = last_read[schedule.device_of(stage)]
        slot = next((slot for slot, until in enumerate(busy) if until < write), len(busy))
        busy[slot : slot + 1] = [read]
        slots[stage, microbatch] = slot
    return slots


def _num_slots(slots: _Slots) -> int:
    """At least 1, even for the inputs of a single stage: an array of no slots cannot be indexed."""
    return max(slots.values(), default=0) + 1


# --- tables -------------------------------------------------------------------------------------------------


def _phase(
    schedule: Schedule,
    numbered: Sequence[tuple[int, _Iteration]],
    inputs: _Slots,
    cotangents: _Slots,
    residuals: _Slots,
) -> Phase:
    iterations = [iteration for _, iteration in numbered]
    last = schedule.num_stages - 1

    def microbatch_of(tick: Tick, stage: int) -> int:
        return next((a.microbatch for a in tick if a is not None and a.stage == stage), NOTHING)

    def column(action: Action | None, slots: _Slots | None = None) -> int:
        if action is None:
            return NOTHING
        return action.microbatch if slots is None else slots.get((action.stage, action.microbatch), NOTHING)

    def virtual(action: Action | None) -> int:
        return NOTHING if action is None else action.stage // schedule.num_devices

    def arrivals(tick: Tick, step: int, slots: _Slots) -> Iterator[int]:
        """Per device, the slot for what its neighbour sends: step 1 round the ring onwards, -1 back."""
        for device in range(schedule.num_devices):
            sender = tick[(device - step) % schedule.num_devices]
            if sender is None or not 0 <= sender.stage + step <= last:
                yield NOTHING
            else:
                yield slots[sender.stage + step, sender.microbatch]

    return Phase(
        cell=iterations[0].cell,
        head=iterations[0].head,
        length=len(iterations),
        f_microbatch=tuple(tuple(column(a) for a in it.f) for it in iterations),
        f_virtual=tuple(tuple(virtual(a) for a in it.f) for it in iterations),
        f_input_slot=tuple(tuple(column(a, inputs) for a in it.f) for it in iterations),
        f_residual_slot=tuple(tuple(column(a, residuals) for a in it.f) for it in iterations),
        f_arrival_slot=tuple(tuple(arrivals(it.f, 1, inputs)) for it in iterations),
        b_microbatch=tuple(tuple(column(a) for a in it.b) for it in iterations),
        b_virtual=tuple(tuple(virtual(a) for a in it.b) for it in iterations),
        b_cotangent_slot=tuple(tuple(column(a, cotangents) for a in it.b) for it in iterations),
        b_residual_slot=tuple(tuple(column(a, residuals) for a in it.b) for it in iterations),
        b_arrival_slot=tuple(tuple(arrivals(it.b, -1, cotangents)) for it in iterations),
        before_microbatch=tuple(microbatch_of(it.f, 0) for it in iterations),
        head_microbatch=tuple(microbatch_of(it.f, last) for it in iterations),
        head_slot=tuple(
            NOTHING if (mb := microbatch_of(it.f, last)) < 0 else cotangents[last, mb] for it in iterations
        ),
        finish_microbatch=tuple(microbatch_of(it.b, 0) for it in iterations),
    )
