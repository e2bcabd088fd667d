"""Divergent schedules: in one tick one device may run a forward while another runs half a backward.

Their backward is split: I, the gradient of the input, which the stage before waits for, and W, the gradient of the
weights, which nobody waits for and which fills what would be a bubble. Each is an order of actions per device, put in
the earliest ticks that its data allows. Legend as in `shardlab.pipeline.schedules`; tF, tI, tW are the times of a
stage's F, I and W.

"Zero bubble" has two conditions. The times are about equal (each schedule says what is left otherwise), and no device
waits for the others at the end of a step: where it does, as in one program, a schedule whose devices start one after
another idles at least the (P-1) tF of that start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from shardlab.pipeline.actions import Action, Kind, ScheduleError, Tick, needs


def zb_h1(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """1F1B's forwards and memory, with W delayed by r on device r (Qi et al., 2023, arXiv 2401.10241).

    Bubble (P-1)(tF + tI - tW) for tW <= tI; every device holds at most P microbatches. P=3, M=4:

        device 0   F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        device 1   .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        device 2   .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    With delayed sends a microbatch comes back to device 0 after 4 P ticks, and P of them cannot fill these: 4 M - M/P +
    4 P - 5 ticks where P divides M and M >= 2 P. ZB-H2 holds enough.
    """
    return _delayed(
        stages,
        microbatches,
        ahead=lambda device: stages - 1 - device,
        delay=lambda device: device,
        forward_first=True,
        delayed=delayed,
    )


def zb_h2(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """ZB-H1 with up to twice the microbatches in flight (same source).

    A device idles (P-1)(tF + tI - 2 tW) between its first action and its last; at most 2P-1 microbatches. With a wait
    for all devices at the end of the step its makespan is no shorter than ZB-H1's where tF = tI = tW. With delayed
    sends 3 M + 2 (P-1) ticks for M >= 2 P: P-1 more than with direct ones that take no time.
    """
    return _delayed(
        stages,
        microbatches,
        ahead=lambda device: 2 * (stages - 1 - device) + 1,
        delay=lambda device: 2 * device,
        forward_first=False,
        delayed=delayed,
    )


def zb_v(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """Two stages a device, down and up again: the last stage is on device 0 (Qi et al., 2024, arXiv 2405.15362).

    A device idles (P-1) max(0, 2 (tI - tW), tI - tF) between its first action and its last, for tW <= tI, tF <= tI;
    it holds at most 2P activations of half a stage, 1F1B's memory. With delayed sends 6 M + 6 P - 7 ticks for M >= 2 P,
    the turn at the far end without a wait.
    """
    # The order needs 2P-1 microbatches to close; with fewer, those beyond are left out of it.
    total = max(microbatches, 2 * stages - 1)

    def row(device: int) -> list[Action]:
        made = _Row(down=device, up=2 * stages - 1 - device, microbatches=microbatches)
        made.down("F", times=2 * (stages - device) - 1)
        for _ in range(device):
            made.up("F").down("F")
        for _ in range(stages - device):
            made.up("FIW")
        while made.done_up("F") < total:
            made.down("FIW" if made.done_down("F") < total else "IW").up("FIW")
        for _ in range(device):
            made.down("I").up("I")
        made.down("IW", times=stages - device)
        made.up("W", times=made.done_up("I") - made.done_up("W"))
        made.down("W", times=made.done_down("I") - made.done_down("W"))
        return made.actions

    return in_ticks([row(device) for device in range(stages)], num_stages=2 * stages, delayed=delayed)


def dualpipe_v(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """DualPipe's order on two stages a device, down and up again (DeepSeek, 2025, "Cut-in-half" DualPipe, arXiv
    2412.19437 and https://github.com/deepseek-ai/DualPipe).

    Steadily a forward of one direction stands beside a backward of the other, so that a communication in one of them
    can hide behind the other's computation; that, not the bubble, is its point. At most 2P+1 activations of half a
    stage. A whole backward is an I and a W in the next tick. With delayed sends 6 M + 6 P - 8 ticks for M >= 2 P.
    """
    # The order needs 2P microbatches; with fewer, those beyond are left out of it.
    total = max(microbatches, 2 * stages)

    def row(device: int) -> list[Action]:
        made = _Row(down=device, up=2 * stages - 1 - device, microbatches=microbatches)
        waiting: list[Callable[[str], _Row]] = []  # of the I's run ahead of their W, in order

        def weights() -> None:
            waiting.pop(0)("W")

        made.down("F", times=2 * (stages - device - 1))
        for _ in range(device + 1):
            made.down("F").up("F")
        for _ in range(stages - device - 1):
            made.up("IWF")
        for _ in range(total - 2 * stages + device + 1):
            made.down("F").up("IWF").down("IW")
        for _ in range(stages - device - 1):
            made.up("IWF").down("IW")
        # Half way through the last backwards the W's are put off: every other device begins with the other direction.
        half = (device + 1) // 2
        for index in range(device + 1):
            for turn, direction in enumerate((made.up, made.down)):
                late = index > half or (index == half and turn >= 1 - device % 2)
                direction("I" if late else "IW")
                if late:
                    waiting.append(direction)
        for _ in range(stages - device - 1):
            weights()
            made.down("I")
            waiting.append(made.down)
        while waiting:
            weights()
        return made.actions

    return in_ticks([row(device) for device in range(stages)], num_stages=2 * stages, delayed=delayed)


class _Row:
    """The actions of a device on a V, written down in order; each kind takes a stage's microbatches in turn."""

    def __init__(self, *, down: int, up: int, microbatches: int) -> None:
        self.actions: list[Action] = []
        self._down, self._up, self._microbatches = down, up, microbatches
        self._done: dict[tuple[int, str], int] = {}

    def down(self, kinds: Sequence[Kind] | str, times: int = 1) -> _Row:
        """One of each kind, on the stage of the way down."""
        return self._add(self._down, kinds, times)

    def up(self, kinds: Sequence[Kind] | str, times: int = 1) -> _Row:
        """One of each kind, on the stage of the way up."""
        return self._add(self._up, kinds, times)

    def done_down(self, kind: Kind) -> int:
        return self._done.get((self._down, kind), 0)

    def done_up(self, kind: Kind) -> int:
        return self._done.get((self._up, kind), 0)

    def _add(self, stage: int, kinds: Sequence[Kind] | str, times: int) -> _Row:
        for _ in range(times):
            for kind in kinds:
                microbatch = self._done.get((stage, kind), 0)
                self._done[stage, kind] = microbatch + 1
                if microbatch < self._microbatches:
                    self.actions.append(Action(stage, kind, microbatch))  # type: ignore[arg-type]
        return self


