"""Where examples lie, their places, counts, loops and derivatives: what is refused by name, and what is let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardlab.mesh.faults import DeclarationError
from shardlab.step.batch_sum import batch_sum
from shardlab.step.examples import check_rows_to_rows, check_sums

ROWS, LENGTH, WIDTH, CLASSES = 4, 3, 6, 5
Function = Callable[..., Any]


def traced(function: Function, rows: int = ROWS) -> tuple[Any, Any]:
    """`function` of parameters w, x [B, S, D], labels [B, S] and a key, traced twice."""

    def shapes(rows: int) -> tuple[Any, ...]:
        w = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
        x = jax.ShapeDtypeStruct((rows, LENGTH, WIDTH), jnp.float32)
        labels = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
        return w, x, labels, jax.eval_shape(lambda: jax.random.key(0))

    return jax.make_jaxpr(function)(*shapes(rows)), jax.make_jaxpr(function)(*shapes(2 * rows))


def module(make: Callable[[nnx.Rngs], Any]) -> Function:
    """An NNX module of x, its parameters closed over."""
    graph, state = nnx.split(make(nnx.Rngs(0)))
    return lambda w, x, labels, key: nnx.merge(graph, state, copy=True)(x)


def linen_module(made: Any, *rngs: str) -> Function:
    variables = made.init({name: jax.random.key(0) for name in ("params", *rngs)}, jnp.zeros((1, LENGTH, WIDTH)))
    return lambda w, x, labels, key: made.apply(variables, x, rngs=dict.fromkeys(rngs, key))


def attention(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """Heads, a causal mask from arange over the sequence, padding by example, positions."""
    batch, length, width = x.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    x = x + jnp.sin(positions[..., None] / jnp.arange(1, width + 1))
    q, k, v = (jnp.einsum("bsd,df->bsf", x, w).reshape(batch, length, 2, width // 2) for _ in range(3))
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None] & (labels > 0)[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)


def experts(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """Top-k of the experts for each token, its own weights picked by arange over the tokens."""
    tokens = x.reshape(-1, WIDTH)
    gates = jax.nn.softmax(tokens @ w[:, :4])
    weights, chosen = jax.lax.top_k(gates, 2)
    picked = gates[jnp.arange(len(tokens))[:, None], chosen]
    scattered = jnp.zeros_like(gates).at[jnp.arange(len(tokens))[:, None], chosen].set(weights)
    outputs = jnp.einsum("td,edf->tef", tokens, jnp.stack([w] * 4))
    return (jnp.einsum("tef,te->tf", outputs, scattered) * picked.sum(-1, keepdims=True)).reshape(x.shape)


@jax.custom_vjp
def quantised(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.round(x * scale) / scale


quantised.defvjp(lambda x, scale: (quantised(x, scale), (x, scale)), lambda kept, g: (g, jnp.sum(g * kept[0])))


def pixel_cnn(x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, jnp.ones((3, WIDTH, WIDTH)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def flat_positions(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """Tokens picked from all tokens by the place of their first one: how BERT's masked positions are often written."""
    offsets = (jnp.arange(len(x)) * LENGTH)[:, None]
    picked = jnp.take(x.reshape(-1, WIDTH), (labels[:, :2] + offsets).reshape(-1), axis=0)
    return picked.reshape(len(x), 2, WIDTH)


def flat_segments(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """Sums over segments of each example, all in one: graphs in a batch are often written so."""
    segments = (jnp.arange(len(x))[:, None] * CLASSES + labels).reshape(-1)
    sums = jax.ops.segment_sum(x.reshape(-1, WIDTH), segments, len(x) * CLASSES)
    return sums.reshape(len(x), CLASSES, WIDTH)


def cache_written(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """A cache with a place of its own for each example."""
    cache = jnp.zeros((len(x), 7, WIDTH))
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at[0], 0)))(cache, x, labels)


