"""Actions: what one device does in one tick of a pipeline.

An action is a stage, a kind and a microbatch, written as in PyTorch's pipelining: ``2F0`` is the forward of
microbatch 0 on stage 2. The kinds:

    F   forward
    B   backward, whole: the gradient of the input and of the weights
    I   the half of a backward that the previous stage waits for: the gradient of the input
    W   the half that nobody waits for: the gradient of the weights
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TEXT = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")


class ScheduleError(ValueError):
    """A schedule, or what was asked of one, is wrong; the message is for the person who wrote it."""


class Action(NamedTuple):
    """One stage's work on one microbatch; a tuple, since tables of thousands are looked up by it.

    >>> str(Action(2, "F", 0))
    '2F0'
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def parse_action(text: str) -> Action:
    """The action that a text such as ``2F0`` names.

    Raises:
        ScheduleError: the text is not a stage, one of F, B, I, W, and a microbatch.

    >>> parse_action("10W3")
    Action(stage=10, kind='W', microbatch=3)
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ScheduleError(
            f"action {text[:40]!r}: not a stage, a kind ({', '.join(KINDS)}) and a microbatch; write it as '2F0'"
        )
    stage, kind, microbatch = match.groups()
    return Action(int(stage), next(k for k in KINDS if k == kind), int(microbatch))


Tick = tuple[Action | None, ...]
"""What every device does at the same time: one action or nothing each."""


def needs(action: Action, num_stages: int) -> tuple[tuple[Action, ...], ...]:
    """What must have run before an action may: for each need, the actions of which any one fulfils it.

    A cotangent comes from the next stage's B or, where that stage splits its backward, from its I.

    >>> [" or ".join(map(str, need)) for need in needs(Action(1, "B", 0), num_stages=4)]
    ['1F0', '2B0 or 2I0']
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return () if stage == 0 else ((Action(stage - 1, "F", microbatch),),)
    if action.kind == "W":
        return ((Action(stage, "I", microbatch),),)
    forward = (Action(stage, "F", microbatch),)
    if stage == num_stages - 1:
        return (forward,)
    return forward, (Action(stage + 1, "B", microbatch), Action(stage + 1, "I", microbatch))
