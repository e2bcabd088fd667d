"""What a plan and its compiled step show together, as findings beside those of `shardlab.report.lint`.

    SL008  a parameter that every device holds whole, where axes could cut it
    SL009  collectives over slow links that another layout of the axes would avoid
    SL010  a collective that could wait for ever, in a branch that not all of its devices take

A sharding that XLA changed is no finding: `compile_train_step` refuses it, by the parameter's path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shardlab.hlo.collectives import Collective
from shardlab.hlo.hang import could_hang
from shardlab.mesh.topology import Layout, collective_seconds, lay_out
from shardlab.plan.layout import axes_in
from shardlab.plan.plan import Plan
from shardlab.plan.text import human_bytes, sibling_pattern
from shardlab.report.lint import SMALLEST, Finding
from shardlab.sharding.rules import spec_text
from shardlab.step.stage_arrays import diverges

_GAIN = 0.05  # what another layout must save of the seconds on the links


def lint_plan(
    plan: Plan, text: str, found: Sequence[Collective], layout: Layout | None, *, smallest: int = SMALLEST
) -> tuple[Finding, ...]:
    """The findings, costliest first within a code.

    Args:
      plan: of the step.
      text: its optimized HLO.
      found: the collectives in it.
      layout: of the mesh on its target, None where no links are known.
      smallest: bytes that a finding must cost to be one.
    """
    every = [*_replicated(plan, smallest), *_slow(plan, found, layout), *_hanging(plan, text)]
    return tuple(sorted(every, key=lambda one: (one.code, -one.bytes)))


def _replicated(plan: Plan, smallest: int) -> Iterator[Finding]:
    """Parameters with no axis, of a plan that stores others in pieces."""
    cut = {axis for one in plan.parameters for axis in axes_in(one.storage) if plan.mesh.sizes[axis] > 1}
    groups: dict[str, list[int]] = {}
    for one in plan.parameters:
        if cut and not any(plan.mesh.sizes[axis] > 1 for axis in axes_in(one.storage)):
            groups.setdefault(sibling_pattern(one.path), []).append(one.bytes_per_device)
    shown = {sibling_pattern(one.path): one for one in plan.parameters}
    for path, sizes in groups.items():
        stages = plan.num_stage_devices if any(path == stack.name for stack in plan.stacks) else 1
        held = sum(sizes) // stages
        if held >= smallest:
            yield Finding(
                "SL008",
                f"every device holds it whole, {human_bytes(held)} of parameters: {spec_text(shown[path].spec)} by "
                f"{shown[path].source}, and no axis of ZeRO divides a dim",
                path,
                "",
                held,
                None,
                f"name one of {', '.join(sorted(cut))} in its rule, with pad=True where the size does not divide",
            )


def _slow(plan: Plan, found: Sequence[Collective], layout: Layout | None) -> Iterator[Finding]:
    """The layout that the collectives' own bytes ask for, where it is faster by more than `_GAIN`."""
    if layout is None or plan.mesh.num_devices == 1:
        return
    names = set(plan.mesh.names)
    sent: dict[str, float] = {}
    for one in found:
        for axis in names & set(one.axes):
            sent[axis] = sent.get(axis, 0.0) + one.wire_bytes
    better = lay_out(plan.mesh, traffic=sent)
    now, then = (
        sum(collective_seconds(each, one.kind, one.axes, one.wire_bytes, count=one.count) for one in found if one.count)
        for each in (layout, better)
    )
    if not now or then > now * (1 - _GAIN):
        return
    moved = [axis for axis in better.axes if axis.size > 1 and axis.dims != layout.links(axis.axis).dims]
    links = {axis.axis: tuple(part.name for part in axis.dims) for axis in moved}
    worst = max(moved, key=lambda axis: sent.get(axis.axis, 0.0))
    yield Finding(
        "SL009",
        f"its collectives take {now:.3g} s on their links, and {then:.3g} s were the axes laid by what they send: "
        + "; ".join(axis.words.rstrip(".") for axis in moved),
        f"mesh axis {worst.axis}",
        "",
        round(sent.get(worst.axis, 0.0)),
        now - then,
        f"declare MeshSpec(..., links={links})",
    )


def _hanging(plan: Plan, text: str) -> Iterator[Finding]:
    if plan.mesh.stage is None or not diverges(plan):
        return
    for one in could_hang(text, plan.mesh.sizes, plan.mesh.stage, slices=plan.mesh.slices):
        yield Finding(
            "SL010",
            f"{one.kind} {one.name} over {' x '.join(one.axes)} is in a branch that not all of its devices take",
            one.op_name,
            one.source,
            one.payload_bytes,
            None,
            "use a schedule that needs no branch: 1f1b_split, interleaved_1f1b or 1f1b",
        )


CODES: Mapping[str, str] = {
    "SL001": "an all-reduce of which every device keeps a slice",
    "SL002": "weights gathered more often than a step has passes over them",
    "SL003": "gradients reduced more often than once a step",
    "SL004": "an all-gather of activations",
    "SL005": "an activation made whole to be cut again",
    "SL006": "float32 where bfloat16 was declared",
    "SL007": "padding of the layout's tiles",
    "SL008": "a parameter that every device holds whole",
    "SL009": "collectives over slow links that another layout would avoid",
    "SL010": "a collective that could wait for ever",
}
