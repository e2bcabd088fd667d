"""Causal attention by JAX's splash kernel on TPU, and in plain JAX elsewhere: never a matrix of scores in memory.

A kernel is closed to XLA's partitioner: heads that lie over a mesh axis are handed to it in a manual region over that
axis, and where XLA splits anything else, as examples with automatic batch axes, plain JAX takes its place. Its blocks
are of 512 by 512, so that it serves examples of a multiple of that and heads of a multiple of 128.

The kernel: https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu/splash_attention (after Dao et al.
2022, arXiv 2205.14135).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_BLOCK, _LANES = 512, 128


def on_tpu(plain: Attend, *, heads_axis: str | None) -> Attend:
    """``(q, k, v) -> out`` by the kernel where it is lowered for a TPU and serves the shapes, else `plain`.

    Args:
      plain: the same in plain JAX; q [B, S, H, K], k and v [B, S, G, K], G dividing H.
      heads_axis: mesh axis over which H and G are split, if they are.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        others = any(size > 1 for name, size in _automatic().items() if name != heads_axis)
        if q.shape[1] % _BLOCK or q.shape[3] % _LANES or others:
            return plain(q, k, v)
        by_kernel = functools.partial(over_heads, kernel, heads_axis)
        return _either(plain, by_kernel, q, k, v)

    return attend


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _either(plain: Attend, kernel: Attend, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    # With a rule of its own: the derivative of a choice keeps what either branch would.
    found: jax.Array = jax.lax.platform_dependent(q, k, v, tpu=kernel, default=plain)
    return found


def _forward(plain: Attend, kernel: Attend, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    def with_kept(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        out, pull = jax.vjp(kernel, q, k, v)
        return out, jax.tree.leaves(pull)

    nothing = jax.eval_shape(with_kept, q, k, v)[1]

    def with_nothing(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return plain(q, k, v), [jnp.zeros(leaf.shape, leaf.dtype) for leaf in nothing]

    out, kept = jax.lax.platform_dependent(q, k, v, tpu=with_kept, default=with_nothing)
    return out, (q, k, v, kept)


def _backward(plain: Attend, kernel: Attend, given: Any, dout: jax.Array) -> Any:
    def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, kept: list[jax.Array], dout: jax.Array) -> Any:
        pull = jax.eval_shape(lambda *given: jax.vjp(kernel, *given)[1], q, k, v)
        return jax.tree.unflatten(jax.tree.structure(pull), kept)(dout)

    def again(q: jax.Array, k: jax.Array, v: jax.Array, kept: list[jax.Array], dout: jax.Array) -> Any:
        return jax.vjp(plain, q, k, v)[1](dout)

    return jax.lax.platform_dependent(*given, dout, tpu=by_kernel, default=again)


_either.defvjp(_forward, _backward)


def over_heads(attend: Attend, axis: str | None, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attend` on each device's heads, with every axis of the mesh manual."""
    names = _automatic()
    if not names:
        return attend(q, k, v)
    spec = P(None, None, axis if axis in names else None, None)
    mesh = jax.sharding.get_abstract_mesh()
    split = jax.shard_map(
        attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, axis_names=set(names), check_vma=False
    )
    return split(q, k, v)


def _automatic() -> dict[str, int]:
    """The automatic axes of the mesh at hand and their sizes: XLA refuses a kernel beside one of size 1 even."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Causal attention by the kernel, q [B, S, H, K] of all heads at hand; `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, width = q.shape
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    sizes = splash.BlockSizes(
        block_q=_BLOCK,
        block_kv=_BLOCK,
        block_kv_compute=_BLOCK,
        block_q_dkv=_BLOCK,
        block_kv_dkv=_BLOCK,
        block_kv_dkv_compute=_BLOCK,
        block_q_dq=_BLOCK,
        block_kv_dq=_BLOCK,
    )
    made = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    by_head = [jnp.swapaxes(one, 1, 2) for one in (q * width**-0.5, k, v)]
    return jnp.swapaxes(jax.vmap(made)(*by_head), 1, 2).astype(q.dtype)
