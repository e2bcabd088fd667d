"""A mixture of gated MLPs in Flax NNX, of which each token takes the few that its router likes best (Mixtral, arXiv
2401.04088).

Every expert computes every token, and a token adds up what its own experts made: the right numbers from plain matrix
products, which XLA splits over any axes, for E / N times the work of a layer that sends tokens to their experts.

Shapes: B examples, S tokens, D model dim, E experts, N of them a token, F width of an expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.sharding.rules import Rule


class Experts(nnx.Module):
    """``experts(x) -> x`` over [B, S, D]; `down_variance` scales the variance that their last kernels start with.

    >>> Experts(4, 2, 8, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 8))).shape
    (2, 3, 8)
    """

    def __init__(
        self,
        num_experts: int,
        per_token: int,
        model_dim: int,
        mlp_dim: int,
        *,
        down_variance: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.per_token = per_token
        init = nnx.initializers.lecun_normal(batch_axis=0)
        last = nnx.initializers.variance_scaling(down_variance, "fan_in", "normal", batch_axis=0)
        wide, narrow = (num_experts, model_dim, mlp_dim), (num_experts, mlp_dim, model_dim)
        self.router = nnx.Linear(model_dim, num_experts, use_bias=False, rngs=rngs)
        self.gate = nnx.Param(init(rngs.params(), wide))
        self.up = nnx.Param(init(rngs.params(), wide))
        self.down = nnx.Param(last(rngs.params(), narrow))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nnx.silu(jnp.einsum("bsd,edf->bsef", x, self.gate[...])) * jnp.einsum("bsd,edf->bsef", x, self.up[...])
        return jnp.einsum("bsef,efd,bse->bsd", hidden, self.down[...], self.shares(x))

    def shares(self, x: jax.Array) -> jax.Array:
        """What part each expert has in a token, [B, S, E]: 0 of all but N, which add up to 1."""
        logits = self.router(x)
        best, which = jax.lax.top_k(logits.astype(jnp.promote_types(x.dtype, jnp.float32)), self.per_token)
        parts = jax.nn.softmax(best, axis=-1)
        return (parts[..., None] * jax.nn.one_hot(which, logits.shape[-1], dtype=parts.dtype)).sum(-2).astype(x.dtype)


def expert_rules(axis: str | None = "tensor", experts_axis: str | None = None) -> tuple[Rule, ...]:
    """Experts over one mesh axis, the width of each over another; the router on every device.

    >>> expert_rules("tensor", "expert")[1]
    Rule(pattern='blocks/*/mlp/gate', spec=P('expert', None, 'tensor'), pad=False)
    """
    return (
        Rule("blocks/*/mlp/router/kernel", P()),
        *(Rule(f"blocks/*/mlp/{name}", P(experts_axis, None, axis)) for name in ("gate", "up")),
        Rule("blocks/*/mlp/down", P(experts_axis, axis, None)),
    )
