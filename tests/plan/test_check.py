"""The full message of everything wrong with a declaration beyond a parameter's spec."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models import mlp
from shardlab.module.functions import Functions
from shardlab.pipeline.schedules import make_schedule
from shardlab.pipeline.stages import LayerCosts
from shardlab.plan.make import make_plan
from shardlab.sharding.rules import Rule, Rules

EIGHT = {"x": np.zeros((8, 12), np.float32), "labels": np.zeros(8, np.int32)}
MODEL = Functions(
    init=mlp.init,
    before=lambda params, batch: mlp.affine(params["inputs"], batch["x"]),
    block=mlp.block,
    after=mlp.after,
)


def rows(count: int, **more: Any) -> dict[str, Any]:
    return {"x": np.zeros((count, 12), np.float32), **more}


def whole(rngs: nnx.Rngs) -> nnx.Module:
    """A model whose parts are not named."""

    class Whole(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(12, 4, rngs=rngs)

        def __call__(self, batch: Any) -> jax.Array:
            return self.layer(batch["x"])

    return Whole()


def declare(model: Any = MODEL, *, batch: Any = EIGHT, mesh: dict[str, int] | None = None, **more: Any) -> None:
    """A plan of the residual MLP over data=2 x stage=2 x tensor=2, or of what is given instead."""
    sizes = {"data": 2, "stage": 2, "tensor": 2} | (mesh or {})
    spec = MeshSpec(sizes, batch="data", stage="stage", target=f"cpu:{np.prod(list(sizes.values()))}")
    given = {"rules": mlp.mlp_rules("tensor"), "optimizer": optax.sgd(0.1), **more}
    make_plan(model, mesh=spec, batch=batch, **given)


def raises(layer: Any, x: Any) -> Any:
    raise KeyError("the model's own")


NARROWING = dataclasses.replace(MODEL, block=lambda layer, x: x[:, :3])
RAISING = dataclasses.replace(MODEL, block=raises)
SPREAD = Rules((("blocks/2/up/kernel", P("tensor")), *((rule.pattern, rule.spec) for rule in mlp.mlp_rules().rules)))
POLICIES = (
    "none, full, stage, dots_saveable, dots_with_no_batch_dims_saveable, everything_saveable, nothing_saveable; "
    "did you mean 'dots_saveable'? write one of them"
)

SCHEDULE_NAMES = "gpipe, 1f1b, interleaved_1f1b, looped_bfs, 1f1b_split, zb_h1, zb_h2, zb_v, dualpipe_v"

# name: (arguments, message)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "zero": (
        {"zero": 4},
        "zero=4: is not one of 0, 1, 2, 3; write one of them",
    ),
    "remat": (
        {"remat": "dots_savable"},
        f"remat='dots_savable': is not one of {POLICIES}",
    ),
    "remat of other stages": (
        {"remat": "full | none | stage"},
        "2 faults in the declaration:\n"
        "  1. remat='stage': keeps a stage's input alone, in buffers that all devices have alike, and others keep "
        "more; write it for all stages, or another for this one\n"
        "  2. remat='full | none | stage': names policies of 3 stages, and there are 2; name one for each, or one for "
        "all",
    ),
    "dtype": (
        {"dtype": "bfloat61"},
        "dtype='bfloat61': is not one of float32, bfloat16, float64; did you mean 'bfloat16'? write one of them",
    ),
    "dtype, nothing like it": (
        {"dtype": "int8"},
        "dtype='int8': is not one of float32, bfloat16, float64; write one of them",
    ),
    "reduce dtype": (
        {"reduce_dtype": "fp32"},
        "reduce_dtype='fp32': is not one of auto, float32, bfloat16, float64; write one of them",
    ),
    "reduce dtype wider than the accumulators": (
        {"reduce_dtype": "float64"},
        "reduce_dtype='float64': gradients of a step in float32 accumulate in float32; use reduce_dtype='float32'",
    ),
    "reduce dtype that XLA decides": (
        {"reduce_dtype": "bfloat16", "batch_axes": "automatic", "mesh": {"stage": 1}},
        "reduce_dtype='bfloat16': with automatic batch axes XLA sums gradients where it computes them, in float32; use "
        "reduce_dtype='auto', or batch_axes='manual'",
    ),
    "head": (
        {"head": "example"},
        "head='example': is not one of auto, examples, last_stage, vocab; did you mean 'examples'? write one of them",
    ),
    "sends": (
        {"sends": "delay"},
        "sends='delay': is not one of auto, direct, delayed; did you mean 'delayed'? write one of them",
    ),
    "scatter": (
        {"scatter": "hole"},
        "scatter='hole': is not one of auto, whole; did you mean 'whole'? write one of them, or the parts of a batch "
        "axis: data=32x8",
    ),
    "scatter in parts of another axis": (
        {"scatter": "date=2"},
        "scatter='date=2': axis 'date' is no batch axis (data); did you mean 'data'? name one",
    ),
    "scatter in parts of another size": (
        {"scatter": "data=2x2"},
        "scatter='data=2x2': 2 x 2 is 4, and axis 'data' has 2 devices; give parts that multiply to 2, or write 'auto'",
    ),
    "batch axes": (
        {"batch_axes": "manually"},
        "2 faults in the declaration:\n"
        "  1. batch_axes='manually': is not one of manual, automatic; did you mean 'manual'? write one of them\n"
        "  2. mesh axis 'stage': 2 stages need manual batch axes; use one stage, or batch_axes='manual'",
    ),
    "float64 in 32 bits": (
        {"dtype": "float64"},
        "dtype='float64': JAX computes in 32 bits here; call jax.config.update('jax_enable_x64', True) first",
    ),
    "a batch without arrays": (
        {"batch": {}, "model": Functions(init=mlp.init, apply=lambda params, batch: 0.0), "mesh": {"stage": 1}},
        "batch: has no arrays; pass a pytree whose arrays have the examples as leading dim",
    ),
    "leading dims differ": (
        {"batch": {"labels": np.zeros(8), "weights": {"each": np.zeros((4, 8))}, "x": EIGHT["x"]}},
        "batch weights/each: leading dim 4 is not the 8 examples of labels; give every array the examples first",
    ),
    "a scalar in the batch": (
        {"batch": rows(8, z=np.float32(1))},
        "batch z: leading dim 0 is not the 8 examples of x; give every array the examples first",
    ),
    "batch does not divide": (
        {"batch": rows(10), "microbatches": 4},
        "batch: 10 examples do not divide by 2 shards (data=2) x 4 microbatches; use a batch of 16, or 1 microbatch",
    ),
    "batch does not divide, and what fewer would": (
        {"batch": rows(64), "microbatches": 7},
        "batch: 64 examples do not divide by 2 shards (data=2) x 7 microbatches; use a batch of 70, or 4 microbatches",
    ),
    "a level that looks like another": (
        {"zero": -1},
        "zero=-1: is not one of 0, 1, 2, 3; write one of them",
    ),
    "microbatches 0": (
        {"microbatches": 0},
        "microbatches=0: is not a positive number; write 1 or more",
    ),
    "microbatches with automatic batch axes": (
        {"microbatches": 2, "batch_axes": "automatic", "mesh": {"stage": 1}},
        "microbatches=2: the model computes across examples, and a microbatch is not the batch; use microbatches=1",
    ),
    "stages without a pipeline": (
        {"model": whole, "rules": Rules((("**", None),))},
        "mesh axis 'stage': has 2 stages, and the model's parts are not named; pass "
        "pipeline=Pipeline(before=..., blocks=..., after=...)",
    ),
    "stages with automatic batch axes": (
        {"batch_axes": "automatic"},
        "mesh axis 'stage': 2 stages need manual batch axes; use one stage, or batch_axes='manual'",
    ),
    "fewer layers than stages": (
        {"mesh": {"data": 1, "stage": 8, "tensor": 1}},
        "4 layers on 8 stages: a stage holds at least 1 layer; use 4 stages or fewer, or more layers",
    ),
    "schedule": (
        {"schedule": "1f1d"},
        f"schedule '1f1d': unknown, there are {SCHEDULE_NAMES}; did you mean '1f1b'?",
    ),
    "schedule, nothing like it": (
        {"schedule": "qqq"},
        f"schedule 'qqq': unknown, there are {SCHEDULE_NAMES}; choose one of these",
    ),
    "fewer layers than virtual stages": (
        {"mesh": {"data": 1, "stage": 4, "tensor": 1}, "schedule": "interleaved_1f1b"},
        "4 layers on 8 stages: a stage holds at least 1 layer; use 4 stages or fewer, or more layers",
    ),
    "virtual stages where a device holds one": (
        {"schedule": "1f1b", "virtual": 2},
        "schedule '1f1b': a device holds 1 of its stages, not 2 (4 stages on 2 devices); write virtual=1, or take one "
        "that holds any number: interleaved_1f1b, looped_bfs, 1f1b_split",
    ),
    "blocks with different specs": (
        {"rules": SPREAD},
        f'blocks/2/up/kernel: spec {P("tensor")} (rule 1, "blocks/2/up/kernel") is not that of blocks/0/up/kernel, '
        "P(None, 'tensor'); blocks are stacked; give every block the same spec",
    ),
    "the head's examples do not divide": (
        {"head": "examples", "microbatches": 4},
        "head='examples': a microbatch of 1 example a shard does not divide by 2 stages; use head='last_stage', or "
        "fewer microbatches",
    ),
    "an integer parameter": (
        {
            "model": Functions(
                init=lambda key: {"order": jax.numpy.arange(12), "w": jax.numpy.ones(12)},
                apply=lambda params, batch: batch["x"][:, params["order"]] * params["w"],
            ),
            "mesh": {"stage": 1},
            "rules": Rules((("**", None),)),
        },
        "order: is a parameter of dtype int32, and only floating-point and complex numbers are trained; make it a "
        "buffer: an nnx.Variable that is no nnx.Param, a Linen collection beside params, or a constant of the function",
    ),
    "activation that names no axis": (
        {"activation": P("dta", "tensor")},
        f"activation={P('dta', 'tensor')}: the mesh has no axis 'dta', it has data, stage, tensor; did you mean "
        "'data'? name one of them",
    ),
    "activation that names the stage axis": (
        {"activation": P("data", "stage")},
        f"activation={P('data', 'stage')}: 'stage' is the stage axis, and x is on one stage at a time; leave it out",
    ),
    "activation with more entries than x has dims": (
        {"activation": P("data", None, "tensor")},
        f"activation={P('data', None, 'tensor')}: has 3 entries, and x 2 dims, [4, 16]; give one entry for each dim, "
        "or fewer",
    ),
    "activation that does not divide": (
        {"activation": P("data", "tensor"), "mesh": {"data": 1, "tensor": 3}, "rules": mlp.mlp_rules(None)},
        f"activation={P('data', 'tensor')}: dim 1 of x has size 16, not divisible by tensor=3; shard another dim",
    ),
    "saved activation that does not divide": (
        {"saved_activation": P("data", "tensor"), "mesh": {"data": 1, "tensor": 3}, "rules": mlp.mlp_rules(None)},
        f"saved_activation={P('data', 'tensor')}: dim 1 of x has size 16, not divisible by tensor=3; shard another dim",
    ),
    "saved activation that names the stage axis": (
        {"saved_activation": P("data", "stage")},
        f"saved_activation={P('data', 'stage')}: 'stage' is the stage axis, and x is on one stage at a time; leave it "
        "out",
    ),
    "activation without parts": (
        {
            "activation": P("data"),
            "model": whole,
            "mesh": {"stage": 1},
            "rules": Rules((("**", None),)),
        },
        f"activation={P('data')}: the model's parts are not named, so that nothing flows between blocks; pass "
        "pipeline=Pipeline(before=..., blocks=..., after=...), or leave it out",
    ),
    "a block that changes x's shape": (
        {
            "model": Functions(
                init=mlp.init,
                before=lambda params, batch: {"h": batch["x"], "mask": batch["x"][:, 0]},
                block=lambda layer, x: {"h": x["h"][:, :3], "mask": x["mask"]},
                after=lambda params, x: x["h"],
            )
        },
        "block: x h enters as [4, 12] and leaves as [4, 3]; every block keeps x's shapes",
    ),
    "a block among others that changes x's shape": (
        {
            "model": Functions(
                init=mlp.init,
                before=MODEL.before,
                block=[mlp.block, mlp.block, lambda layer, x: mlp.block(layer, x)[:, ::2], mlp.block],
                after=mlp.after,
            )
        },
        "block 2: x enters as [4, 16] and leaves as [4, 8]; every block keeps x's shapes",
    ),
    "a block that changes x's structure": (
        {"model": Functions(init=mlp.init, before=MODEL.before, block=lambda layer, x: {"x": x}, after=mlp.after)},
        "block: returns PyTreeDef({'x': *}) for x of PyTreeDef(*); return x's structure",
    ),
    "gather": (
        {"gather": "tick"},
        "gather='tick': is not one of auto, step, layer; write one of them",
    ),
    "weights gathered by layer that lie whole": (
        {"gather": "layer", "zero": 2},
        "gather='layer': at ZeRO level 2 no block's parameter lies in shards of the batch axes; use zero=3 on batch "
        "axes of more than one device, with the blocks named by pipeline=; or gather='step'",
    ),
    "gradients sharded on one shard": (
        {"accumulate": "sharded", "zero": 2, "mesh": {"data": 1, "stage": 2, "tensor": 2}},
        "accumulate='sharded': at ZeRO level 2 no block's gradient lies in shards of the batch axes; use zero=2 or 3 "
        "on batch axes of more than one device, with the blocks named by pipeline=; or accumulate='full'",
    ),
    "gradients sharded at ZeRO 1": (
        {"accumulate": "sharded", "zero": 1},
        "accumulate='sharded': at ZeRO level 1 no block's gradient lies in shards of the batch axes; use zero=2 or 3 "
        "on batch axes of more than one device, with the blocks named by pipeline=; or accumulate='full'",
    ),
    "a table for other devices": (
        {"schedule": make_schedule("1f1b", stages=4, microbatches=1)},
        "schedule '1f1b': is a table for 4 devices, the stage axis 'stage' has 2; give a table with a row for each, or "
        "another mesh",
    ),
    "a schedule beside others": (
        {"schedule": "1f1d", "zero": 7, "reduce_dtype": "float64"},
        "3 faults in the declaration:\n"
        "  1. zero=7: is not one of 0, 1, 2, 3; write one of them\n"
        "  2. reduce_dtype='float64': gradients of a step in float32 accumulate in float32; use "
        "reduce_dtype='float32'\n"
        f"  3. schedule '1f1d': unknown, there are {SCHEDULE_NAMES}; did you mean '1f1b'?",
    ),
    "stages of other layers": (
        {"stages": "E t*3 | t*2 H"},
        "stages: 'E t*3 | t*2 H' lists 5 blocks (3 + 2), and the model has 4; list 1 fewer",
    ),
    "stages that cannot be read, beside others": (
        {"stages": "E t*3 : t H", "zero": 4},
        "2 faults in the declaration:\n"
        "  1. zero=4: is not one of 0, 1, 2, 3; write one of them\n"
        "  2. stages: ':' is no part of a stage; write blocks as t or t*8, any lower-case word for t, E and H for what "
        "is before and after, | between stages\n"
        "    E t*3 : t H\n"
        "          ^",
    ),
    "costs of other layers": (
        {"stages": LayerCosts((1, 2, 3))},
        "costs: 3 for 4 layers; give one cost per layer",
    ),
    # What is found only by going on, where nothing that it needs is wrong.
    "all that is found by going on": (
        {
            "rules": Rules((Rule("outputs/kernel", P(None, ("data", "tensor")), pad=True), *SPREAD.rules)),
            "optimizer": optax.adafactor(0.1, min_dim_size_to_factor=4),
            "batch": rows(24),
            "mesh": {"data": 2, "stage": 2, "tensor": 2},
            "microbatches": 4,
            "head": "examples",
            "gather": "layer",
            "accumulate": "sharded",
            "schedule": "1f1d",
            "activation": P("data", "tensor", None),
        },
        "7 faults in the declaration:\n"
        f"  1. schedule '1f1d': unknown, there are {SCHEDULE_NAMES}; did you mean '1f1b'?\n"
        f'  2. blocks/2/up/kernel: spec {P("tensor")} (rule 2, "blocks/2/up/kernel") is not that of '
        "blocks/0/up/kernel, P(None, 'tensor'); blocks are stacked; give every block the same spec\n"
        "  3. gather='layer': at ZeRO level 0 no block's parameter lies in shards of the batch axes; use zero=3 on "
        "batch axes of more than one device, with the blocks named by pipeline=; or gather='step'\n"
        "  4. accumulate='sharded': at ZeRO level 0 no block's gradient lies in shards of the batch axes; use zero=2 "
        "or 3 on batch axes of more than one device, with the blocks named by pipeline=; or accumulate='full'\n"
        '  5. outputs/kernel (rule 1, "outputs/kernel"): pad=True may change the optimizer\'s state of outputs/kernel: '
        "it looks at more than each number alone; shard another dim, or replicate it on purpose with None\n"
        "  6. head='examples': a microbatch of 3 examples a shard does not divide by 2 stages; use head='last_stage', "
        "or fewer microbatches\n"
        f"  7. activation={P('data', 'tensor', None)}: has 3 entries, and x 2 dims, [3, 16]; give one entry for each "
        "dim, or fewer",
    ),
    "an activation's axis beside a block's shapes": (
        {"model": NARROWING, "activation": P("dta"), "zero": 0, "rules": mlp.mlp_rules(None)},
        "2 faults in the declaration:\n"
        f"  1. activation={P('dta')}: the mesh has no axis 'dta', it has data, stage, tensor; did you mean 'data'? "
        "name one of them\n"
        "  2. block: x enters as [4, 16] and leaves as [4, 3]; every block keeps x's shapes",
    ),
    "what is known before what the model raises": (
        {"model": RAISING, "gather": "layer"},
        "gather='layer': at ZeRO level 0 no block's parameter lies in shards of the batch axes; use zero=3 on batch "
        "axes of more than one device, with the blocks named by pipeline=; or gather='step'",
    ),
    "a fault of each group": (
        {
            "rules": Rules((*mlp.mlp_rules().rules, ("extra/*", None))),
            "remat": "full | none | none",
            "stages": "t*3 | t*2",
            "activation": P("dta"),
            "head": "examples",
            "microbatches": 4,
        },
        "5 faults in the declaration:\n"
        '  1. rule 7, "extra/*": matches no parameter; mend the pattern, or remove the rule\n'
        "  2. remat='full | none | none': names policies of 3 stages, and there are 2; name one for each, or one for "
        "all\n"
        "  3. stages: 't*3 | t*2' lists 5 blocks (3 + 2), and the model has 4; list 1 fewer\n"
        f"  4. activation={P('dta')}: the mesh has no axis 'dta', it has data, stage, tensor; did you mean 'data'? "
        "name one of them\n"
        "  5. head='examples': a microbatch of 1 example a shard does not divide by 2 stages; use head='last_stage', "
        "or fewer microbatches",
    ),
    "a fault of each group, where every parameter has its place": (
        {
            "rules": Rules(
                (
                    Rule("outputs/kernel", P(None, "tensor"), pad=True),
                    Rule("blocks/2/up/kernel", P()),
                    *mlp.mlp_rules().rules,
                )
            ),
            "optimizer": optax.adafactor(0.1, min_dim_size_to_factor=4),
            "mesh": {"data": 1, "tensor": 4},
            "batch": rows(4),
            "microbatches": 4,
            "zero": 3,
            "gather": "layer",
            "accumulate": "sharded",
            "head": "examples",
            "remat": ("full", "none", "none"),
            "stages": (1, 2, 1),
            "activation": P("stage"),
        },
        "8 faults in the declaration:\n"
        "  1. remat='full | none | none': names policies of 3 stages, and there are 2; name one for each, or one for "
        "all\n"
        "  2. stages: (1, 2, 1) lists 3 stages, and there are 2, virtual stages counted; list 2, or leave them out: as "
        "even as can be\n"
        '  3. blocks/2/up/kernel: spec P() (rule 2, "blocks/2/up/kernel") is not that of blocks/0/up/kernel, '
        "P(None, 'tensor'); blocks are stacked; give every block the same spec\n"
        "  4. gather='layer': at ZeRO level 3 no block's parameter lies in shards of the batch axes; use zero=3 on "
        "batch axes of more than one device, with the blocks named by pipeline=; or gather='step'\n"
        "  5. accumulate='sharded': at ZeRO level 3 no block's gradient lies in shards of the batch axes; use zero=2 "
        "or 3 on batch axes of more than one device, with the blocks named by pipeline=; or accumulate='full'\n"
        '  6. outputs/kernel (rule 1, "outputs/kernel"): pad=True may change the optimizer\'s state of outputs/kernel: '
        "it looks at more than each number alone; shard another dim, or replicate it on purpose with None\n"
        f"  7. activation={P('stage')}: 'stage' is the stage axis, and x is on one stage at a time; leave it out\n"
        "  8. head='examples': a microbatch of 1 example a shard does not divide by 2 stages; use head='last_stage', "
        "or fewer microbatches",
    ),
    "many at once": (
        {
            "zero": 5,
            "remat": "some",
            "dtype": "f32",
            "head": "first",
            "batch": rows(9, labels=np.zeros(3)),
            "microbatches": 2,
            "rules": Rules((*mlp.mlp_rules(None).rules[:5], ("output/*", None))),
        },
        "9 faults in the declaration:\n"
        "  1. rule 6, \"output/*\": matches no parameter; did you mean 'outputs/bias'? mend the pattern, or remove "
        "the rule\n"
        '  2. outputs/bias: no rule matches it, and it has no annotation; add a rule ("outputs/bias", P(...)), or '
        '("outputs/bias", None) to replicate it on purpose\n'
        '  3. outputs/kernel: no rule matches it, and it has no annotation; add a rule ("outputs/kernel", P(...)), or '
        '("outputs/kernel", None) to replicate it on purpose\n'
        "  4. zero=5: is not one of 0, 1, 2, 3; write one of them\n"
        "  5. dtype='f32': is not one of float32, bfloat16, float64; did you mean 'float32'? write one of them\n"
        "  6. head='first': is not one of auto, examples, last_stage, vocab; write one of them\n"
        "  7. remat='some': is not one of none, full, stage, dots_saveable, dots_with_no_batch_dims_saveable, "
        "everything_saveable, nothing_saveable; write one of them\n"
        "  8. batch x: leading dim 9 is not the 3 examples of labels; give every array the examples first\n"
        "  9. batch: 3 examples do not divide by 2 shards (data=2) x 2 microbatches; use a batch of 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(DeclarationError) as error:
        declare(**arguments)
    assert str(error.value) == message


def test_an_error_of_the_model_alone_is_the_models() -> None:
    with pytest.raises(KeyError, match="the model's own"):
        declare(RAISING)


def failing(error: Exception, part: str) -> Functions:
    """The model with a part that raises when it is traced."""

    def fail(*given: Any) -> Any:
        raise error

    if part == "before":
        return Functions(init=mlp.init, before=lambda params, batch: fail(), block=mlp.block, after=mlp.after)
    return Functions(init=mlp.init, before=MODEL.before, block=lambda layer, x: fail(), after=mlp.after)


@pytest.mark.parametrize("part", ["before", "block"])
@pytest.mark.parametrize("kind", [ValueError, TypeError, DeclarationError])
def test_an_error_of_the_model_comes_after_what_is_wrong_with_the_declaration(kind: type[Exception], part: str) -> None:
    """The fault may be its cause; where there is none, the model's own error stands as it was raised."""
    own = kind("the model's own, no fault")
    with pytest.raises(DeclarationError) as error:
        declare(failing(own, part), stages=(1, 2))
    assert str(error.value) == "stages: (1, 2) lists 3 blocks (1 + 2), and the model has 4; list 1 more"
    assert error.value.__context__ is own
    with pytest.raises(kind) as raised:
        declare(failing(own, part))
    assert raised.value is own


