"""The named cases: model x mesh x rules x schedule x ZeRO x remat x head x optimizer, against the reference step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardlab
from shardlab.mesh.spec import MeshSpec
from shardlab.models import decoder, linen_decoder, mixer, mlp
from shardlab.module.functions import Functions
from shardlab.module.model import read_model
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.compile import CompiledStep, compile_train_step
from shardlab.step.reference import ReferenceStep
from shardlab.step.verify import STEADY
from tests.equivalence import kinds

AXES = ("replica", "data", "stage", "tensor")


@dataclass(frozen=True)
class Subject:
    """A model to test with, and what the user writes beside it."""

    model: Any
    loss: Callable[..., Any]
    rules: Rules
    pipeline: Pipeline | None
    batch: Callable[[int], dict[str, np.ndarray]]
    batch_size: int = 8


def tokens(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = rng.integers(0, 16, (size, 6)).astype(np.int32)
    targets = np.where(rng.random((size, 6)) < 0.3, -1, rng.integers(0, 16, (size, 6)))  # examples of unequal weight
    return {"tokens": draw, "targets": targets.astype(np.int32)}


def features(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "features": rng.normal(size=(size, 12)).astype(np.float32),
        "labels": rng.integers(0, 10, size).astype(np.int32),
    }


def images(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        "image": rng.normal(size=(size, 8, 8, 3)).astype(np.float32),
        "labels": rng.integers(0, 10, size).astype(np.int32),
    }


LM = {"vocab_size": 16, "model_dim": 16, "num_heads": 4, "head_dim": 4, "mlp_dim": 24}
PARTS = Pipeline(before="embed", blocks="blocks", after="head")
DECODER_PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")
PURE = mlp.MLPConfig()


def replicated(rules: Rules) -> Rules:
    return Rules(tuple(Rule(rule.pattern, P()) for rule in rules.rules))


class ConditionedDecoder(decoder.Decoder):
    """A decoder whose context is made of parameters, so that gradients flow into the context from every stage."""

    def __init__(self, config: decoder.DecoderConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        self.shift = nnx.Param(jax.random.normal(rngs.params(), (config.head_dim // 2,)) * 0.1)

    def context(self, batch: Any) -> decoder.Angles:
        cos, sin = super().context(batch)
        return cos + self.shift[...], sin


def _decoder(**more: Any) -> Subject:
    tied = bool(more.get("tied"))
    given: dict[str, Any] = {**LM, "num_layers": 4, "num_kv_heads": 2, **more}
    config = decoder.DecoderConfig(**given)
    rules = decoder.decoder_rules("tensor", tied=tied)
    return Subject(config, decoder.next_byte_loss, rules, DECODER_PARTS, tokens)


def _linen(**more: Any) -> Subject:
    tied = bool(more.get("tied"))
    model = linen_decoder.LinenDecoder(**{**LM, "num_layers": 4, **more})
    rules = linen_decoder.linen_decoder_rules("tensor", tied=tied)
    return Subject(model, decoder.next_byte_loss, rules, DECODER_PARTS, tokens)


def _conditioned() -> Subject:
    given: dict[str, Any] = {**LM, "num_layers": 4, "num_kv_heads": 2}
    config = decoder.DecoderConfig(**given)
    rules = decoder.decoder_rules("tensor")
    rules = Rules((*rules.rules, Rule("shift", P())))

    def make(rngs: nnx.Rngs) -> ConditionedDecoder:
        return ConditionedDecoder(config, rngs=rngs)

    return Subject(make, decoder.next_byte_loss, rules, DECODER_PARTS, tokens)


def _mixer(**more: Any) -> Subject:
    model = mixer.Mixer(num_layers=4, **more)
    return Subject(model, mlp.label_loss, mixer.mixer_rules("tensor"), PARTS, images)


def _mlp(**more: Any) -> Subject:
    config = mlp.MLPConfig(**more)
    return Subject(config, mlp.label_loss, mlp.mlp_rules("tensor"), PARTS, features)


def _pure(**more: Any) -> Subject:
    config = mlp.MLPConfig(**more)
    functions = Functions(
        init=functools.partial(mlp.init, config=config),
        before=mlp.before,
        block=functools.partial(mlp.block, config=config) if config.dropout else mlp.block,
        after=mlp.after,
    )
    return Subject(functions, mlp.label_loss, mlp.mlp_rules("tensor"), None, features)


def _padded() -> Subject:
    """Widths that no axis divides: 10 classes, hidden layers of 27."""
    config = mlp.MLPConfig(hidden_dim=27, num_layers=3)
    split = [
        Rule("blocks/*/up/kernel", P(None, "tensor"), pad=True),
        Rule("blocks/*/up/bias", P("tensor"), pad=True),
        Rule("blocks/*/down/kernel", P("tensor"), pad=True),
        Rule("outputs/kernel", P(None, ("data", "tensor")), pad=True),
    ]
    rules = Rules((*split, Rule("blocks/*/down/bias", P()), Rule("outputs/bias", P()), Rule("inputs/*", P())))
    return Subject(config, mlp.label_loss, rules, PARTS, features)


def _both_on_one_dim() -> Subject:
    """Dims that the batch's axis and tensor split together, in either order."""
    split = [
        Rule("blocks/*/up/kernel", P(None, ("data", "tensor"))),
        Rule("blocks/*/up/bias", P(("tensor", "data"))),
        Rule("blocks/*/down/kernel", P(("tensor", "data"))),
    ]
    return Subject(mlp.MLPConfig(), mlp.label_loss, Rules((*split, Rule("**", P()))), PARTS, features)


