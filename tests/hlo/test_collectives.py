"""Kinds, axes, counts and bytes of collectives.  Every expected number is worked out by hand from shapes."""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.hlo import collectives, parse, totals
from shardlab.hlo.collectives import replica_groups

CUBE = {"data": 2, "stage": 2, "tensor": 2}
ODD = {"data": 2, "tensor": 3}
LONG = {"data": 8, "stage": 1}
Rows = list[tuple[str, tuple[str, ...], int, int, int]]


def build_mesh(axes: Mapping[str, int]) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(axes.values())]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def text_of(step: Any, *arguments: jax.ShapeDtypeStruct) -> str:
    text: str = step.lower(*arguments).compile().as_text()
    return text


def manual(
    f: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
    *arguments: jax.ShapeDtypeStruct,
    axes: Mapping[str, int] = CUBE,
) -> str:
    """The compiled text of `f` under shard_map over all axes."""
    mesh = build_mesh(axes)
    step = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return text_of(jax.jit(step), *arguments)


def automatic(f: Callable[..., Any], in_specs: tuple[P, ...], out_specs: P, *arguments: jax.ShapeDtypeStruct) -> str:
    """The compiled text of `f` on arrays with these specs, split by GSPMD."""
    mesh = build_mesh(CUBE)
    shardings = tuple(NamedSharding(mesh, spec) for spec in in_specs)
    return text_of(jax.jit(f, in_shardings=shardings, out_shardings=NamedSharding(mesh, out_specs)), *arguments)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def rows(text: str, axes: Mapping[str, int]) -> Rows:
    return [(t.kind, t.axes, t.count, t.payload_bytes, t.wire_bytes) for t in totals(collectives(text, axes))]


