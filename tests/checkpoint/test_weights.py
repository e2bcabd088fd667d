"""Weights of transformers on any plan: the logits that it computes, and files that it reads back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import shardlab
from shardlab.checkpoint.safetensors import read_folder
from shardlab.checkpoint.weights import load_safetensors, save_safetensors
from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import next_byte_loss
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from tests.checkpoint.families import FAMILIES, GOLDEN, LOGITS, Family, tokens

BATCH = {"tokens": tokens(), "targets": tokens()}
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


def plan_of(family: Family, *, rows: int = 2, data: int = 1, stage: int = 1, tensor: int = 1, **options: Any) -> Plan:
    mesh = MeshSpec(
        {"data": data, "stage": stage, "tensor": tensor},
        batch="data",
        stage="stage",
        target=f"cpu:{data * stage * tensor}",
    )
    shapes = {name: jax.ShapeDtypeStruct((rows, leaf.shape[1]), leaf.dtype) for name, leaf in BATCH.items()}
    return make_plan(
        family.config,
        mesh=mesh,
        rules=family.rules,
        optimizer=optax.sgd(0.1),
        batch=shapes,
        pipeline=PARTS,
        **options,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    family = FAMILIES[name]
    plan = plan_of(family)
    forward = shardlab.compile_forward(family.config, plan, BATCH)
    logits = forward(load_safetensors(GOLDEN / name, plan, family.names), {}, BATCH)
    expected = read_folder(GOLDEN / name / LOGITS)["logits"].array()
    assert np.abs(expected).max() > 1
    print(name, np.abs(logits - expected).max(), np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
