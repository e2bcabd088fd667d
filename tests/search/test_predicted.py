"""Estimates against what was compiled: every row of `benchmarks/predicted.py`, whose figures are kept beside it."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from shardlab.mesh.targets import parse_target
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.subject import Subject

ROOT = Path(__file__).parents[2]


def table() -> Any:
    spec = importlib.util.spec_from_file_location("predicted", ROOT / "benchmarks" / "predicted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Estimate, dict[str, Any]]]:
    """Of every row the estimate and what was compiled; rows of one model share its traces."""
    predicted, traced = table(), {}
    kept = json.loads(predicted.KEPT.read_text())
    assert [one["row"] for one in kept] == list(range(len(predicted.ROWS)))
    found = []
    for one in kept:
        model, target, batch, *_ = predicted.ROWS[one["row"]]
        _, config, choice = predicted.planned(one["row"])
        if model not in traced:
            traced[model] = Subject(config, target)
            assert traced[model].arrays  # found here, before it is copied, as the bytes of an example are
            assert traced[model].batch_bytes
        subject = copy.copy(traced[model])
        subject.config, subject.target, subject.rows = config, parse_target(target), batch
        subject.__dict__.pop("chip", None)
        subject.__dict__.pop("model_flops", None)
        found.append((Estimator(subject).estimate(choice), one))
    return found


@pytest.mark.parametrize(("what", "mean", "worst"), [("hbm_bytes", 0.05, 0.10), ("wire_bytes", 0.05, 0.10)])
def test_every_row_is_near_what_was_compiled(
    pairs: list[tuple[Estimate, dict[str, Any]]], what: str, mean: float, worst: float
) -> None:
    off = [abs(getattr(estimate, what) / one[what] - 1) for estimate, one in pairs]
    assert max(off) < worst, off
    assert sum(off) / len(off) < mean, off