def nested(x: jax.Array) -> jax.Array:
    def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        return lax.psum(jnp.sin(c), "data"), None

    def outer(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        c, _ = lax.scan(inner, c, None, length=5)
        return lax.ppermute(c, "stage", [(0, 1), (1, 0)]), None

    return lax.scan(outer, x, None, length=7)[0]


def switched(x: jax.Array, i: jax.Array) -> jax.Array:
    branches = (
        lambda x: lax.psum(x, ("data", "stage")),
        lambda x: lax.psum(lax.psum(x, "tensor") * 2, "tensor"),
        lambda x: x * 3,
    )
    return lax.switch(i, branches, x)


X = array(8, 16)  # 512 bytes; 256 when split in two
INDEX = array(dtype=jnp.int32)


def split_inside_a_stage() -> str:
    """(4, 16) @ (16, 32 / 2), then (4, 16) @ (32 / 2, 16): a sum over tensor, then one over data."""
    mesh = build_mesh(CUBE)
    up, down = (NamedSharding(mesh, spec) for spec in (P(None, "tensor"), P("tensor", None)))
    f = jax.shard_map(
        lambda x, w, v: lax.psum(jnp.tanh(x @ w) @ v, "data"),
        mesh=mesh,
        in_specs=(P("data"), P(), P()),
        out_specs=P(),
        axis_names={"data", "stage"},
        check_vma=False,
    )
    shardings = (NamedSharding(mesh, P("data")), up, down)
    return text_of(jax.jit(f, in_shardings=shardings), X, array(16, 32), array(32, 16))


PROGRAMS: dict[str, tuple[Mapping[str, int], Callable[[], str], Rows]] = {
    "psum": (
        CUBE,
        lambda: manual(lambda x: lax.psum(x, "data"), P("data"), P(), X),
        [("all-reduce", ("data",), 1, 256, 256)],
    ),
    "psum over two axes, not neighbours": (
        CUBE,
        lambda: manual(lambda x: lax.psum(x, ("data", "tensor")), P("data"), P(), X),
        [("all-reduce", ("data", "tensor"), 1, 256, 384)],
    ),
    "psum of a tree is one all-reduce": (
        CUBE,
        lambda: manual(lambda x, y: lax.psum((x, y, x * 2), "stage"), (P("data"), P()), P(), X, array(4)),
        [("all-reduce", ("stage",), 1, 256 + 16 + 256, 528)],
    ),
    "psum over three of a scalar": (
        ODD,
        lambda: manual(lambda x: lax.psum(x, "tensor"), P(), P(), array(), axes=ODD),
        [("all-reduce", ("tensor",), 1, 4, 5)],  # 16/3 bytes
    ),
    "psum_scatter over two axes": (
        CUBE,
        lambda: manual(
            lambda x: lax.psum_scatter(x, ("data", "tensor"), scatter_dimension=1, tiled=True),
            P("stage"),
            P("stage", ("data", "tensor")),
            X,
        ),
        [("reduce-scatter", ("data", "tensor"), 1, 256, 192)],
    ),
    "psum_scatter over three": (
        ODD,
        lambda: manual(
            lambda x: lax.psum_scatter(x, "tensor", tiled=True),
            P("data"),
            P(("data", "tensor")),
            array(12, 5),
            axes=ODD,
        ),
        [("reduce-scatter", ("tensor",), 1, 120, 80)],
    ),
    "all_gather over everything": (
        CUBE,
        lambda: manual(lambda x: lax.all_gather(x, tuple(CUBE), tiled=True), P(tuple(CUBE)), P(), X),
        [("all-gather", ("data", "stage", "tensor"), 1, 512, 448)],
    ),
    "all_gather over the middle axis": (
        CUBE,
        lambda: manual(lambda x: lax.all_gather(x, "stage", tiled=True), P("stage"), P(), X),
        [("all-gather", ("stage",), 1, 512, 256)],
    ),
    "all_to_all": (
        CUBE,
        lambda: manual(lambda x: lax.all_to_all(x, "tensor", 0, 1, tiled=True), P(None, "tensor"), P("tensor"), X),
        [("all-to-all", ("tensor",), 1, 256, 128)],
    ),
    "ppermute around a ring": (
        ODD,
        lambda: manual(
            lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 2), (2, 0)]), P("data"), P("data"), X, axes=ODD
        ),
        [("collective-permute", ("tensor",), 1, 256, 256)],
    ),
    "ppermute, open": (
        CUBE,
        lambda: manual(lambda x: lax.ppermute(x, "stage", [(0, 1)]), P("stage"), P("stage"), X),
        [("collective-permute", ("stage",), 1, 256, 256)],
    ),
    "ppermute over two axes": (
        CUBE,
        lambda: manual(
            lambda x: lax.ppermute(x, ("data", "stage"), [(i, (i + 1) % 4) for i in range(4)]),
            P("tensor"),
            P("tensor"),
            X,
        ),
        [("collective-permute", ("data", "stage"), 1, 256, 256)],
    ),
    "manual data, automatic tensor": (
        CUBE,
        split_inside_a_stage,
        [("all-reduce", ("data",), 1, 256, 256), ("all-reduce", ("tensor",), 1, 256, 256)],
    ),
    "matmuls split by GSPMD": (
        CUBE,
        lambda: automatic(
            lambda x, w, v: jnp.tanh(x @ w) @ v,
            (P("data"), P(None, "tensor"), P("tensor", None)),
            P("data"),
            X,
            array(16, 32),
            array(32, 16),
        ),
        [("all-reduce", ("tensor",), 1, 256, 256)],
    ),
    "gathered by GSPMD": (
        CUBE,
        lambda: automatic(lambda x: x * 2, (P(("data", "tensor")),), P(), X),
        [("all-gather", ("data", "tensor"), 1, 512, 384)],
    ),
    "a scan in a scan": (
        CUBE,
        lambda: manual(nested, P("tensor"), P("tensor"), X),
        [("all-reduce", ("data",), 35, 8960, 8960), ("collective-permute", ("stage",), 7, 1792, 1792)],
    ),
    "the costliest branch": (  # 512 x 2(4-1)/4 = 768 in the first, 2 x 512 in the second
        CUBE,
        lambda: manual(switched, (P(), P()), P(), X, INDEX),
        [("all-reduce", ("tensor",), 2, 1024, 1024)],
    ),
    "one-sided cond": (
        CUBE,
        lambda: manual(
            lambda x, i: lax.cond(i > 0, lambda x: lax.pmax(x, "data"), lambda x: x, x),
            (P(), P()),
            P(),
            array(8, 16, dtype=jnp.int8),
            INDEX,
        ),
        [("all-reduce", ("data",), 1, 128, 128)],
    ),
    "an axis of size 1": (
        LONG,
        lambda: manual(lambda x: lax.psum(x, "stage"), P("data"), P("data"), X, axes=LONG),
        [],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs(name: str) -> None:
    axes, compiled, expected = PROGRAMS[name]
    assert sorted(rows(compiled(), axes)) == sorted(expected)


def test_every_branch() -> None:
    text = manual(switched, (P(), P()), P(), X, INDEX)
    found = collectives(text, CUBE, every_branch=True)
    assert [(c.axes, c.count, c.wire_bytes, c.in_branch) for c in found] == [
        (("data", "stage"), 0, 0, True),
        (("tensor",), 1, 512, True),
        (("tensor",), 1, 512, True),
    ]
    assert [c.axes for c in collectives(text, CUBE)] == [("tensor",), ("tensor",)]


def test_where_it_came_from() -> None:
    (reduce, permute) = collectives(manual(nested, P("tensor"), P("tensor"), X), CUBE)
    first = nested.__code__.co_firstlineno
    assert reduce.op_name.endswith("/psum")
    assert reduce.source.rpartition("/")[2] == f"test_collectives.py:{first + 2}"
    assert permute.source.rpartition("/")[2] == f"test_collectives.py:{first + 6}"
    assert (reduce.dtype, reduce.in_branch, reduce.exact, reduce.group_size) == ("f32", False, True, 2)
    outer, _, inner = (reduce.loop or "").partition("/")
    assert outer == permute.loop
    assert (outer[-2:], inner[-2:]) == ("*7", "*5")


def test_unknown_trips_are_lower_bounds() -> None:
    text = manual(lambda x, n: lax.fori_loop(0, n, lambda i, c: lax.psum(c, "data"), x), (P(), P()), P(), X, INDEX)
    found = collectives(text, CUBE)
    assert [(c.count, c.exact) for c in found] == [(1, False)]
    assert [t.exact for t in totals(found)] == [False]


def test_cpu_reduces_bf16_in_fp32() -> None:
    def found(dtype: Any) -> list[tuple[str, int, bool]]:
        text = manual(lambda x: lax.psum(x, "data"), P("data"), P(), array(8, 16, dtype=dtype))
        return [(c.dtype, c.payload_bytes, c.promoted) for c in collectives(text, CUBE)]

    assert found(jnp.bfloat16) == [("f32", 256, True)]
    assert found(jnp.float32) == [("f32", 256, False)]


def test_cpu_slices_an_all_reduce() -> None:
    """x (8, 16) @ w (16, 32), contracted over tensor: (8, 32) is summed, then half of its rows kept."""
    mesh = build_mesh(CUBE)

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P()))

    found = collectives(automatic(f, (P(None, "tensor"), P("tensor", None)), P("tensor"), X, array(16, 32)), CUBE)
    assert [(c.kind, c.as_reduce_scatter) for c in found] == [("all-reduce", True)]
    (as_is,) = totals(found)
    assert (as_is.kind, as_is.payload_bytes, as_is.wire_bytes) == ("all-reduce", 1024, 1024)
    (folded,) = totals(found, sliced_as_reduce_scatter=True)
    assert (folded.kind, folded.payload_bytes, folded.wire_bytes) == ("reduce-scatter", 1024, 512)


