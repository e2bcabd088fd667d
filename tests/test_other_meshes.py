"""Another mesh for what does not fit: what the search's model says, by every mesh and option that there is."""

from __future__ import annotations

import dataclasses
import math

import pytest

from shardlab.cli.other_meshes import other_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.models.mlp import MLPConfig
from shardlab.run.config import Config
from shardlab.run.remedies import Remedy
from shardlab.search.choice import choice_of
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.subject import Subject
from tests.run.tiny import tiny

TARGET = "tpu:v5e:2x4"


def config() -> Config:
    """Eight data shards, every device with all parameters."""
    this = tiny("data=8", batch_size=64, model=MLPConfig(num_layers=4, model_dim=256, hidden_dim=1024))
    return dataclasses.replace(this, mesh=this.mesh.override("data=8", target=TARGET))


def every() -> dict[str, Estimate]:
    """What may be given instead, as on the command line."""
    found = {}
    estimator = Estimator(Subject(config(), TARGET))
    for data in (1, 2, 4):
        for stage in (1, 2, 4):
            sizes = {"data": data, "stage": stage, "tensor": 8 // data // stage}
            if sizes["data"] * sizes["stage"] * sizes["tensor"] != 8:
                continue
            for zero in (0, 3):
                for remat in ("none", "full"):
                    shown = ",".join(f"{a}={n}" for a, n in sizes.items() if n > 1 or a == "data")
                    words = (
                        [f"--mesh {shown}"] + [f"--zero {zero}"] * (zero > 0) + [f"--remat {remat}"] * (remat != "none")
                    )
                    other = dataclasses.replace(
                        config(), mesh=config().mesh.override(sizes, target=TARGET), zero=zero, remat=remat
                    )
                    try:
                        other.plan()
                    except DeclarationError:
                        continue
                    found[" ".join(words)] = estimator.estimate(choice_of(other))
    return found


@pytest.fixture(scope="module")
def plans() -> dict[str, Estimate]:
    return every()


def needed() -> int:
    return round(Estimator(Subject(config(), TARGET)).estimate(choice_of(config())).needed_bytes)


@pytest.mark.parametrize("part", [0.8, 0.5, 0.1])
def test_the_fastest_that_fits_and_what_it_saves(plans: dict[str, Estimate], part: float) -> None:
    """A part of the plans fit. The compiler needs a tenth more than is counted: that stays."""
    by_compiler = round(1.1 * needed())
    extra = by_compiler - needed()
    room = math.ceil(sorted(one.needed_bytes for one in plans.values())[int(part * len(plans))]) + extra
    fitting = {words: one for words, one in plans.items() if one.needed_bytes <= room - extra}
    assert 0 < len(fitting) < len(plans)
    words, best = min(fitting.items(), key=lambda item: item[1].total_seconds)
    found = other_mesh(config(), by_compiler, room)
    assert found is not None
    assert found == Remedy(
        words,
        pytest.approx(needed() - best.needed_bytes, abs=2),  # type: ignore[arg-type]
        pytest.approx(best.needed_bytes + extra, abs=2),  # type: ignore[arg-type]
        True,
        pytest.approx(best.total_seconds),  # type: ignore[arg-type]
    )


def test_none_where_none_fits() -> None:
    assert other_mesh(config(), needed(), 1000) is None


def test_what_make_plan_refuses_is_not_offered(plans: dict[str, Estimate], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fastest then; half of the plans fit."""
    room = math.ceil(sorted(one.needed_bytes for one in plans.values())[len(plans) // 2])
    first = other_mesh(config(), needed(), room)
    asked = []

    def refuses_once(subject: Subject, choice: object) -> str:
        asked.append(choice)
        return "no" if len(asked) == 1 else ""

    monkeypatch.setattr("shardlab.cli.other_meshes.refused_by_make_plan", refuses_once)
    second = other_mesh(config(), needed(), room)
    assert first is not None
    assert second is not None
    assert second.change != first.change
    assert (second.seconds or 0) >= (first.seconds or 0)
