"""An MLP-Mixer in Flax Linen: a convolution cuts an image into patches, MLPs mix them (arXiv 2105.01601).

It has what a decoder has not: LayerNorm, biases, a convolution kernel of four dims.

Shapes: B images, H x W pixels of C channels, T patches, D model dim, N classes.
A batch is ``{"image": [B, H, W, C] floating point, "labels": [B] int32}``; the loss is `label_loss` of
`shardlab.models.mlp`. What is computed is as wide as the image or the parameters, whichever is wider.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from shardlab.sharding.rules import Rule, Rules


class Mixer(nn.Module):
    """``model.apply(variables, batch) -> logits`` [B, N].

    As parts of a pipeline: ``embed(batch) -> x``, ``blocks[i](x) -> x``, ``head(x) -> logits``.

    Attributes:
      patch_size: pixels along each side of a patch; divides H and W.
      num_layers: number of blocks.
      model_dim: D.
      token_dim: width of the MLP across patches.
      channel_dim: width of the MLP across channels.
      num_classes: N.
      dropout: rate on what each half of a block adds.

    >>> model, batch = Mixer(num_layers=1), {"image": jnp.zeros((2, 12, 12, 3))}
    >>> model.apply(model.init(jax.random.key(0), batch), batch).shape
    (2, 10)
    """

    patch_size: int = 4
    num_layers: int = 4
    model_dim: int = 16
    token_dim: int = 8
    channel_dim: int = 32
    num_classes: int = 10
    dropout: float = 0.0

    def setup(self) -> None:
        patch = (self.patch_size, self.patch_size)
        self.patches = nn.Conv(self.model_dim, patch, strides=patch)
        self.blocks = [Block(self.token_dim, self.channel_dim, self.dropout) for _ in range(self.num_layers)]
        self.norm = nn.LayerNorm()
        self.classes = nn.Dense(self.num_classes)

    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x, train)
        return self.head(x)

    def embed(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The patches, [B, T, D]."""
        x = self.patches(batch["image"])
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def head(self, x: jax.Array) -> jax.Array:
        """The logits of the mean patch, [B, N]."""
        return self.classes(self.norm(x).mean(axis=1))


class Block(nn.Module):
    """``block(x) -> x``: an MLP across the patches, then one across the channels, each added to x."""

    token_dim: int
    channel_dim: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        across = jnp.swapaxes(nn.LayerNorm(name="token_norm")(x), 1, 2)
        mixed = jnp.swapaxes(MLP(self.token_dim, name="tokens")(across), 1, 2)
        x = x + nn.Dropout(self.dropout)(mixed, deterministic=not train)
        mixed = MLP(self.channel_dim, name="channels")(nn.LayerNorm(name="channel_norm")(x))
        return x + nn.Dropout(self.dropout)(mixed, deterministic=not train)


class MLP(nn.Module):
    """Two layers over the last dim, which keeps its size."""

    hidden_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(self.hidden_dim, name="up")(x))
        return nn.Dense(x.shape[-1], name="down")(hidden)


def mixer_rules(axis: str | None = "tensor") -> Rules:
    """The hidden width of both MLPs over one mesh axis; None replicates every parameter.

    >>> mixer_rules("tensor").rules[0]
    Rule(pattern='blocks_*/*/up/kernel', spec=P(None, 'tensor'), pad=False)
    """
    return Rules(
        rules=(
            Rule("blocks_*/*/up/kernel", P(None, axis)),
            Rule("blocks_*/*/up/bias", P(axis)),
            Rule("blocks_*/*/down/kernel", P(axis, None)),
            Rule("blocks_*/*/down/bias", P()),
            Rule("blocks_*/*norm/*", P()),
            Rule("patches/*", P()),
            Rule("norm/*", P()),
            Rule("classes/*", P()),
        )
    )
