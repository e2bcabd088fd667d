"""Schedules drawn as SVG: every action, or what is left out said."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from shardlab.pipeline.schedules import SCHEDULES, make_schedule
from shardlab.report.timeline_svg import kinds, timeline_svg


def bars(svg: str) -> list[tuple[str, float, float, float]]:
    """Kind, top, left and right of each."""
    return [
        (rect.attrib["class"], float(rect.attrib["y"]), x, x + float(rect.attrib["width"]))
        for rect in ElementTree.fromstring(svg).iter("rect")
        if rect.attrib["class"] != "idle"
        for x in [float(rect.attrib["x"])]
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_has_its_bar_and_none_overlap(name: str) -> None:
    schedule = make_schedule(name, stages=4, microbatches=8)
    svg, cut = timeline_svg(schedule)
    found = bars(svg)
    assert cut == ""
    assert len(found) == sum(action is not None for tick in schedule.ticks for action in tick)
    assert {kind for kind, *_ in found} == set(kinds(schedule))
    for top in {top for _, top, *_ in found}:
        row = sorted((left, right) for _, other, left, right in found if other == top)
        assert all(right < left for (_, right), (left, _) in itertools.pairwise(row))
        assert 80 <= row[0][0] <= row[-1][1] <= 1000


def test_a_bar_stands_where_its_action_does() -> None:
    # gpipe of 2 and 2: F at 0, 1 and 1, 2; then B of two units each: 3 units forward, 6 backward, 920 wide.
    svg, _ = timeline_svg(make_schedule("gpipe", stages=2, microbatches=2))
    unit = 920 / 9
    lefts = sorted(round((left - 80) / unit, 2) for kind, top, left, _ in bars(svg) if (kind, top) == ("F", 25))
    assert lefts == [1, 2]
    ends = sorted(round((right + 1 - 80) / unit, 2) for kind, top, _, right in bars(svg) if (kind, top) == ("B", 1))
    assert ends == [7, 9]
    assert ">device 1</text>" in svg
    assert "<title>1F0: forward</title>" in svg


def test_runs_of_one_kind_become_one_bar() -> None:
    svg, cut = timeline_svg(make_schedule("gpipe", stages=8, microbatches=512))
    assert cut == "actions of one kind that follow one another are one bar"
    assert len(bars(svg)) == 16
    assert "<title>0F0 to 0F511: forward</title>" in svg


def test_a_picture_too_large_ends_early_and_says_so() -> None:
    svg, cut = timeline_svg(make_schedule("1f1b", stages=16, microbatches=512))
    assert re.search(r"one bar; the first 1\d% of the step are shown$", cut)
    assert len(bars(svg)) <= 2000
    assert len(svg) < 300_000
    assert max(right for *_, right in bars(svg)) == pytest.approx(999, abs=1)


def test_of_many_devices_the_first_are_drawn() -> None:
    svg, cut = timeline_svg(make_schedule("gpipe", stages=100, microbatches=4))
    assert cut.startswith("the first 64 of 100 devices are shown")
    assert len({top for _, top, *_ in bars(svg)}) == 64
    assert "device 56<" in svg
    assert "device 57<" not in svg
