"""What the search foretells against what compilers make of it here and now: rows of `benchmarks/predicted.py`, and a
plan that the search found itself.

    pip install 'shardlab[test,tpu]' && python -m pytest -m tpu tests/search
    pip install 'shardlab[test,gpu-compiler]' && python -m pytest -m gpu_compiler tests/search
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.predicted import CONFIGS, ROWS, planned
from shardlab.run.config import load_config, override
from shardlab.search.confirm import compiled
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.search import search
from shardlab.search.subject import Subject

TPU_ROWS, GPU_ROWS = (1, 7, 12), (17, 18)  # of v5e, v5p and v6e; FSDP, and with tensor


def near(estimate: Estimate, told: dict[str, Any]) -> None:
    assert "error" not in told, told
    assert told["fits"]
    assert estimate.hbm_bytes == pytest.approx(told["hbm_bytes"], rel=0.10)
    assert estimate.wire_bytes == pytest.approx(told["wire_bytes"], rel=0.05)


def row_is_near(row: int) -> None:
    model, target, *_ = ROWS[row]
    scalars, config, choice = planned(row)
    near(Estimator(Subject(config, target)).estimate(choice), compiled(CONFIGS[model], config, scalars, choice, target))


@pytest.mark.tpu
@pytest.mark.parametrize("row", TPU_ROWS)
def test_memory_and_wire_are_near_what_the_tpu_compiler_makes(row: int) -> None:
    row_is_near(row)


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("row", GPU_ROWS)
def test_memory_and_wire_are_near_what_the_gpu_compiler_makes(row: int) -> None:
    row_is_near(row)


@pytest.mark.tpu
def test_a_plan_found_over_two_slices_is_what_compiles() -> None:
    path, target = CONFIGS["8b"], "2*tpu:v5e:2x4"
    scalars = {"model.num_layers": 4, "model.model_dim": 2048, "model.mlp_dim": 8192, "batch_size": 64}
    config = override(load_config(path), scalars)
    _, found = search(config, target)
    best = found.ranked[0]
    assert dict(best.choice.dcn)
    near(best, compiled(path, config, scalars, best.choice, target))
