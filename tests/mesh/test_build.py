"""Meshes built from a declaration: with devices, and without any."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from shardlab.mesh.build import abstract_mesh, build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.topology import lay_out


def test_every_axis_is_auto_and_in_the_declared_order() -> None:
    mesh = build_mesh(MeshSpec({"data": 2, "stage": 1, "tensor": 4}, batch="data", stage="stage"))
    assert mesh.axis_names == ("data", "stage", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert mesh.devices.shape == (2, 1, 4)


def test_a_smaller_cpu_mesh_takes_the_first_devices() -> None:
    mesh = build_mesh(MeshSpec({"data": 3}, target="cpu:3"))
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2]


def test_devices_that_are_passed_are_all_used() -> None:
    spec = MeshSpec({"data": 2}, target="cpu:2")
    assert [device.id for device in build_mesh(spec, jax.devices()[6:]).devices.flat] == [6, 7]


def test_the_abstract_mesh_is_that_of_the_built_one() -> None:
    spec = MeshSpec({"data": 4, "tensor": 2})
    built, planned = build_mesh(spec).abstract_mesh, abstract_mesh(spec)
    assert (built.shape, built.axis_types) == (planned.shape, planned.axis_types)


def test_4096_devices_without_starting_jax() -> None:
    code = """
from shardlab.mesh.build import abstract_mesh
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.topology import lay_out
spec = MeshSpec({"data": -1, "tensor": 16}, target="tpu:v5p:16x16x16")
mesh = abstract_mesh(spec)
from jax._src.xla_bridge import backends_are_initialized
print(dict(mesh.shape), mesh.size, {kind.name for kind in mesh.axis_types}, backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'data': 256, 'tensor': 16} 4096 {'Auto'} False\n"


def test_too_few_devices() -> None:
    with pytest.raises(DeclarationError) as error:
        build_mesh(MeshSpec({"data": 16}, target="cpu:16", batch="data"))
    assert str(error.value) == (
        "mesh data=16 (batch) on cpu:16: has 16 devices, 8 are here; call emulate(16) before anything starts JAX"
    )


def test_more_devices_passed_than_the_mesh_has() -> None:
    with pytest.raises(DeclarationError) as error:
        build_mesh(MeshSpec({"data": 2}, target="gpu:h200:1x2"), jax.devices())
    assert str(error.value) == (
        "mesh data=2 on gpu:h200:1x2: has 2 devices, 8 were passed; pass 2, or declare sizes that multiply to 8"
    )


def test_a_target_that_is_not_here() -> None:
    with pytest.raises(DeclarationError) as error:
        build_mesh(MeshSpec({"data": 4}, target="tpu:v5e:2x2"))
    assert str(error.value) == (
        "mesh data=4 on tpu:v5e:2x2: JAX sees no tpu device here; run on tpu:v5e:2x2, or pass devices="
    )