def two_views(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """Both views through one encoder, taken apart again: each example against itself."""
    encoded = jnp.tanh(jnp.concatenate([x, 2 * x]) @ w)
    one, two = jnp.split(encoded, 2)
    return jnp.sum(one * two, -1)


def time_major(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """[S, B, D] flattened to [S B, D], a layer, and back."""
    steps = x.swapaxes(0, 1)
    return (steps.reshape(-1, WIDTH) @ w).reshape(steps.shape).swapaxes(0, 1)


def while_each(w: Any, x: Any, labels: Any, key: Any) -> Any:
    """Every example until it has converged."""
    return jax.vmap(lambda z: jax.lax.while_loop(lambda z: jnp.max(jnp.abs(z)) > 0.1, lambda z: z * 0.7, z))(x)


ALLOWED: dict[str, Function] = {
    "attention": attention,
    "nnx attention": module(lambda rngs: nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)),
    "linen attention": linen_module(linen.MultiHeadDotProductAttention(2)),
    "experts": experts,
    "positions of a sequence": lambda w, x, labels, key: x + jnp.arange(LENGTH)[:, None],
    "gather by place": lambda w, x, labels, key: x[jnp.arange(len(x)), labels[:, 0]],
    "gather by place and place in the sequence": lambda w, x, labels, key: x[
        jnp.arange(len(x))[:, None], jnp.arange(LENGTH), labels
    ],
    "scatter by place": lambda w, x, labels, key: x.at[jnp.arange(len(x)), labels[:, 0]].set(0.0),
    "scatter by place into zeros": lambda w, x, labels, key: jnp.zeros(x.shape).at[jnp.arange(len(x)), 0].add(x[:, 1]),
    "gather with numpy places": lambda w, x, labels, key: x[np.arange(len(x)), labels[:, 0]],
    "take_along_axis": lambda w, x, labels, key: jnp.take_along_axis(x, labels[..., None], -1),
    "last token": lambda w, x, labels, key: jnp.take_along_axis(x, (labels.sum(1) - 1)[:, None, None], 1),
    "vmapped dynamic slice": lambda w, x, labels, key: jax.vmap(
        lambda row, i: jax.lax.dynamic_slice_in_dim(row, i[0], 2)
    )(x, labels),
    "vmapped segment sum": lambda w, x, labels, key: jax.vmap(lambda row, i: jax.ops.segment_sum(row, i, 4))(x, labels),
    "flat positions": flat_positions,
    "flat segments": flat_segments,
    "first tokens of all": lambda w, x, labels, key: x.reshape(-1, WIDTH)[jnp.arange(len(x)) * LENGTH],
    "second tokens of all": lambda w, x, labels, key: x.reshape(-1, WIDTH)[jnp.arange(len(x)) * LENGTH + 1],
    "a cache": cache_written,
    "interpolated": lambda w, x, labels, key: jnp.interp(x, jnp.arange(5.0), w[0, :5]) + jnp.searchsorted(w[0], x),
    "packed segments": lambda w, x, labels, key: (
        jnp.cumsum(labels == 0, 1)[:, :, None] == jnp.cumsum(labels == 0, 1)[:, None]
    ),
    "embedding": lambda w, x, labels, key: w[labels],
    "one hot": lambda w, x, labels, key: jax.nn.one_hot(labels, CLASSES),
    "sort within an example": lambda w, x, labels, key: jnp.sort(x, -1)[jnp.arange(len(x)), 0],
    "argsort within an example": lambda w, x, labels, key: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "top k": lambda w, x, labels, key: jax.lax.top_k(x, 2)[0],
    "running sum of a sequence": lambda w, x, labels, key: jnp.cumsum(x, 1),
    "flattened to tokens and back": lambda w, x, labels, key: (x.reshape(-1, WIDTH) @ w).reshape(x.shape),
    "time-major and back": time_major,
    "patches": lambda w, x, labels, key: x.reshape(len(x), LENGTH, 2, 3).transpose(0, 2, 1, 3).reshape(len(x), -1),
    "two views": two_views,
    "real and made": lambda w, x, labels, key: jax.nn.sigmoid(
        jnp.concatenate([x, jnp.zeros(x.shape)])
        * jnp.concatenate([jnp.ones((len(x), 1, 1)), jnp.zeros((len(x), 1, 1))])
    )[: len(x)],
    "guidance": lambda w, x, labels, key: jnp.tile(x, (2, 1, 1))[len(x) :] * 2,
    "neighbouring pairs": lambda w, x, labels, key: x[0::2] - x[1::2],
    "group norm": module(lambda rngs: nnx.GroupNorm(WIDTH, num_groups=3, rngs=rngs)),
    "layer norm": module(lambda rngs: nnx.LayerNorm(WIDTH, rngs=rngs)),
    "batch norm of kept statistics": module(lambda rngs: nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)),
    "nnx RNN": module(lambda rngs: nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs))),
    "linen RNN": linen_module(linen.RNN(linen.GRUCell(WIDTH))),
    "linen bidirectional": linen_module(linen.Bidirectional(linen.RNN(linen.GRUCell(3)), linen.RNN(linen.GRUCell(3)))),
    "convolution": lambda w, x, labels, key: pixel_cnn(x),
    "pooling": lambda w, x, labels, key: linen.max_pool(x, (2,), strides=(1,)),
    "a convolution of each example": lambda w, x, labels, key: jax.vmap(
        lambda row: jax.lax.conv_general_dilated(
            row[None],
            row[:2, :, None] * jnp.ones((1, 1, 2)),
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
    )(x),
    "fourier": lambda w, x, labels, key: jnp.fft.rfft(x, axis=1).real,
    "matrices of each example": lambda w, x, labels, key: jnp.linalg.qr(x[:, :, :2])[0] @ jnp.linalg.inv(w[:2, :2]),
    "solved for each example": lambda w, x, labels, key: jax.scipy.linalg.solve_triangular(w, x[:, 0].T).T,
    "scan over time": lambda w, x, labels, key: jax.lax.scan(
        lambda c, step: (jnp.tanh(c @ w + step), c), jnp.zeros((len(x), WIDTH)), x.swapaxes(0, 1)
    )[1].swapaxes(0, 1),
    "map over examples": lambda w, x, labels, key: jax.lax.map(lambda row: jnp.tanh(row @ w) @ w, x),
    "map over chunks of examples": lambda w, x, labels, key: jax.lax.map(
        lambda row: jnp.tanh(row.mean(0)) @ w, x, batch_size=2
    ),
    "map over examples with a choice": lambda w, x, labels, key: jax.lax.map(
        lambda given: jax.lax.cond(given[1][0] > 0, lambda row: row.max(), lambda row: row.mean(), given[0]),
        (x, labels),
    ),
    "while of each example": while_each,
    "a while of parameters": lambda w, x, labels, key: (
        x * jax.lax.while_loop(lambda c: jnp.max(c) > 0.1, lambda c: c * 0.5, w[0])
    ),
    "relu and its like": lambda w, x, labels, key: jax.nn.softmax(jax.nn.relu(x) + jax.nn.silu(x) + jax.nn.gelu(x)),
    "softplus and logsumexp": lambda w, x, labels, key: jax.nn.logsumexp(jax.nn.softplus(x) + jax.nn.relu6(x), -1),
    "relu of parameters": lambda w, x, labels, key: x @ jax.nn.softmax(jax.nn.relu(w)),
    "a quantiser": lambda w, x, labels, key: quantised(x, w[0, 0]) @ quantised(w, w[0, 0]),
    "a quantiser in a map": lambda w, x, labels, key: jax.lax.map(lambda row: quantised(row, w[0, 0]), x),
    "a gradient of each example": lambda w, x, labels, key: jax.vmap(jax.grad(lambda row: jnp.sum(jnp.sin(row @ w))))(
        x
    ),
    "a gradient by the input": lambda w, x, labels, key: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x),
    "remat": lambda w, x, labels, key: jax.checkpoint(lambda x: jnp.sin(x @ w))(x),
    "norm clipped by example": lambda w, x, labels, key: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1),
    "nnx dropout": lambda w, x, labels, key: nnx.Dropout(0.5)(x, rngs=key, deterministic=False),
    "dropout with a broadcast dim": lambda w, x, labels, key: nnx.Dropout(0.5, broadcast_dims=(1,))(
        x, rngs=key, deterministic=False
    ),
    "linen dropout": linen_module(linen.Dropout(0.5, broadcast_dims=(2,), deterministic=False), "dropout"),
    "noise for all from a key of its own": lambda w, x, labels, key: (
        x + jax.random.normal(jax.random.key(0), (LENGTH, WIDTH))
    ),
    "keys by number": lambda w, x, labels, key: jax.vmap(
        lambda n, row: row * jax.random.normal(jax.random.fold_in(key, n[0]), row.shape)
    )(labels, x),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str) -> None:
    check_rows_to_rows(*traced(ALLOWED[name]), "block", ROWS)


