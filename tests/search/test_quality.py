"""The search's pick among all plans of three small cases that were compiled: `benchmarks/search_quality.py`."""

from __future__ import annotations

import json

import pytest

from benchmarks.search_quality import KEPT, judged, ranked


@pytest.mark.parametrize("case", ["nvlink", "hosts", "torus"])
def test_the_pick_is_within_5_percent_of_the_best(case: str) -> None:
    kept, plans = json.loads(KEPT.read_text())[case], ranked(case)
    assert set(plans) == set(kept), "plans come and go: run the benchmark with --keep"
    assert judged(plans, kept) < 0.05
