"""A schedule over time as SVG to stand in a page: a row a device, a bar an action, idle time left grey."""

from __future__ import annotations

from shardlab.pipeline.actions import KINDS, Kind
from shardlab.pipeline.cost import Span, times
from shardlab.pipeline.schedules import Schedule

NAMES: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "gradient of the input",
    "W": "gradient of the weights",
}
_MOST_BARS, _MOST_ROWS = 2000, 64  # more are neither read nor quickly drawn
_WIDTH, _LEFT = 1000, 80
_LABELLED = 14  # the least width of a bar that holds its microbatch's number


def timeline_svg(schedule: Schedule) -> tuple[str, str]:
    """The picture as an ``<svg>`` element, and in words what of the schedule is not in it, "" where all is.

    On the lockstep clock with a backward twice as long as a forward. Where there are too many bars, actions of one
    kind that follow one another are one; where there are still too many, the picture ends early.

    >>> from shardlab.pipeline.schedules import make_schedule
    >>> svg, cut = timeline_svg(make_schedule("gpipe", stages=2, microbatches=2))
    >>> svg.count("<rect class=\\"F\\""), svg.count("<rect class=\\"B\\""), cut
    (4, 4, '')
    """
    timeline = times(schedule)
    devices = min(schedule.num_devices, _MOST_ROWS)
    spans = [span for span in timeline.spans if span.device < devices]
    runs = [[span] for span in spans]
    said = []
    if devices < schedule.num_devices:
        said.append(f"the first {devices} of {schedule.num_devices} devices are shown")
    if len(runs) > _MOST_BARS:
        runs = _runs(spans)
        said.append("actions of one kind that follow one another are one bar")
    end = timeline.makespan
    if len(runs) > _MOST_BARS:
        runs = sorted(runs, key=lambda run: run[0].start)
        end = runs[_MOST_BARS][0].start
        runs = [run for run in runs if run[0].start < end]
        said.append(f"the first {end / timeline.makespan:.0%} of the step are shown")
    height = max(24 if devices <= 16 else 400 / devices, 7)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height * devices:.0f}" role="img" aria-label="schedule over time">',
    ]
    every = 1 if height >= 14 else 8
    for device in range(devices):
        top, thick = height * device + 1, height - 2
        if device % every == 0:
            parts.append(f'<text class="row" x="0" y="{top + thick / 2:.1f}">device {device}</text>')
        parts.append(
            f'<rect class="idle" x="{_LEFT}" y="{top:.1f}" width="{_WIDTH - _LEFT}" height="{thick:.1f}" rx="2"/>'
        )
    for run in runs:
        parts.append(_bar(schedule, run, end, height))
    return "".join([*parts, "</svg>"]), "; ".join(said)


def kinds(schedule: Schedule) -> list[Kind]:
    """The kinds of action that a schedule has."""
    there = {action.kind for tick in schedule.ticks for action in tick if action is not None}
    return [kind for kind in KINDS if kind in there]


def _bar(schedule: Schedule, run: list[Span], end: float, height: float) -> str:
    first, scale = run[0], (_WIDTH - _LEFT) / end
    left, width = _LEFT + first.start * scale, (min(run[-1].end, end) - first.start) * scale
    top, thick = height * first.device + 1, height - 2
    action = first.action
    virtual = action.stage // schedule.num_devices
    faint = 0.65 + 0.35 * virtual / (schedule.num_virtual - 1) if schedule.num_virtual > 1 else 1
    opacity = f' fill-opacity="{faint:.2f}"' if faint < 1 else ""
    last = f" to {run[-1].action}" if len(run) > 1 else ""
    bar = (
        f'<rect class="{action.kind}" x="{left:.2f}" y="{top:.1f}" width="{max(width - 1, 0.4):.2f}" '
        f'height="{thick:.1f}" rx="1.5"{opacity}><title>{action}{last}: {NAMES[action.kind]}</title></rect>'
    )
    if len(run) > 1 or width < _LABELLED or thick < 12:
        return bar
    return f'{bar}<text x="{left + (width - 1) / 2:.2f}" y="{top + thick / 2:.1f}">{action.microbatch}</text>'


def _runs(spans: list[Span]) -> list[list[Span]]:
    """Spans that follow one another on a device, of one kind and (virtual) stage."""
    runs: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.device, span.start)):
        last = runs[-1][-1] if runs else None
        same = last is not None and (last.device, last.action.kind, last.action.stage, last.end) == (
            span.device,
            span.action.kind,
            span.action.stage,
            span.start,
        )
        if same:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs
