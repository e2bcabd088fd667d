"""Uniform schedules: in one tick every device does the same kind of action, or idles.

One program then serves all devices without a branch, and any collective is legal inside a stage. All of them are one
construction. Forwards have an order, in which device 0 starts one each cycle, and so have backwards; device r runs a
forward r cycles after device 0, and a backward P-1-r cycles after device P-1. Legend as in
`shardlab.pipeline.schedules`.

    rounds      the microbatches, in rounds of at least P, the longest first
    forwards    for each round: for each virtual stage: its microbatches
    backwards   for each round: for each virtual stage, the last first: its microbatches

Delayed sends need a tick between what makes a value and what reads it on another device. While forwards and backwards
take turns each stands between two of the other, and the steady state is as long as without sends. Where only forwards
or only backwards are left, a tick without actions stands between (which is what a direct send costs), or device r runs
a forward 2 r cycles after device 0. A device's order, and with it what it holds, is that of direct sends.

A round of at least P microbatches is why a device never waits: what leaves device P-1 on one virtual stage comes to
device 0 on the next one when that device turns to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardlab.pipeline.actions import Action, Kind, Tick, needs

_Order = Sequence[tuple[int, int] | None]  # (virtual stage, microbatch) that device 0 or P-1 starts, cycle by cycle


def gpipe(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """All forwards, then all backwards (GPipe: Huang et al., 2019, arXiv 1811.06965).

    2 (M+P-1) ticks; every device holds all M microbatches' activations at the turn. P=3, M=3:

        device 0   F0 F1 F2 .  .  .  .  B0 B1 B2
        device 1   .  F0 F1 F2 .  .  B0 B1 B2 .
        device 2   .  .  F0 F1 F2 B0 B1 B2 .  .

    With delayed sends either (M + 2 (P-1)) (F + B) with forwards two ticks later on each device, or, of few
    microbatches, (M+P-1) (F+B) + 2 (M+P-2) sends with a tick between any two: the first from M + P - 2 = 6 (P-1) on,
    where for a send of F/4 and B = 2 F it takes no longer. Forwards, P=2, M=3:

        two later   F0 F1 F2 .  .          between   F0 .  F1 .  F2 .  .
                    .  .  F0 F1 F2                   .  .  F0 .  F1 .  F2

    Backwards run in the order of the forwards, so that gradients add up in the same order as in every other
    schedule.
    """
    return looped_bfs(stages, microbatches, virtual, delayed)


def looped_bfs(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """GPipe over virtual stages, breadth first (Lamy-Poirier, 2022, arXiv 2211.05953).

    All microbatches pass a device's first virtual stage, then all its second, so that each layer's weights are needed
    once forward and once backward: one gather and one reduction with ZeRO 3. 2 (M V + P - 1) ticks for M >= P; M V
    activations. With delayed sends as `gpipe`, where rounds of 2 P microbatches wait for nothing.
    """
    if delayed:
        apart = _apart(_breadth_first(stages, microbatches, virtual, hop=1))
        skewed = _breadth_first(stages, microbatches, virtual, hop=2)
        # Of a forward F, a backward 2 F and a send F / 4: 3/2 F for each pair of ticks more, F / 4 for each empty one.
        more, empty = len(skewed) - sum(map(any, apart)), sum(not any(tick) for tick in apart)
        return skewed if 6 * more <= empty else apart
    return _breadth_first(stages, microbatches, virtual, hop=1)


def _breadth_first(stages: int, microbatches: int, virtual: int, *, hop: int) -> tuple[Tick, ...]:
    forwards, backwards = _orders([microbatches], hop * stages, virtual)
    length = len(forwards) + hop * (stages - 1)
    return tuple(_forward(forwards, cycle, stages, hop) for cycle in range(length)) + tuple(
        _backward("B", backwards, cycle, stages, hop) for cycle in range(length)
    )


def _apart(ticks: Sequence[Tick]) -> tuple[Tick, ...]:
    """The ticks, an empty one before each that reads what the tick before it has sent."""
    out: list[Tick] = []
    stages = 1 + max(action.stage for tick in ticks for action in tick if action)
    for tick in ticks:
        made = {action: device for device, action in enumerate(out[-1]) if action} if out else {}
        if any(
            made.get(need, device) != device
            for device, action in enumerate(tick)
            if action
            for alternatives in needs(action, stages)
            for need in alternatives
        ):
            out.append((None,) * len(tick))
        out.append(tick)
    return tuple(out)


def one_f_one_b(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """Backwards as soon as they can run, in step: an F tick, then a B tick.

    Its idea is PipeDream-flush's (Narayanan et al., 2021, arXiv 2006.09503): few microbatches in flight.
    Where all devices keep step, as under a scan, one action a tick in that paper's order is 54 % over ideal
    (P=8, M=32, B=2F); an F tick and then a B tick is 22 % over, a bubble of (P-1)(F+B), and stage s holds
    min(M, 2(P-1-s)+1) microbatches. A *cycle* is an F tick and a B tick; the first P-1 cycles have no B tick,
    the last P-1 no F tick. P=3, M=3:

        cycle      0    1    2     3     4     5    6
        device 0   F0   F1   F2 .  .  .  .  B0 B1   B2
        device 1   .    F0   F1 .  F2 B0 .  B1 B2   .
        device 2   .    .    F0 B0 F1 B1 F2 B2 .    .

    F comes first in a cycle: the last stage runs the backward of the forward it has just run.

    With delayed sends (M+P-1)(F+B) + 2 (P-1) sends where a send takes no longer than an F: y travels beside a B, dx
    beside an F, and only in the first P-1 and the last P-1 cycles in a tick of their own.
    """
    return _interleaved(stages, microbatches, virtual, split=False, delayed=delayed)


def interleaved_1f1b(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """1F1B over V virtual stages a device, which divide its bubble by V (Narayanan et al., 2021, arXiv 2104.04473).

    (M V + P - 1)(F + B) for M >= P, where F and B are of one virtual stage; device r holds
    P(V-1) + 2(P-1-r) + 1 activations of virtual stages where P divides M, and at most twice the first term where it
    does not. With delayed sends 2 (P V - 1) sends more where P divides M, as in `one_f_one_b`.
    """
    return _interleaved(stages, microbatches, virtual, split=False, delayed=delayed)


def one_f_one_b_split(stages: int, microbatches: int, virtual: int, delayed: bool = False) -> tuple[Tick, ...]:
    """1F1B with the backward split: an F tick, an I tick, a W tick, where all devices run a W at the same time.

    W waits until every device has one, so that no W tick is partly idle: (M V + P - 1)(F + I) + M V W. The price is
    memory, a microbatch is held until its W: at most P(V-1) + 2P - 1 - r on device r where P divides M. The idea of
    filling bubbles with W is that of Qi et al., 2023 (arXiv 2401.10241). With delayed sends P-1 sends more for V = 1
    and M >= P: in the last cycles dx travels beside a W.
    """
    return _interleaved(stages, microbatches, virtual, split=True, delayed=delayed)


def rounds(stages: int, microbatches: int) -> list[int]:
    """How many microbatches each round has: as many rounds as can be of at least P, evenly, the longest first.

    >>> rounds(4, 12), rounds(4, 11), rounds(4, 3)
    ([4, 4, 4], [6, 5], [3])
    """
    count = max(microbatches // stages, 1)
    short, longer = divmod(microbatches, count)
    return [short + 1] * longer + [short] * (count - longer)


def _orders(sizes: Sequence[int], least: int, virtual: int) -> tuple[_Order, _Order]:
    """The orders of forwards and of backwards; a round of fewer than `least`, P, leaves cycles empty."""
    forwards: list[tuple[int, int] | None] = []
    backwards: list[tuple[int, int] | None] = []
    first = 0
    for size in sizes:
        places = [first + place if place < size else None for place in range(max(size, least))]
        for index in range(virtual):
            forwards += [None if at is None else (index, at) for at in places]
            backwards += [None if at is None else (virtual - 1 - index, at) for at in places]
        first += size
    while forwards[-1] is None:
        forwards.pop()
        backwards.pop()
    return forwards, backwards


def _interleaved(stages: int, microbatches: int, virtual: int, *, split: bool, delayed: bool) -> tuple[Tick, ...]:
    sizes = rounds(stages, microbatches)
    forwards, backwards = _orders(sizes, stages, virtual)
    # The first microbatch comes to the last virtual stage of device P-1, which then begins its backwards.
    start = (virtual - 1) * max(sizes[0], stages) + stages - 1
    ticks: list[Tick] = []
    for cycle in range(start + len(backwards) + stages - 1):
        ticks.append(_forward(forwards, cycle, stages))
        ticks.append(_backward("I" if split else "B", backwards, cycle - start, stages))
        if split:
            # Device 0 is the last to have run an I; by then all have.
            ticks.append(_aligned(backwards, cycle - start - (stages - 1), stages))
    busy = tuple(tick for tick in ticks if any(tick))
    return _apart(busy) if delayed else busy


def _forward(order: _Order, cycle: int, stages: int, hop: int = 1) -> Tick:
    return tuple(_action("F", order, cycle - hop * device, device, stages) for device in range(stages))


def _backward(kind: Kind, order: _Order, cycle: int, stages: int, hop: int = 1) -> Tick:
    return tuple(_action(kind, order, cycle - hop * (stages - 1 - device), device, stages) for device in range(stages))


def _aligned(order: _Order, cycle: int, stages: int) -> Tick:
    return tuple(_action("W", order, cycle, device, stages) for device in range(stages))


def _action(kind: Kind, order: _Order, at: int, device: int, stages: int) -> Action | None:
    what = order[at] if 0 <= at < len(order) else None
    return None if what is None else Action(what[0] * stages + device, kind, what[1])