SLICED = """
HloModule sliced, num_partitions=4

%fused (p0: f32[8], p1: s32[]) -> f32[2] {{
  %p0 = f32[8]{{0}} parameter(0)
  %p1 = s32[] parameter(1)
  %half = f32[8]{{0}} multiply(%p0, %p0)
  ROOT %part = f32[{kept}]{{0}} dynamic-slice(%half, %p1), dynamic_slice_sizes={{{kept}}}
}}

ENTRY %main (x: f32[8], i: s32[]) -> (f32[2], f32[8]) {{
  %x = f32[8]{{0}} parameter(0)
  %i = s32[] parameter(1)
  %start = f32[8]{{0}} all-reduce-start(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %done = f32[8]{{0}} all-reduce-done(%start)
  %mine = f32[{kept}]{{0}} fusion(%done, %i), kind=kLoop, calls=%fused
  ROOT %both = (f32[{kept}]{{0}}, f32[8]{{0}}) tuple(%mine, {also})
}}
"""


@pytest.mark.parametrize(
    ("kept", "also", "expected"),
    [(2, "%x", True), (4, "%x", False), (2, "%done", False)],
    ids=["1/n", "1/2", "read whole"],
)
def test_only_slices_of_one_nth_count_as_a_reduce_scatter(kept: int, also: str, expected: bool) -> None:
    (one,) = collectives(SLICED.format(kept=kept, also=also), {"data": 4})
    assert (one.kind, one.as_reduce_scatter) == ("all-reduce", expected)


