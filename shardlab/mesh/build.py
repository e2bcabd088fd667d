"""Build what a MeshSpec declares: a `Mesh` of real or emulated devices, or an `AbstractMesh` without any.

Every axis is **Auto**: user-written Flax models leave activations to the compiler, and `jax.sharding.Mesh`
defaults to Explicit axes since jax 0.9.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.targets import Target
from shardlab.mesh.topology import lay_out

if TYPE_CHECKING:
    import jax
    from jax.sharding import AbstractMesh, Mesh

# JAX is imported where it is used, so that `shardlab.mesh.emulate` can be reached before JAX is imported.


def abstract_mesh(spec: MeshSpec) -> AbstractMesh:
    """The mesh without devices, Auto axes; any size on any machine.

    >>> abstract_mesh(MeshSpec({"data": 512, "tensor": 8}, target="cpu:4096")).size
    4096
    """
    from jax.sharding import AbstractMesh, AxisType

    return AbstractMesh(spec.shape, spec.names, axis_types=(AxisType.Auto,) * len(spec.names))


def build_mesh(spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of devices, Auto axes, sizes in the declared order.

    On TPU and GPU the axes are laid on the physical links by `shardlab.mesh.topology.lay_out`; where the devices are
    not those of the target (other coordinates, or a local target), by `jax.experimental.mesh_utils`, with the axes of
    `spec.dcn` over slices (or, where devices have none, over processes). CPU devices are reshaped in order; of more
    CPU devices than the mesh has, the first are taken.

    Args:
      spec: the declaration.
      devices: to build from, all of them; None takes those JAX sees of the target's platform.

    Raises:
      DeclarationError: the devices are not there, not as many as the mesh has, or not split as `spec.dcn`
        says.

    >>> from shardlab.mesh.emulate import emulate
    >>> emulate(8)
    >>> build_mesh(MeshSpec({"data": 4, "tensor": 2})).axis_names
    ('data', 'tensor')
    """
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    found = _find(spec) if devices is None else list(devices)
    if len(found) != spec.num_devices:
        here = "are here" if devices is None else "were passed"
        raise DeclarationError(
            f"mesh {spec}: has {spec.num_devices} devices, {len(found)} {here}; "
            f"{_way_out(spec, len(found), passed=devices is not None)}"
        )
    types = (AxisType.Auto,) * len(spec.names)
    if found[0].platform == "cpu":
        return Mesh(np.array(found, dtype=object).reshape(spec.shape), spec.names, axis_types=types)
    ordered = in_target_order(spec.machine, found)
    if ordered is not None:
        grid = np.array(ordered, dtype=object)[list(lay_out(spec).order)].reshape(spec.shape)
        return Mesh(grid, spec.names, axis_types=types)
    slices = _distinct(found, "slice_index")
    _check_slow_links(spec, slices, slices if slices > 1 else _distinct(found, "process_index"))
    if not spec.dcn:
        grid = mesh_utils.create_device_mesh(spec.shape, found, allow_split_physical_axes=True)
        return Mesh(grid, spec.names, axis_types=types)
    slow = dict(spec.dcn)
    outer = tuple(slow.get(axis, 1) for axis in spec.names)
    grid = mesh_utils.create_hybrid_device_mesh(
        tuple(size // parts for size, parts in zip(spec.shape, outer, strict=True)),
        outer,
        found,
        process_is_granule=slices == 1,
        allow_split_physical_axes=True,
    )
    return Mesh(grid, spec.names, axis_types=types)


def in_target_order(target: Target, devices: Sequence[Any]) -> list[Any] | None:
    """The devices in the order of the places of `Layout.order`, or None where they are not the target's.

    TPU devices are known by slice, coordinates and core. GPU devices have only their NVLink domain and process: in
    that order, and of ids in a process, they are host by host.
    """
    if target.text == "local" or len(devices) != target.num_devices:
        return None
    if target.platform == "gpu":
        each = set(collections.Counter(device.process_index for device in devices).values())
        whole = each == {len(devices)} or (len(each) == 1 and target.shape[-1] % min(each) == 0)
        return sorted(devices, key=_host_by_host) if whole else None
    shape = (*target.shape, 1)[:3]
    cores = target.num_devices // target.slices // math.prod(shape)
    found = {}
    for device in devices:
        slice_index = getattr(device, "slice_index", None) or 0
        coords, core = getattr(device, "coords", None), getattr(device, "core_on_chip", 0)
        if coords is None or len(coords) != 3:
            return None
        found[(slice_index, *reversed(coords), core)] = device
    places = [range(size) for size in (target.slices, *reversed(shape), cores)]
    ordered = [found.get(place) for place in itertools.product(*places)]
    return None if None in ordered else ordered


def _host_by_host(device: Any) -> tuple[int, int, int]:
    # JAX numbers the NVLink domains of GPUs as slices.
    return getattr(device, "slice_index", None) or 0, device.process_index, device.id


def _distinct(devices: Sequence[Any], attribute: str) -> int:
    return len({getattr(device, attribute, 0) for device in devices})


def _check_slow_links(spec: MeshSpec, slices: int, parts: int) -> None:
    """The devices come in as many parts joined by slow links as `spec.dcn` says; slices must be spoken of."""
    declared = math.prod(count for _, count in spec.dcn)
    if spec.dcn and declared != parts:
        split = ", ".join(f"{axis}={count}" for axis, count in spec.dcn)
        raise DeclarationError(
            f"mesh {spec}: dcn ({split}) splits it in {declared} parts over slow links, the devices have "
            f"{parts}; declare the number of slices or hosts there are"
        )
    if not spec.dcn and slices > 1:
        raise DeclarationError(
            f"mesh {spec}: the devices are {slices} slices joined by slow links, and dcn names no axis for "
            "them; "
            f"declare dcn={{{spec.names[0]!r}: {slices}}}, or another axis"
        )


def _find(spec: MeshSpec) -> list[jax.Device]:
    """The devices of the target's platform that JAX sees here."""
    import jax

    platform = spec.machine.platform
    try:
        found = jax.devices() if spec.target == "local" else jax.devices(platform)
    except RuntimeError as error:
        raise DeclarationError(
            f"mesh {spec}: JAX sees no {platform} device here; run on {spec.target}, or pass devices="
        ) from error
    return found[: spec.num_devices] if platform == "cpu" else found


def _way_out(spec: MeshSpec, count: int, *, passed: bool) -> str:
    if passed:
        return f"pass {spec.num_devices}, or declare sizes that multiply to {count}"
    if spec.machine.platform == "cpu":
        return f"call emulate({spec.num_devices}) before anything starts JAX"
    return f"declare sizes that multiply to {count}, or run on {spec.target}"
