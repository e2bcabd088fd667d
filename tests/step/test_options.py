"""XLA's options for a step: what its program needs on a TPU, and what the user gives besides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.plan.plan import Plan
from shardlab.step.compile import options_for
from tests.equivalence.cases import case, planned

WINDOWS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


def options(plan: Plan, given: dict[str, Any] | None = None, platform: str = "tpu") -> dict[str, Any] | None:
    mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)], dtype=object))
    return options_for(plan, mesh, given)


PLANS: dict[str, tuple[Plan, bool]] = {
    "one stage": (planned(case("decoder", data=2, tensor=2)), False),
    "stages in lock-step": (planned(case("decoder", stage=2, microbatches=4)), False),
    "stages in branches": (planned(case("decoder", stage=2, microbatches=4, schedule="zb_h1")), True),
    "x in parts over tensor": (planned(case("decoder", data=2, tensor=2, activation=P("data", "tensor"))), True),
    "x in parts over data alone": (planned(case("decoder", data=2, tensor=2, activation=P("data"))), False),
}


@pytest.mark.parametrize("name", PLANS)
def test_no_products_in_windows_where_devices_part_or_x_does(name: str) -> None:
    plan, needs = PLANS[name]
    assert options(plan) == ({WINDOWS: 1 << 30} if needs else None)
    assert options(plan, platform="cpu") is None


def test_what_the_user_gives_is_added_and_wins() -> None:
    plan, _ = PLANS["stages in branches"]
    assert options(plan, {"a": 1}) == {WINDOWS: 1 << 30, "a": 1}
    assert options(plan, {WINDOWS: 8}) == {WINDOWS: 8}
    assert options(plan, {"a": 1}, platform="gpu") == {"a": 1}
