"""A small decoder in Flax Linen, written in `setup` so that its parts have names, with its rules.

Shapes as in `shardlab.models.decoder`: B examples, S tokens, D model dim, heads of dim K, V vocabulary.
The loss is that module's `next_byte_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from shardlab.models.decoder import Angles, causal_attention, heads, rotary_angles, rotate
from shardlab.sharding.rules import Rule, Rules


class LinenDecoder(nn.Module):
    """``model.apply(variables, batch) -> logits`` [B, S, V], from ``batch["tokens"]`` [B, S] of int32.

    As parts of a pipeline: ``embed(batch) -> x``, ``context(batch) -> c``, ``blocks[i](x, c) -> x``,
    ``head(x) -> logits``. A compact module would keep these inside its one method.

    Attributes:
      vocab_size: V.
      num_layers: number of blocks.
      model_dim: D.
      num_heads: attention heads.
      head_dim: K, even.
      mlp_dim: width of the MLP.
      dropout: rate on what each half of a block adds.
      tied: the embedding is the output kernel too.

    >>> model, batch = LinenDecoder(num_layers=1), {"tokens": jnp.zeros((3, 5), jnp.int32)}
    >>> model.apply(model.init(jax.random.key(0), batch), batch).shape
    (3, 5, 256)
    """

    vocab_size: int = 256
    num_layers: int = 4
    model_dim: int = 32
    num_heads: int = 4
    head_dim: int = 8
    mlp_dim: int = 64
    dropout: float = 0.0
    tied: bool = False

    def setup(self) -> None:
        small = nn.initializers.normal(0.02)
        self.tokens = nn.Embed(self.vocab_size, self.model_dim, embedding_init=small)
        self.blocks = [Block(self.num_heads, self.head_dim, self.mlp_dim, self.dropout) for _ in range(self.num_layers)]
        self.norm = nn.RMSNorm()
        if not self.tied:
            self.unembed = nn.Dense(self.vocab_size, use_bias=False, kernel_init=small)

    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
        x, c = self.embed(batch), self.context(batch)
        for block in self.blocks:
            x = block(x, c, train)
        return self.head(x)

    def embed(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The embedded tokens, [B, S, D]."""
        return self.tokens(batch["tokens"])

    def context(self, batch: Mapping[str, jax.Array]) -> Angles:
        """The rotary angles of positions 0 to S-1, which every block reads."""
        dtype = jnp.promote_types(self.tokens.embedding.dtype, jnp.float32)
        return rotary_angles(jnp.arange(batch["tokens"].shape[1], dtype=dtype)[None], self.head_dim, 10_000.0)

    def head(self, x: jax.Array) -> jax.Array:
        """The logits, [B, S, V]."""
        x = self.norm(x)
        return self.tokens.attend(x) if self.tied else self.unembed(x)


class Block(nn.Module):
    """``block(x, c) -> x``: attention, then an MLP, each added to what came in."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, c: Angles, train: bool = False) -> jax.Array:
        inner, dim = self.num_heads * self.head_dim, x.shape[-1]
        normed = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (heads(nn.Dense(inner, use_bias=False, name=name)(normed), self.head_dim) for name in "qkv")
        attended = causal_attention(rotate(q, c), rotate(k, c), v).reshape(*x.shape[:2], inner)
        attended = nn.Dense(dim, use_bias=False, name="o")(attended)
        x = x + nn.Dropout(self.dropout)(attended, deterministic=not train)
        normed = nn.RMSNorm(name="mlp_norm")(x)
        hidden = nn.gelu(nn.Dense(self.mlp_dim, use_bias=False, name="up")(normed))
        added = nn.Dense(dim, use_bias=False, name="down")(hidden)
        return x + nn.Dropout(self.dropout)(added, deterministic=not train)


def linen_decoder_rules(axis: str | None = "tensor", *, tied: bool = False) -> Rules:
    """Megatron's tensor parallelism over one mesh axis, as `decoder_rules`; None replicates every parameter.

    >>> linen_decoder_rules("tensor").rules[1]
    Rule(pattern='blocks_*/q/kernel', spec=P(None, 'tensor'), pad=False)
    """
    columns, rows = P(None, axis), P(axis, None)
    output = () if tied else (Rule("unembed/kernel", columns),)
    return Rules(
        rules=(
            Rule("tokens/embedding", columns),
            *(Rule(f"blocks_*/{name}/kernel", columns) for name in ("q", "k", "v", "up")),
            *(Rule(f"blocks_*/{name}/kernel", rows) for name in ("o", "down")),
            Rule("**/*norm/scale", P()),
            *output,
        )
    )