def test_what_the_model_finds_wrong_joins_the_other_faults() -> None:
    own = DeclarationError("routing: 3 experts on 2 devices; use 4")
    with pytest.raises(DeclarationError) as error:
        declare(failing(own, "block"), stages=(1, 2))
    assert str(error.value) == (
        "2 faults in the declaration:\n"
        "  1. stages: (1, 2) lists 3 blocks (1 + 2), and the model has 4; list 1 more\n"
        "  2. routing: 3 experts on 2 devices; use 4"
    )
    with pytest.raises(DeclarationError) as raised:
        declare(failing(own, "block"))
    assert raised.value is own


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "jax_default_prng_impl",
            "rbg",
            "jax_default_prng_impl='rbg': its draws depend on how an array is sharded; use "
            "jax.config.update('jax_default_prng_impl', 'threefry2x32')",
        ),
        (
            "jax_threefry_partitionable",
            False,
            "jax_threefry_partitionable=False: a device would draw all of an array to keep its share; use "
            "jax.config.update('jax_threefry_partitionable', True)",
        ),
    ],
)
def test_random_numbers_that_depend_on_the_mesh_are_refused(option: str, value: Any, message: str) -> None:
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        with pytest.raises(DeclarationError) as error:
            declare()
    finally:
        jax.config.update(option, before)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("remat", 7, "remat=7: is not one of none, full, stage, "),
        ("schedule", -1, "schedule=-1: is neither a name nor a table; write a name as '1f1b', or give a Schedule"),
    ],
)
@pytest.mark.parametrize("stages", [1, 2])
def test_a_choice_of_another_type(option: str, value: Any, message: str, stages: int) -> None:
    with pytest.raises(DeclarationError) as error:
        declare(mesh={"stage": stages}, **{option: value})
    assert str(error.value).startswith(message)


def test_an_axis_of_the_models_own_code_that_the_mesh_lacks() -> None:
    def block(layer: Any, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(mlp.block(layer, x), P(None, "expert"))

    with pytest.raises(DeclarationError) as error:
        declare(dataclasses.replace(MODEL, block=block))
    assert str(error.value) == (
        "mesh axis 'expert': a constraint in the model's own code, P(None, 'expert'), names it, and the mesh has "
        "'data', 'stage', 'tensor'; declare it, of size 1 if need be, or change the constraint"
    )