def _centred() -> Subject:
    """Mathematics across examples: x is centred over the whole batch before the head and before the blocks."""

    def centred(x: jax.Array) -> jax.Array:
        return x - shardlab.batch_sum(x.sum(0)) / shardlab.batch_sum(jnp.ones(len(x), x.dtype).sum())

    functions = Functions(
        init=functools.partial(mlp.init, config=PURE),
        before=lambda params, batch: centred(mlp.before(params, batch)),
        block=mlp.block,
        after=lambda params, x, batch: mlp.after(params, centred(x)),
    )
    return Subject(functions, mlp.label_loss, mlp.mlp_rules("tensor"), None, features)


def _constrained() -> Subject:
    """Sharding constraints in the user's code that name every axis, inside a jit and a scan as well."""
    spec = P(("replica", "data"), "tensor")

    def block(layer: Any, x: jax.Array) -> jax.Array:
        def twice(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.jit(lambda x: jax.lax.with_sharding_constraint(mlp.block(layer, x), spec))(x), None

        return jax.lax.scan(twice, jax.lax.with_sharding_constraint(x, spec), None, length=2)[0]

    functions = Functions(
        init=functools.partial(mlp.init, config=PURE), before=mlp.before, block=block, after=mlp.after
    )
    return Subject(functions, mlp.label_loss, mlp.mlp_rules("tensor"), None, features)


def _auxiliary() -> Subject:
    """Blocks with an auxiliary loss."""

    def block(layer: Any, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        y = mlp.block(layer, x)
        return y, (1e-2 * jnp.sum(y**4), y.shape[0])

    functions = Functions(
        init=functools.partial(mlp.init, config=mlp.MLPConfig(num_layers=3)),
        before=mlp.before,
        block=block,
        after=mlp.after,
    )
    return Subject(functions, mlp.label_loss, mlp.mlp_rules("tensor"), None, features)


def _kinds(model: Any, rules: Rules, parts: Pipeline | None = None) -> Subject:
    return Subject(model, mlp.label_loss, rules, parts, features)


def token_loss(logits: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    losses, counted = shardlab.cross_entropy(logits, batch["targets"]), batch["targets"] >= 0
    return jnp.where(counted, losses, 0).sum(), counted.sum()


def class_loss(logits: jax.Array, batch: Any) -> tuple[jax.Array, int]:
    return jax.vmap(shardlab.cross_entropy)(logits, batch["labels"]).sum(), len(logits)


def _decoder_vocab(**more: Any) -> Subject:
    """The output kernel's vocabulary over the stages, and over tensor beside them."""
    subject = _decoder(**more)
    rules = Rules((Rule("unembed/kernel", P(None, ("stage", "tensor"))), *subject.rules.rules[:-1]))
    return Subject(subject.model, token_loss, rules, subject.pipeline, subject.batch)


def _mlp_vocab(**more: Any) -> Subject:
    """10 classes over the stages, padded where these do not divide them, and a loss that is mapped over examples."""
    config = mlp.MLPConfig(**more)
    split = Rule("outputs/kernel", P(None, "stage"), pad=True), Rule("outputs/bias", P("stage"), pad=True)
    rules = Rules((*split, *mlp.mlp_rules("tensor").rules[:-1]))
    return Subject(config, class_loss, rules, PARTS, features)


class UNetBlock(nnx.Module):
    """One block of a small U-Net: in the first half it fills its skip, in the second it reads its mirror's.

    All blocks are one program. Where a block stands is an array that is not trained.
    """

    def __init__(self, place: int, rngs: nnx.Rngs) -> None:
        self.place = nnx.Variable(jnp.int32(place))
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x: dict[str, Any]) -> dict[str, Any]:
        h, skips, place = x["h"], x["skips"], self.place[...]
        mirrored = 2 * len(skips) - 1 - place
        h = h + sum(jnp.where(mirrored == at, skip, 0) for at, skip in enumerate(skips))
        h = h + self.down(jnp.tanh(self.up(h)))
        return {"h": h, "skips": [jnp.where(place == at, h, skip) for at, skip in enumerate(skips)]}


class UNet(nnx.Module):
    """Skip connections across stages: they flow from block to block inside x."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inputs, self.outputs = nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
        self.blocks = nnx.List([UNetBlock(place, rngs) for place in range(6)])

    def embed(self, batch: Any) -> dict[str, Any]:
        h = self.inputs(batch["features"].astype(self.inputs.kernel.dtype))
        return {"h": h, "skips": [jnp.zeros_like(h)] * (len(self.blocks) // 2)}

    def head(self, x: dict[str, Any]) -> jax.Array:
        return self.outputs(x["h"])


def whole(subject: Subject) -> Subject:
    """The same model, its parts not named."""
    return Subject(subject.model, subject.loss, subject.rules, None, subject.batch, subject.batch_size)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "decoder": _decoder,
    "decoder-dropout": lambda: _decoder(dropout=0.25),
    "decoder-heads": lambda: _decoder(heads_axis="tensor"),
    "decoder-chunks": lambda: _decoder(loss_chunk=2, query_chunk=3, heads_axis="tensor"),
    "decoder-tied": lambda: _decoder(tied=True),
    "decoder-10-layers": lambda: _decoder(num_layers=10),
    "decoder-24-layers-dropout": lambda: _decoder(num_layers=24, dropout=0.25),
    "decoder-3-layers": lambda: _decoder(num_layers=3),
    "decoder-conditioned": _conditioned,
    "decoder-vocab": _decoder_vocab,
    "decoder-vocab-10-layers-dropout": lambda: _decoder_vocab(num_layers=10, dropout=0.25),
    "decoder-vocab-24-layers-dropout": lambda: _decoder_vocab(num_layers=24, dropout=0.25, vocab_size=48),
    "decoder-whole": lambda: whole(_decoder()),
    "decoder-whole-dropout": lambda: whole(_decoder(dropout=0.25)),
    "linen": _linen,
    "linen-dropout": lambda: _linen(dropout=0.25),
    "linen-tied": lambda: _linen(tied=True),
    "linen-whole-dropout": lambda: whole(_linen(dropout=0.25)),
    "mixer": _mixer,
    "mixer-dropout": lambda: _mixer(dropout=0.25),
    "mixer-whole": lambda: whole(_mixer()),
    "mlp": _mlp,
    "mlp-5-layers": lambda: _mlp(num_layers=5),
    "mlp-7-layers": lambda: _mlp(num_layers=7),
    "mlp-24-layers": lambda: _mlp(num_layers=24),
    "mlp-vocab-7-layers": lambda: _mlp_vocab(num_layers=7),
    "mlp-whole": lambda: whole(_mlp()),
    "mlp-unet": lambda: Subject(UNet, mlp.label_loss, mlp.mlp_rules("tensor"), PARTS, features),
    "pure": _pure,
    "mlp-both-on-one-dim": _both_on_one_dim,
    "mlp-both-on-one-dim-whole": lambda: whole(_both_on_one_dim()),
    "mlp-padded": _padded,
    "mlp-padded-whole": lambda: whole(_padded()),
    "pure-centred": _centred,
    "pure-constrained": _constrained,
    "pure-auxiliary": _auxiliary,
    "dense-and-experts": lambda: _kinds(*kinds.dense_and_experts("dedede")),
    "dense-then-experts": lambda: _kinds(*kinds.dense_and_experts("ddeeee")),
    "encoder-decoder": lambda: _kinds(
        lambda rngs: kinds.EncoderDecoder(3, 2, rngs=rngs), kinds.ENCODER_DECODER_RULES, PARTS
    ),
    "linen-two-widths": lambda: _kinds(kinds.LinenTwoWidths(), kinds.LINEN_RULES, PARTS),
}

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-2),
    # For the mixer: a bias before a LayerNorm has a gradient of zero but for rounding, which a smaller eps would turn
    # into steps of 1e-8.
    "adamw-eps": lambda: optax.adamw(1e-2, eps=1e-5),
    "sgd": lambda: optax.sgd(0.1),
    # For many layers and few examples: gradients of 1e-12 beside others of 1, whose rounding Adam's first step would
    # make visible, and losses of 1e-6 after a few of its steps.
    "steady": lambda: STEADY,
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "muon": lambda: optax.contrib.muon(1e-2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "block-clipped": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.adam(1e-2)),
    "masked": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "multi": lambda: optax.multi_transform(
        {"first": optax.adam(1e-2), "rest": optax.sgd(0.1)},
        lambda tree: jax.tree_util.tree_map_with_path(lambda keys, _: "first" if "0" in str(keys) else "rest", tree),
    ),
    "multisteps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
}


@dataclass(frozen=True)
class Case:
    """One combination."""

    subject: str
    mesh: dict[str, int] = field(default_factory=dict)
    optimizer: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    replicate: bool = False

    @property
    def spec(self) -> MeshSpec:
        sizes = {axis: self.mesh.get(axis, 1) for axis in AXES}
        count = int(np.prod(list(sizes.values())))
        return MeshSpec(sizes, batch=("replica", "data"), stage="stage", target=f"cpu:{count}")


def case(subject: str, *, optimizer: str = "adamw", batch: int = 8, replicate: bool = False, **given: Any) -> Case:
    mesh = {axis: given.pop(axis) for axis in AXES if axis in given}
    return Case(subject, mesh, optimizer, given, batch, replicate)


CASES: dict[str, Case] = {
    # One device: the engine itself, against plain JAX.
    "one-device": case("decoder"),
    "one-device-accumulation": case("decoder", microbatches=4),
    "one-device-whole": case("decoder-whole", microbatches=2),
    # Data parallelism and ZeRO, any batch axes.
    "data-2": case("mlp", data=2),
    "data-3": case("mlp", data=3, batch=9, microbatches=3),
    "data-5": case("pure", data=5, batch=10),
    "data-8-zero-1": case("decoder", data=8, zero=1),
    "data-4-zero-2-accumulation": case("decoder", data=4, zero=2, microbatches=2),
    "data-8-zero-3": case("decoder", data=8, zero=3),
    "replica-2-data-2-zero-3": case("linen", replica=2, data=2, zero=3, microbatches=2),
    "data-4-whole-zero-1": case("mixer-whole", optimizer="adamw-eps", data=4, zero=1),
    "data-4-whole-zero-3-accumulation": case("decoder-whole", data=4, zero=3, microbatches=2),
    # Tensor parallelism.
    "tensor-2": case("decoder", tensor=2),
    "tensor-4-linen": case("linen", tensor=4),
    "tensor-2-whole": case("decoder-whole", tensor=2),
    "tensor-8-mixer": case("mixer", optimizer="adamw-eps", tensor=8),
    "data-2-tensor-2-zero-3": case("decoder", data=2, tensor=2, zero=3, microbatches=2),
    "sequence-parallel": case("decoder", data=2, tensor=2, activation=P("data", "tensor")),
    "sequence-parallel-stages": case(
        "decoder-heads", data=2, stage=2, tensor=2, microbatches=2, activation=P("data", "tensor")
    ),
    "loss-in-chunks": case(
        "decoder-chunks", data=2, stage=2, tensor=2, microbatches=2, activation=P("data", "tensor"), zero=3
    ),
    # Pipelines.
    "stage-2": case("decoder", stage=2, microbatches=4),
    "stage-2-gpipe": case("decoder", stage=2, microbatches=4, schedule="gpipe"),
    "stage-4": case("linen", stage=4, microbatches=2),
    "stage-4-gpipe": case("mixer", optimizer="adamw-eps", stage=4, microbatches=2, schedule="gpipe"),
    "stage-3-uneven": case("mlp", stage=3, batch=12, microbatches=4),
    "stage-4-of-10-layers": case("decoder-10-layers", stage=4, microbatches=2),
    "stage-2-of-3-layers": case("decoder-3-layers", stage=2, data=2, microbatches=2),
    "stage-2-of-5-layers-zero-1": case("mlp-5-layers", stage=2, data=2, microbatches=2, zero=1),
    "stage-8-microbatch-1": case("decoder-10-layers", stage=8, microbatches=1),
    "stage-2-last-stage-head": case("decoder", stage=2, microbatches=8, head="last_stage"),
    "stage-4-last-stage-tied": case("decoder-tied", stage=4, microbatches=4, head="last_stage"),
    "stage-2-conditioned": case("decoder-conditioned", stage=2, data=2, microbatches=2),
    # Stages as listed: shorter at both ends, of none but the embedding or the head, virtual ones; skips across them.
    "stages-listed": case("mlp-7-layers", stage=4, data=2, microbatches=2, stages="E t | t*3 | t*2 | t H"),
    "stages-listed-virtual": case(
        "mlp-7-layers", stage=2, data=2, microbatches=4, schedule="zb_v", stages="E | t*3 | t*0 | t*4 H"
    ),
    "stages-without-blocks-remat": case(
        "mlp-7-layers",
        stage=4,
        data=2,
        microbatches=2,
        stages="E | t*4 | t*0 | t*3 H",
        remat="full | none | full | dots_saveable",
    ),
    "stages-without-blocks-kinds": case(
        "dense-then-experts", stage=2, data=2, microbatches=4, schedule="zb_v", stages="E d | d e | e*0 | e*3 H"
    ),
    "stages-skips": case("mlp-unet", stage=4, data=2, microbatches=2, stages=(1, 2, 2, 1)),
    # Every schedule: virtual stages, split backwards, branches; microbatches that the stages do not divide.
    "interleaved": case("decoder-10-layers", stage=2, data=2, microbatches=4, schedule="interleaved_1f1b"),
    "interleaved-3-virtual": case(
        "mlp-7-layers", stage=2, microbatches=5, batch=10, schedule="interleaved_1f1b", virtual=3
    ),
    "interleaved-3-stages": case(
        "decoder-10-layers", stage=3, microbatches=5, batch=15, schedule="interleaved_1f1b", remat="dots_saveable"
    ),
    "interleaved-hybrid": case(
        "decoder-dropout", data=2, stage=2, tensor=2, microbatches=2, schedule="interleaved_1f1b", zero=1
    ),
    "looped-bfs": case("linen-dropout", stage=2, data=2, microbatches=4, schedule="looped_bfs", zero=3),
    "looped-bfs-fewer-microbatches": case("mlp-7-layers", stage=3, microbatches=2, schedule="looped_bfs"),
    "split": case("decoder-tied", stage=2, tensor=2, data=2, microbatches=4, schedule="1f1b_split", remat="full"),
    "split-virtual": case(
        "decoder-10-layers", stage=2, data=2, microbatches=3, batch=12, schedule="1f1b_split", virtual=2
    ),
    "split-auxiliary": case(
        "pure-auxiliary", data=2, stage=3, microbatches=4, schedule="1f1b_split", head="last_stage"
    ),
    "zb-h1-hybrid": case("decoder", data=2, stage=2, tensor=2, microbatches=2, schedule="zb_h1", zero=1),
    "zb-h2-uneven": case("mlp-5-layers", data=2, stage=4, microbatches=4, batch=32, schedule="zb_h2", zero=2),
    "zb-v": case("decoder-dropout", data=2, stage=2, tensor=2, microbatches=2, schedule="zb_v"),
    "zb-v-uneven-clipped": case(
        "decoder-10-layers", stage=4, data=2, microbatches=4, batch=32, schedule="zb_v", zero=1, optimizer="clipped"
    ),
    "zb-v-conditioned-tied": case("decoder-conditioned", stage=2, microbatches=4, schedule="zb_v", head="last_stage"),
    "dualpipe-v": case("decoder-tied", stage=2, data=2, microbatches=4, schedule="dualpipe_v", remat="full"),
    "dualpipe-v-3-stages": case("mlp-7-layers", stage=3, microbatches=7, batch=21, schedule="dualpipe_v"),
    # What a tick makes is sent during the next one.
    "delayed-hybrid": case("decoder", data=2, stage=2, tensor=2, microbatches=4, sends="delayed"),
    "delayed-split-virtual": case(
        "mlp-7-layers", stage=3, microbatches=5, batch=15, schedule="1f1b_split", virtual=2, sends="delayed"
    ),
    "delayed-zb-v": case("decoder-dropout", data=2, stage=2, microbatches=4, schedule="zb_v", sends="delayed"),
    # Weights gathered when they are used, gradients reduce-scattered in every backward.
    "gather-layer": case("decoder-dropout", data=4, microbatches=2, zero=3, gather="layer", accumulate="sharded"),
    "gather-layer-hybrid": case(
        "decoder", data=2, stage=2, tensor=2, microbatches=2, zero=3, gather="layer", accumulate="sharded"
    ),
    "gather-layer-zb-v": case(
        "mlp-7-layers",
        replica=2,
        data=2,
        stage=2,
        microbatches=2,
        zero=3,
        gather="layer",
        accumulate="sharded",
        schedule="zb_v",
    ),
    "sharded-gradients": case(
        "linen", data=2, stage=2, tensor=2, microbatches=2, zero=2, accumulate="sharded", schedule="1f1b_split"
    ),
    # What the context reads adds up whole; a tied embedding is read before and after.
    "sharded-gradients-conditioned": case(
        "decoder-conditioned", data=2, stage=2, microbatches=2, zero=3, accumulate="sharded"
    ),
    "sharded-gradients-tied": case(
        "decoder-tied",
        data=2,
        stage=2,
        microbatches=4,
        zero=2,
        accumulate="sharded",
        schedule="zb_v",
        head="last_stage",
    ),
    # A batch axis in parts, over which gradients are scattered one after another.
    "scatter-in-parts": case(
        "decoder-dropout", data=4, microbatches=2, zero=3, gather="layer", accumulate="sharded", scatter="data=2x2"
    ),
    "scatter-in-parts-hybrid": case("decoder", data=4, tensor=2, zero=3, scatter="data=2x2", optimizer="clipped"),
    "scatter-in-parts-of-replicas": case(
        "mlp", replica=2, data=4, zero=2, accumulate="sharded", scatter="data=2x2,replica=2"
    ),
    # Everything at once.
    "hybrid": case("decoder", data=2, stage=2, tensor=2, microbatches=2),
    "hybrid-gpipe-zero-1": case("decoder", data=2, stage=2, tensor=2, microbatches=2, schedule="gpipe", zero=1),
    "hybrid-zero-2": case("linen", data=2, stage=2, tensor=2, microbatches=2, zero=2),
    "hybrid-zero-3": case("decoder", data=2, stage=2, tensor=2, microbatches=2, zero=3),
    "hybrid-mixer": case("mixer", optimizer="adamw-eps", data=2, stage=2, tensor=2, microbatches=2),
    "hybrid-replicated-rules": case("decoder", data=2, stage=2, tensor=2, microbatches=2, replicate=True),
    "hybrid-uneven-zero-3": case("decoder-10-layers", data=2, stage=4, microbatches=2, zero=3, head="last_stage"),
    # Each stage with a part of the vocabulary.
    "vocab": case("decoder-vocab", data=2, stage=2, tensor=2, microbatches=2, zero=1, head="vocab"),
    "vocab-interleaved-zero-3": case(
        "decoder-vocab-10-layers-dropout",
        data=2,
        stage=2,
        microbatches=2,
        schedule="interleaved_1f1b",
        zero=3,
        remat="full",
        head="vocab",
    ),
    "vocab-split-uneven": case("mlp-vocab-7-layers", stage=3, microbatches=2, schedule="1f1b_split", head="vocab"),
    "vocab-zb-v": case(
        "decoder-vocab", data=2, stage=2, tensor=2, microbatches=4, schedule="zb_v", zero=2, head="vocab"
    ),
    # Mathematics across examples; auxiliary losses of blocks.
    "batch-sum-data": case("pure-centred", optimizer="adamw-eps", data=4, tensor=2),
    "batch-sum-stages": case("pure-centred", optimizer="adamw-eps", data=2, stage=2, tensor=2),
    "batch-sum-last-stage": case("pure-centred", optimizer="adamw-eps", data=2, stage=2, head="last_stage"),
    "constraints": case("pure-constrained", data=2, stage=2, tensor=2, microbatches=2),
    "auxiliary-one-device": case("pure-auxiliary", microbatches=2),
    "auxiliary-uneven-stages": case("pure-auxiliary", data=2, stage=2, microbatches=2, zero=1),
    "auxiliary-remat": case("pure-auxiliary", data=2, stage=3, microbatches=2, head="last_stage", remat="full"),
    "both-axes-on-one-dim": case("mlp-both-on-one-dim", data=2, stage=2, tensor=2, microbatches=2),
    "both-axes-on-one-dim-whole": case("mlp-both-on-one-dim-whole", data=4, tensor=2, zero=1),
    # Dims that the axes do not divide, padded.
    "padded-tensor": case("mlp-padded", tensor=4),
    "padded-whole": case("mlp-padded-whole", data=4, tensor=2, zero=1),
    "padded-stages-zero-3": case("mlp-padded", data=2, stage=2, tensor=2, microbatches=2, zero=3, optimizer="clipped"),
    # Blocks of different kinds: in turn, one after another; masked where an axis inside a stage is automatic, in a
    # branch of their own where none is.
    "kinds-one-device": case("dense-and-experts", microbatches=2),
    "kinds-in-turn": case("dense-and-experts", data=2, stage=2, tensor=2, microbatches=2, zero=1),
    "kinds-in-turn-interleaved": case(
        "dense-and-experts", stage=2, data=2, microbatches=4, schedule="interleaved_1f1b", zero=3, remat="full"
    ),
    "kinds-encoder-decoder": case("encoder-decoder", stage=2, data=2, tensor=2, microbatches=2, schedule="zb_h1"),
    "kinds-after-another-split": case(
        "dense-then-experts", stage=2, data=2, microbatches=3, batch=12, schedule="1f1b_split"
    ),
    "kinds-linen-zb-v": case("linen-two-widths", stage=2, data=2, microbatches=2, schedule="zb_v", optimizer="muon"),
    # Remat.
    "remat-stage": case("decoder-dropout", stage=2, data=2, microbatches=4, remat="stage"),
    "remat-stage-split": case(
        "dense-and-experts", stage=2, data=2, microbatches=2, remat="stage", schedule="zb_h1", head="last_stage"
    ),
    "remat-by-stage": case("decoder-10-layers", stage=4, microbatches=4, remat="full | dots_saveable | none | none"),
    "remat-full": case("decoder", stage=2, data=2, microbatches=2, remat="full"),
    "remat-dots": case("linen", stage=2, tensor=2, microbatches=2, remat="dots_saveable"),
    # x kept in parts over tensor: of every block that keeps it, of stages, from I to W, beside x that flows in parts.
    "saved-activation-by-stage": case(
        "decoder",
        stage=2,
        data=2,
        tensor=2,
        microbatches=4,
        remat="full | none",
        saved_activation=P("data", "tensor"),
    ),
    "saved-activation-zb-v": case(
        "decoder",
        stage=2,
        tensor=2,
        microbatches=4,
        schedule="zb_v",
        remat="stage/full",
        saved_activation=P("data", None, "tensor"),
    ),
    "saved-activation-sequence-parallel": case(
        "linen",
        stage=2,
        data=2,
        tensor=2,
        microbatches=2,
        remat="stage",
        activation=P("data", "tensor"),
        saved_activation=P("data", None, "tensor"),
    ),
    "saved-activation-skips": case(
        "mlp-unet", stage=2, data=2, tensor=2, microbatches=2, remat="full", saved_activation=P("data", "tensor")
    ),
    "remat-whole": case("decoder-whole", data=2, remat="full"),
    "remat-dropout": case("decoder-dropout", stage=2, data=2, microbatches=2, remat="full"),
    # Several of these at once.
    "together-encdec-zbv-delayed-sharded": case(
        "encoder-decoder",
        stage=2,
        data=2,
        microbatches=4,
        schedule="zb_v",
        sends="delayed",
        zero=2,
        accumulate="sharded",
    ),
    "together-experts-v3-delayed-stagefull-layer": case(
        "dense-and-experts",
        stage=2,
        data=2,
        microbatches=4,
        schedule="interleaved_1f1b",
        virtual=3,
        sends="delayed",
        remat="stage/full",
        zero=3,
        gather="layer",
        accumulate="sharded",
    ),
    "together-conditioned-zbh1-stage-layer": case(
        "decoder-conditioned",
        stage=2,
        data=2,
        microbatches=2,
        schedule="zb_h1",
        remat="stage",
        zero=3,
        gather="layer",
        accumulate="sharded",
    ),
    "together-empty-stage-remat-by-stage": case(
        "dense-then-experts",
        stage=3,
        data=2,
        microbatches=3,
        batch=18,
        stages="E | t*2 | t*4 H",
        remat="full | none | full",
        head="last_stage",
    ),
    "together-vocab-zbv-delayed-sharded-layer": case(
        "mlp-vocab-7-layers",
        stage=2,
        data=2,
        microbatches=4,
        schedule="zb_v",
        sends="delayed",
        zero=3,
        accumulate="sharded",
        gather="layer",
        head="vocab",
    ),
    "together-vocab-split-virtual-stagefull": case(
        "decoder-vocab",
        stage=2,
        data=2,
        tensor=2,
        microbatches=4,
        schedule="1f1b_split",
        virtual=2,
        remat="stage/full",
        sends="delayed",
        head="vocab",
    ),
    "together-linen-muon-remat-by-stage": case(
        "linen-two-widths", stage=2, data=2, microbatches=2, remat="full | none", zero=1, optimizer="muon"
    ),
    "together-experts-tensor-dualpipe-stage": case(
        "dense-and-experts", stage=2, data=2, tensor=2, microbatches=4, schedule="dualpipe_v", remat="stage", zero=1
    ),
    "together-unet-zbh2-delayed": case(
        "mlp-unet", stage=3, data=2, microbatches=3, batch=18, schedule="zb_h2", sends="delayed"
    ),
    "together-encdec-listed-v": case(
        "encoder-decoder", stage=2, data=2, microbatches=4, schedule="zb_v", stages="E t | t*0 | t*2 | t*2 H", zero=3
    ),
    "together-balanced": case(
        "dense-and-experts",
        stage=3,
        data=2,
        microbatches=2,
        batch=12,
        stages="balanced",
        head="last_stage",
        schedule="1f1b",
    ),
    "together-clipped-kinds-per-layer": case(
        "encoder-decoder", stage=2, data=2, tensor=2, microbatches=2, optimizer="adafactor", zero=1
    ),
    # Dropout: the same masks under every plan.
    "dropout-data": case("decoder-dropout", data=4, microbatches=2),
    "dropout-stages": case("decoder-dropout", stage=4, microbatches=2),
    "dropout-hybrid": case("decoder-dropout", data=2, stage=2, tensor=2, microbatches=2),
    "dropout-linen": case("linen-dropout", data=2, stage=2, microbatches=2),
    "dropout-mixer": case("mixer-dropout", optimizer="adamw-eps", data=2, stage=2, microbatches=2, head="last_stage"),
    "dropout-whole": case("decoder-whole-dropout", data=2, tensor=2, microbatches=2),
    "dropout-linen-whole": case("linen-whole-dropout", data=4),
    # Tied embeddings.
    "tied-hybrid": case("decoder-tied", data=2, stage=2, tensor=2, microbatches=2),
    "tied-linen": case("linen-tied", stage=2, data=2, microbatches=2, zero=1),
    # Any optimizer, as on the user's own tree.
    "lion": case("decoder", stage=2, data=2, microbatches=2, zero=1, optimizer="lion"),
    "adafactor": case("decoder", stage=2, data=2, microbatches=2, zero=1, optimizer="adafactor"),
    "adafactor-whole": case("decoder-whole", data=4, zero=1, optimizer="adafactor"),
    "muon": case("decoder", stage=2, data=2, microbatches=2, zero=1, optimizer="muon"),
    "muon-uneven": case("mlp-5-layers", stage=2, data=2, microbatches=2, zero=3, optimizer="muon"),
    "clipped": case("decoder", data=2, stage=2, tensor=2, microbatches=2, zero=1, optimizer="clipped"),
    "clipped-uneven": case("decoder-3-layers", data=2, stage=2, microbatches=2, optimizer="clipped"),
    "block-clipped": case("decoder", stage=2, data=2, microbatches=2, optimizer="block-clipped"),
    "masked": case("decoder", stage=2, data=2, microbatches=2, zero=3, optimizer="masked"),
    "multi": case("decoder", stage=2, data=2, microbatches=2, zero=1, optimizer="multi"),
    "multisteps": case("decoder", stage=2, data=2, microbatches=2, zero=1, optimizer="multisteps"),
}


DAILY = (
    *(
        "one-device",
        "data-8-zero-1",
        "replica-2-data-2-zero-3",
        "tensor-4-linen",
    ),
    *(
        "hybrid",
        "stages-listed-virtual",
        "stages-skips",
    ),
    *(
        "batch-sum-stages",
        "constraints",
        "both-axes-on-one-dim",
        "padded-stages-zero-3",
    ),
)
"""Beside the pipelines in which every two choices meet, what the default run tries: what those leave out."""


def subject_of(this: Case) -> Subject:
    subject = SUBJECTS[this.subject]()
    if this.replicate:
        subject = Subject(subject.model, subject.loss, replicated(subject.rules), subject.pipeline, subject.batch)
    return subject


def planned(this: Case) -> Plan:
    """Its plan, in float32 unless it says otherwise."""
    found = subject_of(this)
    return make_plan(
        found.model,
        mesh=this.spec,
        rules=found.rules,
        optimizer=OPTIMIZERS[this.optimizer](),
        batch=found.batch(this.batch_size),
        pipeline=found.pipeline,
        **this.options,
    )


def compiled(this: Case) -> CompiledStep:
    """Its train step."""
    found = subject_of(this)
    optimizer, batch = OPTIMIZERS[this.optimizer](), found.batch(this.batch_size)
    return compile_train_step(found.model, found.loss, optimizer, planned(this), batch)


def run_of_reference(found: Subject, optimizer: Any, plan: Plan, batch: Any, steps: int) -> Any:
    """Initial parameters, losses, first gradients and last parameters of the reference."""
    step = ReferenceStep(read_model(found.model, batch, found.pipeline), found.loss, optimizer, plan, 0)
    initial = {path: np.asarray(value) for path, value in step.parameters.items()}
    losses, first = [], None
    for _ in range(steps):
        loss, gradients = step(batch)
        losses.append(float(loss))
        first = first or {path: np.asarray(value) for path, value in gradients.items()}
    return initial, losses, first, {path: np.asarray(value) for path, value in step.parameters.items()}
