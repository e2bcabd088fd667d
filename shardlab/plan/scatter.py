"""How gradients are to be scattered over the batch axes, as it is declared: by name, or over parts of an axis."""

from __future__ import annotations

import math
import re

from shardlab.mesh.faults import Fault, suggestion
from shardlab.mesh.spec import MeshSpec

SCATTERS = ("auto", "whole")
_PARTS = re.compile(r"\s*(\w+)\s*=\s*([1-9]\d*(?:x[1-9]\d*)*)\s*")


def read_parts(text: str) -> dict[str, tuple[int, ...]]:
    """Parts by axis, outermost first; of a name none.

    >>> read_parts("data=32x8"), read_parts("whole")
    ({'data': (32, 8)}, {})
    """
    found = [_PARTS.fullmatch(one) for one in text.split(",")] if text not in SCATTERS else []
    return {match[1]: tuple(int(size) for size in match[2].split("x")) for match in found if match}


def scatter_faults(text: str, mesh: MeshSpec) -> list[Fault]:
    """What is wrong with a `scatter`."""
    where = f"scatter={text!r}"
    if not isinstance(text, str) or (text not in SCATTERS and not all(map(_PARTS.fullmatch, text.split(",")))):
        hint = suggestion(text, SCATTERS) if isinstance(text, str) else ""
        forms = "write one of them, or the parts of a batch axis: data=32x8"
        return [Fault(where, f"is not one of {', '.join(SCATTERS)}", hint + forms)]
    faults = []
    for axis, parts in read_parts(text).items():
        if axis not in mesh.batch:
            names = ", ".join(mesh.batch) or "none"
            faults.append(
                Fault(where, f"axis {axis!r} is no batch axis ({names})", f"{suggestion(axis, mesh.batch)}name one")
            )
        elif math.prod(parts) != mesh.sizes[axis]:
            product = f"{' x '.join(map(str, parts))} is {math.prod(parts)}"
            problem = f"{product}, and axis {axis!r} has {mesh.sizes[axis]} devices"
            faults.append(Fault(where, problem, f"give parts that multiply to {mesh.sizes[axis]}, or write 'auto'"))
    return faults
