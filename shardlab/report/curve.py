"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

Points = Sequence[tuple[int, float]]


def draw_curve(path: Path, train: Points, held_out: Points, *, unit: str, title: str) -> None:
    """Writes a PNG: training loss, faint, and its running mean; held-out points, the last with its value.

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
        axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, label="training, each step")
        window = max(1, len(losses) // 25)
        if window > 1:
            axes.plot(
                steps,
                running_mean(losses, window),
                color="#1f5fa8",
                linewidth=1.8,
                label=f"training, mean of {window} steps",
            )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="#c8501e", markersize=5, linewidth=1, label="held-out")
        axes.annotate(
            f"{held_out[-1][1]:.3f}",
            held_out[-1],
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
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


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values up to each, of fewer at the start.

    >>> running_mean(np.array([1.0, 3.0, 5.0]), 2).tolist()
    [1.0, 2.0, 4.0]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (sums[stop] - sums[start]) / (stop - start)
