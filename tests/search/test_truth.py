"""What the search foretells against what compilers make of it here and now: rows of `benchmarks/predicted.py`, and a
plan that the search found itself.

    pip install 'shardlab[test,tpu]' && python -m pytest -m tpu tests/search
    pip install 'shardlab[test,gpu-compiler]' && python -m pytest -m gpu_compiler tests/search
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import reported_memory
from benchmarks.predicted import ROWS, planned
from shardlab.run.config import load_config, override
from shardlab.search.confirm import compiled
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.search import search
from shardlab.search.subject import Subject

# Of v5e, v5p and v6e, two of them of 4 layers; FSDP, and with tensor.
TPU_ROWS, GPU_ROWS = (1, 42, 43), (17, 18)


def near(estimate: Estimate, told: dict[str, Any]) -> None:
    assert "error" not in told, told
    assert told["fits"]
    assert estimate.hbm_bytes == pytest.approx(told["hbm_bytes"], rel=0.10)
    assert estimate.wire_bytes == pytest.approx(told["wire_bytes"], rel=0.05)


def estimated(row: int) -> Estimate:
    _, _, config, choice = planned(row)
    return Estimator(Subject(config, ROWS[row][1])).estimate(choice)


@pytest.mark.tpu
@pytest.mark.parametrize("row", TPU_ROWS)
def test_memory_and_wire_are_near_what_the_tpu_compiler_makes(row: int, tmp_path: Path) -> None:
    """And what it reports follows from its buffer assignment as `shardlab/search/beyond.py` has it."""
    told = reported_memory.compiled(row, tmp_path)
    near(estimated(row), told)
    assigned, passing = reported_memory.assignment(tmp_path)
    assert told["memory"]["temp_bytes"] == pytest.approx(2 * assigned - passing, rel=0.001)
    assert assigned < 0.95 * told["memory"]["temp_bytes"]


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("row", GPU_ROWS)
def test_memory_and_wire_are_near_what_the_gpu_compiler_makes(row: int) -> None:
    path, scalars, config, choice = planned(row)
    near(estimated(row), compiled(path, config, scalars, choice, ROWS[row][1]))


@pytest.mark.tpu
def test_a_plan_found_over_two_slices_is_what_compiles() -> None:
    path, target = "configs/llama3_8b.py", "2*tpu:v5e:2x4"
    scalars = {"model.num_layers": 4, "model.model_dim": 2048, "model.mlp_dim": 8192, "batch_size": 64}
    config = override(load_config(path), scalars)
    _, found = search(config, target)
    best = found.ranked[0]
    assert dict(best.choice.dcn)
    near(best, compiled(path, config, scalars, best.choice, target))
