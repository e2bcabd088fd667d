"""Whether `after` and a loss treat the classes of a vocabulary one by one, but for `shardlab.cross_entropy`.

With ``head="vocab"`` a stage has a part of the classes as a shard of the batch has a part of the examples, and the
proof is the same: `shardlab.step.examples` walks over a trace with the classes of one stage and one with those of two.
What it calls rows are classes here, and a sum over those at hand is right only where a mark of `cross_entropy` adds up
all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

from shardlab.mesh.faults import DeclarationError
from shardlab.module.inner import programs_in
from shardlab.step.batch_sum import is_batch_sum
from shardlab.step.blocks import following
from shardlab.step.cross_entropy import CLASSES, SUM, mark_of
from shardlab.step.examples import Walk
from shardlab.step.kinds import ROWS, SAME, Kind, Value


def check_classes(
    here: Any,
    there: Any,
    where: str,
    classes: Collection[int],
    held: str,
    *,
    whole: bool,
    given: Sequence[Value | None] = (),
) -> list[Value]:
    """What is known of what `where` returns, of a part of the classes what it would be of all of them.

    Args:
      here, there: the closed jaxprs with some of the classes and with twice as many.
      where: what to call the function in an error.
      classes: how many of its classes each parameter has in the first.
      held: what a stage has, for an error: "6 of 12 classes".
      whole: whether nothing that it returns may still follow the classes.
      given: what is known of the inputs, where it is more than their shapes tell.

    Raises:
      DeclarationError: naming the operation and the line of the model.
    """
    values = _Classes(where, classes, held).closed(here, there, given)
    free = (Kind.SAME, Kind.ZERO, Kind.OWN)
    for index, value in enumerate(values):
        if value.kind in free or (value.kind in (Kind.ROWS, Kind.ALIKE) and not whole):
            continue
        name = f"its {('sum', 'weight')[index]}" if whole else "what it returns"
        raise DeclarationError(f"{where}: {name} is of the classes at hand, {_held(held)}; {_WAY_OUT}")
    return values


@contextlib.contextmanager
def on_a_part(where: str, held: str) -> Iterator[None]:
    """Says that a function was called with a part of the vocabulary, where it fails for that reason."""
    try:
        yield
    except DeclarationError:
        raise
    except Exception as error:  # whatever the user's code raises
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise DeclarationError(
            f"{where}: fails on a part of the vocabulary, {_held(held)}: {type(error).__name__}: {text}; {_WAY_OUT}"
        ) from error


_WAY_OUT = "make nothing but shardlab.cross_entropy of the logits, or use head='examples'"


def check_same_program(part: Any, every: Any, where: str, held: str) -> None:
    """That `where` does the same with a part of the classes as with all of them.

    Args:
      part, every: the closed jaxprs with some of the classes and with all.

    Raises:
      DeclarationError: it does not.
    """
    if list(_operations(part.jaxpr)) != list(_operations(every.jaxpr)):
        _refuse_program(where, held)


def _operations(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for program in programs_in(equation):
            yield from _operations(program)


def _refuse_program(where: str, held: str) -> NoReturn:
    raise DeclarationError(
        f"{where}: is another program for a part of the classes, {_held(held)}; let nothing but shapes follow the "
        "number of classes, or use head='examples'"
    )


def _held(held: str) -> str:
    return f"and with head='vocab' a stage has {held}"


class _Classes(Walk):
    """The walk, with classes for examples and the marks of `cross_entropy` for `batch_sum`."""

    def __init__(self, where: str, classes: Collection[int], held: str) -> None:
        super().__init__(where, min(classes))
        self._classes, self._held = classes, held

    def _equation(self, mine: Any, other: Any, ins: list[Value]) -> list[Value]:
        if is_batch_sum(mine):
            return ins  # it adds up over examples, each class for itself
        mark = mark_of(mine)
        if mark is None:
            return super()._equation(mine, other, ins)
        if len(ins) != 1 or len(mine.outvars) != 1:
            self.fault(mine, "is differentiated", _NAME)
        (value,), (out,) = ins, mine.outvars
        if mark == CLASSES:
            # Of other numbers of classes it could not be told which are padding.
            if value.kind is Kind.PLACE and out.aval.shape[0] in self._classes:
                return [ROWS]
            self.fault(mine, "is given what is not one logit for each of the examples", _NAME)
        joined = following(out.aval, other.outvars[0].aval) is None
        if joined and value.kind in ((Kind.SUM, Kind.ZERO) if mark == SUM else (Kind.ROWS, Kind.ALIKE)):
            return [SAME]
        self.fault(mine, "is differentiated", _NAME)

    def _random(self, mine: Any, name: str, ins: list[Value], follows: bool) -> Value:
        if follows or any(value.kind is not Kind.SAME and value.kind is not Kind.OWN for value in ins):
            self.fault(mine, "draws for every example")
        return super()._random(mine, name, ins, follows)

    def _other_program(self) -> NoReturn:
        _refuse_program(self.where, self._held)

    def fault(self, equation: Any, what: str, name: str = "") -> NoReturn:
        what = what.replace("examples", "classes").replace("example", "class")
        raise DeclarationError(
            f"{self.where}: {name or equation.primitive.name}{self.line} {what}, {_held(self._held)}; {_WAY_OUT}"
        )


_NAME = "shardlab.cross_entropy"
