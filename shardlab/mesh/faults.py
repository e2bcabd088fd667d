"""Faults of a declaration: what is wrong, with the facts and the way out, all of them in one message.

>>> raise_faults([Fault("mesh axis 'data'", "has size 0", "give it a positive size")])
Traceback (most recent call last):
    ...
shardlab.mesh.faults.DeclarationError: mesh axis 'data': has size 0; give it a positive size
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable


class DeclarationError(ValueError):
    """What the user declared is wrong; the message is written for that user."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing wrong with a declaration.

    Attributes:
      where: a parameter's path, a mesh axis, a rule or a field.
      problem: the facts: names and both numbers.
      way_out: what to write instead.
    """

    where: str
    problem: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.way_out}"


def raise_faults(faults: Iterable[Fault]) -> None:
    """Nothing when there are no faults.

    Raises:
      DeclarationError: with every fault, numbered when there are several.

    >>> raise_faults([])
    >>> raise_faults([Fault("a", "is odd", "make it even"), Fault("b", "is odd", "make it even")])
    Traceback (most recent call last):
        ...
    shardlab.mesh.faults.DeclarationError: 2 faults in the declaration:
      1. a: is odd; make it even
      2. b: is odd; make it even
    """
    found = list(faults)
    if len(found) == 1:
        raise DeclarationError(str(found[0]))
    if found:
        lines = (f"  {number}. {fault}" for number, fault in enumerate(found, start=1))
        raise DeclarationError("\n".join((f"{len(found)} faults in the declaration:", *lines)))


def nearest(name: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The choice most like `name`, or None when none is like it.

    >>> nearest("tensr", ["data", "stage", "tensor"])
    'tensor'
    """
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None


def suggestion(name: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``"did you mean 'tensor'? "``, or nothing when no choice is like `name`.

    >>> suggestion("tensr", ["data", "tensor"]) + "declare it"
    "did you mean 'tensor'? declare it"
    """
    near = nearest(name, choices, cutoff=cutoff)
    return f"did you mean {near!r}? " if near else ""