GPU = """
HloModule gpu, num_partitions=8

%wrapped (p: bf16[1024]) -> bf16[512] {
  %p = bf16[1024]{0} parameter(0)
  ROOT %scatter = bf16[512]{0} reduce-scatter(%p), channel_id=4, replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: bf16[1024]) -> bf16[2048] {
  %x = bf16[1024]{0} parameter(0)
  %ag-start = ((bf16[1024]{0}), bf16[2048]{0}) all-gather-start(%x), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(2,1,0), dimensions={0}
  %ag-done = bf16[2048]{0} all-gather-done(%ag-start)
  %ag-old-start = (bf16[1024]{0}, bf16[2048]{0}) all-gather-start(bf16[1024]{0} %x), channel_id=6, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
  %ag-old-done = bf16[2048]{0} all-gather-done(%ag-old-start)
  %ar-start = ((bf16[1024]{0}), bf16[1024]{0}) all-reduce-start(%x), channel_id=2, replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add
  %ar-done = bf16[1024]{0} all-reduce-done(%ar-start)
  %cp-start = (bf16[1024]{0}, bf16[1024]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{2,3},{4,5},{6,7}}
  %cp-done = bf16[1024]{0} collective-permute-done(%cp-start)
  %async-start = ((bf16[1024]{0}), bf16[512]{0}, s32[]) async-start(%x), calls=%wrapped
  %async-update = ((bf16[1024]{0}), bf16[512]{0}, s32[]) async-update(%async-start)
  %async-done = bf16[512]{0} async-done(%async-update), calls=%wrapped
  %rs-start = ((bf16[1024]{0}), bf16[512]{0}) reduce-scatter-start(%x), channel_id=5, replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  %rs-done = bf16[512]{0} reduce-scatter-done(%rs-start)
  %token = token[] after-all()
  %send = (bf16[1024]{0}, u32[], token[]) send(%x, %token), channel_id=7, frontend_attributes={_xla_send_recv_source_target_pairs="{{0,4},{1,5},{2,6},{3,7}}"}
  %send-done = token[] send-done(%send), channel_id=7
  %to-host = (bf16[1024]{0}, u32[], token[]) send(%x, %token), channel_id=8, is_host_transfer=true
  %permute-to-self = bf16[1024]{0} collective-permute(%x), channel_id=9, source_target_pairs={{0,0},{1,1}}
  %alone = bf16[1024]{0} all-reduce(%x), channel_id=10, replica_groups=[8,1]<=[8], to_apply=%add
  %no-channel = bf16[1024]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %everyone = bf16[1024]{0} all-reduce(%x), channel_id=11, replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_asynchronous_pairs_as_gpu_compilers_print_them() -> None:
    """x is 2,048 bytes."""
    found = [(c.name, c.kind, c.axes, c.count, c.payload_bytes, c.wire_bytes) for c in collectives(GPU, CUBE)]
    assert found == [
        ("scatter", "reduce-scatter", ("tensor",), 1, 2048, 1024),
        ("ag-start", "all-gather", ("data",), 1, 4096, 2048),
        ("ag-old-start", "all-gather", ("stage",), 1, 4096, 2048),
        ("ar-start", "all-reduce", ("data", "stage", "tensor"), 1, 2048, 3584),
        ("cp-start", "collective-permute", ("tensor",), 1, 2048, 2048),
        ("rs-start", "reduce-scatter", ("tensor",), 1, 2048, 1024),
        ("send", "collective-permute", ("data",), 1, 2048, 2048),
        ("everyone", "all-reduce", ("data", "stage", "tensor"), 1, 2048, 3584),
    ]


TPU = """
HloModule tpu, num_partitions=8

%all-reduce-scatter.1 (input: bf16[1000,128]) -> bf16[128,128] {
  %input = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[1024,128]{1,0:T(8,128)(2,1)} pad(%input, %zero), padding=0_24x0_0
  %all-reduce.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-reduce(%pad), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add.clone
  %partition-id = u32[] partition-id()
  %rows = u32[] constant(128)
  %offset = u32[] multiply(%partition-id, %rows)
  %none = u32[] constant(0)
  ROOT %part = bf16[128,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %offset, %none), dynamic_slice_sizes={128,128}
}