@jax.custom_vjp
def whole_clip(x: jax.Array) -> jax.Array:
    return x


whole_clip.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.linalg.norm(g),))


@jax.custom_jvp
def whole_slope(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


whole_slope.defjvp(lambda given, tangents: (jnp.sin(given[0]), tangents[0] * jnp.max(jnp.cos(given[0]))))


def qr_factor(w: Any, x: Any, labels: Any, key: Any) -> Any:
    return x[:, 0, :2] @ jnp.linalg.qr(x[:, 0, :2])[1]


def by_place(w: Any, x: Any, labels: Any, key: Any) -> Any:
    return x * (jnp.arange(len(x)) + 1.0)[:, None, None]


REFUSED: dict[str, tuple[Function, str]] = {
    "halves": (
        lambda w, x, labels, key: jnp.subtract(*jnp.split(x, 2)),
        "split at FILE takes the examples apart",
    ),
    "the first half": (lambda w, x, labels, key: x[: len(x) // 2], "slice at FILE takes the examples apart"),
    "halves as a dim": (
        lambda w, x, labels, key: x.reshape(2, -1, LENGTH, WIDTH).sum(0),
        "reshape at FILE takes the examples apart",
    ),
    "views in another order": (
        lambda w, x, labels, key: jnp.concatenate([x, x]) - jnp.repeat(x, 2, 0),
        "sub at FILE brings examples together that lie in different orders",
    ),
    "every third of views": (
        lambda w, x, labels, key: jnp.split(jnp.concatenate([x, x, x, x]), 8)[0],
        "split at FILE takes the examples apart",
    ),
    "a shifted batch": (
        lambda w, x, labels, key: jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1],
        "pad at FILE makes [5, 3, 6] of 4 examples",
    ),
    "turned round": (lambda w, x, labels, key: x + x[::-1], "rev at FILE orders the examples"),
    "weights by place": (by_place, "mul at FILE uses the places of the examples at hand"),
    "the first of the batch": (
        lambda w, x, labels, key: jnp.where((jnp.arange(len(x)) == 0)[:, None, None], 0.0, x),
        "select_n at FILE uses the places of the examples at hand",
    ),
    "a table by place": (
        lambda w, x, labels, key: x[:, 0] + jnp.ones((99, WIDTH))[jnp.arange(len(x))],
        "add at FILE uses the places of the examples at hand",
    ),
    "places returned": (
        lambda w, x, labels, key: jnp.arange(len(x)),
        "returns the places of the examples, and a device holds 4 of the batch's; put them into the batch",
    ),
    "numpy weights by place": (
        lambda w, x, labels, key: x * np.linspace(0, 1, len(x), dtype=np.float32)[:, None, None],
        "mul at FILE uses the places of the examples at hand",
    ),
    "the next example": (
        lambda w, x, labels, key: x - x[(jnp.arange(len(x)) + 1) % len(x)],
        "gather at FILE picks examples by their number",
    ),
    "the next example's token": (
        lambda w, x, labels, key: x.reshape(-1, WIDTH)[jnp.arange(len(x)) * LENGTH + LENGTH],
        "gather at FILE picks examples by their number",
    ),
    "another example's token": (
        lambda w, x, labels, key: x.reshape(-1, WIDTH)[jnp.arange(len(x)) * 2 + labels[:, 0]],
        "gather at FILE picks examples by their number",
    ),
    "examples by number": (lambda w, x, labels, key: x[labels[:, 0]], "add at FILE picks examples by their number, or"),
    "examples by checked number": (
        lambda w, x, labels, key: jnp.take(x, labels[:, 0], axis=0, mode="clip"),
        "gather at FILE picks examples by their number",
    ),
    "examples written by number": (
        lambda w, x, labels, key: x.at[labels[:, 0]].set(0.0, wrap_negative_indices=False),
        "scatter at FILE picks examples by their number",
    ),
    "divided by the count": (
        lambda w, x, labels, key: x / len(x),
        "div at FILE uses the number of examples at hand",
    ),
    "divided by its root": (
        lambda w, x, labels, key: x / np.sqrt(len(x)),
        "div at FILE uses the number of examples at hand",
    ),
    "the count returned": (
        lambda w, x, labels, key: (x, jnp.sqrt(jnp.float32(len(x)))),
        "returns a number that follows the count of the examples, and a device holds 4 of the batch's",
    ),
    "while any example has not converged": (
        lambda w, x, labels, key: jax.lax.while_loop(lambda z: jnp.max(jnp.abs(z)) > 0.1, lambda z: z * 0.7, x),
        "reduce_max at FILE takes one value of all examples",
    ),
    "a mean in a while": (
        lambda w, x, labels, key: jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] - c[1].mean(0)), (0, x)
        ),
        "div at FILE takes a mean over the examples at hand",
    ),
    "as often as there are examples": (
        lambda w, x, labels, key: jax.lax.while_loop(lambda c: c < len(x), lambda c: c + 1, 0) * x,
        "while at FILE repeats as all examples together say",
    ),
    "qr over the batch": (qr_factor, "qr at FILE takes one value of all examples"),
    "orthogonal examples": (
        lambda w, x, labels, key: jax.lax.linalg.householder_product(x[:, 0, :2], jnp.ones(2)),
        "householder_product at FILE goes from example to example",
    ),
    "convolved over the batch": (
        lambda w, x, labels, key: pixel_cnn(x.swapaxes(0, 1)).swapaxes(0, 1),
        "conv_general_dilated at FILE goes from example to example",
    ),
    "pooled over the batch": (
        lambda w, x, labels, key: jax.lax.reduce_window(x, 0.0, jax.lax.add, (3, 1, 1), (1, 1, 1), "SAME"),
        "reduce_window_sum at FILE goes from example to example",
    ),
    "fourier over the batch": (
        lambda w, x, labels, key: jnp.fft.fft(x[:, 0, 0]).real,
        "fft at FILE goes from example to example",
    ),
    "a rule for the backward": (
        lambda w, x, labels, key: whole_clip(x),
        "sqrt at FILE goes on from a sum over the examples",
    ),
    "a rule for the tangent": (
        lambda w, x, labels, key: whole_slope(x),
        "reduce_max at FILE takes one value of all examples",
    ),
    "a rule for the backward of parameters": (
        lambda w, x, labels, key: x @ whole_clip(w),
        "mul at FILE goes on from a sum over the examples",
    ),
    "all examples for each in a map": (
        lambda w, x, labels, key: jax.lax.map(lambda row: x[:, 0] @ row[0], x),
        "scan at FILE makes [4, 4] of 4 examples",
    ),
    "their sum for each in a map": (
        lambda w, x, labels, key: jax.lax.map(lambda row: jnp.einsum("bd,d->d", x[:, 0], w[0]), x),
        "scan at FILE takes one value of all examples for each of them",
    ),
    "a batch sum of rows": (
        lambda w, x, labels, key: batch_sum(x),
        "shardlab.batch_sum at FILE is given what is not a sum over the examples",
    ),
    "a batch sum of parameters": (
        lambda w, x, labels, key: x * batch_sum(w.sum()),
        "shardlab.batch_sum at FILE is given what is not a sum over the examples",
    ),
    "a key of its own": (
        lambda w, x, labels, key: x + jax.random.normal(jax.random.key(7), x.shape),
        "random_bits at FILE draws for every example from a key that the model makes itself, and a device holds 4 of "
        "the batch's; draw from the key that the model is given",
    ),
    "a shifted place in a key": (
        lambda w, x, labels, key: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i + 1)))(
            jnp.arange(len(x))
        ),
        "random_fold_in at FILE uses the places of the examples at hand",
    ),
    "a place in a key in a map": (
        lambda w, x, labels, key: jax.lax.map(
            lambda i: jax.random.normal(jax.random.fold_in(key, i)), jnp.arange(len(x))
        ),
        "random_fold_in at FILE uses the place of an example among those at hand",
    ),
    "places and numbers in a key": (
        lambda w, x, labels, key: (
            jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(jnp.arange(len(x))),
            jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(labels[:, 0]),
        ),
        "with 4 examples a device, numbers of shape [4] are folded into a key both per example and otherwise; use "
        "another batch size or number of microbatches so that the two shapes differ",
    ),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(DeclarationError) as error:
        check_rows_to_rows(*traced(function), "block", ROWS)
    before, _, after = ("block: " + message).partition("FILE")
    assert str(error.value).startswith(before), str(error.value)
    assert after in str(error.value)
    assert not after or f"{__file__}:" in str(error.value)


