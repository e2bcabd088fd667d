"""Weights from elsewhere onto a plan's mesh, and a plan's parameters to files that others read.

    tensors in files  -- a table of names -->  parameters by path  -- a plan -->  arrays as the plan stores them

Every process reads of every file what its own devices store, one device's part of one stored array at a time: stacks,
padding and shards are made while it reads, and no host and no device holds the model. Back, one parameter at a time is
gathered.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from shardlab.checkpoint.canonical import own_parameters
from shardlab.checkpoint.names import Held, Names, read_names
from shardlab.checkpoint.safetensors import DTYPES, Entry, Tensor, read_folder, shown, write_folder
from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.mesh.processes import gathered
from shardlab.plan.plan import Plan
from shardlab.step.state import shardings, storage_specs

MAX_BYTES = 5_000_000_000
"""Of a file, where nothing else is said; what transformers has long written."""


def load_safetensors(
    folder: str | Path, plan: Plan, names: Names | str, *, cast: bool = False, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """The parameters that a folder of safetensors holds, placed as `plan` stores them.

        step = shardlab.compile_train_step(model, loss, optimizer, plan, batch)
        state = step.init(0, shardlab.load_safetensors("Qwen3-8B", plan, "qwen", cast=True))

    Args:
      folder: with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files that it names.
      plan: of a train step or of a forward pass.
      names: a table of names, or the name of one: "llama", "qwen", "mixtral".
      cast: make a tensor of another dtype what the plan's parameter is; without it that is a fault.
      mesh: the devices, in place of those that `build_mesh` gives.

    Raises:
      DeclarationError: with every tensor that is missing, too many, or of another shape or dtype, before any is read;
        or a file is not what it says.

    >>> import tempfile
    >>> import optax
    >>> from jax.sharding import PartitionSpec as P
    >>> from shardlab import Functions, MeshSpec, make_plan
    >>> from shardlab.checkpoint import Name
    >>> model = Functions(init=lambda key: {"up": jnp.ones((2, 4))}, apply=lambda p, batch: batch @ p["up"])
    >>> mesh, batch = MeshSpec({"tensor": 2}, target="cpu:2"), jnp.ones((3, 2))
    >>> plan = make_plan(model, mesh=mesh, rules=[("up", P(None, "tensor"))], optimizer=optax.sgd(1.0), batch=batch)
    >>> table = Names((Name("up", "up_proj.weight", dims=(1, 0)),))
    >>> placed = jax.device_put({"up": jnp.ones((2, 4))}, shardings(build_mesh(mesh), storage_specs(plan)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = save_safetensors(folder, plan, placed, table)
    ...     print(files[0].name, load_safetensors(folder, plan, table)["up"].sharding.spec)
    model.safetensors P(None, 'tensor')
    """
    return open_weights(folder, plan, names, cast=cast).onto(mesh or build_mesh(plan.mesh))


def save_safetensors(
    folder: str | Path,
    plan: Plan,
    parameters: Mapping[str, jax.Array],
    names: Names | str,
    *,
    dtype: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Writes the parameters of a plan to a folder of safetensors, as `load_safetensors` and transformers read one.

        shardlab.save_safetensors("out", plan, state.parameters, "qwen", dtype="bfloat16")

    transformers also reads ``config.json``, which says what the model is: put the one there that the weights came with.

    Args:
      folder: to make; one that holds weights is refused.
      plan: whose parameters they are.
      parameters: as a `TrainState` of the plan has them.
      names: a table of names, or the name of one.
      dtype: to write numbers in; None: as they are.
      max_bytes: of a file; a tensor that is larger has one of its own.

    Returns:
      The files, the index last where there are several.

    Raises:
      DeclarationError: the table has no name for a parameter, or one for two; the folder holds weights already, or
        cannot be written.
    """
    by_path = {parameter.path: parameter for parameter in plan.parameters}
    members = {stack.name: stack.members for stack in plan.stacks}
    ordered = [by_path[path] for name in storage_specs(plan) for path in members.get(name, (name,)) if path]
    shapes = {one.path: jax.ShapeDtypeStruct(one.shape, jnp.dtype(one.dtype)) for one in ordered}
    return write_weights(
        folder,
        shapes,
        (_on_host(array) for _, array in own_parameters(plan, parameters)),
        names,
        dtype=dtype,
        max_bytes=max_bytes,
    )


def write_weights(
    folder: str | Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    values: Iterator[np.ndarray],
    names: Names | str,
    *,
    dtype: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """`save_safetensors` of arrays by path, `values` in the order of `shapes`; process 0 writes."""
    names, folder = read_names(names), Path(folder)
    if dtype is not None and dtype not in DTYPES.values():
        raise DeclarationError(f"dtype: is {dtype!r}; give one of {', '.join(DTYPES.values())}")
    held, entries, faults = [], {}, []
    for path, leaf in shapes.items():
        found = names.held(path, leaf.shape)
        if found is None:
            faults.append(_no_line(path))
            continue
        held.append(found)
        for _, name in found.tensors():
            if name in entries:
                faults.append(Fault(path, f"is written as {name!r}, and so is another", "give each its own name"))
            entries[name] = Entry(name, dtype or leaf.dtype.name, found.shape)
    raise_faults(_alike(faults))

    def tensors(values: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for one, value in zip(held, values, strict=True):
            for at, _ in one.tensors():
                yield one.as_theirs(value[tuple(at.get(dim, slice(None)) for dim in range(value.ndim))])

    def write(values: Iterator[np.ndarray]) -> list[Path]:
        return write_folder(folder, list(entries.values()), tensors(values), max_bytes)

    return gathered(values, write) or []


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


@dataclass(frozen=True)
class Weights:
    """Tensors of a folder, found to be those of a plan's parameters; none is read yet.

    Attributes:
      plan: whose parameters they are.
      held: of each parameter by path, as which tensors it is held.
      tensors: by name.
    """

    plan: Plan
    held: Mapping[str, Held]
    tensors: Mapping[str, Tensor]

    def onto(self, mesh: Mesh) -> dict[str, jax.Array]:
        """The parameters, read and placed as the plan stores them."""
        members = {stack.name: stack.members for stack in self.plan.stacks}
        by_path = {parameter.path: parameter for parameter in self.plan.parameters}
        arrays = {}
        for name, sharding in shardings(mesh, storage_specs(self.plan)).items():
            slots = members.get(name)
            one = by_path[name if slots is None else next(filter(None, slots))]
            shape = one.stored_shape if slots is None else (len(slots), *one.stored_shape)
            arrays[name] = self._placed(slots or name, shape, jnp.dtype(one.dtype), sharding)
        return arrays

    def _placed(
        self, which: str | Sequence[str | None], shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
    ) -> jax.Array:
        """A stored array. One shard is read at a time, for all the devices of this process that hold it."""
        holders: dict[tuple[range, ...], list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(range(*one.indices(size)) for one, size in zip(index or (), shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        parts = []
        for bounds, devices in holders.items():
            shard = self.read(which, bounds, dtype)
            # Waited for: until it is there the host holds what it has read.
            parts += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    def read(self, which: str | Sequence[str | None], bounds: tuple[range, ...], dtype: jnp.dtype) -> np.ndarray:
        """The part of a parameter, or of a stack of some, within bounds of its stored dims; zeros where padded."""
        out = np.zeros([len(one) for one in bounds], dtype)
        if isinstance(which, str):
            self._fill(out, which, bounds)
            return out
        for place, slot in enumerate(bounds[0]):
            path = which[slot]
            if path is not None:
                self._fill(out[place], path, bounds[1:])
        return out

    def _fill(self, out: np.ndarray, path: str, bounds: tuple[range, ...]) -> None:
        held = self.held[path]
        # A padded dim goes on behind the user's own.
        inside = tuple(range(one.start, min(one.stop, size)) for one, size in zip(bounds, held.ours, strict=True))
        slices = [slice(one.start, one.stop) for dim, one in enumerate(inside) if dim not in held.counted]
        for at, name in held.tensors(inside):
            place = tuple(at[dim] - one.start if dim in at else slice(len(one)) for dim, one in enumerate(inside))
            out[place] = held.as_ours(self.tensors[name].array())[tuple(slices)]


def open_weights(folder: str | Path, plan: Plan, names: Names | str, *, cast: bool = False) -> Weights:
    """The tensors of a folder, checked against a plan's parameters; see `load_safetensors`."""
    names, tensors = read_names(names), read_folder(folder)
    held: dict[str, Held] = {}
    faults, used = [], set()
    for parameter in plan.parameters:
        found = names.held(parameter.path, parameter.shape)
        if found is None:
            faults.append(_no_line(parameter.path))
            continue
        held[parameter.path] = found
        for _, name in found.tensors():
            used.add(name)
            if name not in tensors:
                problem = f"is tensor {name!r}, which {folder} does not hold"
                way_out = "give the folder of such a model, or the model and the table of such a folder"
                faults.append(Fault(parameter.path, problem, way_out))
            else:
                faults += _differences(parameter.path, parameter.dtype, found.shape, tensors[name], cast)
    for name in sorted(tensors.keys() - used):
        if not names.ignores(name):
            way_out = "give the model that has it, or a table that ignores it: Names(lines, ignored=(...))"
            faults.append(Fault(str(tensors[name]), "is no parameter of this model by the table of names", way_out))
    raise_faults(_alike(faults))
    return Weights(plan, held, tensors)


def _differences(path: str, dtype: str, shape: tuple[int, ...], tensor: Tensor, cast: bool) -> Iterator[Fault]:
    if tensor.shape != shape:
        problem = f"is {shown(list(tensor.shape))}, and {path} needs {list(shape)}"
        yield Fault(str(tensor), problem, "give the sizes of the model that was saved")
    if tensor.dtype == dtype:
        return
    problem = f"is {tensor.dtype}, and {path} is {dtype}"
    if not all(jnp.issubdtype(one, jnp.floating) for one in (tensor.dtype, dtype)):
        yield Fault(str(tensor), problem, "give weights that are not quantised")
    elif not cast:
        theirs, ours = jnp.finfo(tensor.dtype), jnp.finfo(dtype)
        exact = theirs.nmant <= ours.nmant and theirs.nexp <= ours.nexp
        how = "which changes no number" if exact else "rounded"
        yield Fault(str(tensor), problem, f"say cast=True (--cast-weights True) to make it {dtype}, {how}")


def _no_line(path: str) -> Fault:
    return Fault(path, "the table of names has no line for it", f"add Name({path!r}, ...), or give another table")


def _alike(faults: Sequence[Fault]) -> Iterator[Fault]:
    """The faults, those that differ in numbers alone, as of layers, once and with a count."""
    groups = itertools.groupby(
        sorted(faults, key=lambda fault: re.sub(r"\d+", "*", str(fault))),
        key=lambda fault: re.sub(r"\d+", "*", str(fault)),
    )
    for _, same in groups:
        first, *more = same
        yield Fault(first.where + (f" and {len(more)} more like it" if more else ""), first.problem, first.way_out)
