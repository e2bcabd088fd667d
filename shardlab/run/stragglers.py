"""Seconds a step by process: what each does on its own before the others can go on, and how long it waits.

All devices of a step keep pace: it takes as long as the slowest, whichever that is, in every process. What a process
can tell of itself is the time of its host: reading data and handing a step over, during which its devices may have
nothing to do, and waiting for devices. A process whose host holds the others up reads longest and waits least. Devices
that are slow are not told from others by this: all processes wait for them alike.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardlab.mesh.processes import index, of_all


@dataclass(frozen=True)
class HostTimes:
    """Seconds of this process's host, a number a step.

    Attributes:
      reading: to make a batch and give it to the devices.
      handing: to hand the step over.
      waiting: for the devices, until the step's numbers are here.
    """

    reading: list[float] = field(default_factory=list)
    handing: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)

    @staticmethod
    @contextlib.contextmanager
    def taken(into: list[float]) -> Iterator[None]:
        """Adds the seconds that pass inside."""
        start = time.perf_counter()
        yield
        into.append(time.perf_counter() - start)


def seconds_by_process(times: HostTimes) -> list[dict[str, Any]]:
    """Of every process its host's name and medians a step, in all of them.

    >>> [row] = seconds_by_process(HostTimes([0.5, 0.25, 0.25], [0.0], [1.0]))
    >>> row["process"], row["reading"], row["longest_reading"], row["waiting"]
    (0, 0.25, 0.5, 1.0)
    """

    def mine() -> dict[str, Any]:
        medians = {name: statistics.median(getattr(times, name) or [0.0]) for name in ("reading", "handing", "waiting")}
        longest = max(times.reading, default=0.0)
        return {"process": index(), "host": platform.node(), **medians, "longest_reading": longest}

    return of_all(mine)


def straggler_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line a process, and who holds the others up.

    >>> a = {"process": 0, "host": "a", "reading": 0.001, "handing": 0.001, "waiting": 0.5, "longest_reading": 0.1}
    >>> b = {"process": 1, "host": "b", "reading": 0.4, "handing": 0.001, "waiting": 0.1, "longest_reading": 0.5}
    >>> print(straggler_text([a, b]))
    process  host     reads  hands over     waits
          0  a      0.001 s     0.001 s   0.500 s
          1  b      0.400 s     0.001 s   0.100 s  the others wait 0.399 s a step for it
    """
    width = max(4, *(len(row["host"]) for row in rows))
    lines = [f"process  {'host':<{width}}     reads  hands over     waits"]
    own = [row["reading"] + row["handing"] for row in rows]
    slowest, usual = max(own), statistics.median_low(own)
    for row, mine in zip(rows, own, strict=True):
        # A tenth of what a step takes it: less is noise.
        late = mine == slowest and slowest - usual > 0.1 * (mine + row["waiting"])
        text = f"  the others wait {slowest - usual:.3f} s a step for it" if late else ""
        lines.append(
            f"{row['process']:>7}  {row['host']:<{width}}  {row['reading']:>6.3f} s    {row['handing']:>6.3f} s  "
            f"{row['waiting']:>6.3f} s{text}"
        )
    return "\n".join(lines)