def _delayed(
    stages: int,
    microbatches: int,
    *,
    ahead: Callable[[int], int],
    delay: Callable[[int], int],
    forward_first: bool,
    delayed: bool,
) -> tuple[Tick, ...]:
    """Device r runs `ahead` forwards, then an I with each further one, each W `delay` I's after its own."""

    def row(device: int) -> list[Action]:
        lead, late = ahead(device), delay(device)
        actions = [Action(device, "F", index) for index in range(min(lead, microbatches))]
        for index in range(microbatches):
            forward = [Action(device, "F", index + lead)] if index + lead < microbatches else []
            weights = [Action(device, "W", index - late)] if index >= late else []
            inputs = [Action(device, "I", index)]
            actions += forward + inputs + weights if forward_first else inputs + weights + forward
        return actions + [Action(device, "W", index) for index in range(max(0, microbatches - late), microbatches)]

    return in_ticks([row(device) for device in range(stages)], num_stages=stages, delayed=delayed)


def in_ticks(rows: Sequence[Sequence[Action]], *, num_stages: int, delayed: bool = False) -> tuple[Tick, ...]:
    """Each device's actions, in their order, in the earliest ticks in which their data is there.

    Args:
        rows: of each device.
        num_stages: on all devices.
        delayed: what another device makes is there two ticks later instead of one.

    Raises:
        ScheduleError: devices that wait for one another for ever.

    >>> orders = [[Action(0, "F", 0), Action(0, "B", 0)], [Action(1, "F", 0), Action(1, "B", 0)]]
    >>> [[str(action) if action else "." for action in tick] for tick in in_ticks(orders, num_stages=2)]
    [['0F0', '.'], ['.', '1F0'], ['.', '1B0'], ['0B0', '.']]
    """
    done: dict[Action, tuple[int, int]] = {}
    fronts = [0] * len(rows)
    ticks: list[Tick] = []
    while any(front < len(row) for front, row in zip(fronts, rows, strict=True)):
        following = (row[front] if front < len(row) else None for front, row in zip(fronts, rows, strict=True))
        tick = tuple(
            action
            if action is not None and is_there(action, device, len(ticks), done, num_stages, delayed=delayed)
            else None
            for device, action in enumerate(following)
        )
        # With nothing under way from the tick before, nothing will come.
        if not any(tick) and not (delayed and ticks and any(ticks[-1])):
            waiting = ", ".join(str(row[front]) for front, row in zip(fronts, rows, strict=True) if front < len(row))
            raise ScheduleError(f"rows of actions: {waiting} wait for one another for ever; order them otherwise")
        for device, action in enumerate(tick):
            if action is not None:
                done[action] = len(ticks), device
                fronts[device] += 1
        ticks.append(tick)
    return tuple(ticks)


def is_there(
    action: Action, device: int, tick: int, done: Mapping[Action, tuple[int, int]], num_stages: int, *, delayed: bool
) -> bool:
    """Whether an action's data is on a device in a tick, where `done` holds the tick and the device of all before.

    >>> done = {Action(0, "F", 0): (0, 0)}
    >>> [is_there(Action(1, "F", 0), 1, tick, done, 2, delayed=True) for tick in (1, 2)]
    [False, True]
    """
    return all(
        any(
            need in done and done[need][0] + (2 if delayed and done[need][1] != device else 1) <= tick
            for need in alternatives
        )
        for alternatives in needs(action, num_stages)
    )
