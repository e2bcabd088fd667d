"""What is tried of the best plans alone: stages balanced by cost, kinds of parameters of blocks kept whole."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax
import pytest

from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig
from shardlab.models.mlp import label_loss
from shardlab.module.pipeline import Pipeline
from shardlab.run.config import Config
from shardlab.search.candidates import elsewhere, simplified
from shardlab.search.choice import Choice, changed
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.explain import bound, bound_by, explanation
from shardlab.search.search import search
from shardlab.search.stages import Held
from shardlab.search.subject import Subject
from shardlab.search.text import how
from shardlab.search.why import difference
from tests.equivalence.kinds import LINEN_RULES, LinenTwoWidths
from tests.search.subjects import SHAPE, Shapes, decoder

PIPED = (("data", 1), ("stage", 2), ("tensor", 1))


def two_widths(target: str, *widths: int) -> Config:
    """Blocks of which each takes as long as it is wide."""
    return Config(
        model=LinenTwoWidths(widths),
        loss=label_loss,
        optimizer=optax.adamw(1e-3),
        data=Shapes(lambda n: {"features": SHAPE((n, 12), jnp.float32), "labels": SHAPE((n,), jnp.int32)}),
        mesh=MeshSpec({"data": 1, "stage": 1, "tensor": 1}, batch="data", stage="stage", target="cpu:1"),
        rules=LINEN_RULES,
        pipeline=Pipeline(before="embed", blocks="blocks", after="head"),
        batch_size=65536,
    )


@pytest.fixture(scope="module")
def wide_first() -> Estimator:
    return Estimator(Subject(two_widths("cpu:1", 6144, 6144, 2048, 2048, 2048, 2048), "tpu:v5p:1x1x2"))


def test_balanced_stages_are_those_that_the_plan_makes(wide_first: Estimator) -> None:
    subject = wide_first.subject
    even = Choice(mesh=PIPED, microbatches=4)
    balanced = dataclasses.replace(even, stages="balanced")
    for choice, layers in ((even, (3, 3)), (balanced, (2, 4))):
        assert wide_first.layers(choice) == layers
        assert changed(subject.config, choice.overrides(subject.target.text)).plan().layers == layers


def test_the_stage_that_takes_longest_is_waited_for(wide_first: Estimator) -> None:
    """3 + 3 + 1 against 1 + 1 + 1, and 3 + 3 against 1 + 1 + 1 + 1, of a mean of 5: 7 and 6 fifths, in 5 ticks of 4."""
    even = wide_first.estimate(Choice(mesh=PIPED, microbatches=4))
    balanced = wide_first.estimate(Choice(mesh=PIPED, microbatches=4, stages="balanced"))
    assert even.seconds["compute"] == pytest.approx(balanced.seconds["compute"], rel=1e-6)

    def ticks(one: Estimate) -> float:
        return (one.seconds["compute"] + one.seconds["bubble"]) / one.seconds["compute"]

    assert ticks(even) == pytest.approx(5 / 4 * 7 / 5, rel=0.05)
    assert ticks(balanced) == pytest.approx(5 / 4 * 6 / 5, rel=0.05)


def test_slots_that_a_stage_has_no_block_for_take_time_unless_they_are_left_out() -> None:
    held = Held((2, 2), (2, 1), ((2, 0), (1, 1)))
    assert held.longest([1.0, 5.0], skips=False) == 7.0
    assert held.longest([1.0, 5.0], skips=True) == 6.0
    assert held.mean([1.0, 5.0]) == 4.0


def test_balanced_stages_are_searched_and_named(wide_first: Estimator) -> None:
    subject = wide_first.subject
    _, plans = search(subject.config, subject.target.text)
    assert plans.piped is not None
    assert plans.piped.choice.stages == "balanced"
    assert "stages balanced" in how(plans.piped.choice, subject)
    even = wide_first.estimate(dataclasses.replace(plans.piped.choice, stages=""))
    assert ("stages", "balanced", "''") in difference(plans.piped, even)


def test_stages_of_equal_blocks_have_nothing_to_balance() -> None:
    estimator = Estimator(Subject(decoder({"data": 8, "stage": 1, "tensor": 1}), "tpu:v5e:1x2"))
    choice = Choice(mesh=PIPED, microbatches=4)
    spec = estimator.links.layout(choice.placed).spec
    assert [one for one in elsewhere(choice, spec, estimator.layers) if one.stages] == []


NARROW = DecoderConfig(
    num_layers=2, model_dim=2048, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=128, vocab_size=32000
)
AXES = {"data": 8, "stage": 1, "tensor": 1}


@pytest.fixture(scope="module")
def narrow() -> Estimator:
    """An MLP too narrow for its sums over tensor to pay."""
    config = decoder(AXES, model=NARROW, seq=1024, dtype="bfloat16", batch_size=16)
    return Estimator(Subject(config, "gpu:h100:2x8"))


def test_kinds_of_parameters_are_kept_whole_together(narrow: Estimator) -> None:
    choice = Choice(mesh=(("data", 4), ("stage", 1), ("tensor", 4)), zero=1)
    found = [
        sorted(pattern.removeprefix("blocks/*/").removesuffix("/kernel") for pattern, _ in other.whole)
        for other in simplified(narrow.subject, choice)
    ]
    attention = [f"attention/{name}" for name in "kqvo"]
    assert sorted(found) == sorted(
        [
            sorted(attention),
            ["attention/k", "attention/v"],
            ["attention/q"],
            ["attention/o"],
            ["mlp/down", "mlp/gate", "mlp/up"],
            ["mlp/gate", "mlp/up"],
            ["mlp/down"],
        ]
    )
    again = next(iter(simplified(narrow.subject, choice)))
    assert all(set(again.whole) <= set(other.whole) for other in simplified(narrow.subject, again))
    assert list(simplified(narrow.subject, Choice(mesh=(("data", 16), ("stage", 1), ("tensor", 1))))) == []


def test_a_kind_of_parameter_whole_is_estimated_and_planned_so(narrow: Estimator) -> None:
    choice = Choice(mesh=(("data", 4), ("stage", 1), ("tensor", 4)), zero=1)
    whole = next(
        one for one in simplified(narrow.subject, choice) if {"mlp"} == {p.split("/")[2] for p, _ in one.whole}
    )
    cut, kept = narrow.estimate(choice), narrow.estimate(whole)
    assert kept.total_seconds < 0.98 * cut.total_seconds
    assert kept.wire["activations", ("tensor",)] < cut.wire["activations", ("tensor",)]
    plan = changed(narrow.subject.config, whole.overrides("gpu:h100:2x8")).plan()
    specs = {parameter.path: str(parameter.compute) for parameter in plan.parameters}
    assert "tensor" not in specs["blocks/1/mlp/up/kernel"]
    assert "tensor" in specs["blocks/1/attention/q/kernel"]


def test_a_search_keeps_a_kind_of_parameter_whole() -> None:
    """One example: tensor alone can share the work, and of the narrow MLP there is too little to share."""
    config = decoder(AXES, model=NARROW, seq=1024, dtype="bfloat16", batch_size=1)
    _, plans = search(config, "gpu:h100:1x4")
    whole = {pattern for one in plans.ranked[:1] for pattern, _ in one.choice.whole}
    assert {f"blocks/*/mlp/{name}/kernel" for name in ("gate", "up", "down")} <= whole


def test_what_binds_is_named_in_short_and_explained_apart() -> None:
    model = dataclasses.replace(NARROW, mlp_dim=8192)
    subject = Subject(decoder(AXES, model=model, seq=256, dtype="bfloat16", batch_size=16), "tpu:v5e:4x4")
    estimator = Estimator(subject)
    flat, piped = (tuple(zip(("data", "stage", "tensor"), sizes, strict=True)) for sizes in ((16, 1, 1), (8, 2, 1)))
    told = {
        "gradients": bound_by(estimator.estimate(Choice(mesh=flat)), subject),
        "stages": bound_by(estimator.estimate(Choice(mesh=piped, zero=1, microbatches=2)), subject),
    }
    assert told["gradients"] == "ICI: all-reduce over data of gradients (tokens/embedding largest)"
    assert told["stages"] == "ICI: reduce-scatter over stage of gradients (tokens/embedding largest)"
    one = estimator.estimate(Choice(mesh=flat))
    seconds, total = one.seconds["gradients"], one.total_seconds
    said = f"DP 16, bound by {told['gradients']}: {seconds:.3g} s of {total:.3g} s"
    assert explanation(one, subject) == said


def test_activations_over_tensor_are_told_by_the_part_of_the_model() -> None:
    model = dataclasses.replace(NARROW, num_layers=8)
    subject = Subject(decoder(AXES, model=model, seq=1024, dtype="bfloat16", batch_size=8), "gpu:a6000:8x1")
    one = Estimator(subject).estimate(Choice(mesh=(("data", 1), ("stage", 1), ("tensor", 8))))
    assert bound_by(one, subject) == "network: all-reduce over tensor of activations (in blocks)"


def test_weights_are_told_by_the_largest_parameter_of_the_blocks() -> None:
    model = dataclasses.replace(NARROW, mlp_dim=8192, num_layers=8)
    subject = Subject(decoder(AXES, model=model, seq=64, dtype="bfloat16", batch_size=8), "gpu:a6000:8x1")
    one = Estimator(subject).estimate(
        Choice(mesh=(("data", 8), ("stage", 1), ("tensor", 1)), zero=3, gather="layer", accumulate="sharded")
    )
    found = bound(dataclasses.replace(one, seconds={"weights": 1.0, "compute": 0.0}), subject)
    assert str(found).startswith("network: all-gather over data of weights (blocks/*/mlp/")


def test_products_bind_as_compute_and_what_they_are_fed_as_memory() -> None:
    def of(mlp: int, seq: int, batch: int) -> str:
        model = dataclasses.replace(NARROW, num_layers=1, mlp_dim=mlp, vocab_size=64)
        subject = Subject(decoder(AXES, model=model, seq=seq, dtype="bfloat16", batch_size=batch), "tpu:v5e:1x1")
        one = Estimator(subject).estimate(Choice(mesh=(("data", 1), ("stage", 1), ("tensor", 1)), remat="full"))
        return bound_by(dataclasses.replace(one, seconds={**one.seconds, "optimizer": 0.0}), subject)

    assert of(65536, 256, 32) == "compute"
    assert of(256, 4, 1) == "memory bandwidth"
