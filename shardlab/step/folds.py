"""What a random operation makes of keys and numbers, some of which follow the number of examples."""

from __future__ import annotations

from typing import Any, NoReturn

from shardlab.mesh.faults import DeclarationError
from shardlab.step.kinds import ROWS, Kind, Spot, Value

RANDOM = frozenset({"random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_bits"})
RANDOM |= {"random_gamma"}

Folds = dict[tuple[int, ...], str]
"""Of the numbers that are folded into keys, by shape: how."""


def drawn(at: Spot, mine: Any, name: str, ins: list[Value], follows: bool, folds: Folds) -> Value:
    """What a random operation makes of its inputs; `follows` says whether its result follows the examples.

    How it folds the examples into keys is noted in `folds`.
    """
    kinds = [value.kind for value in ins]
    if {Kind.COUNT, Kind.ODD, Kind.SUM} & set(kinds):
        at.fault(mine, "draws by the number of examples at hand")
    key, data = ins[0], ins[-1]
    if name == "random_fold_in":
        return _fold_in(at, mine, key, data, follows, folds)
    if {Kind.PLACE, Kind.SHIFTED} & set(kinds):
        at.fault(mine, "uses the places of the examples at hand")
    if name in ("random_seed", "random_wrap"):
        return ROWS if follows else Value(Kind.ONE if Kind.ONE in kinds else Kind.OWN)
    if not follows:
        made = Kind.ONE if Kind.ONE in kinds else Kind.SAME
        return Value(Kind.OWN) if key.kind is Kind.OWN and name == "random_split" else Value(made)
    if key.kind is Kind.OWN:
        _own_key(at, mine)
    return Value(Kind.ROWS, key.blocks)


def _fold_in(at: Spot, mine: Any, key: Value, data: Value, follows: bool, folds: Folds) -> Value:
    shape = tuple(mine.invars[1].aval.shape)
    if not follows:
        if data.kind in (Kind.PLACE, Kind.SHIFTED):
            at.fault(mine, "uses the place of an example among those at hand")
        if len(shape) == 1 and not mine.invars[0].aval.shape:
            _note(at, folds, shape, "fold_in")
        return Value(next(kind for kind in Kind if kind in (key.kind, data.kind, Kind.SAME)))
    if key.kind is Kind.ROWS:
        if data.kind in (Kind.PLACE, Kind.SHIFTED):
            at.fault(mine, "uses the places of the examples at hand")
        return Value(Kind.ROWS, key.blocks)
    whole = data.kind is Kind.PLACE and data.stride == 1
    if data.kind is Kind.SHIFTED or (data.kind is Kind.PLACE and (key.kind is Kind.OWN or not whole)):
        at.fault(mine, "uses the places of the examples at hand")
    if len(shape) != 1 or mine.invars[0].aval.shape:
        at.fault(mine, f"folds numbers of shape {list(shape)} into keys, and only [{at.rows}] can be cut")
    _note(at, folds, shape, "fold_in_place" if data.kind is Kind.PLACE else "fold_in_rows")
    return Value(Kind.ROWS, data.blocks)


def _note(at: Spot, folds: Folds, shape: tuple[int, ...], name: str) -> None:
    if folds.setdefault(shape, name) != name:
        raise DeclarationError(
            f"{at.where}: with {at.rows} examples a device, numbers of shape {list(shape)} are folded into a "
            "key both per example and otherwise; use another batch size or number of microbatches so that the two "
            "shapes differ"
        )


def _own_key(at: Spot, mine: Any) -> NoReturn:
    raise DeclarationError(
        f"{at.where}: {mine.primitive.name}{at.line} draws for every example from a key that the model "
        f"makes itself, and a device holds {at.rows} of the batch's; draw from the key that the model is given"
    )
