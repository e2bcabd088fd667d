"""A Llama-style decoder in Flax NNX, its loss, and the rules that make it tensor-parallel.

RMSNorm before each part, rotary positions, grouped-query attention, a gated MLP (Llama 2, arXiv 2307.09288); by options
what Qwen 2 and 3 (arXiv 2407.10671, 2505.09388) and Mixtral (arXiv 2401.04088) do otherwise.

Shapes: B examples, S tokens, D model dim, H heads of dim K, G key-value heads, V vocabulary.
No layer names a dtype: the dtype of the parameters decides what is computed in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.models.experts import Experts, expert_rules
from shardlab.models.splash import Attend, on_tpu
from shardlab.sharding.rules import Rule, Rules

Angles = tuple[jax.Array, jax.Array]
"""Cosines and sines of the rotary angles, each [1, S, K/2]."""


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder; called with `nnx.Rngs` it makes one, so a config is a model factory.

    Attributes:
      vocab_size: V, 256 for bytes.
      num_layers: number of blocks.
      model_dim: D.
      num_heads: H, query heads.
      num_kv_heads: G, key-value heads; each serves H / G query heads.
      head_dim: K, even.
      mlp_dim: width of the gated MLP.
      dropout: rate on the embedding and on what each half of a block adds; 0 draws nothing.
      tied: the embedding is the output kernel too.
      query_chunk: queries that attention takes at a time, which bounds its memory; 0 takes all. Divides S.
      loss_chunk: tokens of one example whose logits are made at a time, and again for the backward; the decoder returns
        each token's cross-entropy then, and never makes all logits. 0 returns the logits. Divides S.
      splash: whether attention is a kernel on TPU (`shardlab.models.splash`), with `query_chunk` for elsewhere.
      heads_axis: mesh axis that attention's heads are split over, said to XLA where tokens are split between blocks
        (it would attend with parts of the tokens); None leaves it to XLA.
      rope_base: the longest rotary wavelength is about ``2 pi rope_base`` tokens.
      rope_stretch: by how much wavelengths longer than `rope_trained` tokens are stretched, as in Llama 3.1.
      rope_trained: see there; wavelengths shorter than a quarter of it stay, and those between go over.
      norm_epsilon: what every RMSNorm adds to the mean square.
      qkv_bias: biases of queries, keys and values, as in Qwen 2.
      qk_norm: RMSNorm of each head's queries and keys, before they are turned, as in Qwen 3.
      num_experts: in place of each gated MLP so many of them (`shardlab.models.experts`), as in Mixtral; 0: one alone.
      experts_per_token: how many of them a token's are added up of.

    >>> DecoderConfig(num_layers=1, model_dim=32)(nnx.Rngs(0)).tokens.embedding.shape
    (256, 32)
    """

    vocab_size: int = 256
    num_layers: int = 8
    model_dim: int = 128
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 16
    mlp_dim: int = 384
    dropout: float = 0.0
    tied: bool = False
    rope_base: float = 10_000.0
    rope_stretch: float = 1.0
    rope_trained: int = 8192
    query_chunk: int = 0
    loss_chunk: int = 0
    splash: bool = False
    heads_axis: str | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 2

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                "every key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs, so make it even")

    def __call__(self, rngs: nnx.Rngs) -> Decoder:
        return Decoder(self, rngs=rngs)