def _tpus(slices: int, chips: int) -> list[Any]:
    """Stand-ins for TPU devices of several slices."""
    return [
        SimpleNamespace(
            id=number,
            platform="tpu",
            device_kind="TPU v5 lite",
            slice_index=number // chips,
            process_index=number // chips,
            coords=(number % chips % 2, number % chips // 2, 0),
            core_on_chip=0,
        )
        for number in range(slices * chips)
    ]


def _grid(monkeypatch: pytest.MonkeyPatch, spec: MeshSpec, devices: list[Any]) -> np.ndarray[Any, Any]:
    made: dict[str, Any] = {}
    monkeypatch.setattr("jax.sharding.Mesh", lambda grid, names, axis_types: made.update(grid=grid))
    build_mesh(spec, devices)
    slices = [device.slice_index for device in made["grid"].flat]
    return np.array(slices).reshape(made["grid"].shape)


def test_slow_links_lie_on_the_declared_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MeshSpec({"data": 4, "tensor": 2}, batch="data", target="tpu:v5e:2x4", dcn={"data": 2})
    slices = _grid(monkeypatch, spec, _tpus(2, 4))
    assert slices.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_slices_that_are_not_what_dcn_says() -> None:
    spec = MeshSpec({"data": 8}, batch="data", target="tpu:v5e:2x4", dcn={"data": 4})
    with pytest.raises(DeclarationError) as error:
        build_mesh(spec, _tpus(2, 4))
    assert str(error.value) == (
        "mesh data=8 (batch) on tpu:v5e:2x4: dcn (data=4) splits it in 4 parts over slow links, the "
        "devices have "
        "2; declare the number of slices or hosts there are"
    )


def test_several_slices_without_dcn() -> None:
    spec = MeshSpec({"data": 8}, batch="data", target="tpu:v5e:2x4")
    with pytest.raises(DeclarationError) as error:
        build_mesh(spec, _tpus(2, 4))
    assert str(error.value) == (
        "mesh data=8 (batch) on tpu:v5e:2x4: the devices are 2 slices joined by slow links, and dcn names "
        "no axis "
        "for them; declare dcn={'data': 2}, or another axis"
    )


def test_a_slice_of_another_shape_is_laid_on_its_links(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(shape: tuple[int, ...], devices: list[Any], **options: Any) -> np.ndarray[Any, Any]:
        asked.update(shape=shape, **options)
        return np.array(devices, dtype=object).reshape(shape)

    monkeypatch.setattr(mesh_utils, "create_device_mesh", create)
    _grid(monkeypatch, MeshSpec({"data": 2, "tensor": 2}, target="tpu:v5e:1x4"), _tpus(1, 4))
    assert asked == {"shape": (2, 2), "allow_split_physical_axes": True}


# --- laid out as explained


def _built(monkeypatch: pytest.MonkeyPatch, spec: MeshSpec, devices: list[Any]) -> list[int]:
    """Ids of the devices in mesh order."""
    made: dict[str, Any] = {}
    monkeypatch.setattr("jax.sharding.Mesh", lambda grid, names, axis_types: made.update(grid=grid))
    build_mesh(spec, devices)
    assert made["grid"].shape == spec.shape
    return [device.id for device in made["grid"].flat]


def test_tpus_of_the_target_lie_as_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MeshSpec({"data": 4, "tensor": 2}, batch="data", target="2*tpu:v5e:2x2", dcn={"data": 2})
    devices = _tpus(2, 4)  # numbered as places count: slice, y, x
    assert lay_out(spec).order == (0, 1, 2, 3, 4, 5, 6, 7)
    links = MeshSpec(
        {"data": 4, "tensor": 2}, batch="data", target="2*tpu:v5e:2x2", dcn={"data": 2}, links={"tensor": "y"}
    )
    assert lay_out(links).order == (0, 2, 1, 3, 4, 6, 5, 7)
    for declared in (spec, links):
        assert _built(monkeypatch, declared, devices) == list(lay_out(declared).order)
        assert _built(monkeypatch, declared, devices[::-1]) == list(lay_out(declared).order)


def test_both_devices_of_a_chip_are_found_by_their_core(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MeshSpec({"data": 4, "tensor": 2}, batch="data", target="tpu:v7x:2x2x1")
    devices = [
        SimpleNamespace(id=n, platform="tpu", process_index=0, coords=[n // 2 % 2, n // 4, 0], core_on_chip=n % 2)
        for n in range(8)
    ]
    assert _built(monkeypatch, spec, devices[::-1]) == list(lay_out(spec).order) == list(range(8))


def _gpus(hosts: int, gpus: int, each: int = 0) -> list[Any]:
    """Stand-ins for GPUs, a process for every `each` of them (a host's unless given), shuffled."""
    devices = [
        SimpleNamespace(id=n, platform="gpu", process_index=n // (each or gpus), slice_index=n // gpus)
        for n in range(hosts * gpus)
    ]
    return devices[1::2] + devices[::2]


@pytest.mark.parametrize("each", [4, 2, 1])
def test_gpus_lie_host_by_host(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    spec = MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage", target="gpu:h100:2x4")
    assert _built(monkeypatch, spec, _gpus(2, 4, each)) == list(lay_out(spec).order) == [0, 1, 4, 5, 2, 3, 6, 7]


def test_gpus_in_other_hosts_are_left_to_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(shape: tuple[int, ...], outer: tuple[int, ...], devices: list[Any], **options: Any) -> Any:
        asked.update(shape=shape, outer=outer)
        return np.array(devices, dtype=object).reshape(shape[0] * outer[0], -1)

    monkeypatch.setattr(mesh_utils, "create_hybrid_device_mesh", create)
    spec = MeshSpec({"data": 6, "tensor": 2}, batch="data", target="gpu:h100:3x4", dcn={"data": 2})
    _built(monkeypatch, spec, _gpus(2, 6))
    assert asked == {"shape": (3, 2), "outer": (2, 1)}
