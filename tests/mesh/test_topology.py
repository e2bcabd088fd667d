"""Meshes laid on pods and clusters: who gets which links, in which order, and how it is told."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.topology import Layout, collective_seconds, lay_out

GOLDEN = Path(__file__).parents[1] / "golden" / "topology"


def mesh(target: str, sizes: str, **roles: Any) -> MeshSpec:
    axes = dict.fromkeys(("data", "fsdp", "stage", "expert", "tensor"))
    for part in sizes.split():
        axis, _, size = part.partition("=")
        axes[axis] = int(size)
    found = {axis: size for axis, size in axes.items() if size is not None}
    batch = tuple(axis for axis in ("data", "fsdp") if axis in found)
    return MeshSpec(found, batch=batch, stage="stage" if "stage" in found else None, target=target, **roles)


def where(layout: Layout) -> dict[str, str]:
    """Of every axis the parts of dims, as x4 (whole or neighbours), x4/2 (every 2nd), with o where it closes."""
    return {
        links.axis: " ".join(
            f"{part.name}{part.size}{f'/{part.stride}' if part.stride > 1 else ''}{'o' if part.wrap else ''}"
            for part in links.dims
        )
        for links in layout.axes
    }


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (mesh("tpu:v5p:4x8x8", "data=64 tensor=4"), "y8o z8o @360, x4o @180"),
        (mesh("tpu:v5p:4x8x8", "data=32 tensor=8"), "x4o z8o @360, y8o @180"),
        (mesh("tpu:v5p:4x8x8", "data=256"), "x4o y8o z8o @540"),
        (mesh("tpu:v5e:16x16", "data=64 tensor=4"), "x4/4o y16o @90, x4 @45"),
        (mesh("tpu:v5e:4x4", "data=4 tensor=4"), "y4 @45, x4 @45"),
        # As many cuts as with four in a row, and a square is a ring.
        (mesh("tpu:v5e:16x2", "data=8 tensor=4"), "x8/2o @45, x2 y2 @90"),
        (mesh("tpu:v5p:4x8x8", "data=8 stage=4 tensor=8"), "z8o @180, x4o @180, y8o @180"),
        (mesh("tpu:v5p:2x2x2", "data=2 stage=2 tensor=2"), "y2 @90, z2 @90, x2 @90"),
        (mesh("tpu:v7x:2x2x1", "data=4 tensor=2"), "x2 y2 @90, core2 @540"),
        (mesh("gpu:h200:8x8", "data=16 tensor=4"), "gpu2/4 island8 @100, gpu4 @450"),
        (mesh("gpu:h200:2x8", "expert=4 tensor=4"), "gpu2/4 island2 @100, gpu4 @450"),
        (mesh("gpu:h200:8x8", "stage=8 tensor=8"), "island8 @50, gpu8 @450"),
        (mesh("gpu:gb200:18x4", "data=9 tensor=8"), "gpu9/8 @900, gpu8 @900"),
        (mesh("2*tpu:v5e:16x16", "data=32 tensor=16", dcn={"data": 2}), "y16o slice2 @47.449, x16o @90"),
        (mesh("2*tpu:v5e:16x16", "stage=2 tensor=256", dcn={"stage": 2}), "slice2 @3.125, x16o y16o @180"),
        (mesh("cpu:8", "data=4 tensor=2"), "device4/2 @0, device2 @0"),
    ],
    ids=str,
)
def test_the_chattiest_axis_gets_the_best_links(spec: MeshSpec, expected: str) -> None:
    layout = lay_out(spec)
    places = where(layout)
    found = [f"{places[links.axis]} @{links.bandwidth / 1e9:g}" for links in layout.axes]
    assert ", ".join(found) == expected


def test_the_tier_is_that_of_the_slowest_links() -> None:
    tiers = {
        "tpu:v5e:4x4": ["ici", "ici"],
        "gpu:h100:2x8": ["network", "nvlink"],
        "gpu:a6000:4x4": ["network", "host"],
        "cpu:16": ["host", "host"],
    }
    for target, expected in tiers.items():
        layout = lay_out(mesh(target, "data=4 tensor=4"))
        assert [links.tier for links in layout.axes] == expected
    sliced = lay_out(mesh("2*tpu:v5e:4x4", "data=8 tensor=4", dcn={"data": 2}))
    assert [links.tier for links in sliced.axes] == ["dcn", "ici"]


def test_traffic_says_which_axis_is_chattiest() -> None:
    spec = mesh("gpu:h100:2x8", "data=2 stage=2 tensor=4")
    assert where(lay_out(spec)) == {"data": "gpu2/4", "stage": "island2", "tensor": "gpu4"}
    busy = lay_out(spec, traffic={"stage": 9e9, "tensor": 1e9})
    assert where(busy) == {"data": "island2", "stage": "gpu2", "tensor": "gpu4/2"}


def test_with_traffic_a_dim_is_cut_where_that_takes_less_time() -> None:
    spec = mesh("tpu:v5e:16x16", "data=64 tensor=4")
    # Four chips of a square are a ring, four in a row are a line.
    assert where(lay_out(spec, traffic={"tensor": 1e9})) == {"data": "x8/2o y8/2o", "tensor": "x2 y2"}


def test_traffic_of_an_axis_that_is_not_there() -> None:
    with pytest.raises(DeclarationError, match="mesh axis 'tensr': is not an axis of the mesh"):
        lay_out(mesh("tpu:v5e:4x4", "data=4 tensor=4"), traffic={"tensr": 1.0})


# --- order

DIVISORS = {n: [k for k in range(1, n + 1) if n % k == 0] for n in range(1, 4097)}


@st.composite
def specs(draw: st.DrawFn) -> MeshSpec:
    kind = draw(st.sampled_from(["v4", "v5e", "v5p", "v6e", "v7x"]))
    dims = 2 if kind in ("v5e", "v6e") else 3
    sizes = [2, 4, 8, 16] if dims == 2 else [1, 2, 4, 8]
    shape = [draw(st.sampled_from(sizes)) for _ in range(dims)]
    slices = draw(st.sampled_from([1, 1, 2]))
    left = math.prod(shape) * (2 if kind == "v7x" else 1)
    found = {}
    for axis in ("fsdp", "stage", "expert", "tensor"):
        found[axis] = draw(st.sampled_from(DIVISORS[left]))
        left //= found[axis]
    text = f"{'2*' if slices == 2 else ''}tpu:{kind}:{'x'.join(map(str, shape))}"
    axes = {"data": left * slices, **found}
    return MeshSpec(axes, batch=("data", "fsdp"), stage="stage", target=text, dcn={"data": 2} if slices == 2 else {})


def coordinates(layout: Layout, place: int) -> tuple[int, ...]:
    out = []
    for dim in layout.dims:
        place, digit = divmod(place, dim.size)
        out.append(digit)
    return tuple(out)


@settings(max_examples=200, deadline=None)
@given(specs())
def test_order_is_a_permutation_and_rings_run_over_neighbours(spec: MeshSpec) -> None:
    layout = lay_out(spec)
    assert sorted(layout.order) == list(range(spec.num_devices))
    stride = spec.num_devices
    for links in layout.axes:
        stride //= links.size
        assert math.prod(part.size for part in links.dims) == links.size
        # The positions of this axis, all others at 0.
        line = [coordinates(layout, layout.order[k * stride]) for k in range(links.size)]
        by_name = {part.name: part for part in links.dims}
        for before, after in itertools.pairwise(line):
            moved = [(dim, abs(a - b)) for dim, a, b in zip(layout.dims, before, after, strict=True) if a != b]
            # One step of the axis's first dim is one step of its part; a snake moves on one dim at a time.
            assert all(dim.name in by_name for dim, _ in moved)
            if len(links.dims) == 1 or links.axis == spec.stage:
                ((dim, distance),) = moved
                assert distance == by_name[dim.name].stride
        for part in links.dims:
            if part.wrap:
                assert part.stride * part.size == part.dim.size
                assert part.dim.wrap


@settings(max_examples=100, deadline=None)
@given(specs())
def test_the_parts_of_all_axes_fill_every_dim_once(spec: MeshSpec) -> None:
    layout = lay_out(spec)
    for dim in layout.dims:
        parts = sorted(
            (part for links in layout.axes for part in links.dims if part.dim == dim), key=lambda p: p.stride
        )
        reached = 1
        for part in parts:
            assert part.stride == reached
            reached *= part.size
        assert reached == dim.size


@settings(max_examples=100, deadline=None)
@given(specs())
def test_slices_are_outermost(spec: MeshSpec) -> None:
    layout = lay_out(spec)
    if not spec.dcn:
        return
    half = spec.num_devices // 2
    assert {place // half for place in layout.order[:half]} == {0}
    assert {place // half for place in layout.order[half:]} == {1}


def test_a_stage_axis_over_several_dims_is_a_snake() -> None:
    stages = lay_out(mesh("tpu:v5e:4x4", "stage=8 tensor=2"))
    assert where(stages) == {"stage": "x2/2 y4", "tensor": "x2"}
    assert [coordinates(stages, place) for place in stages.order[::2]] == [
        *((0, 0), (2, 0)),
        *((2, 1), (0, 1)),
        *((0, 2), (2, 2)),
        *((2, 3), (0, 3)),
    ]
    plain = lay_out(mesh("tpu:v5e:4x4", "data=8 tensor=2"))
    assert [coordinates(plain, place)[0] for place in plain.order[::2]] == [0, 2, 0, 2, 0, 2, 0, 2]


# --- what the user may say


def test_links_put_an_axis_on_the_named_dims() -> None:
    spec = mesh("tpu:v5p:4x8x8", "data=32 tensor=8", links={"tensor": "z"})
    assert where(lay_out(spec)) == {"data": "x4o y8o", "tensor": "z8o"}
    spec = mesh("tpu:v5e:16x16", "data=64 tensor=4", links={"tensor": ("x", "y"), "data": ("y", "x")})
    assert where(lay_out(spec))["tensor"] == "x4"
    spec = mesh("gpu:h100:4x8", "data=8 tensor=4", links={"tensor": "island"})
    assert where(lay_out(spec)) == {"data": "gpu8", "tensor": "island4"}


def test_links_that_leave_no_way() -> None:
    with pytest.raises(DeclarationError) as error:
        lay_out(mesh("tpu:v5p:4x8x8", "data=32 tensor=8", links={"tensor": "x"}))
    assert str(error.value) == (
        "mesh data=32 (batch) x tensor=8 on tpu:v5p:4x8x8: what is declared (tensor on x) leaves no way to lay the "
        "axes on the dims (x 4, y 8, z 8); name more dims for an axis, or leave it out of links"
    )


def test_dcn_that_is_not_how_the_target_is_split() -> None:
    with pytest.raises(DeclarationError) as error:
        lay_out(mesh("tpu:v5e:4x4", "data=8 tensor=2", dcn={"data": 2}))
    assert str(error.value) == (
        "mesh data=8 (batch) x tensor=2 on tpu:v5e:4x4: dcn (data=2) is not how tpu:v5e:4x4 is split: it has 1 slice; "
        "declare no dcn, or a target of several slices, like 2*tpu:v5e:16x16"
    )
    with pytest.raises(DeclarationError) as error:
        lay_out(mesh("gpu:h100:4x8", "data=8 tensor=4", dcn={"data": 2}))
    assert str(error.value) == (
        "mesh data=8 (batch) x tensor=4 on gpu:h100:4x8: dcn (data=2) is not how gpu:h100:4x8 is split: it has 4 "
        "islands; declare parts that multiply to 4"
    )


# --- time


def test_seconds_over_several_axes_use_the_links_of_all() -> None:
    layout = lay_out(mesh("tpu:v5p:4x8x8", "data=8 fsdp=8 tensor=4"))
    one, both = (collective_seconds(layout, "all-gather", axes, 1e12) for axes in (["data"], ["data", "fsdp"]))
    assert one == pytest.approx(1e12 / 180e9, rel=1e-4)
    assert both == pytest.approx(1e12 / 360e9, rel=1e-4)


def test_two_parts_of_one_dim_are_its_ring_again() -> None:
    layout = lay_out(mesh("tpu:v5e:16x1", "data=4 tensor=4"))
    assert collective_seconds(layout, "all-gather", ["tensor"], 1e12) == pytest.approx(1e12 / 45e9, rel=1e-4)
    assert collective_seconds(layout, "all-gather", ["data", "tensor"], 1e12) == pytest.approx(1e12 / 90e9, rel=1e-4)


def test_an_axis_that_the_hlo_does_not_tell_is_taken_for_all() -> None:
    layout = lay_out(mesh("gpu:h100:2x8", "data=2 tensor=8"))
    unknown, every = (collective_seconds(layout, "all-reduce", axes, 1e9) for axes in (["?"], ["data", "tensor"]))
    assert unknown == every


def test_no_time_on_emulated_devices() -> None:
    with pytest.raises(DeclarationError) as error:
        collective_seconds(lay_out(mesh("cpu:8", "data=8")), "all-reduce", ["data"], 1e9)
    assert str(error.value) == (
        "mesh data=8 (batch) on cpu:8: links: of emulated and local devices none are known, so no time can "
        "be told; name a TPU or GPU target"
    )


# --- words and drawings

SHOWN = {
    "v5p_64": mesh("tpu:v5p:4x4x4", "data=16 tensor=4"),
    "v5e_cut": mesh("tpu:v5e:4x4", "stage=4 tensor=4", links={"tensor": ("x", "y")}),
    "v5e_split": mesh("tpu:v5e:16x16", "data=64 tensor=4"),
    "v5e_slices": mesh("2*tpu:v5e:8x8", "data=16 tensor=8", dcn={"data": 2}),
    "v7x": mesh("tpu:v7x:2x2x1", "data=4 tensor=2"),
    "v5p_large": mesh("tpu:v5p:16x16x16", "data=16 fsdp=16 tensor=16"),
    "h100": mesh("gpu:h100:4x8", "data=4 stage=2 tensor=4"),
    "gb200": mesh("gpu:gb200:36x4", "data=36 tensor=4"),
    "a6000": mesh("gpu:a6000:4x4", "stage=4 tensor=4"),
    "cpu": mesh("cpu:8", "data=4 tensor=2"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_words_and_drawing(name: str) -> None:
    layout = lay_out(SHOWN[name])
    assert f"{layout.explanation}\n\n{layout.draw()}\n" == (GOLDEN / f"{name}.txt").read_text()


def test_a_drawing_fits_a_terminal() -> None:
    for spec in SHOWN.values():
        lines = lay_out(spec).draw().splitlines()
        assert max(map(len, lines)) <= 104
        assert len(lines) <= 65
