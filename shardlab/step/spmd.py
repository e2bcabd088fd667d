"""Gradients of a model taken whole: microbatches accumulate in a scan, and are reduced over the batch axes once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from shardlab.module.model import computed
from shardlab.module.residuals import rematerialised
from shardlab.plan.layout import policy_within_stage
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls
from shardlab.step.region import Region, rows_of
from shardlab.step.state import storage_specs

Arrays = dict[str, Any]


def whole_gradients(
    plan: Plan, region: Region, calls: Calls, specs: dict[str, PartitionSpec]
) -> Callable[..., tuple[Arrays, jax.Array, Arrays]]:
    """``(values, buffers, batch, key data) -> (gradient sums by name, (loss sum, weight), buffers)``.

    Gradients are sums over the whole batch, reduced once, laid out as `specs`; divide them by the weight.
    """
    wide = jnp.float64 if plan.dtype == "float64" else jnp.float32
    rows, remat = plan.microbatch_rows, plan.remat
    assert isinstance(remat, str), "a model taken whole is one stage"
    if policy_within_stage(remat):  # of one stage its input is the batch
        remat = "full"
    compute = storage_specs(plan, "compute")

    def in_region(
        values: Arrays, buffers: Arrays, batch: Any, key_data: jax.Array, shard: jax.Array
    ) -> tuple[Arrays, jax.Array, Arrays]:
        first = shard[0] * (plan.batch_size // region.shards)

        def loss(trained: Arrays, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Arrays]]:
            examples = rows_of(batch, index * rows, rows)

            def forward(trained: Arrays) -> tuple[Any, Arrays]:
                return calls.whole({**trained, **buffers}, examples, (key_data, first + index * rows), rows)

            y, written = rematerialised(forward, remat)(trained)
            total, weight = calls.loss(y, examples)
            return total, (weight, written)

        def microbatch(carry: Any, index: jax.Array) -> tuple[Any, Arrays]:
            total, weight, sums = carry
            (more, (heavier, written)), gradient = jax.value_and_grad(loss, has_aux=True)(values, index)
            sums = {name: held + gradient[name].astype(held.dtype) for name, held in sums.items()}
            return (total + more.astype(wide), weight + heavier.astype(wide), sums), written

        # What a scan carries keeps the layout it starts with.
        zeros = {
            name: jax.lax.with_sharding_constraint(
                jnp.zeros(value.shape, computed(value.dtype, jnp.dtype(wide).name)),
                region.automatic_part(compute[name]),
            )
            for name, value in values.items()
        }
        start = jnp.zeros((), wide), jnp.zeros((), wide), zeros
        if plan.num_microbatches == 1:
            (total, weight, sums), written = microbatch(start, jnp.int32(0))
        else:
            (total, weight, sums), _ = jax.lax.scan(
                microbatch, start, jnp.arange(plan.num_microbatches, dtype=jnp.int32)
            )
            written = {}
        reduced = region.reduced(sums, dict.fromkeys(sums, region.batch), compute, specs)
        both = jnp.stack([total, weight])
        both = jax.lax.psum(both, region.batch) if region.batch else both
        return reduced, both, {**buffers, **written}

    def gradients(values: Arrays, buffers: Arrays, batch: Any, key_data: jax.Array) -> Any:
        none = PartitionSpec()
        rows_spec = PartitionSpec(region.batch or None)
        in_specs = (
            dict.fromkeys(values, none),
            dict.fromkeys(buffers, none),
            jax.tree.map(lambda _: rows_spec, batch),
            none,
            rows_spec,
        )
        out_specs = (
            {name: region.manual_part(spec) for name, spec in specs.items()},
            none,
            dict.fromkeys(buffers, none),
        )
        shards = np.arange(region.shards, dtype=np.int32)
        return region.run(in_region, in_specs, out_specs)(values, buffers, batch, key_data, shards)

    return gradients
