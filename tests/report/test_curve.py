"""The loss curve: a PNG of the expected size with what was measured on it, and nothing global changed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardlab.report.curve import Points, draw_curve, moving_mean

TRAIN: Points = [(step, 5.0 / step) for step in range(1, 201)]
HELD_OUT: Points = [(0, 5.0), (100, 1.0), (200, 0.5)]
MEAN, POINTS = (0x1F, 0x5F, 0xA8), (0xC8, 0x50, 0x1E)


def drawn(path: Path, train: Points, held_out: Points) -> np.ndarray:
    """The pixels [height, width, RGB], of a file that is a PNG to its end."""
    draw_curve(path, train, held_out, unit="nats", title="a title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.verify()  # checks the sums of every chunk
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(axis=-1).sum())


def test_all_that_was_measured_is_on_it(tmp_path: Path) -> None:
    pixels = drawn(tmp_path / "loss.png", TRAIN, HELD_OUT)
    assert pixels.shape == (540, 960, 3)  # 8 x 4.5 inches at 120 dots
    assert all(count(pixels, colour) > 100 for colour in (MEAN, POINTS))
    # Three points and the one of the legend stand apart; the last has its value above it.
    columns = np.flatnonzero((pixels == POINTS).all(axis=-1).any(axis=0))
    assert 1 + np.count_nonzero(np.diff(columns) > 20) >= 3


def test_the_value_of_a_first_point_is_beside_the_axis(tmp_path: Path) -> None:
    points = (drawn(tmp_path / "a.png", TRAIN, [(0, 3.0)]) == POINTS).all(axis=-1)
    points[:, points.shape[1] // 2 :] = False  # the legend's
    last = np.flatnonzero(points.any(axis=1)).max()  # the lowest row of the dot, which is under its value
    value, dot = (np.flatnonzero(part.any(axis=0)) for part in (points[: last - 12], points[last - 12 :]))
    assert dot.min() < value.min() < dot.max() + 10
    assert value.max() > dot.max() + 30


def test_what_was_not_measured_is_not_on_it(tmp_path: Path) -> None:
    assert count(drawn(tmp_path / "a.png", TRAIN, []), POINTS) == 0
    only = drawn(tmp_path / "b.png", [], HELD_OUT)
    assert count(only, MEAN) == 0
    assert count(only, POINTS) > 100
    short = drawn(tmp_path / "c.png", TRAIN[:49], [])  # too short for a mean
    assert count(short, MEAN) == 0


def test_a_single_step_is_seen(tmp_path: Path) -> None:
    nothing, one = (drawn(tmp_path / f"{len(points)}.png", points, []) for points in ([], TRAIN[:1]))
    assert nothing.shape == one.shape == (540, 960, 3)
    blue = one[..., 2].astype(int) - one[..., 0] > 20
    # The legend's line and dot, and the dot itself, apart from it.
    gaps = [np.diff(np.flatnonzero(blue.any(axis=axis))).max() for axis in (0, 1)]
    assert max(gaps) > 20


def test_the_users_pictures_stay_what_they_were(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom shardlab.report.curve import draw_curve\n"
        f"draw_curve(Path({str(tmp_path / 'a.png')!r}), [(1, 2.0)], [], unit='nats', title='t')\n"
        "import matplotlib\nprint('matplotlib.pyplot' in sys.modules, matplotlib.rcParams._get_backend_or_none())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "False None\n"


@pytest.mark.parametrize("half", [0, 1, 3, 50])
def test_the_moving_mean_by_hand(half: int) -> None:
    values = np.random.default_rng(0).normal(size=11)
    expected = []
    for place in range(11):
        reach = min(half, place, 10 - place)
        expected.append(np.mean(values[place - reach : place + reach + 1]))
    np.testing.assert_allclose(moving_mean(values, half), expected, rtol=1e-12)


def test_the_moving_mean_of_a_line_lies_on_it() -> None:
    line = np.linspace(5.0, 1.0, 33)
    np.testing.assert_allclose(moving_mean(line, 4), line, rtol=1e-12)
