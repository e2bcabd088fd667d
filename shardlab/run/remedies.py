"""What to change in a config whose step does not fit, and how many bytes of a device each change saves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardlab.mesh.faults import DeclarationError
from shardlab.plan.plan import Plan
from shardlab.run.config import Config


@dataclass(frozen=True)
class Remedy:
    """One or several scalars of a config given anew.

    Attributes:
      change: as on the command line: ``--zero 3 --remat full``.
      saves_bytes: as the plans' own counts differ.
      hbm_bytes: what the step would need then.
      fits: whether that is within the capacity.
      seconds: of a step, as the search's model estimates it; None where that was not asked.
    """

    change: str
    saves_bytes: int
    hbm_bytes: int
    fits: bool
    seconds: float | None = None


def remedies(config: Config, plan: Plan, needed: int, capacity: int) -> tuple[Remedy, ...]:
    """Single changes, those that save most first; then, where none is enough, as many together as it takes.

    Args:
      plan: of the config.
      needed: bytes of a device that its step needs, by the compiler.
      capacity: bytes that there are.
    """
    start = _counted(plan)

    def remedy(changes: Mapping[str, Any], counted: int) -> Remedy:
        text = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
        held = left(needed, start, counted)
        return Remedy(text, needed - held, held, held <= capacity)

    singles = [(changes, counted) for changes, counted in _better(config, {}, start)]
    found = [remedy(changes, counted) for changes, counted in singles]
    together, counted = singles[0] if singles else ({}, start)
    while singles and left(needed, start, counted) > capacity:
        further = list(_better(config, together, counted))
        if not further:
            break
        together, counted = further[0]
    if singles and together != singles[0][0]:
        found.append(remedy(together, counted))
    return tuple(found)


def left(needed: int, start: int, counted: int) -> int:
    """What the compiler will need of a device, where `start` was counted for what needs `needed`, and `counted` now.

    What it needs beyond the count stays; where too much was counted, the rest shrinks with the count.
    """
    return needed - (start - counted) if start <= needed else round(needed * counted / start)


def _better(config: Config, so_far: Mapping[str, Any], counted: int) -> Iterator[tuple[dict[str, Any], int]]:
    """What may be changed beside `so_far`, with what the plan counts then, where that is less; the least first."""
    found = []
    for changes in _changes(dataclasses.replace(config, **so_far)):
        # A change that the declaration does not allow is none.
        with contextlib.suppress(DeclarationError):
            together = {**so_far, **changes}
            found.append((together, _counted(dataclasses.replace(config, **together).plan())))
    yield from sorted((one for one in found if one[1] < counted), key=lambda one: one[1])


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    if config.zero < 3:
        yield {"zero": 3}
    if config.zero < 1:
        yield {"zero": 1}
    if config.zero > 1 and config.accumulate == "full":
        yield {"accumulate": "sharded"}
    if config.zero == 3 and config.gather == "step":
        yield {"gather": "layer"}
    if config.remat != "full" and not config.remat.startswith("stage"):
        yield {"remat": "full"}
    if config.pipeline is not None and config.remat == "full":
        yield {"remat": "stage/full"}
    yield {"microbatches": config.microbatches * 2}
    yield {"microbatches": config.microbatches * 4}


def _counted(plan: Plan) -> int:
    return sum(size for name, size in plan.bytes_per_device().items() if name != "padding")
