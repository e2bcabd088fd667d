"""Plans between which a state is moved: one model, one optimizer, every way that a plan lays arrays out."""

from __future__ import annotations

from typing import Any

from tests.equivalence.cases import Case, case

MODEL = "mlp-7-layers"


def _plan(subject: str = MODEL, **given: Any) -> Case:
    return case(subject, batch=8, **given)


PLANS: dict[str, Case] = {
    "one device": _plan(),
    "data": _plan(data=4),
    "fsdp 1": _plan(data=4, zero=1),
    "fsdp 2": _plan(data=2, zero=2, microbatches=2),
    "fsdp 3": _plan(data=8, zero=3),
    "fsdp 3 by layer": _plan(data=4, zero=3, gather="layer", accumulate="sharded"),
    "tensor": _plan(data=2, tensor=2),
    "1f1b 2": _plan(stage=2, microbatches=4),
    "1f1b 4": _plan(stage=4, data=2, microbatches=2, zero=1),
    "interleaved": _plan(stage=2, microbatches=4, schedule="interleaved_1f1b"),
    "uneven": _plan(stage=4, data=2, microbatches=2, stages="E t | t*3 | t*2 | t H"),
    "hybrid": _plan(data=2, stage=2, tensor=2, microbatches=2, zero=3),
    "zb_v": _plan(stage=2, data=2, microbatches=4, schedule="zb_v", zero=2),
}

FEW = ("one device", "uneven", "hybrid")
"""Those between which a state is moved in the default tests."""
