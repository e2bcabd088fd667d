"""Devices to compile for that are not there: the forms, the refusals, and meshes laid on them."""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import pytest

from shardlab.mesh import offline
from shardlab.mesh.chips import CHIPS
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.offline import compile_devices, compile_environment, compile_options, target_config
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.targets import parse_target
from shardlab.mesh.topology import lay_out


def test_emulated_devices_for_a_cpu() -> None:
    assert compile_devices(parse_target("cpu:8")) == jax.devices()


@pytest.mark.parametrize(
    ("text", "extra"), [("tpu:v5p:4x8x8", "shardlab[tpu]"), ("gpu:h100:8x8", "shardlab[gpu-compiler]")]
)
def test_a_compiler_that_is_not_installed(text: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_PLUGINS", {"tpu": ("no_libtpu",), "gpu": ("no_plugins.xla_cuda13",)})
    with pytest.raises(DeclarationError) as error:
        compile_devices(parse_target(text))
    assert str(error.value) == f"target {text}: its compiler is not installed; pip install '{extra}'"


def test_a_shape_that_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    def refuse(**options: Any) -> None:
        raise RuntimeError("INVALID_ARGUMENT: no such layout\nand a trace")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(offline, "compiler_installed", lambda platform: True)
    with pytest.raises(DeclarationError) as error:
        compile_devices(parse_target("tpu:v5p:3x5x7"))
    assert str(error.value) == (
        "target tpu:v5p:3x5x7: the compiler refuses it: INVALID_ARGUMENT: no such layout; give another shape"
    )


@pytest.mark.parametrize(
    ("text", "name", "chip", "host", "slices", "wrap"),
    [
        ("tpu:v5p:4x8x8", "v5:4x8x8", "megacore", (2, 2, 1), 1, (True, True, True)),
        ("tpu:v4:2x2x1", "v4:2x2x1", "megacore", (2, 2, 1), 1, (False, False, False)),
        ("2*tpu:v5e:8x16", "v5e:8x16", "default", (2, 2, 1), 2, (False, True, False)),
        ("tpu:v6e:1x1", "v6e:1x1", "default", (1, 1, 1), 1, (False, False, False)),
        ("tpu:v7x:4x4x8", "tpu7x:4x4x8", "default", (2, 2, 1), 1, (True, True, True)),
    ],
)
def test_the_form_of_a_topology(
    text: str, name: str, chip: str, host: tuple[int, ...], slices: int, wrap: tuple[bool, ...]
) -> None:
    assert offline._tpu(parse_target(text)) == {
        "platform": "tpu",
        "topology_name": name,
        "chip_config_name": chip,
        "chips_per_host_bounds": host,
        "num_slices": slices,
        "wrap": wrap,
    }


def test_the_environment_of_a_child() -> None:
    settings = compile_environment(parse_target("tpu:v5p:4x8x8"))
    assert settings["JAX_PLATFORMS"] == "cpu"
    assert settings["ALLOW_MULTIPLE_LIBTPU_LOAD"] == settings["TPU_SKIP_MDS_QUERY"] == "1"
    assert "device_count=6" in compile_environment(parse_target("cpu:6"))["XLA_FLAGS"]


def test_options_of_the_compiler() -> None:
    assert compile_options(parse_target("gpu:h100:1x8")) == {"xla_gpu_autotune_level": 0}
    assert compile_options(parse_target("tpu:v5e:4x4")) == compile_options(parse_target("cpu:8")) == {}


def test_a_gpu_as_the_compilers_text() -> None:
    text = target_config(CHIPS["gpu", "h100"])
    for line in (
        "core_count: 132",
        "device_memory_size: 84942979072",
        "memory_bandwidth: 3350000000000",
        "feature_extension: ACCELERATED_FEATURES",
        'device_description_str: "NVIDIA H100 80GB HBM3"',
    ):
        assert line in text


# What a child does: a mesh of the spec on the target's devices, compiled; where its devices lie.
CHILD = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from shardlab.mesh.build import build_mesh, in_target_order
from shardlab.mesh.offline import compile_devices, compile_options
from shardlab.mesh.spec import MeshSpec
spec = MeshSpec.from_json(json.loads(sys.argv[1]))
devices = compile_devices(spec.machine)
mesh = build_mesh(spec, devices)
split = NamedSharding(mesh, P(spec.names))
size = spec.num_devices
made = jax.jit(lambda x: (x @ x).sum(), in_shardings=split).lower(jax.ShapeDtypeStruct((size, size), jnp.bfloat16))
compiled = made.compile(compiler_options=compile_options(spec.machine))
canonical = {device: place for place, device in enumerate(in_target_order(spec.machine, devices))}
where = [(getattr(d, "slice_index", 0) or 0, *d.coords, getattr(d, "core_on_chip", 0)) for d in mesh.devices.flat]
print(json.dumps({
    "order": [canonical[device] for device in mesh.devices.flat], "where": where, "kind": devices[0].device_kind,
    "partitions": re.search(r"num_partitions=(\\d+)", compiled.as_text())[1],
}))
"""


def start(spec: MeshSpec) -> subprocess.Popen[str]:
    environment = {**os.environ, **compile_environment(spec.machine), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, json.dumps(spec.to_json())]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-2000:]
    assert err == ""  # The compilers are quiet.
    return json.loads(out)


TPUS = {
    "v4": MeshSpec({"data": 16, "tensor": 4}, batch="data", target="tpu:v4:4x4x4"),
    "v5e": MeshSpec({"data": 64, "tensor": 2}, batch="data", target="tpu:v5e:8x16"),
    "v5p": MeshSpec({"data": 64, "tensor": 4}, batch="data", target="tpu:v5p:4x8x8"),
    "v6e": MeshSpec({"stage": 16, "tensor": 4}, stage="stage", target="tpu:v6e:8x8"),
    "v7x": MeshSpec({"data": 16, "tensor": 8}, batch="data", target="tpu:v7x:4x4x4"),
    "slices": MeshSpec({"data": 8, "tensor": 4}, batch="data", target="2*tpu:v5e:4x4", dcn={"data": 2}),
    "slices of v7x": MeshSpec({"data": 4, "tensor": 4}, batch="data", target="2*tpu:v7x:2x2x1", dcn={"data": 2}),
    "odd": MeshSpec({"data": 15}, batch="data", target="tpu:v5e:3x5"),
}


@pytest.mark.tpu
@pytest.mark.parametrize("name", TPUS)
def test_what_is_built_for_a_tpu_is_what_is_laid_out(name: str) -> None:
    spec = TPUS[name]
    layout = lay_out(spec)
    found = finish(start(spec))
    # Of several slices XLA makes the program of one; what goes between them it sends from host to host.
    assert int(found["partitions"]) == spec.num_devices // spec.machine.slices
    assert found["order"] == list(layout.order)
    # Where the layout puts a mesh position, by its own account of the dims: slice, x, y, z, core.
    for place, where in zip(layout.order, found["where"], strict=True):
        at = {}
        for dim in layout.dims:
            place, at[dim.name] = divmod(place, dim.size)
        assert where == [at.get(name, 0) for name in ("slice", "x", "y", "z", "core")]


@pytest.mark.tpu
def test_two_compilations_at_once() -> None:
    children = [start(TPUS["v5p"]), start(TPUS["v6e"])]
    assert [finish(child)["kind"] for child in children] == ["TPU v5", "TPU v6 lite"]


GPUS = {
    "a100": "2x8",
    "h100": "8x8",
    "h200": "1x8",
    "b200": "2x8",
    "gb200": "18x4",
    "a6000": "2x4",
}


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("kind", GPUS)
def test_what_is_built_for_gpus_is_what_is_laid_out(kind: str) -> None:
    target = f"gpu:{kind}:{GPUS[kind]}"
    spec = MeshSpec({"data": -1, "tensor": 4}, batch="data", target=target)
    found = finish(start(spec))
    assert found["kind"] in (CHIPS["gpu", kind].gpu.name, *CHIPS["gpu", kind].names)  # type: ignore[union-attr]
    assert found["order"] == list(lay_out(spec).order)
    hosts, gpus = spec.machine.shape
    assert sorted(where[2:4] for where in found["where"]) == [
        [host, gpu] for host in range(hosts) for gpu in range(gpus)
    ]
