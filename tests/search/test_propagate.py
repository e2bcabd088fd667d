"""What one device does of a traced program: by hand for single operations, and against what XLA:CPU compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.report.collectives import collective_rows
from shardlab.run.config import Config
from shardlab.search.choice import choice_of
from shardlab.search.estimate import Estimator
from shardlab.search.laid import Laid, laid
from shardlab.search.program import flat
from shardlab.search.propagate import propagate
from shardlab.search.subject import Subject
from shardlab.search.work import Compiler, Work
from shardlab.step.compile import compile_train_step
from tests.search.subjects import decoder, image_mixer, whole_mlp

T = ("tensor",)


def work(function: Callable[..., Any], *args: tuple[tuple[int, ...], Laid], sizes: int = 4, **known: Any) -> Work:
    program = flat(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape, _ in args)))
    return propagate(program, [lay for _, lay in args], {"tensor": sizes}, compiler=Compiler(**known))


W = ((8, 32), laid(2, {1: T}, weight=True))  # cut by columns
V = ((32, 8), laid(2, {0: T}, weight=True))  # cut by rows
X = ((4, 8), laid(2, {}))


def test_a_column_then_a_row_product_is_one_all_reduce_of_the_result() -> None:
    found = work(lambda w, v, x: jnp.tanh(jnp.tanh(x @ w) @ v), W, V, X)
    assert found.flops == {"float32": 2 * (4 * 8 * 32 + 4 * 32 * 8) / 4}
    assert found.sends == {("all-reduce", T): (1, 4 * 8 * 4)}
    assert found.outs[0].dims == ((), ())


def test_sums_that_are_added_are_one_collective_where_the_compiler_merges_them() -> None:
    both = lambda w, v, x: jnp.tanh(jnp.tanh(x @ w) @ v + jnp.sin(x @ w) @ v)  # noqa: E731
    assert work(both, W, V, X).sends == {("all-reduce", T): (1, 128)}
    assert work(both, W, V, X, merges=False).sends == {("all-reduce", T): (2, 256)}


def test_gradients_leave_where_they_are_made_and_weights_are_there_until_they_are_read() -> None:
    """Of h [4, 16], g [8, 16] and y [4, 8] in float32, 256, 512 and 128 bytes, and two weights of 512 bytes."""
    whole = laid(2, {}, weight=True)
    program = flat(
        jax.make_jaxpr(lambda w, v, x: ((h := x @ w) @ v, x.T @ h))(*(jnp.zeros(s) for s in ((8, 16), (16, 8), (4, 8))))
    )
    found = propagate(program, [whole, whole, laid(2, {})], {}, gradients=[1])
    assert found.live == 256 + 128 + 512
    assert found.bare == 256 + 128 + 512
    assert found.gathered == 512 + 512 + 256
    first = propagate(program, [whole, whole, laid(2, {})], {}, gradients=[0, 1])
    assert (first.live, first.bare) == (256 + 128 + 512, 256 + 512)


def test_exponentials_of_a_loop_are_kept_for_all_that_read_them() -> None:
    """Of a product [4, 32], 256 bytes in bfloat16 and 512 in float32, whose sums are 16 bytes."""

    def softmax(x: Any, w: Any) -> Any:
        product = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
        found = jnp.exp(product.astype(jnp.float32))
        return found / found.sum(-1, keepdims=True)

    weights = (8, 32), laid(2, {})
    assert work(softmax, ((4, 8), laid(2, {})), weights).live == 256 + 16
    looped = work(
        lambda x, w: jax.lax.scan(lambda _, rows: (0.0, softmax(rows, w)), 0.0, x)[1],
        ((3, 4, 8), laid(3, {})),
        weights,
    )
    assert looped.live == 3 * 512 + 512 + 16 + 4  # and what it carries


def test_a_region_that_lays_its_arrays_by_hand_is_believed() -> None:
    mesh = jax.make_mesh((4,), T, axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    doubled = jax.shard_map(lambda x: 2 * x, mesh=mesh, in_specs=P(None, "tensor"), out_specs=P(None, "tensor"))
    assert work(doubled, ((4, 8), laid(2, {}))).outs[0].dims == ((), T)
    gathered = work(doubled, ((4, 8), laid(2, {0: T})))
    assert gathered.outs[0].dims == ((), T)
    assert gathered.sends == {("all-to-all", T): (1, 4 * 8 * 4 / 4)}


def test_a_product_waits_for_what_it_reads_and_writes_longer_than_it_computes() -> None:
    """[64, 32] @ [32, 128]: 2 x 64 x 32 x 128 operations of 57,344 bytes, 9.1 a byte."""
    args = ((64, 32), laid(2, {})), ((32, 128), laid(2, {}))
    size = 4 * (64 * 32 + 32 * 128 + 64 * 128)
    assert work(jnp.matmul, *args, ridge=9.0).moved == 0
    assert work(jnp.matmul, *args, ridge=18.0).moved == pytest.approx(size - 2 * 64 * 32 * 128 / 18)
    assert work(jnp.matmul, *args).moved == 0


def test_what_a_product_reads_of_fused_operations_is_written_once() -> None:
    def twice(x: Any, w: Any) -> Any:
        y = jnp.exp(x)
        return y @ w, y.T @ y

    args = ((64, 32), laid(2, {})), ((32, 128), laid(2, {}))
    assert work(twice, *args).moved == 64 * 32 * 4
    assert work(lambda x, w: x.astype(jnp.float32) @ w, *args).moved == 0


def test_a_kernel_has_the_products_of_the_plain_operations_and_its_own_traffic() -> None:
    def attend(q: Any, k: Any) -> Any:
        plain = lambda q, k: jax.nn.softmax(q @ k.T) @ k  # noqa: E731
        return jax.lax.platform_dependent(q, k, tpu=lambda q, k: q, default=plain)

    args = ((64, 32), laid(2, {})), ((64, 32), laid(2, {}))
    elsewhere, on_tpu = work(attend, *args), work(attend, *args, kernels=True)
    assert elsewhere.flops == on_tpu.flops == {"float32": 2 * 2 * 64 * 64 * 32}
    assert elsewhere.moved > 64 * 64 * 4
    assert on_tpu.moved == 4  # the number of the platform


def test_a_sum_that_meets_a_shard_is_scattered_and_its_input_gathered_once() -> None:
    """Sequence parallelism: x lies in shards of its first dim between the products."""
    shard = ((4, 8), laid(2, {0: T}))
    found = work(lambda w, v, x: x + jnp.tanh(x @ w) @ v + jnp.sin(x @ w) @ v, W, V, shard)
    # The first product is summed into x's shards; what is added to that then is too.
    assert found.sends == {("all-gather", T): (1, 128), ("reduce-scatter", T): (2, 256)}
    assert found.outs[0].dims == (T, ())


def test_a_lookup_in_rows_that_lie_elsewhere_is_a_sum() -> None:
    def lookup(table: Any, rows: Any) -> Any:
        return jnp.tanh(table[rows.astype(jnp.int32)])

    cut, whole = laid(2, {0: T}, weight=True), laid(1, {})
    assert work(lookup, ((16, 8), cut), ((4,), whole)).sends == {("all-reduce", T): (1, 4 * 8 * 4)}
    features = laid(2, {1: T}, weight=True)
    found = work(lookup, ((16, 8), features), ((4,), whole))
    assert found.sends == {}
    assert found.outs[0].dims == ((), T)


def test_heads_split_off_a_dim_keep_its_axis_if_they_divide() -> None:
    split = lambda x: jnp.tanh(x.reshape(2, 4, 2, 4))  # noqa: E731
    kept = work(split, ((2, 4, 8), laid(3, {2: T})), sizes=2)
    assert kept.outs[0].dims == ((), (), T, ())
    assert kept.sends == {}
    gathered = work(split, ((2, 4, 8), laid(3, {2: T})), sizes=4)
    assert gathered.sends == {("all-gather", T): (1, 2 * 4 * 8 * 4)}


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def loop(w: Any, v: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (jnp.tanh(jnp.tanh(x @ w) @ v), None), x, None, length=5)[0]

    found = work(loop, W, V, X)
    assert found.sends == {("all-reduce", T): (5, 5 * 128)}
    assert found.flops == {"float32": 5 * 2 * (4 * 8 * 32 + 4 * 32 * 8) / 4}


CONFIGS: dict[str, Callable[..., Config]] = {"decoder": decoder, "mlp": whole_mlp, "mixer": image_mixer}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("model", list(CONFIGS))
def test_what_blocks_send_is_what_xla_compiles(model: str, tensor: int, remat: str) -> None:
    """To the byte, but for the squared norm of the gradients and the metrics."""
    config = CONFIGS[model]({"data": 1, "stage": 1, "tensor": tensor}, f"cpu:{tensor}", batch_size=4, remat=remat)
    plan = config.plan()
    devices = jax.devices()[:tensor]
    step = compile_train_step(
        config.model, config.loss, config.make_optimizer(), plan, config.abstract_batch(), devices=devices
    )
    compiled = sum(row["wire_bytes"] for row in collective_rows(step.compiled.as_text(), plan.mesh.sizes))
    estimated = Estimator(Subject(config, config.mesh.target)).estimate(choice_of(config)).wire_bytes
    scalars = 64 * 2 * (tensor - 1) / tensor
    assert 0 <= compiled - estimated <= scalars


def test_twice_the_tensor_axis_halves_the_products_of_a_block() -> None:
    flops = []
    for tensor in (1, 2, 4):
        config = decoder({"data": 1, "stage": 1, "tensor": tensor}, f"cpu:{tensor}", batch_size=4)
        flops.append(Estimator(Subject(config, config.mesh.target)).estimate(choice_of(config)).flops)
    assert flops[0] == pytest.approx(2 * flops[1]) == pytest.approx(4 * flops[2])


def test_costs_grow_linearly_with_the_examples() -> None:
    """Traced with 2 and 4 examples, and true of 8."""
    config = decoder({"data": 1, "stage": 1, "tensor": 4}, "cpu:4")
    subject = Subject(config, "cpu:4")
    estimator = Estimator(subject)
    split = estimator.split(config.mesh.axes, None, None, (), False)
    cost = subject.costs.block(0, "full", split).backward
    part = subject.parts.block(0, "full", 8)
    assert part.backward is not None
    eight = subject.costs.work(part, split)
    assert sum(one.at(8) for one in cost.flops.values()) == pytest.approx(sum(eight.flops.values()))
    assert cost.moved.at(8) == pytest.approx(eight.moved)
    for key, (count, payload) in cost.sends.items():
        assert (count, payload.at(8)) == pytest.approx(eight.sends[key])


def test_a_program_computes_nothing_twice() -> None:
    made = flat(jax.make_jaxpr(lambda x: jnp.tanh(x) + jnp.tanh(x))(jnp.ones(3)))
    assert [op.name for op in made.ops] == ["tanh", "add"]
