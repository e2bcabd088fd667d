"""A mesh declaration: its roles, overrides and JSON, and the full message of everything wrong with one."""

import json
from typing import Any

import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec

HYBRID = MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch=("data",), stage="stage")


def test_roles_and_sizes() -> None:
    mesh = MeshSpec(
        {"replica": 2, "fsdp": 4, "stage": 3, "tensor": 1},
        batch=("replica", "fsdp"),
        stage="stage",
        target="cpu:24",
    )
    assert list(mesh.sizes.items()) == [("replica", 2), ("fsdp", 4), ("stage", 3), ("tensor", 1)]
    assert mesh.names == ("replica", "fsdp", "stage", "tensor")
    assert (mesh.num_devices, mesh.batch_size_divisor, mesh.size("stage")) == (24, 8, 3)


def test_pairs_and_a_mapping_declare_the_same_mesh() -> None:
    same = MeshSpec((("data", 2), ("stage", 2), ("tensor", 2)), batch="data", stage="stage")
    assert same == HYBRID
    assert hash(same) == hash(HYBRID)


@pytest.mark.parametrize(
    ("target", "sizes"),
    [("cpu:8", (2, 4)), ("tpu:v5p:4x8x8", (64, 4)), ("gpu:h200:8x8", (16, 4))],
)
def test_one_size_is_inferred_from_the_target(target: str, sizes: tuple[int, ...]) -> None:
    assert MeshSpec({"data": -1, "tensor": 4}, target=target).shape == sizes


def test_json_round_trip_keeps_the_order_and_every_field() -> None:
    mesh = MeshSpec({"z": 4, "a": 2}, batch="z", stage=None, target="tpu:v5e:2x4", dcn={"z": 2})
    assert MeshSpec.from_json(json.loads(json.dumps(mesh.to_json()))) == mesh


def test_override_gives_unnamed_axes_size_one() -> None:
    assert HYBRID.override("data=4, stage=2").sizes == {"data": 4, "stage": 2, "tensor": 1}
    assert HYBRID.override({"tensor": -1}).sizes == {"data": 1, "stage": 1, "tensor": 8}
    small = HYBRID.override("stage=3", target="cpu:3")
    assert (small.sizes["stage"], small.batch, small.stage) == (3, ("data",), "stage")


