"""A plan in words: what it is, what binds it, why another lost."""

from __future__ import annotations

from shardlab.search.estimate import Estimate
from shardlab.search.subject import Subject

_LINKS = {"tpu": "ICI", "gpu": "NVLink or network", "cpu": "host memory"}


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


def bound_by(estimate: Estimate, subject: Subject) -> str:
    """What takes most of the time that is not the model's own products, in words."""
    seconds = estimate.seconds
    part = max(seconds, key=lambda key: seconds[key])
    links = _LINKS[subject.target.platform]

    def axes(*causes: str) -> str:
        mine = {at: size for (cause, at), size in estimate.wire.items() if cause in causes}
        return " x ".join(max(mine.items(), key=lambda item: item[1])[0]) if mine else ""

    return {
        "compute": "compute",
        "collectives": f"{links} sums of activations over {axes('activations')}",
        "weights": f"{links} all-gather of weights over {axes('weights')}",
        "gradients": f"{links} reduction of gradients over {axes('gradients')}",
        "bubble": "the pipeline's bubble",
        "stages": f"{links} sends between stages over {axes('stages')}",
        "optimizer": "memory traffic of the optimizer",
    }[part]


def fits(estimate: Estimate, subject: Subject) -> bool:
    """Whether it fits the memory of a device."""
    return estimate.hbm_bytes <= subject.room
