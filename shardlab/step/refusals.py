"""What the compiler refuses, as an error for who declared the plan: a step that does not fit above all."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax

from shardlab.mesh.faults import DeclarationError
from shardlab.plan.plan import Plan
from shardlab.plan.text import bytes_label, human_bytes

_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?"
# What XLA:TPU calls temporaries in the first text has the arguments in it: 8 GiB handed in, donated, and 8 GiB of
# temporaries are "HLO temporaries (16.00G)" (jax 0.10.2, libtpu 0.0.42.1). XLA:GPU names one allocation.
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_ALL = re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE)


class OutOfMemory(DeclarationError):
    """A step that does not fit.

    Attributes:
      needed_bytes: of a device, as far as the compiler says it; None where it gives no number.
      capacity_bytes: what the compiler lets a program have; None where it gives no number.
    """

    def __init__(self, message: str, needed_bytes: int | None, capacity_bytes: int | None) -> None:
        super().__init__(message)
        self.needed_bytes, self.capacity_bytes = needed_bytes, capacity_bytes


@contextlib.contextmanager
def refusals(plan: Plan) -> Iterator[None]:
    """Around a compilation: what the compiler refuses is said of the plan.

    Raises:
      OutOfMemory: it does not fit: both sizes, what the plan counts, and the ways out.
      DeclarationError: it is refused for something else, in the compiler's words.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            said = str(error).strip().partition("\n")[0]
            raise DeclarationError(f"plan on {plan.mesh}: the compiler refuses the step: {said}") from error
        held = {name: size for name, size in plan.bytes_per_device().items() if size and name != "padding"}
        needed, capacity = read_sizes(str(error))
        counted = ", ".join(f"{bytes_label(name)} {human_bytes(size)}" for name, size in held.items())
        lacks = "" if needed is None or capacity is None else _lacks(needed, capacity)
        raise OutOfMemory(
            f"plan on {plan.mesh}: does not fit in a device's memory{lacks}; of it the plan counts {counted}; "
            "lower what is largest: state by a higher ZeRO level or more devices on an axis that cuts parameters, "
            "activations by remat='full', more microbatches or more devices on a batch axis",
            needed,
            capacity,
        ) from error


def read_sizes(text: str) -> tuple[int | None, int | None]:
    """Bytes needed and bytes there are, from what the compiler says; None for what it does not.

    >>> read_sizes("the total memory required for HLO temporaries (32.50G) exceeds available HBM (15.75G).")
    (34896609280, 16911433728)
    >>> read_sizes("Used 17.00G of 15.75G hbm. Exceeded hbm capacity by 1.25G.")
    (18253611008, 16911433728)
    """
    for pattern in (_TEMPORARIES, _ALL):
        if found := pattern.search(text):
            size, unit, limit, limit_unit = found.groups()
            return round(float(size) * _SIZES[unit]), round(float(limit) * _SIZES[limit_unit])
    return None, None


def _lacks(needed: int, capacity: int) -> str:
    return f": it needs {human_bytes(needed)}, {human_bytes(needed - capacity)} more than the {human_bytes(capacity)}"