%begin (a: bf16[128,128]) -> bf16[1024,128] {
  %a = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=9, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion (b: bf16[128,128]) -> bf16[1024,128] {
  %b = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[1024,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%b), channel_id=9, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%end (c: bf16[128,128]) -> bf16[1024,128] {
  %c = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather(%c), channel_id=9, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (g: bf16[1000,128], w: bf16[128,128]) -> bf16[128,128] {
  %g = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %async-collective-start = bf16[1024,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%begin
  %fusion.1 = bf16[1024,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%async_collective_fusion
  %async-collective-done = bf16[1024,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%end
  ROOT %fusion.2 = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/dot_general" source_file="model.py" source_line=12}
}
"""  # noqa: E501


def test_fusions_as_tpu_compilers_print_them() -> None:
    """A reduce-scatter of 1,000 rows padded to 1,024, an all-gather in three pieces; 262,144 bytes each."""
    scatter, gather = collectives(TPU, CUBE)
    everywhere = ("data", "stage", "tensor")
    assert (scatter.kind, scatter.axes, scatter.count) == ("reduce-scatter", everywhere, 1)
    assert (scatter.payload_bytes, scatter.wire_bytes) == (262_144, 229_376)
    assert (scatter.op_name, scatter.source) == ("jit(step)/dot_general", "model.py:12")
    assert not scatter.as_reduce_scatter
    assert (gather.kind, gather.axes, gather.count) == ("all-gather", everywhere, 1)
    assert (gather.payload_bytes, gather.wire_bytes) == (262_144, 229_376)


ONE = """
HloModule one, num_partitions={devices}
ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0)
  ROOT %sum = f32[10]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""


def axes_of(groups: str, axes: Mapping[str, int]) -> tuple[str, ...]:
    (one,) = collectives(ONE.format(devices=math.prod(axes.values()), groups=groups), axes)
    return one.axes


def test_axes_of_every_product_of_axes() -> None:
    axes = {"a": 2, "b": 3, "c": 1, "d": 2}
    ids = np.arange(12).reshape(2, 3, 1, 2)
    names = list(axes)
    chosen = [c for size in (1, 2, 3) for c in itertools.combinations(["a", "b", "d"], size)]
    assert len(chosen) == 7
    for group_axes in chosen:
        inner = [names.index(name) for name in group_axes]
        outer = [k for k in range(4) if k not in inner]
        width = math.prod(axes[name] for name in group_axes)
        listed = ids.transpose(*outer, *inner).reshape(-1, width).tolist()
        braces = str(listed).replace(" ", "").replace("[", "{").replace("]", "}")
        iota = f"[{12 // width},{width}]<=[2,3,1,2]T({','.join(map(str, [*outer, *inner]))})"
        mesh = "mesh['x'=2,'y'=3,'z'=1,'w'=2] {" + ",".join(f"'{'xyzw'[k]}'" for k in inner) + "}"
        assert {axes_of(text, axes) for text in (braces, iota, mesh)} == {group_axes}, group_axes


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,6},{5,7}}", ("wide",)),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("wide",)),
        ("{{0,1,4,5},{2,3,6,7}}", ("data", "wide")),
    ],
)
def test_groups_that_are_a_part_of_a_product_of_axes_have_the_axes_they_cross(
    groups: str, axes: tuple[str, ...]
) -> None:
    assert axes_of(groups, {"data": 2, "wide": 4}) == axes


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2},{3,4,5,6,7}}",
        "{{0,1,2,3}}",  # not everyone
        "{{0,4},{1,2},{3,7},{5,6}}",  # the first is, the second is not
        "{{0,5},{1,4},{2,6},{3,7}}",  # the first crosses both, the last one
    ],
)
def test_groups_that_are_no_product_of_axes_are_not_guessed(groups: str) -> None:
    assert axes_of(groups, {"data": 2, "wide": 4}) == ("?",)


def test_parts_of_axes_and_meshes_in_another_order() -> None:
    """The mesh that XLA prints is its own: here 'x' of 8 in parts, and a transposed one."""
    assert replica_groups("mesh['x'=8] {'x':(1)2}") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert replica_groups("mesh['x'=8] {'x':(2)2}") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert replica_groups("mesh['x'=8] {'x':(4)2}") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert axes_of("mesh['x'=8] {'x':(2)2}", CUBE) == ("stage",)
    assert axes_of("mesh['x'=8] {'x':(1)2,'x':(4)2}", CUBE) == ("data", "tensor")
    assert replica_groups("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}") == (
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    )
    assert replica_groups("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'}") == ((0, 1), (2, 3))
    assert axes_of("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", CUBE) == ("tensor",)


