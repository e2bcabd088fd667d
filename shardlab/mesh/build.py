"""Build what a MeshSpec declares: a `Mesh` of real or emulated devices, or an `AbstractMesh` without any.

Every axis is **Auto**: user-written Flax models leave activations to the compiler, and `jax.sharding.Mesh`
defaults to Explicit axes since jax 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec

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

    On TPU and GPU the axes are laid on the physical links by `jax.experimental.mesh_utils`; axes of
    `spec.dcn` run over slices (or, where devices have none, over processes). CPU devices are reshaped in
    order; of more CPU devices than the mesh has, the first are taken.

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
