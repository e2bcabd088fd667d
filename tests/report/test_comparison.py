"""Schedules side by side, and that the README's table is the one that is printed."""

import re
from pathlib import Path

import pytest

from shardlab.pipeline.cost import Costs, cost
from shardlab.pipeline.schedules import SCHEDULES, make_schedule
from shardlab.report.comparison import comparison_rows, comparison_table

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_a_row_for_every_schedule_the_shortest_first() -> None:
    rows = comparison_rows(stages=4, microbatches=8)
    assert {row["name"] for row in rows} == set(SCHEDULES)  # none built is shorter than zb_v
    assert [row["makespan"] for row in rows] == sorted(row["makespan"] for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert {name for name, row in by_name.items() if row["branches"]} == {"zb_h1", "zb_h2", "zb_v", "dualpipe_v"}
    # (M V + P - 1)(F + B) of a half stage each.
    assert by_name["interleaved_1f1b"]["makespan"] == (8 * 2 + 3) * 1.5
    assert by_name["1f1b"]["held"] == 7


def test_virtual_stages_take_their_share_of_a_devices_costs() -> None:
    costs = Costs(F=(2, 4), I=2, W=2, send=0.25)
    rows = {row["name"]: row for row in comparison_rows(stages=2, microbatches=4, costs=costs)}
    schedule = make_schedule("zb_v", stages=2, microbatches=4)
    # Stages 0 and 3 are on device 0.
    assert rows["zb_v"]["makespan"] == cost(schedule, Costs(F=(1, 2, 2, 1), I=1, W=1, send=0.25)).makespan


def test_the_automatic_one_is_there_where_it_is_better_than_what_fits() -> None:
    rows = comparison_rows(stages=4, microbatches=16, costs=Costs(1, 1, 0.5))
    assert rows[0]["name"] == "automatic"
    within = comparison_rows(stages=4, microbatches=8, limit=2)
    assert next(row for row in within if row["name"] == "automatic")["held"] <= 2
    assert comparison_table(within).splitlines()[0].split()[:4] == ["schedule", "virtual", "makespan", "bubble"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_readmes_table(name: str) -> None:
    (row,) = (row for row in comparison_rows(stages=8, microbatches=32) if row["name"] == name)
    found = re.search(rf"^\| `{name}` \| ([\d.]+) % \| ([\d.]+) \| (yes|no) \|", README, re.MULTILINE)
    assert found is not None
    expected = (f"{100 * row['bubble_fraction']:.1f}", f"{row['held']:g}", "yes" if row["branches"] else "no")
    assert found.groups() == expected


def test_delayed_sends_beside_direct_ones() -> None:
    rows = comparison_rows(stages=8, microbatches=32, costs=Costs(send=0.25), delayed=True)
    by_name = {(row["name"], row["delayed"]): row for row in rows}
    assert len(rows) == len(by_name) == 2 * len(SCHEDULES) + 1
    assert rows[0]["name"] == "automatic"
    for name in ("1f1b", "1f1b_split"):
        late, direct = (f"{100 * by_name[name, delayed]['bubble_fraction']:.1f} %" for delayed in (True, False))
        assert re.search(rf"`{name}`[^`]* {late} instead of {direct}", " ".join(README.split()))
    assert [line.split("  ")[0] for line in comparison_table(rows).splitlines()[2:4]] == [
        "automatic, delayed",
        "zb_h2, delayed",
    ]
    assert len(comparison_rows(stages=1, microbatches=4, delayed=True)) == len(SCHEDULES)