def test_groups_in_a_new_form_are_an_error() -> None:
    with pytest.raises(ValueError, match="replica groups in a form that is not known: 'v4\\(0,1\\)'"):
        axes_of("v4(0,1)", CUBE)


def test_the_mesh_of_another_program_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"compiled for 8 devices, the mesh \(data=2, tensor=3\) has 6; give the axes"):
        collectives(ONE.format(devices=8, groups="{}"), ODD)


def test_a_parsed_module_is_as_good_as_its_text() -> None:
    text = manual(lambda x: lax.psum(x, "data"), P("data"), P(), jax.ShapeDtypeStruct((8, 4), jnp.float32))
    assert collectives(parse(text), CUBE) == collectives(text, CUBE)


def counted(text: str, devices: int) -> tuple[int, int]:
    """Collectives and their wire bytes by another road: lines taken apart by patterns, each computation's total by hand
    over to those that call it, as often as they do.
    """
    width = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "f64": 8, "pred": 1}
    share: dict[str, Callable[[int, int], int]] = {
        "all-reduce": lambda n, size: 2 * (n - 1) * size // n,
        "all-gather": lambda n, size: (n - 1) * size // n,
        "reduce-scatter": lambda n, size: (n - 1) * size,
        "all-to-all": lambda n, size: (n - 1) * size // n,
        "collective-permute": lambda n, size: size,
    }
    own: dict[str, list[tuple[int, int]]] = {}
    calls: dict[str, list[tuple[int, str]]] = {}
    here = entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            here = header[2]
            entry = here if header[1] else entry
            own[here], calls[here] = [], []
        elif found := re.match(rf" .* = (.*?) ({'|'.join(share)})(?:-start)?\(", line):
            result, kind = found[1], found[2]
            size = 0
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
                size += width[dtype] * math.prod(int(d) for d in dims.split(",") if d)
            groups = re.search(r"replica_groups=(\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[(.*?)\].*?\{(.*?)\})", line)
            n = devices
            if groups and groups[2]:
                n = int(groups[2])
            elif groups and groups[3]:
                n = len(groups[3].split(","))
            elif groups and groups[4]:
                sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[4]))
                n = math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", groups[5]))
            own[here].append((1, share[kind](n, size)))
        elif loop := re.search(r"while\(.*body=%([\w.\-]+).*\"known_trip_count\":\{\"n\":\"(\d+)\"", line):
            calls[here].append((int(loop[2]), loop[1]))
        elif call := re.search(r" call\(.*to_apply=%([\w.\-]+)", line):
            calls[here].append((1, call[1]))

    def total(name: str) -> tuple[int, int]:
        inner = [(times, total(callee)) for times, callee in calls[name]]
        return (
            sum(n for n, _ in own[name]) + sum(times * n for times, (n, _) in inner),
            sum(size for _, size in own[name]) + sum(times * size for times, (_, size) in inner),
        )

    return total(entry)


def test_totals_beside_an_independent_count_of_a_compiled_step() -> None:
    """Layers over `tensor`, examples over `data`, in each microbatch a send over `stage`: to the byte."""
    mesh = build_mesh(CUBE)

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        whole = lax.all_gather(w, "data", axis=0, tiled=True)
        return jnp.tanh(lax.psum(x @ whole, "tensor")), None

    def microbatch(x: jax.Array, _: None, w: jax.Array) -> tuple[jax.Array, None]:
        y, _ = lax.scan(layer, x, w)
        return lax.ppermute(y, "stage", [(0, 1), (1, 0)]), None

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        y, _ = lax.scan(lambda c, i: microbatch(c, i, w), x, None, length=5)
        return lax.psum((y**2).sum(), ("data", "stage"))

    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        w = w - 0.1 * jax.grad(loss)(w, x)
        return w

    spec = P(None, "data", "tensor")
    f = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(spec, P("data")), out_specs=spec, check_vma=False))
    shapes = jax.ShapeDtypeStruct((3, 16, 32), jnp.float32), jax.ShapeDtypeStruct((4, 16), jnp.float32)
    text = f.lower(*shapes).compile().as_text() or ""
    found = collectives(text, CUBE)
    assert len(found) >= 5
    assert (sum(one.count for one in found), sum(one.wire_bytes for one in found)) == counted(text, 8)
