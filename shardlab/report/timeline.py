"""A schedule over time: as a picture (PNG or SVG), and as a trace that Perfetto and Chrome open.

device 0   | 0F0 | 0F1 |           | 0B0       | 0B1       |
device 1         | 1F0 | 1B0       | 1F1 | 1B1       |
           0 ------------------------------------------------> time
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardlab.pipeline.actions import Kind
from shardlab.pipeline.cost import EQUAL, Cost, Costs, Mode, Timeline, cost, times
from shardlab.pipeline.schedules import Schedule

_COLOURS: dict[Kind, str] = {"F": "#4c78a8", "B": "#e07b39", "I": "#e9a13b", "W": "#6aa66a"}
_NAMES: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "gradient of the input",
    "W": "gradient of the weights",
}
_MOST_LABELLED = 160  # actions of a device; more are too narrow for their numbers


def draw_timeline(
    path: Path, schedules: Sequence[Schedule], costs: Sequence[Costs] | Costs = EQUAL, *, mode: Mode = "lockstep"
) -> None:
    """Writes a picture of schedules one below the other, on one scale of time; PNG, SVG or PDF by the suffix.

    Devices are rows. The number in a bar is its microbatch; of several virtual stages the later ones are darker.

    Args:
      path: of the picture.
      schedules: what to draw.
      costs: of their stages; one for each, or one for all.
      mode: which clock: ``"lockstep"``, as the compiled program runs, or ``"async"``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    each = [costs] * len(schedules) if isinstance(costs, Costs) else list(costs)
    timelines = [times(schedule, cost_, mode) for schedule, cost_ in zip(schedules, each, strict=True)]
    longest = max(timeline.makespan for timeline in timelines)
    rows = [schedule.num_devices for schedule in schedules]
    figure = Figure(figsize=(12, 0.9 * len(rows) + 0.34 * sum(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[count + 1.2 for count in rows], sharex=True)
    for axes, schedule, timeline, cost_ in zip(panels[:, 0], schedules, timelines, each, strict=True):
        _panel(axes, schedule, timeline, cost(schedule, cost_, mode))
        axes.set_xlim(0, longest)
    panels[-1, 0].set_xlabel("time, in the unit of the costs" + (", in lockstep" if mode == "lockstep" else ""))
    there = {span.action.kind for timeline in timelines for span in timeline.spans}
    patches = [Patch(color=_COLOURS[kind], label=f"{kind} {name}") for kind, name in _NAMES.items() if kind in there]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), frameon=False)
    figure.savefig(path)


def _panel(axes: Any, schedule: Schedule, timeline: Timeline, at: Cost) -> None:
    labelled = len(timeline.spans) <= _MOST_LABELLED * schedule.num_devices
    for span in timeline.spans:
        virtual = span.action.stage // schedule.num_devices
        left, width = span.start, span.end - span.start
        axes.broken_barh(
            [(left, width)],
            (span.device - 0.45, 0.9),
            facecolor=_COLOURS[span.action.kind],
            alpha=1 - 0.35 * (1 - virtual / max(schedule.num_virtual - 1, 1)) if schedule.num_virtual > 1 else 1,
            edgecolor="white",
            linewidth=0.6,
        )
        if labelled and width:
            axes.text(
                left + width / 2,
                span.device,
                str(span.action.microbatch),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white",
                clip_on=True,
            )
    held = max(at.peak_in_flight) / schedule.num_virtual
    each = f", {schedule.num_virtual} virtual stages each" if schedule.num_virtual > 1 else ""
    axes.set_title(
        f"{schedule.name}{each}: bubble {at.bubble_fraction:.1%}, holds up to {held:g} "
        f"microbatch{'es' if held != 1 else ''}, {max(at.sends)} {'delayed ' if schedule.delayed else ''}sends",
        loc="left",
        fontsize=9,
    )
    axes.set_ylim(schedule.num_devices - 0.5, -0.5)
    axes.set_yticks(range(schedule.num_devices), [f"device {device}" for device in range(schedule.num_devices)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def write_trace(path: Path, schedule: Schedule, costs: Costs = EQUAL, *, mode: Mode = "lockstep") -> None:
    """Writes a trace in Chrome's JSON format, which https://ui.perfetto.dev opens: a track for each device.

    A unit of time is a millisecond.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{schedule.name}, {mode}"}}
    ]
    for device in range(schedule.num_devices):
        name = {"name": f"device {device}"}
        events.append({"ph": "M", "pid": 0, "tid": device, "name": "thread_name", "args": name})
    for span in times(schedule, costs, mode).spans:
        action = span.action
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": span.device,
                "name": str(action),
                "cat": _NAMES[action.kind],
                "ts": span.start * 1000,
                "dur": (span.end - span.start) * 1000,
                "args": {"stage": action.stage, "microbatch": action.microbatch, "kind": _NAMES[action.kind]},
            }
        )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
