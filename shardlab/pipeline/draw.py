"""A schedule as a picture in text."""

from __future__ import annotations

import textwrap

from shardlab.pipeline.actions import KINDS, Action
from shardlab.pipeline.schedules import Schedule

_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "gradient of the input",
    "W": "gradient of the weights",
}


def draw(schedule: Schedule, width: int = 100) -> str:
    """The table with devices as rows and ticks as columns, a legend above.

    Lines have at most `width` characters; ticks that do not fit follow below. Where a device holds one stage,
    the stage is left out of its actions.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> print(draw(make_schedule("1f1b", stages=2, microbatches=2)))
    1f1b: 2 devices, 2 microbatches, 6 ticks
    F0 forward of microbatch 0, B0 backward, . idle
    tick       0  1  2  3  4  5
    device 0  F0 F1  .  . B0 B1
    device 1   . F0 B0 F1 B1  .
    """

    def text(action: Action | None) -> str:
        if action is None:
            return "."
        return str(action) if schedule.num_virtual > 1 else f"{action.kind}{action.microbatch}"

    labels = [f"device {device}" for device in range(schedule.num_devices)]
    label_width = max(map(len, labels)) + 1
    cells = [[text(action) for action in tick] for tick in schedule.ticks]
    cell_width = max([len(str(len(cells) - 1))] + [len(cell) for tick in cells for cell in tick]) + 1
    columns = max(1, (width - label_width) // cell_width)

    lines = [_title(schedule), *textwrap.wrap(_legend(schedule), max(width, 40))]
    for start in range(0, len(cells), columns):
        stop = min(start + columns, len(cells))
        if start:
            lines.append("")
        lines.append("tick".ljust(label_width) + "".join(str(tick).rjust(cell_width) for tick in range(start, stop)))
        for device, label in enumerate(labels):
            row = "".join(cells[tick][device].rjust(cell_width) for tick in range(start, stop))
            lines.append(label.ljust(label_width) + row)
    return "\n".join(lines)


def _title(schedule: Schedule) -> str:
    def count(number: int, one: str, many: str) -> str:
        return f"{number} {one if number == 1 else many}"

    parts = [count(schedule.num_devices, "device", "devices")]
    if schedule.num_virtual > 1:
        parts.append(f"{schedule.num_virtual} virtual stages on each")
    parts.append(count(schedule.num_microbatches, "microbatch", "microbatches"))
    parts.append(count(len(schedule.ticks), "tick", "ticks"))
    if schedule.delayed:
        parts.append("sends delayed")
    return f"{schedule.name}: {', '.join(parts)}"


def _legend(schedule: Schedule) -> str:
    there = {action.kind for tick in schedule.ticks for action in tick if action is not None}
    stage, of_stage = ("1", " on stage 1") if schedule.num_virtual > 1 else ("", "")
    kinds = [f"{stage}{kind}0 {_NAMES[kind]}" for kind in KINDS if kind in there]
    if kinds:
        kinds[0] += f" of microbatch 0{of_stage}"
    return ", ".join([*kinds, ". idle"])
