"""Pictures and traces of schedules."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shardlab.pipeline.cost import Costs, Mode, cost
from shardlab.pipeline.schedules import make_schedule
from shardlab.report.timeline import draw_timeline, write_trace


def test_a_png_has_the_colours_of_the_kinds_there_are(tmp_path: Path) -> None:
    schedules = [make_schedule(name, stages=2, microbatches=4) for name in ("1f1b", "zb_h1")]
    for count, blue_green in ((1, (True, False)), (2, (True, True))):
        draw_timeline(tmp_path / "one.png", schedules[:count])
        pixels = np.round(imread(tmp_path / "one.png")[..., :3] * 255).astype(int)
        colours = {tuple(int(value) for value in pixel) for pixel in pixels.reshape(-1, 3)}
        assert ((0x4C, 0x78, 0xA8) in colours, (0x6A, 0xA6, 0x6A) in colours) == blue_green


def test_an_svg_names_schedules_and_devices(tmp_path: Path) -> None:
    schedules = [make_schedule(name, stages=3, microbatches=4) for name in ("gpipe", "zb_v")]
    draw_timeline(tmp_path / "both.svg", schedules, [Costs(1, 1, 1), Costs(0.5, 0.5, 0.5)], mode="async")
    text = (tmp_path / "both.svg").read_text()
    assert text.startswith("<?xml")
    for name in ("gpipe: bubble 33.3%, holds up to 4 microbatches, 8 sends", "zb_v, 2 virtual stages each", "device 2"):
        assert name in text


@pytest.mark.parametrize("mode", ["lockstep", "async"])
def test_a_trace_holds_every_action_in_its_place(tmp_path: Path, mode: Mode) -> None:
    schedule, costs = make_schedule("zb_h1", stages=2, microbatches=3), Costs(1, 2, 1)
    write_trace(tmp_path / "trace.json", schedule, costs, mode=mode)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {f"zb_h1, {mode}", "device 0", "device 1"}
    actions = [event for event in events if event["ph"] == "X"]
    assert sorted(event["name"] for event in actions) == sorted(
        str(action) for device in range(2) for action in schedule.row(device)
    )
    for device in range(2):
        mine = sorted((event for event in actions if event["tid"] == device), key=lambda event: event["ts"])
        assert [event["name"] for event in mine] == [str(action) for action in schedule.row(device)]
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(mine))
    assert max(event["ts"] + event["dur"] for event in actions) == cost(schedule, costs, mode).makespan * 1000
