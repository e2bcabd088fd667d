"""x kept for the backward in parts, while the blocks compute with all of it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.plan.plan import Plan
from shardlab.report.collectives import collective_rows
from tests.equivalence.cases import case, compiled, planned

GIVEN: dict[str, Any] = {"stage": 2, "data": 2, "tensor": 2, "microbatches": 4}
IN_PARTS: dict[str, Any] = {**GIVEN, "saved_activation": P("data", "tensor")}


@pytest.mark.parametrize(
    ("remat", "leading"),
    [("full", "3,2"), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("stage", "3"), ("stage/full", "1,2")))],
)
def test_buffers_of_x_hold_a_part(remat: str, leading: str) -> None:
    """In the compiled step [slots, blocks, rows, tokens, width], of 6 tokens 3."""

    def held(given: dict[str, Any]) -> set[str]:
        with jax.default_matmul_precision("float32"):
            text = compiled(case("decoder", remat=remat, **given)).compiled.as_text()
        loops = "\n".join(line for line in text.splitlines() if " while(" in line)
        return set(re.findall(rf"f32\[{leading},1,(\d),16\]", loops))

    assert "6" in held(GIVEN)
    assert held(IN_PARTS) == {"3"}


def test_a_plan_counts_a_part() -> None:
    """Of blocks that keep everything, x alone is less."""

    def bytes_of(remat: str, given: dict[str, Any], subject: str = "decoder") -> tuple[int, int]:
        plan = planned(case(subject, remat=remat, **given))
        return plan.activation_bytes, plan.recomputed_bytes

    x = 4 * 6 * 16
    assert bytes_of("full", GIVEN) == (2 * x, 0)
    assert bytes_of("full", IN_PARTS) == (2 * x // 2, 0)
    assert bytes_of("stage/full", IN_PARTS) == (x // 2, 2 * x // 2)
    # 2 blocks, x 1 x 16, of which they keep other things too.
    everything = bytes_of("none", GIVEN, "pure")[0]
    assert bytes_of("none", IN_PARTS, "pure") == (everything - 2 * 4 * 16 // 2, 0)
    # What flows in parts is kept so.
    assert bytes_of("full", {**GIVEN, "activation": P("data", None, "tensor")}) == (2 * x // 2, 0)


def test_a_plan_says_so_and_is_read_again() -> None:
    plan = planned(case("decoder", activation=P("data", None, "tensor"), **IN_PARTS))
    assert plan.saved_activation_spec == P("data", "tensor")
    line = "x between blocks P('data', None, 'tensor'), kept for the backward P('data', 'tensor')"
    assert line in str(plan).splitlines()
    assert "kept for the backward" not in str(planned(case("decoder", **GIVEN)))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_says_where_it_saves_nothing() -> None:
    def notes(subject: str, **given: Any) -> list[str]:
        return [note for note in planned(case(subject, **{**IN_PARTS, **given})).notes if "saves nothing" in note]

    assert notes("decoder", remat="none") == [
        "saved_activation=P('data', 'tensor') saves nothing: no block keeps x as it enters, or the spec names batch "
        "axes alone; remat='full' keeps it, remat='stage' a stage's"
    ]
    assert len(notes("decoder", remat="full", saved_activation=P("data"))) == 1
    assert len(notes("decoder", remat="stage", saved_activation=P("data"))) == 1
    assert not notes("decoder", remat="full")
    assert not notes("decoder", remat="stage")
    assert not notes("pure", remat="none")


def test_x_is_gathered_once_a_block_and_backward() -> None:
    """And the blocks compute as they would: 2 blocks and 5 backwards make 10 more gathers over tensor, and no sum."""

    def over_tensor(given: dict[str, Any]) -> dict[str, int]:
        with jax.default_matmul_precision("float32"):
            step = compiled(case("decoder", remat="full", **given))
        rows = collective_rows(step.compiled.as_text(), step.plan.mesh.sizes)
        found = Counter[str]()
        for row in rows:
            found[row["kind"]] += row["count"] if row["axes"] == ["tensor"] else 0
        return dict(found)

    whole, in_parts = over_tensor(GIVEN), over_tensor(IN_PARTS)
    assert in_parts["all-gather"] == whole["all-gather"] + 2 * 5
    assert {**in_parts, "all-gather": 0} == {**whole, "all-gather": 0}