def test_it_prints_as_one_line() -> None:
    assert str(HYBRID) == "data=2 (batch) x stage=2 (stage) x tensor=2 on cpu:8"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no axes": (
        {"axes": {}},
        "mesh: has no axes; declare at least one, like {'data': 8}",
    ),
    "same name twice": (
        {"axes": [("data", 2), ("data", 4)]},
        "mesh axis 'data': is declared twice; give each axis its own name",
    ),
    "size zero": (
        {"axes": {"data": 0}},
        "mesh axis 'data': has size 0; give it a positive size, or -1 to infer it",
    ),
    "negative size": (
        {"axes": {"data": -2}},
        "mesh axis 'data': has size -2; give it a positive size, or -1 to infer it",
    ),
    "size is no number": (
        {"axes": {"data": 2.5}},
        "mesh axis 'data': has size 2.5, not a whole number; give it a positive size, or -1",
    ),
    "not an identifier": (
        {"axes": {"my axis": 8}},
        "mesh axis 'my axis': is not an identifier; use letters, digits and _, starting with a letter",
    ),
    "two inferred": (
        {"axes": {"data": -1, "tensor": -1}},
        "mesh: axes 'data' and 'tensor' are both -1; only one size can be inferred; give the others",
    ),
    "three inferred": (
        {"axes": {"data": -1, "tensor": -1, "expert": -1}},
        "mesh: axes 'data', 'tensor' and 'expert' are all -1; only one size can be inferred; give the others",
    ),
    "cannot be inferred": (
        {"axes": {"data": -1, "tensor": 3}},
        "mesh axis 'data': cannot be inferred: the 8 devices of target cpu:8 do not divide by 3 (tensor=3); "
        "choose other sizes so that they divide 8",
    ),
    "product too small": (
        {"axes": {"data": 2, "tensor": 3}},
        "mesh: data=2 x tensor=3 is 6 devices, target cpu:8 has 8; make the sizes multiply to 8, or declare "
        "target='cpu:6' (--target cpu:6)",
    ),
    "product of one": (
        {"axes": {"data": 1}, "target": "cpu:2"},
        "mesh: data=1 is 1 device, target cpu:2 has 2; make the sizes multiply to 2, or declare target='cpu:1' "
        "(--target cpu:1)",
    ),
    "slices and no dcn": (
        {"axes": {"data": 32}, "target": "2*tpu:v5e:4x4"},
        "mesh: target 2*tpu:v5e:4x4 is 2 slices joined by slow links, and dcn names no axis for them; declare "
        "dcn={'data': 2} (--mesh data=2*16), or another axis",
    ),
    "other slices than dcn says": (
        {"axes": {"data": 32}, "target": "2*tpu:v5e:4x4", "dcn": {"data": 4}},
        "mesh: target 2*tpu:v5e:4x4 is 2 slices joined by slow links, dcn (data=4) splits the mesh in 4; declare "
        "dcn={'data': 2} (--mesh data=2*16), or another axis",
    ),
    "links on no dim": (
        {"axes": {"data": 16}, "target": "tpu:v5e:4x4", "links": {"data": "z"}},
        "links of axis 'data': 'z' is not a dim of target tpu:v5e:4x4 (x, y); name dims that it has, or leave the axis "
        "out",
    ),
    "links on a dim of another name": (
        {"axes": {"data": 16}, "target": "gpu:h100:2x8", "links": {"data": ("gpu", "isle")}},
        "links of axis 'data': 'isle' is not a dim of target gpu:h100:2x8 (gpu, island); did you mean 'island'? name "
        "dims that it has, or leave the axis out",
    ),
    "links of no axis": (
        {"axes": {"data": 16}, "target": "tpu:v5e:4x4", "links": {"dat": "x"}},
        "links of axis 'dat': is not an axis of the mesh (data); did you mean 'data'? name a declared axis, or declare "
        "this one",
    ),
    "links that are empty": (
        {"axes": {"data": 16}, "target": "tpu:v5e:4x4", "links": {"data": ()}},
        "links of axis 'data': names no dim; name some of x, y, or leave the axis out",
    ),
    "product on a pod": (
        {"axes": {"data": 64}, "target": "tpu:v5p:4x8x8"},
        "mesh: data=64 is 64 devices, target tpu:v5p:4x8x8 has 256; make the sizes multiply to 256, or "
        "declare "
        "another target",
    ),
    "batch axis not declared": (
        {"axes": {"data": 8}, "batch": ("dta",)},
        "batch axis 'dta': is not an axis of the mesh (data); did you mean 'data'? name a declared axis, or "
        "declare this one",
    ),
    "stage axis not declared": (
        {"axes": {"data": 8}, "stage": "pipe"},
        "stage axis 'pipe': is not an axis of the mesh (data); name a declared axis, or declare this one",
    ),
    "batch axis twice": (
        {"axes": {"data": 8}, "batch": ("data", "data")},
        "batch axis 'data': is given twice; name it once",
    ),
    "stage axis is a batch axis": (
        {"axes": {"data": 8}, "batch": ("data",), "stage": "data"},
        "stage axis 'data': is a batch axis too; an axis splits examples or holds stages: drop one role",
    ),
    "order": (
        {"axes": {"tensor": 2, "stage": 2, "data": 2}, "batch": ("data",), "stage": "stage"},
        "mesh: axes are in the order tensor, stage, data; batch axes come first, then the stage axis, then "
        "the "
        "rest; write {'data': 2, 'stage': 2, 'tensor': 2}",
    ),
    "dcn axis not declared": (
        {"axes": {"data": 8}, "dcn": {"date": 2}},
        "dcn axis 'date': is not an axis of the mesh (data); did you mean 'data'? name a declared axis, or "
        "declare this one",
    ),
    "dcn does not divide": (
        {"axes": {"data": 8}, "dcn": {"data": 3}},
        "dcn axis 'data': size 8 does not divide by its 3 parts joined by slow links; give 'data' a "
        "multiple of "
        "3, or another split",
    ),
    "dcn of an inferred axis does not divide": (
        {"axes": {"data": -1, "tensor": 2}, "dcn": {"data": 3}},
        "dcn axis 'data': size 4 does not divide by its 3 parts joined by slow links; give 'data' a "
        "multiple of "
        "3, or another split",
    ),
    "dcn of zero": (
        {"axes": {"data": 8}, "dcn": {"data": 0}},
        "dcn axis 'data': runs over 0 parts; give a whole number, 1 or more",
    ),
    "bad target": (
        {"axes": {"data": 8}, "target": "cpus:8"},
        "target 'cpus:8': 'cpus' is no platform; did you mean 'cpu'? write cpu:8, tpu:v5p:4x8x8, gpu:h200:8x8 or local",
    ),
    "all at once": (
        {
            "axes": {"data": 0, "tensor": 2},
            "batch": ("dat",),
            "stage": "x",
            "target": "tpu:v9:2",
            "dcn": {"y": 2},
        },
        "5 faults in the declaration:\n"
        "  1. mesh axis 'data': has size 0; give it a positive size, or -1 to infer it\n"
        "  2. target 'tpu:v9:2': 'v9' is not one of v4, v5e, v5p, v6e, v7x; write one of them\n"
        "  3. batch axis 'dat': is not an axis of the mesh (data, tensor); did you mean 'data'? name a "
        "declared "
        "axis, or declare this one\n"
        "  4. stage axis 'x': is not an axis of the mesh (data, tensor); name a declared axis, or declare "
        "this "
        "one\n"
        "  5. dcn axis 'y': is not an axis of the mesh (data, tensor); name a declared axis, or declare "
        "this one",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed(name: str) -> None:
    fields, message = BAD[name]
    fields = dict(fields)
    with pytest.raises(DeclarationError) as error:
        MeshSpec(fields.pop("axes"), **fields)
    assert str(error.value) == message


BAD_OVERRIDE = {
    "tensr=2": "mesh axis 'tensr': is not an axis of the mesh (data, stage, tensor); did you mean "
    "'tensor'? only "
    "declared axes can be given a size",
    "data=two": "mesh 'data=two': 'data=two' is not axis=size; write it like data=2,tensor=4",
    "data": "mesh 'data': 'data' is not axis=size; write it like data=2,tensor=4",
    "data=2,data=4": "mesh 'data=2,data=4': axis 'data' is given twice; give it one size",
    "data=3": "mesh: data=3 x stage=1 x tensor=1 is 3 devices, target cpu:8 has 8; make the sizes multiply "
    "to 8, "
    "or declare target='cpu:3' (--target cpu:3)",
}


@pytest.mark.parametrize("text", BAD_OVERRIDE)
def test_malformed_override(text: str) -> None:
    with pytest.raises(DeclarationError) as error:
        HYBRID.override(text)
    assert str(error.value) == BAD_OVERRIDE[text]


def test_size_of_an_axis_that_is_not_there() -> None:
    with pytest.raises(DeclarationError) as error:
        HYBRID.size("stages")
    assert str(error.value) == (
        "mesh axis 'stages': is not an axis of the mesh (data, stage, tensor); did you mean 'stage'? name a "
        "declared axis, or declare this one"
    )


def test_links_are_kept_and_written() -> None:
    spec = MeshSpec({"data": 4, "tensor": 4}, batch="data", target="tpu:v5e:4x4", links={"tensor": "y"})
    assert spec.links == (("tensor", ("y",)),)
    assert spec.to_json()["links"] == {"tensor": ["y"]}
    assert MeshSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.override("data=8,tensor=2").links == spec.links
    assert "links" not in HYBRID.to_json()


def test_links_are_not_looked_at_on_emulated_devices() -> None:
    spec = MeshSpec({"data": 4, "tensor": 4}, batch="data", target="tpu:v5e:4x4", links={"tensor": "y"})
    assert spec.override("data=4,tensor=2", target="cpu:8").links == spec.links


def test_slices_are_written_into_the_sizes() -> None:
    spec = HYBRID.override("data=2*16,tensor=4", target="2*tpu:v5e:8x8")
    assert (spec.sizes, spec.dcn) == ({"data": 32, "stage": 1, "tensor": 4}, (("data", 2),))
    assert spec.override("data=32,tensor=4").dcn == (("data", 2),)
    assert spec.override("data=-1,tensor=8").sizes["data"] == 16
    assert MeshSpec.from_text("data=2*-1,tensor=4", target="2*tpu:v5e:8x8").sizes == {"data": 32, "tensor": 4}
