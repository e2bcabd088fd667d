"""A plan of a head over the vocabulary: what it says, what it counts, and what it refuses."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.models.decoder import DecoderConfig, decoder_rules
from shardlab.models.linen_decoder import LinenDecoder, linen_decoder_rules
from shardlab.module.functions import Functions
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rule, Rules

CONFIG = mlp.MLPConfig(num_classes=24, num_layers=5)
INIT = functools.partial(mlp.init, config=CONFIG)
MODEL = Functions(init=INIT, before=mlp.before, block=mlp.block, after=mlp.after)
KERNEL, BIAS = Rule("outputs/kernel", P(None, "stage")), Rule("outputs/bias", P("stage"))
REST = mlp.mlp_rules("tensor").rules[:-1]
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


def planned(model: Any = MODEL, *split: Rule, stage: int = 2, **more: Any) -> Plan:
    mesh = MeshSpec({"data": 2, "stage": stage, "tensor": 2}, batch="data", stage="stage", target=f"cpu:{4 * stage}")
    features = {"features": np.zeros((8, 12), np.float32), "labels": np.zeros(8, np.int32)}
    given = {"rules": Rules((*(split or (KERNEL, BIAS)), *REST)), "optimizer": optax.adam(1e-2), "head": "vocab"}
    return make_plan(model, mesh=mesh, **({"batch": features} | given | more))


def test_what_the_plan_says() -> None:
    plan = planned()
    assert plan.vocabulary == {"outputs/bias": 0, "outputs/kernel": 1}
    assert "schedule 1f1b, head over vocab" in str(plan)
    assert plan.notes == ()
    assert Plan.from_json(plan.to_json()) == plan
    kernel = next(p for p in plan.parameters if p.path == "outputs/kernel")
    assert kernel.compute == kernel.storage == kernel.state == P(None, "stage")
    inputs = next(p for p in plan.parameters if p.path == "inputs/kernel")
    assert (inputs.compute, inputs.storage) == (P(), P(None, "stage"))  # lent, as with any head


def test_bytes_are_those_of_a_part() -> None:
    """Of 16 x 24 and 24 numbers a stage has half: kernel, accumulator, optimizer state."""
    whole = planned(rules=mlp.mlp_rules("tensor"), head="examples").bytes_per_device()
    parts = planned().bytes_per_device()
    assert whole["gradients"] - parts["gradients"] == 4 * (16 * 24 + 24) // 2
    for name in ("parameters", "optimizer_state"):
        assert whole[name] == parts[name]  # a part is stored in either case


@pytest.mark.parametrize("zero", range(4))
def test_batch_axes_take_another_dim(zero: int) -> None:
    kernel = next(p for p in planned(zero=zero).parameters if p.path == "outputs/kernel")
    cut, part = P("data", "stage"), P(None, "stage")
    assert (kernel.storage, kernel.state) == (cut if zero == 3 else part, cut if zero else part)
    assert kernel.compute == part


def test_automatic_stays_with_the_examples() -> None:
    """And says what the stage axis in a spec is then."""
    plan = planned(head="auto", microbatches=2)
    assert (plan.head, plan.vocabulary) == ("examples", {})
    assert plan.notes == tuple(
        f"{path}: its spec names the stage axis 'stage', which is storage: every stage gathers it once a step; "
        "head='vocab' computes with the parts"
        for path in ("outputs/bias", "outputs/kernel")
    )
    assert not any("stage" in p.compute for p in plan.parameters)


def test_before_runs_whole_where_examples_do_not_divide() -> None:
    note = "head vocab: every stage runs before whole: a microbatch of 1 example a shard does not divide by 2 stages"
    assert planned(microbatches=4).notes == (note,)


def test_one_stage_has_the_whole_vocabulary() -> None:
    plan = planned(stage=1)
    assert (plan.head, plan.vocabulary) == ("vocab", {})
    assert plan.notes == ()


def test_a_vocabulary_that_does_not_divide_is_padded_on_request() -> None:
    init = functools.partial(mlp.init, config=mlp.MLPConfig(num_classes=13))
    model = Functions(init=init, before=mlp.before, block=mlp.block, after=mlp.after)
    plan = planned(model, *(Rule(rule.pattern, rule.spec, pad=True) for rule in (KERNEL, BIAS)))
    kernel = next(p for p in plan.parameters if p.path == "outputs/kernel")
    assert (kernel.stored_shape, kernel.compute) == ((16, 14), P(None, "stage"))
    assert plan.bytes_per_device()["padding"] == pytest.approx(4 * 17 / 2, abs=2)  # of a stage, a share of 17 zeros


HELD = "with head='vocab' a stage has 12 of its 24 classes"
WAY_OUT = (
    "name the stage axis in the spec of every parameter with the vocabulary's dim, and compute with the shapes that "
    "are given (nnx.Linear and x @ kernel do, Linen's Dense does not); or use head='examples'"
)


def two_heads(first: int, second: int) -> Functions:
    def init(key: Any) -> Any:
        params, other = (mlp.init(key, mlp.MLPConfig(num_classes=size)) for size in (first, second))
        return {**params, "others": other["outputs"]}

    def after(params: Any, x: Any) -> Any:
        return mlp.after(params, x), mlp.affine(params["others"], x)

    return Functions(init=init, before=mlp.before, block=mlp.block, after=after)


def summing(before: bool) -> Functions:
    """The output kernel, used before the blocks as well, or there alone."""
    return Functions(
        init=INIT,
        before=lambda params, batch: mlp.before(params, batch) + params["outputs"]["kernel"].sum(),
        block=mlp.block,
        after=lambda params, x: x if before else mlp.after(params, x),
    )


# name: (model, rules before those of the blocks, more, message)
BAD: dict[str, tuple[Any, tuple[Rule, ...], dict[str, Any], str]] = {
    "no part": (
        MODEL,
        (Rule("outputs/*", P()),),
        {},
        "head='vocab': no parameter outside the blocks names the stage axis 'stage' in its spec; name it on the dim of "
        """the vocabulary, as in ("head/kernel", P(None, "stage")), or use head='examples'""",
    ),
    "not first": (
        MODEL,
        (Rule("outputs/kernel", P(None, ("tensor", "stage"))), BIAS),
        {},
        """outputs/kernel (rule 1, "outputs/kernel"): its spec P(None, ('tensor', 'stage')) names the stage axis """
        "'stage' after 'tensor'; name 'stage' first: a stage's part of the vocabulary is one piece",
    ),
    "does not divide": (
        MODEL,
        (KERNEL, BIAS),
        {"stage": 5},
        "2 faults in the declaration:\n"
        "  1. outputs/bias: dim 0 has size 24, not divisible by axis 'stage' of size 5 (rule 2, \"outputs/bias\"); "
        "pad it to 25 with Rule(..., pad=True), or replicate it on purpose with None\n"
        "  2. outputs/kernel: dim 1 has size 24, not divisible by axis 'stage' of size 5 (rule 1, \"outputs/kernel\"); "
        "pad it to 25 with Rule(..., pad=True), or replicate it on purpose with None",
    ),
    "tied": (
        summing(before=False),
        (KERNEL, BIAS),
        {},
        f"outputs/kernel: `before` uses it whole, and {HELD}; use head='examples'",
    ),
    "not of the head": (
        summing(before=True),
        (KERNEL, Rule("outputs/bias", P())),
        {},
        f"outputs/kernel: `before` uses it whole, and {HELD}; leave the stage axis out of its spec",
    ),
    "not used": (
        Functions(init=INIT, before=mlp.before, block=mlp.block, after=lambda params, x: x),
        (KERNEL, Rule("outputs/bias", P())),
        {},
        f"outputs/kernel: its spec names the stage axis, and `after` does not use it: {HELD}; leave the stage axis "
        "out of its spec",
    ),
    "a bias that is whole": (
        MODEL,
        (KERNEL, Rule("outputs/bias", P())),
        {},
        "head='vocab': `after` does not take a stage's part of its parameters (outputs/kernel [16, 12] of [16, 24]): "
        f"ValueError: Incompatible shapes for broadcasting: shapes=[(4, 12), (24,)]; {WAY_OUT}",
    ),
    "padded alike": (
        two_heads(23, 24),
        (
            Rule("outputs/kernel", P(None, "stage"), pad=True),
            Rule("outputs/bias", P("stage"), pad=True),
            Rule("others/kernel", P(None, "stage")),
            Rule("others/bias", P("stage")),
        ),
        {},
        "2 faults in the declaration:\n"
        "  1. outputs/bias: has 23 classes and others/bias 24, both padded to 24; "
        "give both the same number of classes\n"
        "  2. outputs/kernel: has 23 classes and others/bias 24, both padded to 24; "
        "give both the same number of classes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name: str) -> None:
    model, split, more, message = BAD[name]
    with pytest.raises(DeclarationError) as error:
        planned(model, *split, **more)
    assert str(error.value) == message


def test_a_tied_embedding_is_refused() -> None:
    config = DecoderConfig(num_layers=2, tied=True)
    rules = Rules((Rule("tokens/embedding", P("stage")), *decoder_rules("tensor", tied=True).rules[1:]))
    tokens = {name: np.zeros((8, 6), np.int32) for name in ("tokens", "targets")}
    with pytest.raises(DeclarationError) as error:
        planned(config, rules=rules, pipeline=PARTS, batch=tokens)
    assert str(error.value) == (
        "tokens/embedding: `before` uses it whole, and with head='vocab' a stage has 128 of its 256 classes; use "
        "head='examples'"
    )


def test_a_linen_dense_that_checks_its_shapes_is_refused() -> None:
    model = LinenDecoder(vocab_size=24)
    rules = Rules((Rule("unembed/kernel", P(None, "stage")), *linen_decoder_rules("tensor").rules[:-1]))
    tokens = {name: np.zeros((8, 6), np.int32) for name in ("tokens", "targets")}
    with pytest.raises(DeclarationError) as error:
        planned(model, rules=rules, pipeline=PARTS, batch=tokens)
    start = (
        "head='vocab': `after` does not take a stage's part of its parameters (unembed/kernel [32, 12] of [32, 24]): "
    )
    assert str(error.value).startswith(start + "ScopeParamShapeError: ")
    assert str(error.value).endswith(f"; {WAY_OUT}")
