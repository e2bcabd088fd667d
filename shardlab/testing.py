"""For a user's own tests: prove that a model and a plan compute what the single-device model computes.

    from shardlab.testing import assert_matches_reference

    def test_my_plan():
        assert_matches_reference(model, loss, optimizer, batch, mesh=mesh, rules=rules, pipeline=pipeline)

With ``from shardlab.testing import emulate; emulate(8)`` first in ``conftest.py``.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from shardlab.mesh.emulate import emulate
from shardlab.mesh.spec import MeshSpec
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rules
from shardlab.step.calls import Loss
from shardlab.step.verify import Verification, verify

__all__ = ["assert_matches_reference", "emulate"]


def assert_matches_reference(
    model: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    batch: Any,
    *,
    mesh: MeshSpec,
    rules: Rules,
    steps: int = 3,
    seed: int = 0,
    dtype: str = "float64",
    **options: Any,
) -> Verification:
    """Asserts that the plan's initial parameters, loss, gradients and parameters after `steps` are the reference's.

    Args:
      model, loss, optimizer: as given to `compile_train_step`.
      batch: one global batch, used for every step.
      mesh, rules, options: as given to `make_plan`.
      dtype: what to compute in; float64 (the default) leaves an error nowhere to hide.

    Raises:
      AssertionError: with the table of errors, and the parameter where the largest is.
    """
    with jax.enable_x64(dtype == "float64"):
        plan = make_plan(model, mesh=mesh, rules=rules, optimizer=optimizer, batch=batch, dtype=dtype, **options)
        found = verify(model, loss, optimizer, plan, [batch] * steps, seed=seed)
    if not found.passed:
        raise AssertionError(str(found))
    return found
