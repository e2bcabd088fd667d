"""Updates that are not made: where the loss or a gradient is not finite, a step leaves everything but its count.

`optax.apply_if_finite` lets the bad update through once it has skipped enough; here none is ever made, and who runs the
steps decides when to stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardlab.plan.plan import Plan


def finite_layers(gradients: Mapping[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    """By stored name whether the gradient is finite, of a stack that of each slot, bool [slots]."""
    stacks = {stack.name for stack in plan.stacks}
    return {
        name: jnp.isfinite(value).all(axis=tuple(range(1, value.ndim)) if name in stacks else None)
        for name, value in gradients.items()
    }


def unless_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` where all was finite, else `old`."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def not_finite(layers: Mapping[str, Any], plan: Plan) -> list[str]:
    """The user's own paths of the parameters whose gradient was not finite."""
    stacks = {stack.name: stack.members for stack in plan.stacks}
    found = []
    for name, finite in layers.items():
        members = stacks.get(name, (name,))
        fine = np.atleast_1d(np.asarray(finite))
        found += [path for path, one in zip(members, fine, strict=True) if path and not one]
    return sorted(found)
