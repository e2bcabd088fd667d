"""A plan in words: what it is, and what binds it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from shardlab.plan.layout import axes_in
from shardlab.search.choice import Choice
from shardlab.search.estimate import Estimate, Estimator, Planned
from shardlab.search.link_costs import LinkCosts
from shardlab.search.storage import Axes
from shardlab.search.subject import Array, Subject
from shardlab.sharding.zero import without

_LINKS = {"ici": "ICI", "dcn": "DCN", "nvlink": "NVLink", "network": "network", "host": "PCIe"}
_CAUSE = {"collectives": "activations", "weights": "weights", "gradients": "gradients", "stages": "stages"}
_OTHER = {"bubble": "pipeline bubble", "optimizer": "memory bandwidth"}


def name(estimate: Estimate, subject: Subject) -> str:
    """``FSDP 64 x TP 4``: the mesh by what its axes do."""
    choice, mesh = estimate.choice, subject.config.mesh
    words = []
    for axis, size in choice.mesh:
        if size == 1:
            continue
        if axis in mesh.batch:
            words.append(f"{'FSDP' if choice.zero == 3 else f'ZeRO-{choice.zero}' if choice.zero else 'DP'} {size}")
        elif axis == mesh.stage:
            words.append(f"PP {size} ({choice.schedule})")
        else:
            words.append(f"{'TP' if axis in ('tensor', 'model', 'tp') else axis} {size}")
    return " x ".join(words) or "one device"


@dataclass(frozen=True)
class Bound:
    """What takes most of a step.

    Attributes:
      by: "compute", "memory bandwidth", "pipeline bubble", or a collective: "ICI: all-gather over data of weights".
      where: of a collective, in which parameter or part of the model most of it is; empty of others.
      seconds: that it takes.
    """

    by: str
    where: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.by} ({self.where})" if self.where else self.by


def bound_by(estimate: Estimate, subject: Subject) -> str:
    """What takes most of a step: ``ICI: all-gather over data of weights (blocks/*/mlp/up/kernel largest)``."""
    return str(bound(estimate, subject))


def bound(estimate: Estimate, subject: Subject) -> Bound:
    """The longest part of a step, and of one that waits for links its longest collective."""
    estimator = Estimator(subject)
    part = max(estimate.seconds, key=lambda one: estimate.seconds[one])
    lasting = estimate.seconds[part]
    if part == "compute":
        # What products take alone, were memory infinitely fast.
        estimator.memory_pace = 0.0
        products = estimator.estimate(estimate.choice).seconds["compute"]
        return Bound("memory bandwidth" if products < lasting / 2 else "compute", "", lasting)
    if part in _OTHER:
        return Bound(_OTHER[part], "in the optimizer's update" if part == "optimizer" else "", lasting)
    cause = _CAUSE[part]
    planned = Planned(estimator, estimate.choice)
    planned.estimate()
    found = {key: seconds for key, seconds in planned.lasting.items() if key[0] == cause}
    if not found:
        return Bound(f"{links(estimate, subject, ())}: {cause}", "", lasting)
    _, kind, axes, place = max(found, key=lambda key: found[key])
    of = "x between stages" if cause == "stages" else cause
    by = f"{links(estimate, subject, axes)}: {kind} over {' x '.join(axes)} of {of}"
    if cause == "activations":
        where = f"in {place}"
    elif cause == "stages":
        where = ""
    else:
        where = f"{_largest(estimator, estimate.choice, axes, inside=place == 'blocks')} largest"
    return Bound(by, where, lasting)


def links(estimate: Estimate, subject: Subject, axes: Axes) -> str:
    """The slowest links that the axes of a plan lie on."""
    layout = LinkCosts(subject).layout(estimate.choice.placed)
    tiers = {layout.links(axis).tier for axis in axes}
    return next((words for tier, words in reversed(_LINKS.items()) if tier in tiers), "links")


def explanation(estimate: Estimate, subject: Subject) -> str:
    """A plan and what binds it, in a sentence: ``FSDP 64 x TP 4, bound by compute: 24.9 s of 25 s``."""
    found, total = bound(estimate, subject), estimate.total_seconds
    said = f"{name(estimate, subject)}, bound by {found}: {found.seconds:.3g} s of {total:.3g} s"
    waits = {of: estimate.seconds[part] for part, of in _WAITS.items()}
    longest = max(waits, key=lambda of: waits[of])
    if waits[longest] > 0.01 * total and waits[longest] < found.seconds:
        said += f"; {longest}, {waits[longest]:.3g} s, is the most of the rest"
    return said


_WAITS = {
    "collectives": "waiting for sums and gathers of activations",
    "weights": "waiting for weights",
    "gradients": "waiting for sums of gradients",
    "stages": "sending between stages",
    "bubble": "the pipeline's bubble",
}


def _largest(estimator: Estimator, choice: Choice, axes: Axes, *, inside: bool) -> str:
    """The parameter of which most is sent over the axes; those of all blocks together, with a star for the number."""
    subject, mesh = estimator.subject, estimator.links.mesh(choice.mesh)
    specs, sizes = subject.specs(choice.whole), choice.sizes
    most, found = -1.0, ""
    for array in subject.arrays:
        # Stages share what is outside blocks, and nothing else.
        if (inside and array.kind < 0) or (mesh.stage in axes and array.kind >= 0):
            continue
        compute = without(specs[array.path], mesh.batch)
        size = math.prod(array.shape) / math.prod(sizes[axis] for axis in axes_in(compute))
        size *= subject.kinds.count(array.kind) if array.kind >= 0 else 1
        if size > most:
            most, found = size, _starred(subject, array)
    return found


def _starred(subject: Subject, array: Array) -> str:
    """A path of a block with a star for its number: ``blocks/0/mlp/up/kernel`` is ``blocks/*/mlp/up/kernel``."""
    parts = subject.model.parts
    if parts is None or array.kind < 0:
        return array.path
    layer = parts.layers[parts.kinds.index(array.kind)]
    inner = next(inner for inner, path in layer.items() if path == array.path)
    return re.sub(r"\d+(?=\D*$)", "*", array.path.removesuffix(inner)) + inner


def fits(estimate: Estimate, subject: Subject) -> bool:
    """Whether it fits the memory of a device."""
    return estimate.needed_bytes <= subject.room
