"""What a plan's weights and gradients send between devices, and what the other choice would cost.

Wire bytes are per device and step, of a ring over n devices: (n-1)/n of a gathered or scattered array of one device,
twice that of an all-reduced one. What runs in a pipeline's ticks is counted in each that runs it, masked ones included.

Not counted: what flows between stages, what the user's own specs make a block send, the moves of an optimizer that runs
per layer. XLA:CPU sums bfloat16 as float32, at twice the bytes.

Ring costs: Chan et al. 2007, "Collective communication: theory, practice, and experience".
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shardlab.module.model import computed
from shardlab.pipeline.buffers import program
from shardlab.plan.layout import axes_in, policy_within_stage
from shardlab.plan.plan import Parameter, Plan, shard_bytes


@dataclass(frozen=True)
class Choice:
    """What one value of an option costs a device.

    Attributes:
      option, value: as `make_plan` takes them: ``gather="layer"``.
      chosen: whether the plan has it.
      held_bytes: of the weights' working copy, or of the gradients' accumulators.
      wire_bytes: of the weights, or of the gradients, in a step.
      total_bytes: all that `Plan.bytes_per_device` counts, with this value and the plan's others.
    """

    option: str
    value: str
    chosen: bool
    held_bytes: int
    wire_bytes: int
    total_bytes: int


def choices(plan: Plan) -> tuple[Choice, ...]:
    """What `gather` and `accumulate` cost, the value chosen and the other one; empty where a plan has no choice."""
    if not plan.batch_axes_manual or not plan.layers:
        return ()
    batch = {axis for axis in plan.mesh.batch if plan.mesh.sizes[axis] > 1}
    inside = {path for stack in plan.stacks for path in stack.members}
    blocks = [parameter for parameter in plan.parameters if parameter.path in inside]
    found = []
    if any(batch & axes_in(block.storage) for block in blocks):
        found += [_choice(plan, "gather", value) for value in ("step", "layer")]
    if plan.zero > 1 and any(batch & axes_in(block.state) for block in blocks):
        found += [_choice(plan, "accumulate", value) for value in ("full", "sharded")]
    return tuple(found)


def weight_wire_bytes(plan: Plan) -> int:
    """What a step sends so that every device has the weights it computes with.

    By layer this is the most: a backward that does not read a weight does not gather it.
    """
    sizes, runs = plan.mesh.sizes, _runs(plan)
    total = 0.0
    for parameter, copies, per_tick in _stored(plan):
        whole = shard_bytes(parameter.stored_shape, computed(parameter.dtype, plan.dtype), parameter.compute, sizes)
        once = whole * _scattered(_devices(plan, axes_in(parameter.storage) - axes_in(parameter.compute)))
        in_ticks = plan.gather == "layer" and per_tick > 0
        # W needs what crosses the cut, and no weights.
        ticks = runs["F"] + (runs["B"] + runs["I"]) * (2 if policy_within_stage(plan.remat) else 1)
        total += once * (per_tick * ticks if in_ticks else copies)
        # Where only the optimizer's state is cut, devices update a share each and gather the new weights.
        updated = shard_bytes(parameter.stored_shape, parameter.dtype, parameter.storage, sizes)
        total += updated * copies * _scattered(_devices(plan, axes_in(parameter.state) - axes_in(parameter.storage)))
    return round(total)


def gradient_wire_bytes(plan: Plan) -> int:
    """What a step sends to sum gradients over the batch and, of what all stages use, over the stages."""
    sizes, runs, ends = plan.mesh.sizes, _runs(plan), _ends(plan)
    total = 0.0
    for parameter, copies, per_tick in _stored(plan):
        kind = computed(parameter.dtype, plan.reduce_dtype)
        whole = shard_bytes(parameter.stored_shape, kind, parameter.compute, sizes)
        axes = {*plan.mesh.batch}
        if not per_tick and plan.mesh.stage:
            axes |= {plan.mesh.stage} - axes_in(parameter.compute)  # each stage has a part of a vocabulary to itself
        pieces = _devices(plan, axes & axes_in(parameter.state))
        once = whole * (_scattered(pieces) + 2 * _scattered(_devices(plan, axes - axes_in(parameter.state))) / pieces)
        times = copies
        if plan.in_pieces(parameter):
            times = per_tick * (runs["B"] + runs["W"]) or sum(ends[part] for part in parameter.read_by)
        total += once * times
    return round(total)


def _choice(plan: Plan, option: str, value: str) -> Choice:
    given: dict[str, Any] = {option: value}
    other = dataclasses.replace(plan, **given)
    held = other.bytes_per_device()
    what, wire = {
        "gather": ("working_copy", weight_wire_bytes),
        "accumulate": ("gradients", gradient_wire_bytes),
    }[option]
    total = sum(size for name, size in held.items() if name != "padding")
    return Choice(option, value, other == plan, held[what], wire(other), total)


def _stored(plan: Plan) -> Iterator[tuple[Parameter, int, int]]:
    """Each stored array once: a parameter of it, how many a device holds, and how many a cell of a stage goes through.

    The last is 0 for those outside blocks.
    """
    stack_of = {path: stack for stack in plan.stacks for path in stack.members if path}
    seen = set()
    for parameter in plan.parameters:
        stack = stack_of.get(parameter.path)
        if stack is None:
            yield parameter, 1, 0
        elif stack.name not in seen:
            seen.add(stack.name)
            held = len(stack.members) // plan.num_stage_devices
            yield parameter, held, held // plan.virtual


def _runs(plan: Plan) -> Counter[str]:
    """How often a device runs each kind of cell: all do in every iteration of a uniform phase, else the busiest."""
    runs: Counter[str] = Counter()
    if not plan.layers:
        return runs
    for phase in program(plan.table()).phases:
        for index, kind in enumerate(phase.cell):
            if phase.divergent:
                runs[kind] += max(column.count(index) for column in zip(*phase.kind, strict=True))
            else:
                runs[kind] += phase.length
    return runs


def _ends(plan: Plan) -> Counter[str]:
    """How often a step takes the gradient of `before` and of `after`, as `Cells.where_due` does it."""
    ends: Counter[str] = Counter()
    for phase in program(plan.table()).phases:
        for part, when, due in (
            ("after", phase.head, phase.head_microbatch),
            ("before", phase.finish, phase.finish_microbatch),
        ):
            every = when == "sometimes" and not (plan.virtual > 1 or phase.divergent)
            ends[part] += phase.length if every else sum(microbatch >= 0 for microbatch in due)
    return ends


def _devices(plan: Plan, axes: set[str]) -> int:
    return math.prod(plan.mesh.sizes[axis] for axis in axes)


def _scattered(devices: int) -> float:
    return (devices - 1) / devices
