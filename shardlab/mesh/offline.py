"""Devices of a machine that is not here: what JAX compiles for a TPU pod or a GPU cluster, on a computer with neither.

    target  compiler                           extra
    tpu:    libtpu                             shardlab[tpu]
    gpu:    XLA's CUDA plugin, no CUDA needed  shardlab[gpu-compiler]
    cpu:    JAX itself: emulated devices       none

Compilers can end the process that calls them, and read their settings when they are loaded: a caller starts a child
process under `compile_environment()`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from shardlab.mesh.chips import Chip, chip_of
from shardlab.mesh.emulate import emulate, environment
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.physical import wraps_of
from shardlab.mesh.targets import Target

if TYPE_CHECKING:
    import jax

_TPU_NAMES = {"v5p": "v5", "v7x": "tpu7x"}  # Where libtpu's name is not ours.
_MEGACORE = ("v4", "v5p")
_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # Else libtpu asks the cloud's metadata server, and waits.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Else a second process is refused.
    # What libtpu would read of the TPU it runs on, and complain of not finding; the topology asked for is what counts.
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_EXTRAS = {"tpu": "shardlab[tpu]", "gpu": "shardlab[gpu-compiler]"}


def compile_environment(target: Target | None = None) -> dict[str, str]:
    """The environment variables under which a process compiles for machines that are not here, quietly, beside others.

    JAX's own devices are emulated ones, as many as a CPU target has, so that nothing waits for an accelerator.

    >>> compile_environment()["TPU_SKIP_MDS_QUERY"]
    '1'
    """
    count = target.num_devices if target is not None and target.platform == "cpu" else 1
    return {**environment(count), **_SETTINGS}


def compiler_installed(platform: str) -> bool:
    """Whether the compiler of a platform ("tpu", "gpu", "cpu") is installed here; nothing is loaded."""
    return platform == "cpu" or any(_there(name) for name in _PLUGINS[platform])


def extra_of(platform: str) -> str:
    """What to install for the compiler of a platform ("tpu", "gpu")."""
    return _EXTRAS[platform]


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # The package above it is not there.
        return False


def compile_options(target: Target) -> dict[str, Any]:
    """Compiler options that compiling for a target that is not here needs, for `Lowered.compile`.

    XLA's GPU compiler times kernels to choose among them, which needs the GPU: level 0 leaves that.
    """
    return {"xla_gpu_autotune_level": 0} if target.platform == "gpu" else {}


def compile_devices(target: Target) -> list[jax.Device]:
    """Compile-only devices of the target, in JAX's order; emulated devices of a CPU target.

    Raises:
      DeclarationError: its compiler is not installed, or refuses the shape.
    """
    if target.platform == "cpu":
        import jax

        emulate(target.num_devices)
        return jax.devices()
    if not compiler_installed(target.platform):
        raise DeclarationError(
            f"target {target}: its compiler is not installed; pip install '{_EXTRAS[target.platform]}'"
        )
    from jax.experimental import topologies

    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    options = _tpu(target) if target.platform == "tpu" else _gpu(target, chip_of(target))
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DeclarationError(f"target {target}: the compiler refuses it: {reason}; give another shape") from error


def _tpu(target: Target) -> dict[str, Any]:
    """Arguments of `get_topology_desc`. The short form, without them, has no wrap-around links."""
    shape = (*target.shape, 1)[:3]
    return {
        "platform": "tpu",
        "topology_name": f"{_TPU_NAMES.get(target.kind, target.kind)}:{'x'.join(map(str, target.shape))}",
        "chip_config_name": "megacore" if target.kind in _MEGACORE else "default",
        "chips_per_host_bounds": (*(2 if size % 2 == 0 else 1 for size in shape[:2]), 1),
        "num_slices": target.slices,
        "wrap": (*wraps_of(target), False)[:3],
    }


def _gpu(target: Target, chip: Chip) -> dict[str, Any]:
    hosts, gpus = target.shape
    return {
        "platform": "cuda",
        "topology_name": "any",
        "topology": f"1x{hosts}x{gpus}",
        "target_config": target_config(chip),
    }


def target_config(chip: Chip) -> str:
    """The chip as the text of XLA's `GpuTargetConfigProto`."""
    gpu = chip.gpu
    assert gpu is not None
    major, minor = gpu.capability
    limits = "threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152"
    grid = "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
    return f"""
gpu_device_info {{
  {limits} {grid}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory_optin}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {chip.clock_hz / 1e9}
  memory_bandwidth: {chip.hbm_bandwidth:.0f}
  device_memory_size: {chip.usable_hbm_bytes}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {"ACCELERATED_FEATURES" if gpu.accelerated else "NONE"}
  }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""