class Decoder(nnx.Module):
    """``model(batch) -> logits`` [B, S, V], from ``batch["tokens"]`` [B, S] of int32.

    As parts of a pipeline: ``embed(batch) -> x``, ``context(batch) -> c``, ``blocks[i](x, c) -> x``,
    ``head(x, batch) -> logits``.

    >>> model = DecoderConfig(num_layers=1)(nnx.Rngs(0))
    >>> model({"tokens": jnp.zeros((3, 5), jnp.int32)}).shape
    (3, 5, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        small = nnx.initializers.normal(0.02)
        self.config = config
        self.tokens = nnx.Embed(config.vocab_size, config.model_dim, embedding_init=small, rngs=rngs)
        # nnx.Embed notes the dtype it was made in, and would turn bfloat16 parameters back to float32.
        self.tokens.dtype = None
        self.drop = dropout(config, rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = norm(config, rngs)
        if not config.tied:
            self.unembed = nnx.Linear(config.model_dim, config.vocab_size, use_bias=False, kernel_init=small, rngs=rngs)

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        x, c = self.embed(batch), self.context(batch)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x, batch)

    def embed(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The embedded tokens, [B, S, D]."""
        return self.drop(self.tokens(batch["tokens"]))

    def context(self, batch: Mapping[str, jax.Array]) -> Angles:
        """The rotary angles of positions 0 to S-1, which every block reads."""
        dtype = jnp.promote_types(self.tokens.embedding.dtype, jnp.float32)
        positions = jnp.arange(batch["tokens"].shape[1], dtype=dtype)[None]
        stretch = self.config.rope_stretch, self.config.rope_trained
        return rotary_angles(positions, self.config.head_dim, self.config.rope_base, stretch)

    def head(self, x: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The logits, [B, S, V]; or, with `loss_chunk`, the cross-entropy of every target, [B, S]."""
        x, chunk = self.norm(x), self.config.loss_chunk
        if not chunk:
            return self.tokens.attend(x) if self.config.tied else self.unembed(x)
        kernel = self.tokens.embedding[...].T if self.config.tied else self.unembed.kernel[...]
        if self.config.heads_axis is not None:
            # Chunks of tokens that lie over an axis would be gathered one by one.
            x = jax.lax.with_sharding_constraint(x, P(P.UNCONSTRAINED, None, None))

        def losses(_: None, at: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            return None, cross_entropies(at[0] @ kernel, at[1])

        in_chunks = x.reshape(-1, chunk, x.shape[-1]), batch["targets"].reshape(-1, chunk)
        _, found = jax.lax.scan(jax.checkpoint(losses), None, in_chunks)
        return found.reshape(x.shape[:2])


class Block(nnx.Module):
    """``block(x, c) -> x``: attention, then the gated MLP, each added to what came in."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = norm(config, rngs)
        self.mlp: GatedMLP | Experts
        if config.num_experts:
            sizes = config.num_experts, config.experts_per_token, config.model_dim, config.mlp_dim
            self.mlp = Experts(*sizes, down_variance=1 / (2 * config.num_layers), rngs=rngs)
        else:
            self.mlp = GatedMLP(config, rngs=rngs)
        self.attention_drop = dropout(config, rngs)
        self.mlp_drop = dropout(config, rngs)

    def __call__(self, x: jax.Array, c: Angles) -> jax.Array:
        x = x + self.attention_drop(self.attention(self.attention_norm(x), c))
        return x + self.mlp_drop(self.mlp(self.mlp_norm(x)))


class Attention(nnx.Module):
    """Causal grouped-query attention over [B, S, D]."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.head_dim, self.query_chunk = config.head_dim, config.query_chunk
        self.heads_axis, self.splash = config.heads_axis, config.splash
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nnx.Linear(config.model_dim, queries, use_bias=config.qkv_bias, rngs=rngs)
        self.k = nnx.Linear(config.model_dim, keys, use_bias=config.qkv_bias, rngs=rngs)
        self.v = nnx.Linear(config.model_dim, keys, use_bias=config.qkv_bias, rngs=rngs)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_epsilon, rngs=rngs)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.norm_epsilon, rngs=rngs)
        self.o = nnx.Linear(queries, config.model_dim, use_bias=False, kernel_init=residual_init(config), rngs=rngs)

    def __call__(self, x: jax.Array, c: Angles) -> jax.Array:
        q, k, v = (self.over_heads(heads(layer(x), self.head_dim)) for layer in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        attend: Attend = functools.partial(causal_attention, query_chunk=self.query_chunk)
        attend = on_tpu(attend, heads_axis=self.heads_axis) if self.splash else attend
        out = attend(rotate(q, c), rotate(k, c), v)
        return self.o(self.over_heads(out).reshape(*x.shape[:2], -1))

    def over_heads(self, x: jax.Array) -> jax.Array:
        """x [B, S, heads, K], its heads split over `heads_axis`."""
        if self.heads_axis is None:
            return x
        return jax.lax.with_sharding_constraint(x, P(P.UNCONSTRAINED, None, self.heads_axis, None))


class GatedMLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202) over the last dim."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        dims = config.model_dim, config.mlp_dim
        self.gate = nnx.Linear(*dims, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(*dims, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(*dims[::-1], use_bias=False, kernel_init=residual_init(config), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the model dim."""
    return nnx.RMSNorm(config.model_dim, epsilon=config.norm_epsilon, rngs=rngs)


def dropout(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Dropout:
    """Dropout at the config's rate; at rate 0 it holds no random state."""
    return nnx.Dropout(config.dropout, rngs=rngs if config.dropout else None)


def residual_init(config: DecoderConfig) -> nnx.Initializer:
    """What each half of a block adds starts smaller by ``sqrt(2 L)``, so that L of them add up to one."""
    return nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "normal")


def heads(x: jax.Array, head_dim: int) -> jax.Array:
    """[B, S, heads * K] as [B, S, heads, K]."""
    return x.reshape(*x.shape[:2], -1, head_dim)


def rotary_angles(positions: jax.Array, head_dim: int, base: float, stretch: tuple[float, int] = (1.0, 1)) -> Angles:
    """Cosines and sines of ``position * base ** (-2 i / K)``, each [1 or B, S, K/2] (RoPE, arXiv 2104.09864).

    Args:
      positions: [1 or B, S], floating point; computed in its dtype.
      stretch: factor of the wavelengths longer than so many tokens (Llama 3, arXiv 2407.21783; 1 and 4 are its
        `low_freq_factor` and `high_freq_factor`).

    >>> cos, sin = rotary_angles(jnp.arange(3.0)[None], head_dim=4, base=10_000.0)
    >>> cos.shape, float(cos[0, 0, 0]), float(sin[0, 0, 0])
    ((1, 3, 2), 1.0, 0.0)
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=positions.dtype) / head_dim)
    factor, length = stretch
    if factor != 1:
        stays = jnp.clip((length * frequencies / (2 * math.pi) - 1) / (4 - 1), 0, 1)
        frequencies = frequencies * ((1 - stays) / factor + stays)
    angles = positions[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, c: Angles) -> jax.Array:
    """x [B, S, heads, K] with each pair (i, i + K/2) of a head turned by its position's angle."""
    cos, sin = (half[:, :, None, :] for half in c)
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, query_chunk: int = 0) -> jax.Array:
    """Attention of each token to itself and those before it, [B, S, H, K].

    Args:
      q: [B, S, H, K].
      k: [B, S, G, K], G dividing H; query head h reads key-value head ``h // (H / G)``.
      v: like k.
      query_chunk: queries taken at a time, their weights computed again for the backward (Rabe & Staats, 2021, arXiv
        2112.05682); 0: all at once.
    """
    b, s, h, d = q.shape
    if not query_chunk or query_chunk == s:
        return attend(q, k, v, 0)

    def chunk(_: None, at: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, attend(at[0], k, v, at[1])

    chunks = jnp.moveaxis(q.reshape(b, s // query_chunk, query_chunk, h, d), 1, 0)
    firsts = jnp.arange(0, s, query_chunk)
    _, out = jax.lax.scan(jax.checkpoint(chunk), None, (chunks, firsts))
    return jnp.moveaxis(out, 0, 1).reshape(b, s, h, d)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | int) -> jax.Array:
    """`causal_attention` of queries of which the first is token `first`."""
    b, s, h, d = q.shape
    grouped = q.reshape(b, s, k.shape[2], -1, d)
    scores = jnp.einsum("bqgnd,bkgd->bgnqk", grouped, k) * d**-0.5
    visible = first + jnp.arange(s)[:, None] >= jnp.arange(k.shape[1])[None, :]
    scores = jnp.where(visible, scores.astype(jnp.promote_types(q.dtype, jnp.float32)), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bgnqk,bkgd->bqgnd", weights, v).reshape(b, s, h, d)


def next_byte_loss(y: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy in nats, and how many targets it sums over.

    Computed in float32 or wider. A target of -1 counts for nothing.

    Args:
      y: logits [B, S, V]; or, as a decoder with `loss_chunk` returns them, each target's cross-entropy [B, S].
      batch: with ``targets`` [B, S] of int32.

    >>> total, weight = next_byte_loss(jnp.zeros((2, 3, 256)), {"targets": jnp.ones((2, 3), jnp.int32)})
    >>> f"{total / weight:.4f} nats over {weight:.0f} targets"
    '5.5452 nats over 6 targets'
    """
    targets = batch["targets"]
    losses = y if y.ndim == targets.ndim else cross_entropies(y, targets)
    counted = (targets >= 0).astype(losses.dtype)
    return jnp.sum(losses * counted), jnp.sum(counted)


def cross_entropies(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The cross-entropy of every target in nats, by logits [..., V] for targets [...]; in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Not take_along_axis: gathering from logits sharded over the vocabulary aborts XLA's partitioner when a
    # second axis is automatic too. A masked sum is partitioned like any other sum.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.where(vocabulary == targets[..., None], logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def decoder_rules(
    axis: str | None = "tensor",
    *,
    tied: bool = False,
    qkv_bias: bool = False,
    experts: bool = False,
    experts_axis: str | None = None,
) -> Rules:
    """Megatron's tensor parallelism (arXiv 1909.08053) over one mesh axis; None replicates all.

        q k v, gate up    kernel [D, out]    out over the axis: each device has its own heads and MLP columns
        o, down           kernel [in, D]     in over the axis: each device has a part of a sum, one all-reduce
        embedding         [V, D]             D over the axis: a lookup picks rows, each device has all rows
        output kernel     [D, V]             V over the axis: logits stay cut, the loss reduces over them

    Args:
      axis: the mesh axis.
      tied, qkv_bias: as of the config.
      experts: whether the config has several; each is cut like the MLP.
      experts_axis: mesh axis that the experts are spread over.

    >>> decoder_rules("tensor").rules[0]
    Rule(pattern='tokens/embedding', spec=P(None, 'tensor'), pad=False)
    """
    columns, rows = P(None, axis), P(axis, None)
    output = () if tied else (Rule("unembed/kernel", columns),)
    biases = tuple(Rule(f"blocks/*/attention/{name}/bias", P(axis)) for name in "qkv") if qkv_bias else ()
    mlp = (
        *(Rule(f"blocks/*/mlp/{name}/kernel", columns) for name in ("gate", "up")),
        Rule("blocks/*/mlp/down/kernel", rows),
    )
    return Rules(
        rules=(
            Rule("tokens/embedding", columns),
            *(Rule(f"blocks/*/attention/{name}/kernel", columns) for name in ("q", "k", "v")),
            Rule("blocks/*/attention/o/kernel", rows),
            *biases,
            *(expert_rules(axis, experts_axis) if experts else mlp),
            Rule("**/*norm/scale", P()),
            *output,
        )
    )