def cross_entropy(w: Any, x: Any, labels: Any, key: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, labels)
    kept = labels > 0
    return jnp.sum(losses * kept), jnp.sum(kept)


SUMS: dict[str, Function] = {
    "cross entropy": cross_entropy,
    "a decay for each example": lambda w, x, labels, key: (jnp.sum(x) + len(x) * jnp.sum(w**2), len(x)),
    "a decay for each of two": lambda w, x, labels, key: (0.5 * (jnp.sum(x) + 2 * len(x) * jnp.sum(w**2)), len(x)),
    "one hot": lambda w, x, labels, key: (
        optax.softmax_cross_entropy(x @ w, jax.nn.one_hot(labels, WIDTH)).sum(),
        labels.size,
    ),
    "ctc": lambda w, x, labels, key: (
        optax.ctc_loss(x, jnp.zeros(labels.shape), labels[:, :2], jnp.zeros((len(x), 2))).sum(),
        len(x),
    ),
    "huber and cosine": lambda w, x, labels, key: (
        optax.huber_loss(x).sum() + optax.cosine_distance(x, x @ w, epsilon=1e-6).sum(),
        x.size,
    ),
    "real against made": lambda w, x, labels, key: (
        optax.sigmoid_binary_cross_entropy(
            jnp.concatenate([x, x @ w]), jnp.concatenate([jnp.ones(x.shape), jnp.zeros(x.shape)])
        ).sum(),
        len(x),
    ),
    "pieces": lambda w, x, labels, key: (jnp.add(*jnp.split(x.sum((0, 1)), 2)).sum(), len(x)),
    "a histogram": lambda w, x, labels, key: (
        jnp.sum(jnp.zeros(CLASSES).at[labels].add(1.0) * jnp.arange(CLASSES)),
        labels.size,
    ),
    "examples one after another": lambda w, x, labels, key: (
        jax.lax.map(lambda row: jnp.tanh(row @ w).sum(), x).sum(),
        jnp.ones(len(x)).sum(),
    ),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    check_sums(*traced(SUMS[name]), "loss", ROWS)


NO_SUMS: dict[str, tuple[Function, str]] = {
    "divided by a root": (
        lambda w, x, labels, key: (jnp.sum(x) / np.sqrt(len(x)), len(x)),
        "div at FILE scales a sum over the examples by a number that follows theirs",
    ),
    "weighted by place": (
        lambda w, x, labels, key: (jnp.sum(x.sum((1, 2)) * (jnp.arange(len(x)) + 1.0)), len(x)),
        "mul at FILE uses the places of the examples at hand",
    ),
    "a weight of places": (
        lambda w, x, labels, key: (jnp.sum(x), jnp.sum(jnp.arange(len(x)) + 1.0)),
        "reduce_sum at FILE uses the places of the examples at hand",
    ),
    "an odd weight": (
        lambda w, x, labels, key: (jnp.sum(x), len(x) - 1),
        "its weight follows the number of examples, but not in proportion, so that it cannot be added up over "
        "microbatches and devices; return the sum over examples and how many (or how much weight) it is over",
    ),
    "an odd addition": (
        lambda w, x, labels, key: (jnp.sum(x) + len(x) ** 0.5 * w[0, 0], len(x)),
        "add at FILE adds to a sum over the examples what does not grow in proportion to their number",
    ),
    "weights of the count": (
        lambda w, x, labels, key: (jnp.sum(x * jnp.full((len(x), 1, 1), 1 / len(x))), len(x)),
        "mul at FILE uses the number of examples at hand",
    ),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_no_sums(name: str) -> None:
    function, message = NO_SUMS[name]
    with pytest.raises(DeclarationError) as error:
        check_sums(*traced(function), "loss", ROWS)
    before, _, after = ("loss: " + message).partition("FILE")
    assert str(error.value).startswith(before), str(error.value)
    assert after in str(error.value)
