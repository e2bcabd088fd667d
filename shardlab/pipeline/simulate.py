"""A program run on symbols in place of arrays: it shows what every action reads, before anything is compiled."""

from __future__ import annotations

from collections.abc import Sequence

from shardlab.pipeline.actions import Action, ScheduleError
from shardlab.pipeline.buffers import NOTHING, Phase, Program, step_of

_Symbol = tuple[str, int, int]  # (what, the stage that reads it, microbatch)


def simulate(program: Program) -> tuple[tuple[Action, ...], ...]:
    """What each device ran, in order, when the program runs on symbols in place of arrays.

    Every device computes and sends in every iteration, as in the compiled step: from garbage where its index
    is -1, and buffers start as garbage.

    Raises:
        ScheduleError: an action that reads anything but its own input, residuals, cotangent or cut.

    >>> from shardlab.pipeline.buffers import program
    >>> from shardlab.pipeline.schedules import make_schedule
    >>> p = program(make_schedule("1f1b", stages=2, microbatches=2))
    >>> [" ".join(map(str, row)) for row in simulate(p)]
    ['0F0 0F1 0B0 0B1', '1F0 1B0 1F1 1B1']
    """
    return _Simulation(program).run()


class _Simulation:
    """The devices' buffers, filled with symbols; None is garbage.

    With delayed sends, `outbox` is what every device has made in the tick before.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.schedule = program, program.schedule
        self.count, self.last = self.schedule.num_devices, self.schedule.num_stages - 1
        self.ran: list[list[Action]] = [[] for _ in range(self.count)]
        self.mail = self._buffer(program.num_mail_slots)
        self.residuals = self._buffer(program.num_residual_slots)
        self.cuts = self._buffer(program.num_cut_slots)
        self.outbox: list[_Symbol | None] = [None] * self.count

    def _buffer(self, num_slots: int) -> list[list[_Symbol | None]]:
        return [[None] * num_slots for _ in range(self.count)]

    def run(self) -> tuple[tuple[Action, ...], ...]:
        for phase in self.program.phases:
            if phase.first_step:
                self._put(self.outbox, phase.first_step, phase.first_slot)
            for index in range(phase.length):
                if phase.divergent:
                    sent = self.outbox
                    self.outbox = [self._one(phase, index, device) for device in range(self.count)]
                    self._head(phase, index)
                    for step in (1, -1):
                        self._receive(sent if self.program.delayed else self.outbox, step, phase, index)
                    self._receive(self.outbox, 0, phase, index)
                    continue
                if self.program.delayed:
                    self._travelling(phase, index)
                    continue
                if "F" in phase.cell:
                    self._receive([self._forward(phase, index, d) for d in range(self.count)], 1, phase, index)
                    self._head(phase, index)
                if "B" in phase.cell or "I" in phase.cell:
                    self._receive([self._backward(phase, index, d) for d in range(self.count)], -1, phase, index)
                if "W" in phase.cell:
                    for device in range(self.count):
                        self._weights(phase, index, device)
        return tuple(map(tuple, self.ran))

    def _travelling(self, phase: Phase, index: int) -> None:
        """A uniform iteration with delayed sends: what a part has made travels during the next one."""
        made, step = self.outbox, step_of(phase.parts[-1])
        for part in phase.parts:
            sent = made
            if part == "F":
                made = [self._forward(phase, index, device) for device in range(self.count)]
                self._head(phase, index)
            elif part == "W":
                for device in range(self.count):
                    self._weights(phase, index, device)
            elif part is not None:
                made = [self._backward(phase, index, device) for device in range(self.count)]
            if step:
                self._receive(sent, step, phase, index)
            step = step_of(part)
        self.outbox = made if step else [None] * self.count

    def _one(self, phase: Phase, index: int, device: int) -> _Symbol | None:
        kind = phase.kind[index][device]
        if kind == NOTHING:
            return None
        if phase.cell[kind] == "F":
            return self._forward(phase, index, device)
        if phase.cell[kind] == "W":
            self._weights(phase, index, device)
            return None
        return self._backward(phase, index, device)

    def _forward(self, phase: Phase, index: int, device: int) -> _Symbol | None:
        microbatch, slot = phase.f_microbatch[index][device], phase.f_mail_slot[index][device]
        if microbatch == NOTHING:
            return None
        stage = self.schedule.stage_of(device, phase.f_virtual[index][device])
        x = ("x", 0, phase.before_microbatch[index]) if slot == NOTHING else self.mail[device][slot]
        self._ran(device, Action(stage, "F", microbatch), (x, "x"))
        self.residuals[device][phase.f_residual_slot[index][device]] = ("residuals", stage, microbatch)
        return "x", stage + 1, microbatch

    def _head(self, phase: Phase, index: int) -> None:
        microbatch = phase.head_microbatch[index]
        if microbatch == NOTHING:
            return
        device = self.schedule.device_of(self.last)
        forward = Action(self.last, "F", microbatch)
        if self.ran[device][-1:] != [forward]:
            raise ScheduleError(f"the head of microbatch {microbatch} runs in an iteration without {forward}")
        self.mail[device][phase.head_slot[index]] = ("cotangent", self.last, microbatch)

    def _backward(self, phase: Phase, index: int, device: int) -> _Symbol | None:
        microbatch, cut = phase.b_microbatch[index][device], phase.b_cut_slot[index][device]
        if microbatch == NOTHING:
            return None
        stage = self.schedule.stage_of(device, phase.b_virtual[index][device])
        action = Action(stage, "B" if cut == NOTHING else "I", microbatch)
        cotangent = self.mail[device][phase.b_mail_slot[index][device]]
        residuals = self.residuals[device][phase.b_residual_slot[index][device]]
        self._ran(device, action, (cotangent, "cotangent"), (residuals, "residuals"))
        if stage == 0 and phase.finish_microbatch[index] != microbatch:
            raise ScheduleError(f"{action} finishes microbatch {phase.finish_microbatch[index]}")
        if cut != NOTHING:
            self.cuts[device][cut] = ("cut", stage, microbatch)
        return "cotangent", stage - 1, microbatch

    def _weights(self, phase: Phase, index: int, device: int) -> None:
        microbatch = phase.w_microbatch[index][device]
        if microbatch == NOTHING:
            return
        stage = self.schedule.stage_of(device, phase.w_virtual[index][device])
        residuals = self.residuals[device][phase.w_residual_slot[index][device]]
        cut = self.cuts[device][phase.w_cut_slot[index][device]]
        self._ran(device, Action(stage, "W", microbatch), (residuals, "residuals"), (cut, "cut"))

    def _ran(self, device: int, action: Action, *read: tuple[_Symbol | None, str]) -> None:
        for value, what in read:
            expected = (what, action.stage, action.microbatch)
            if value != expected:
                raise ScheduleError(f"{action} reads {_text(value)}, not {_text(expected)}")
        self.ran[device].append(action)

    def _receive(self, sent: Sequence[_Symbol | None], step: int, phase: Phase, index: int) -> None:
        self._put(sent, step, {1: phase.onward_slot, -1: phase.back_slot, 0: phase.local_slot}[step][index])

    def _put(self, sent: Sequence[_Symbol | None], step: int, slots: Sequence[int]) -> None:
        for device, slot in enumerate(slots):
            if slot != NOTHING:
                self.mail[device][slot] = sent[(device - step) % self.count]


def _text(value: _Symbol | None) -> str:
    return "garbage" if value is None else f"{value[0]} of microbatch {value[2]} for stage {value[1]}"
