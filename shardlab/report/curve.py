"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

Points = Sequence[tuple[int, float]]


def draw_curve(path: Path, train: Points, held_out: Points, *, unit: str, title: str) -> None:
    """Writes a PNG: training loss, faint, and its moving mean; held-out points, the last with its value.

    Args:
      path: of the PNG.
      train: (step, loss).
      held_out: (step, loss); may be empty.
      unit: what the loss is counted in.
      title: above the picture.
    """
    # The object interface and the Agg canvas: nothing global, no display, no backend of the user's changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = (np.asarray(column, float) for column in zip(*train, strict=True))
        dots = "." if len(losses) < 3 else None  # a line of one point shows nothing
        axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, marker=dots, label="training, each step")
        half = len(losses) // 50
        if half:
            label = f"training, mean of {2 * half + 1} steps"
            axes.plot(steps, moving_mean(losses, half), color="#1f5fa8", linewidth=1.8, label=label)
    if held_out:
        # No line between them: nothing was measured there, and the first steps fall far below it. Not clipped, since
        # the first lies on the axis.
        axes.plot(*zip(*held_out, strict=True), "o", color="#c8501e", markersize=6, clip_on=False, label="held-out")
        at_axis = held_out[-1][0] == 0
        axes.annotate(
            f"{held_out[-1][1]:.3f}",
            held_out[-1],
            xytext=(6 if at_axis else 0, 9),
            textcoords="offset points",
            ha="left" if at_axis else "center",
            color="#c8501e",
            fontweight="bold",
        )
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(left=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    figure.savefig(path)


def moving_mean(values: np.ndarray, half: int) -> np.ndarray:
    """The mean of each value and the `half` before and after it, of fewer at the ends.

    As many on both sides, so that a falling curve's mean lies on the curve and not to its right.

    >>> moving_mean(np.array([1.0, 3.0, 5.0, 13.0]), 1).tolist()
    [1.0, 3.0, 7.0, 13.0]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, place[::-1]))
    start, stop = place - reach, place + reach + 1
    return (sums[stop] - sums[start]) / (stop - start)
