"""What a compiled step communicates: rows by kind and mesh axes, and the same as a plain text table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from shardlab.hlo import collectives, totals
from shardlab.plan.text import human_bytes


class Row(TypedDict):
    """Collectives of one kind over the same axes; bytes per device and step, loops counted.

    `exact` is False when a loop's trip count is not in the program: count and bytes are lower bounds then. `in_branch`
    is True when some stand in a branch of which the program does not say how often it is taken: they are counted as if
    it were always. Of the branches of shardlab's own steps it does (`shardlab.hlo.loops.taken_name`).
    """

    kind: str
    axes: list[str]
    count: int
    payload_bytes: int
    wire_bytes: int
    exact: bool
    in_branch: bool


def collective_rows(
    text: str,
    axes: Mapping[str, int],
    *,
    slices: Mapping[str, int] | None = None,
    sliced_as_reduce_scatter: bool = False,
) -> list[Row]:
    """The rows of a compiled step, most wire bytes first; `shardlab.hlo.collectives` defines the columns.

    Args:
      text: `compiled.as_text()`.
      axes: sizes of the mesh axes in mesh order.
      slices: of several TPU slices, over how many of them an axis runs.
      sliced_as_reduce_scatter: count an all-reduce of which only slices are kept as a reduce-scatter.

    Raises:
      ValueError: the text is not HLO, or is for another number of devices than the mesh has.
    """
    found = totals(collectives(text, axes, slices=slices or {}), sliced_as_reduce_scatter=sliced_as_reduce_scatter)
    return [
        Row(
            kind=total.kind,
            axes=list(total.axes),
            count=total.count,
            payload_bytes=total.payload_bytes,
            wire_bytes=total.wire_bytes,
            exact=total.exact,
            in_branch=total.in_branch,
        )
        for total in found
    ]


def collectives_table(rows: Sequence[Row]) -> str:
    """The rows as text, their total last.

    `>=` marks lower bounds, `<=` upper ones, `?` groups that are no product of mesh axes.

    >>> sizes = {"payload_bytes": 4096, "wire_bytes": 6144}
    >>> sums = Row(kind="all-reduce", axes=["data"], count=2, exact=True, in_branch=False, **sizes)
    >>> sizes = {"payload_bytes": 512, "wire_bytes": 512}
    >>> sends = Row(kind="permute", axes=["stage"], count=70, exact=False, in_branch=False, **sizes)
    >>> print(collectives_table([sums, sends]))
    collective  axes   count  payload     wire
    all-reduce  data       2  4.0 KiB  6.0 KiB
    permute     stage  >= 70    512 B    512 B
    total              >= 72  4.5 KiB  6.5 KiB
    >=: in a loop of unknown length
    """
    if not rows:
        return "no collectives"
    lines = [["collective", "axes", "count", "payload", "wire"]]
    for row in rows:
        count = f"{_bound([row])}{row['count']}"
        sizes = [human_bytes(row["payload_bytes"]), human_bytes(row["wire_bytes"])]
        lines.append([row["kind"], " x ".join(row["axes"]), count, *sizes])
    count = f"{_bound(rows)}{sum(row['count'] for row in rows)}"
    payload, wire = (sum(row[key] for row in rows) for key in ("payload_bytes", "wire_bytes"))
    lines.append(["total", "", count, human_bytes(payload), human_bytes(wire)])
    widths = [max(len(line[k]) for line in lines) for k in range(5)]
    text = [
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    if any("?" in row["axes"] for row in rows):
        text.append("?: between devices that no mesh axes name")
    if not all(row["exact"] for row in rows):
        text.append(">=: in a loop of unknown length")
    if any(row["in_branch"] for row in rows):
        text.append("<=: some in a branch, counted as if it were always taken")
    return "\n".join(text)


def _bound(rows: Sequence[Row]) -> str:
    """How a count is to be read: as it is, or as a bound; of both kinds it is neither."""
    less, more = any(row["in_branch"] for row in rows), not all(row["exact"] for row in rows)
    return "~ " if less and more else "<= " if less else ">= " if more else ""
