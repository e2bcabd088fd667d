"""How long a compiled step takes on its target: compute, what of communication it waits for, the pipeline's bubble.

    seconds = compute + exposed communication

Compute is the compiler's own estimate where it prints one (XLA:TPU), else a roofline for each operation; a pipeline's
idle ticks run masked, so they are in it. Communication takes its bytes over the links that its axes lie on, and is
exposed as far as the program's schedule puts no compute beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shardlab.hlo.collectives import Collective, replica_groups
from shardlab.hlo.overlap import Overlaps, overlaps
from shardlab.hlo.parse import HloModule
from shardlab.hlo.time import Rates, Times, times
from shardlab.mesh.build import abstract_mesh
from shardlab.mesh.chips import Chip
from shardlab.mesh.link_time import link_seconds
from shardlab.mesh.topology import Layout, collective_seconds, group_seconds
from shardlab.module.flops import trained_flops
from shardlab.module.model import Model
from shardlab.pipeline.cost import idle_fraction
from shardlab.plan.microbatch import Microbatch
from shardlab.plan.plan import Plan

_TIERS = {"ici": "ICI", "dcn": "DCN", "nvlink": "NVLink", "network": "the network", "host": "the host"}


def step_overlaps(module: HloModule, found: Sequence[Collective], layout: Layout, chip: Chip) -> tuple[Times, Overlaps]:
    """The compute of a step, and its collectives beside it."""
    compute = times(module, Rates(chip.flops, chip.hbm_bandwidth, chip.clock_hz))

    def links(one: Collective) -> Hashable:
        # Axes of a torus have links of their own; whatever leaves an island or a slice shares what leads out of it.
        tiers = {axis.tier for axis in layout.axes if axis.axis in one.axes} - {"ici"}
        return frozenset(tiers) or one.axes

    return compute, overlaps(module, found, seconds_on(layout, module), compute, links=links)


def seconds_on(layout: Layout, module: HloModule) -> Callable[[Collective], float]:
    """Seconds of a collective, all its executions together, over the links that its axes lie on."""
    sizes, slices = layout.spec.sizes, layout.spec.slices
    # A program of several slices numbers the devices of one: the first part of every axis that runs over them.
    inner = [size // slices.get(axis, 1) for axis, size in sizes.items()]
    positions = np.arange(layout.spec.num_devices).reshape(layout.spec.shape)[tuple(map(slice, inner))].ravel()

    def seconds(one: Collective) -> float:
        if one.over_slices:
            between = [part for axis in one.axes for part in layout.links(axis).dims if part.dim.tier == "dcn"]
            return link_seconds(between, one.kind, one.wire_bytes, count=one.count)
        if one.group_size < math.prod(sizes.get(axis, 1) for axis in one.axes):
            groups = module.home[one.name].instructions[one.name].attributes.get("replica_groups", "")
            for group in replica_groups(groups)[:1]:
                found = group_seconds(
                    layout, one.kind, positions[list(group)].tolist(), one.wire_bytes, count=one.count
                )
                if found is not None:
                    return found
        return collective_seconds(layout, one.kind, one.axes, one.wire_bytes, count=one.count)

    return seconds


def estimate_facts(
    plan: Plan, compute: Times, beside: Overlaps, layout: Layout, chip: Chip, flops: int
) -> dict[str, Any]:
    """The estimate as plain data: ``estimate_seconds``, ``mfu``, ``bound_by``, and ``estimate`` with its parts.

    Args:
      flops: `model_flops`.
    """
    idle = idle_fraction(plan.table(), (1,) * plan.num_stages) if plan.num_stage_devices > 1 else 0.0
    products = sum(piece.seconds for piece in compute.pieces if piece.flops)
    others = compute.seconds - products
    parts = [
        ("matrix products", "compute", products * (1 - idle)),
        ("other operations", "HBM", others * (1 - idle)),
        ("pipeline bubble", "the pipeline's bubble", (products + others) * idle),
    ]
    waited: dict[tuple[str, tuple[str, ...]], float] = {}
    for one in beside.each:
        key = one.collective.kind, one.collective.axes
        waited[key] = waited.get(key, 0.0) + one.exposed_seconds
    tiers = {axis.axis: _TIERS[axis.tier] for axis in layout.axes}
    for (kind, axes), exposed in sorted(waited.items(), key=lambda item: -item[1]):
        over = " x ".join(axes)
        slowest = [tiers[axis] for axis in axes if axis in tiers]
        parts.append((f"{kind} over {over}, exposed", f"{slowest[-1] if slowest else 'links'} over {over}", exposed))
    seconds = sum(part for *_, part in parts)
    bound: dict[str, float] = {}
    for _, by, part in parts:
        bound[by] = bound.get(by, 0.0) + part
    # TPUs multiply float32 in passes of bfloat16, and publish no peak of it.
    peak = chip.flops.get(plan.dtype, chip.flops["bfloat16"]) * plan.mesh.num_devices
    kernels: dict[str, set[str]] = {}
    for kernel in compute.left_out:
        if kernel.reason.startswith("a kernel"):
            kernels.setdefault(kernel.reason, set()).add(_unnumbered(kernel.name))
    left_out = [f"{reason} ({', '.join(sorted(names))})" for reason, names in sorted(kernels.items())]
    return {
        "estimate_seconds": seconds,
        "mfu": flops / peak / seconds if seconds else None,
        "bound_by": max(bound, key=lambda by: bound[by]),
        "estimate": {
            "seconds": seconds,
            "parts": [{"name": name, "seconds": part} for name, _, part in parts if part > 0],
            "model_flops": flops,
            "compute_seconds": compute.seconds,
            "exposed_seconds": beside.exposed_seconds,
            "overlapped_seconds": beside.hidden_seconds,
            "basis": _basis(compute),
            "left_out": [*left_out, "input data, host work between steps"],
        },
    }


def _basis(compute: Times) -> str:
    """What the seconds of the compute come from."""
    if not any(piece.estimated for piece in compute.pieces):
        return "a roofline for each operation"
    counted = {_unnumbered(one.name) for one in compute.pieces if one.flops and not one.estimated}
    kernels = f"; kernels it has none for at the pace of its products ({', '.join(sorted(counted))})" if counted else ""
    return f"the compiler's cycle estimates{kernels}"


def _unnumbered(name: str) -> str:
    return re.sub(r"[.\d]+$", "", name)


def model_flops(model: Model, plan: Plan, batch: Any) -> int:
    """Floating point operations of a step on all devices: each matrix product once forward, twice backward.

    What is rematerialised, what pads and what runs in a pipeline's idle ticks does not count; attention counts whole,
    its masked half too. Those of the loss itself are not known in a model with parts.

    Args:
      batch: shapes of the global batch.
    """
    if model.parts is None:
        values = {**model.parameters, **model.buffers}
        key = jax.eval_shape(lambda: jax.random.key(0))
        with jax.sharding.use_abstract_mesh(abstract_mesh(plan.mesh)):
            return trained_flops(
                lambda trained, v, b, k: model.forward({**v, **trained}, b, k, True)[0],
                dict(model.parameters),
                values,
                batch,
                key,
            )
    rows = plan.microbatch_rows
    costs = Microbatch(model, batch, plan.mesh, rows, plan.dtype).costs("none")
    return round((sum(costs.blocks) + costs.before + costs.after) * plan.batch_size / rows)


def wire_by_axes(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Wire bytes of collective rows by the axes they cross, most first."""
    found: dict[str, int] = {}
    for row in rows:
        name = " x ".join(row["axes"])
        found[name] = found.get(name, 0) + row["wire_bytes"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))
