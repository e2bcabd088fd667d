"""The facts of a plan and of its compiled step, as plain data fit for JSON."""

from __future__ import annotations

from typing import Any

from shardlab.pipeline.cost import cost
from shardlab.plan.plan import Plan
from shardlab.report.collectives import collective_rows
from shardlab.report.memory import memory
from shardlab.step.compile import CompiledStep


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What the plan says: mesh, parameters, bytes per device, the schedule and its bubble.

    `bubble_fraction` is the schedule's own, in lockstep, with a backward twice as long as a forward.
    """
    at = cost(plan.table())
    return {
        "mesh": plan.mesh.sizes,
        "batch_axes": list(plan.mesh.batch),
        "stage_axis": plan.mesh.stage,
        "target": plan.mesh.target,
        "num_parameters": plan.num_parameters,
        "dtype": plan.dtype,
        "zero": plan.zero,
        "remat": plan.remat,
        "batch_size": plan.batch_size,
        "microbatches": plan.num_microbatches,
        "stages": plan.num_stage_devices,
        "virtual": plan.virtual,
        "layers": list(plan.layers),
        "head": plan.head,
        "schedule": plan.schedule,
        "table_csv": plan.table_csv,
        "sends": plan.sends,
        "bubble_fraction": at.bubble_fraction,
        "peak_in_flight": list(at.peak_in_flight),
        # Of a model taken whole there is no estimate of the activations, which is not to say that there are none.
        "bytes_per_device": plan.bytes_per_device() | ({} if plan.layers else {"activations": None}),
        "notes": list(plan.notes),
    }


def step_facts(step: CompiledStep) -> dict[str, Any]:
    """The plan's facts and, beside them, what the compiler made: `memory` and `collectives` per device and step."""
    return {
        **plan_facts(step.plan),
        "memory": memory(step.compiled).to_json(),
        "collectives": collective_rows(step.compiled.as_text(), step.plan.mesh.sizes, slices=step.plan.mesh.slices),
    }
