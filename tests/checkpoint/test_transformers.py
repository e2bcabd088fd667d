"""Weights to and from transformers itself.

pip install -e '.[test,transformers]' && python -m pytest -m transformers tests
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shardlab
from shardlab.checkpoint.safetensors import read_folder
from shardlab.checkpoint.weights import load_safetensors, save_safetensors
from tests.checkpoint.families import FAMILIES, GOLDEN, LOGITS, their_logits, their_model
from tests.checkpoint.test_weights import BATCH, PLANS, plan_of

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_same_here_and_there_and_there_again(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, model = FAMILIES[name], their_model(FAMILIES[name])
    golden = read_folder(GOLDEN / name / LOGITS)["logits"].array()
    np.testing.assert_allclose(their_logits(model), golden, rtol=0, atol=2e-5)

    model.save_pretrained(tmp_path / "theirs")
    plan = plan_of(family)
    parameters = load_safetensors(tmp_path / "theirs", plan, family.names)
    forward = shardlab.compile_forward(family.config, plan, BATCH)
    logits = np.asarray(forward(parameters, {}, BATCH))
    print(f"{name}: logits differ by {np.abs(logits - their_logits(model)).max():.1e} of {np.abs(logits).max():.1f}")
    np.testing.assert_allclose(logits, their_logits(model), rtol=0, atol=2e-5)

    # Other numbers go back, from another plan and in several files.
    plan = plan_of(family, **PLANS["hybrid"])
    more = {key: 1.125 * value for key, value in load_safetensors(tmp_path / "theirs", plan, family.names).items()}
    assert len(save_safetensors(tmp_path / "ours", plan, more, family.names, max_bytes=20_000)) > 2
    model.config.save_pretrained(tmp_path / "ours")
    back, told = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    logits = np.asarray(forward({key: 1.125 * value for key, value in parameters.items()}, {}, BATCH))
    np.testing.assert_allclose(their_logits(back.eval()), logits, rtol=0, atol=5e-5)
    assert np.abs(logits - golden).max() > 0.1
