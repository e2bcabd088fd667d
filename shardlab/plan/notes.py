"""What a plan notes: what was decided and not declared, in the words that it prints."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from shardlab.mesh.spec import MeshSpec
from shardlab.pipeline.runs import stage_runs
from shardlab.pipeline.schedules import Schedule
from shardlab.pipeline.stages import LayerCosts, Stages
from shardlab.plan.layout import axes_in
from shardlab.plan.plan import Parameter
from shardlab.sharding.rules import spec_text


def storage_notes(
    parameters: Sequence[Parameter], inside: frozenset[str], mesh: MeshSpec, zero: int, head: str
) -> list[str]:
    """What is stored otherwise than its spec might be read."""
    notes, several = [], mesh.stage is not None and mesh.sizes[mesh.stage] > 1
    for one in parameters:
        if zero == 3 and mesh.batch_size_divisor > 1 and not set(mesh.batch) & axes_in(one.storage):
            dims = list(one.stored_shape)
            notes.append(f"{one.path}: no dim of {dims} divides by the batch axes; replicated over them")
        if several and one.path not in inside and mesh.stage in axes_in(one.spec) and head != "vocab":
            notes.append(
                f"{one.path}: its spec names the stage axis {mesh.stage!r}, which is storage: every stage gathers it "
                "once a step; head='vocab' computes with the parts"
            )
    return notes


def saved_notes(spec: PartitionSpec, *, in_parts: bool) -> list[str]:
    """Of `saved_activation`, where no block keeps anything that it speaks of in parts."""
    if in_parts:
        return []
    return [
        f"saved_activation={spec_text(spec)} saves nothing: no block keeps x as it enters, or the spec names batch "
        "axes alone; remat='full' keeps it, remat='stage' a stage's"
    ]


def ignored_notes(schedule: str | Schedule, sends: str, stages: Stages) -> list[str]:
    """What was said of stages where there is one."""
    notes = []
    if schedule != "1f1b":
        name = schedule if isinstance(schedule, str) else schedule.name
        notes.append(f"schedule {name} is ignored: one stage only accumulates its microbatches")
    if sends == "delayed":
        notes.append("sends delayed is ignored: one stage sends nothing")
    return [*notes, "stages are ignored: one stage holds every block"] if stages is not None else notes


def stage_notes(layers: tuple[int, ...], costs: LayerCosts | None, head: str, source: str, one_kind: bool) -> list[str]:
    """What was decided about the stages, and what a list of them costs every stage; of several kinds, `kind_notes`."""
    notes, blocks = [], ", ".join(map(str, layers))
    even = math.ceil(sum(layers) / len(layers))
    if costs is not None:
        times, mean = costs.of_stages(layers), sum(costs.blocks) / len(costs.blocks)
        burden = f"before as {costs.before / mean:.2f} blocks, after as {costs.after / mean:.2f}"
        notes.append(
            f"stages balanced by {source} cost "
            f"({'before and after are spread over all stages' if head != 'last_stage' else burden}): {blocks} blocks; "
            f"slowest stage {max(times) * len(times) / sum(times):.2f} x the mean"
        )
    elif max(layers) > even and one_kind:
        notes.append(
            f"stages of {blocks} blocks: in a tick every stage computes {max(layers)} slots, as many as the longest "
            f"holds; even stages would compute {even}"
        )
    return notes


def kind_notes(kinds: tuple[int, ...], layers: tuple[int, ...]) -> list[str]:
    """What blocks of different kinds cost: a program for each, and slots that only some stages have a block for."""
    count = max(kinds) + 1
    if count == 1:
        return []
    firsts = [kinds.index(kind) for kind in range(count)]
    slots = sum(run.count(kind) for run in stage_runs(kinds, layers)[0] for kind in range(count))
    room = f"; a stage has room for {slots} and holds {max(layers)} at most" if slots > max(layers) else ""
    return [f"blocks are of {count} kinds, the first of each {', '.join(map(str, firsts))}{room}"]


PER_LAYER = "the optimizer runs per layer"


def update_notes(reason: str | None) -> list[str]:
    """What was decided about the tree that the optimizer runs on, and why."""
    return [] if reason is None else [f"{PER_LAYER}: {reason}"]
