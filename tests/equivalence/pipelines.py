"""What a pipeline may be made of, and few cases of it in which every two choices meet."""

from __future__ import annotations

from typing import Any

from shardlab.pipeline.schedules import SCHEDULES
from tests.equivalence.cases import Case, case
from tests.equivalence.pairwise import Choice, pairwise

BATCH = 24
LAYERS = {
    "decoder-10-layers": 10,
    "linen-dropout": 4,
    "mlp-7-layers": 7,
    "dense-and-experts": 6,
    "pure-auxiliary": 3,
}
FEATURES: dict[str, tuple[Any, ...]] = {
    "schedule": (
        *((name, published.virtual) for name, published in SCHEDULES.items()),
        *(("interleaved_1f1b", 3), ("1f1b_split", 2)),
    ),
    "mesh": (
        {"stage": 2},
        {"stage": 2, "data": 2, "tensor": 2},
        {"stage": 3, "data": 2},
        {"stage": 4, "data": 2},
    ),
    "microbatches": (3, 4, 6),
    "subject": tuple(LAYERS),
    "zero": (0, 1, 2, 3),
    "shards": (("step", "full"), ("step", "sharded"), ("layer", "sharded")),
    "remat": ("none", "full", "dots_saveable", "stage", "stage/full"),
    "head": ("examples", "last_stage"),
    "sends": ("direct", "delayed"),
}


def allowed(choice: Choice) -> bool:
    """Whether a plan can be made of it."""
    mesh, (name, virtual), (gather, accumulate) = choice["mesh"], choice["schedule"], choice["shards"]
    stages, data = mesh["stage"], mesh.get("data", 1)
    rows, rest = divmod(BATCH, data * choice["microbatches"])
    return not (
        rest
        or (choice["head"] == "examples" and rows % stages)
        or stages * virtual > LAYERS[choice["subject"]]
        or (gather == "layer" and (choice["zero"] < 3 or data == 1))
        or (accumulate == "sharded" and (choice["zero"] < 2 or data == 1))
        or (name == "dualpipe_v" and choice["microbatches"] < 2 * stages)
    )


def cases() -> dict[str, Case]:
    """By name, the cases in which every two values of `FEATURES` meet that are allowed together."""
    frozen = {name: tuple(range(len(values))) for name, values in FEATURES.items()}

    def chosen(places: Choice) -> Choice:
        return {name: FEATURES[name][place] for name, place in places.items()}

    found = {}
    for places in pairwise(frozen, lambda places: allowed(chosen(places)), seed=41):
        choice = chosen(places)
        (schedule, virtual), (gather, accumulate) = choice.pop("schedule"), choice.pop("shards")
        mesh, subject = choice.pop("mesh"), choice.pop("subject")
        sizes = "x".join(map(str, mesh.values()))
        name = f"{schedule}-{virtual}-{sizes}-{'-'.join(map(str, choice.values()))}-{gather}-{accumulate}-{subject}"
        options = {"schedule": schedule, "virtual": virtual, "gather": gather, "accumulate": accumulate, **choice}
        found[name] = case(subject, batch=BATCH, **mesh, **options)
    return found
