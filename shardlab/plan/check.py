"""What can be wrong with a declaration beyond a parameter's spec."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from shardlab.mesh.faults import DeclarationError, Fault, suggestion
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import path_of
from shardlab.module.model import Model
from shardlab.module.residuals import POLICIES, REMAT
from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.check import check
from shardlab.pipeline.schedules import Schedule, make_schedule
from shardlab.pipeline.stages import Stages, read_stages, stage_layers
from shardlab.plan.layout import axes_in, policy_within_stage
from shardlab.plan.optimizer import changed_by_padding
from shardlab.plan.plan import Parameter
from shardlab.sharding.rules import axes_of

DTYPES = ("float32", "bfloat16", "float64")
HEADS = ("auto", "examples", "last_stage", "vocab")


def choice_faults(**given: Any) -> list[Fault]:
    """Faults of the options that are names or levels."""
    allowed: dict[str, tuple[Any, ...]] = {
        "zero": (0, 1, 2, 3),
        "dtype": DTYPES,
        "reduce_dtype": ("auto", *DTYPES),
        "head": HEADS,
        "gather": ("auto", "step", "layer"),
        "accumulate": ("auto", "full", "sharded"),
        "sends": ("auto", "direct", "delayed"),
        "batch_axes": ("manual", "automatic"),
    }
    faults = []
    for name, value in given.items():
        if value not in allowed[name]:
            hint = suggestion(value, map(str, allowed[name])) if isinstance(value, str) else ""
            faults.append(
                Fault(
                    f"{name}={value!r}",
                    f"is not one of {', '.join(map(str, allowed[name]))}",
                    f"{hint}write one of them",
                )
            )
    if given["dtype"] == "float64" and not jax.config.read("jax_enable_x64"):
        faults.append(
            Fault(
                "dtype='float64'",
                "JAX computes in 32 bits here",
                "call jax.config.update('jax_enable_x64', True) first",
            )
        )
    return faults


def remat_faults(remat: str | tuple[str, ...]) -> list[Fault]:
    """What is wrong with the remat policies, one for all stages or one for each."""
    policies, each = (*REMAT, "stage", *POLICIES), remat if isinstance(remat, tuple) else (remat,)
    within = tuple(f"stage/{policy}" for policy in (*REMAT, *POLICIES))
    faults = [
        Fault(
            f"remat={value!r}",
            f"is not one of {', '.join(policies)}",
            f"{suggestion(value, policies) if isinstance(value, str) else ''}write one of them",
        )
        for value in dict.fromkeys(each)
        if value not in (*policies, *within)
    ]
    if len(each) > 1 and any(policy_within_stage(value) for value in each):
        problem = "keeps a stage's input alone, in buffers that all devices have alike, and others keep more"
        faults.append(Fault("remat='stage'", problem, "write it for all stages, or another for this one"))
    return faults


def reduce_faults(asked: str, dtype: str, accumulated: str, manual: bool) -> list[Fault]:
    """What gradients cannot be summed in; a dtype that is none is told elsewhere."""
    where = f"reduce_dtype={asked!r}"
    if asked not in DTYPES or dtype not in DTYPES:
        return []
    if not manual and asked != dtype:
        return [
            Fault(
                where,
                f"with automatic batch axes XLA sums gradients where it computes them, in {dtype}",
                "use reduce_dtype='auto', or batch_axes='manual'",
            )
        ]
    if jnp.dtype(asked).itemsize > jnp.dtype(accumulated).itemsize:
        problem = f"gradients of a step in {dtype} accumulate in {accumulated}"
        return [Fault(where, problem, f"use reduce_dtype={accumulated!r}")]
    return []


def batch_faults(leaves: list[tuple[str, Any]], mesh: MeshSpec, microbatches: int, manual: bool) -> list[Fault]:
    """What is wrong with the batch, its size and the microbatches."""
    if not leaves:
        return [Fault("batch", "has no arrays", "pass a pytree whose arrays have the examples as leading dim")]
    faults = []
    first, size = leaves[0][0], leaves[0][1].shape[0] if leaves[0][1].shape else 0
    for path, leaf in leaves:
        here = leaf.shape[0] if leaf.shape else 0
        if here != size or not leaf.shape:
            faults.append(
                Fault(
                    f"batch {path}",
                    f"leading dim {here} is not the {size} examples of {first}",
                    "give every array the examples first",
                )
            )
    shards = mesh.batch_size_divisor
    axes = " x ".join(f"{axis}={mesh.sizes[axis]}" for axis in mesh.batch) or "no batch axis"
    if microbatches < 1:
        faults.append(Fault(f"microbatches={microbatches}", "is not a positive number", "write 1 or more"))
    elif size % (shards * microbatches):
        up = math.ceil(size / (shards * microbatches)) * shards * microbatches
        fewer = next((count for count in range(microbatches, 0, -1) if size % (shards * count) == 0), 0)
        faults.append(
            Fault(
                "batch",
                f"{size} examples do not divide by {shards} shards ({axes}) x {microbatches} microbatches",
                f"use a batch of {up}" + (f", or {fewer} microbatch{'es' if fewer > 1 else ''}" if fewer else ""),
            )
        )
    if not manual and microbatches > 1:
        faults.append(
            Fault(
                f"microbatches={microbatches}",
                "the model computes across examples, and a microbatch is not the batch",
                "use microbatches=1",
            )
        )
    return faults


def stage_faults(
    model: Model,
    mesh: MeshSpec,
    schedule: str | Schedule,
    virtual: int | None,
    layers: Stages,
    microbatches: int,
    manual: bool,
    remat: str | tuple[str, ...],
    *,
    delayed: bool,
) -> list[Fault]:
    """What is wrong with the stages: parts, schedule, layers, remat policies."""
    stages = mesh.sizes[mesh.stage] if mesh.stage else 1
    faults = []
    if stages > 1 and model.parts is None:
        faults.append(
            Fault(
                f"mesh axis {mesh.stage!r}",
                f"has {stages} stages, and the model's parts are not named",
                "pass pipeline=Pipeline(before=..., blocks=..., after=...)",
            )
        )
    if stages > 1 and not manual:
        faults.append(
            Fault(
                f"mesh axis {mesh.stage!r}",
                f"{stages} stages need manual batch axes",
                "use one stage, or batch_axes='manual'",
            )
        )
    try:
        if isinstance(schedule, str):
            sizes = {"stages": stages, "microbatches": max(microbatches, 1)}
            made = make_schedule(schedule, **sizes, virtual=virtual, delayed=delayed)
        else:
            made = schedule
            check(made)
            faults += _table_faults(made, mesh, stages, microbatches)
        count = made.num_stages if stages > 1 else 1
        if isinstance(remat, tuple) and len(remat) != count:
            problem = f"names policies of {len(remat)} stages, and there {'are' if count > 1 else 'is'} {count}"
            faults.append(Fault(f"remat={' | '.join(remat)!r}", problem, "name one for each, or one for all"))
        if model.parts is not None:
            stage_layers(layers if stages > 1 else None, len(model.parts.layers), count)
            faults += _word_faults(layers, model) if stages > 1 else []
    except ScheduleError as error:
        fault = fault_of(error)
        if fault is None:  # a printed table, whose marks are the way out
            raise DeclarationError(str(error)) from None
        faults.append(fault)
    return faults


def _word_faults(stages: Stages, model: Model) -> list[Fault]:
    """A list of stages that names blocks by several words names each kind by its own."""
    if not isinstance(stages, str) or "|" not in stages or model.parts is None:
        return []
    words = [
        word for stage in read_stages(stages) for word, count in stage for _ in range(count) if word not in ("E", "H")
    ]
    if len(set(words)) == 1:
        return []
    kinds, first = model.parts.kinds, dict[str, int]()
    for block, word in enumerate(words):
        like = first.setdefault(word, block)
        if kinds[block] != kinds[like]:
            problem = f"{word} stands for block {like} and for block {block}, which are of different kinds"
            return [Fault(f"stages {stages!r}", problem, "use a word for each kind, or one for all")]
    return []


def fault_of(error: ScheduleError | DeclarationError) -> Fault | None:
    """A message of its own, which reads ``where: problem; way out``, as a fault beside the others; None of another."""
    where, _, rest = str(error).partition(": ")
    problem, _, way_out = rest.rpartition("; ")
    return Fault(where, problem, way_out) if problem else None


def _table_faults(schedule: Schedule, mesh: MeshSpec, stages: int, microbatches: int) -> list[Fault]:
    """A table of the user's own is for as many devices and microbatches as there are."""
    faults = []
    if stages not in (1, schedule.num_devices):
        problem = f"is a table for {schedule.num_devices} devices, the stage axis {mesh.stage!r} has {stages}"
        faults.append(
            Fault(f"schedule {schedule.name!r}", problem, "give a table with a row for each, or another mesh")
        )
    if stages > 1 and schedule.num_microbatches != microbatches:
        problem = f"is a table for {schedule.num_microbatches} microbatches, a step has {microbatches}"
        faults.append(
            Fault(
                f"schedule {schedule.name!r}",
                problem,
                f"use microbatches={schedule.num_microbatches}, or another table",
            )
        )
    return faults


def in_shards(blocks: Sequence[Parameter], mesh: MeshSpec, which: str) -> bool:
    """Whether the batch axes cut some parameter of a block in its ``"storage"`` or ``"state"``."""
    several = {axis for axis in mesh.batch if mesh.sizes[axis] > 1}
    return any(several & axes_in(getattr(block, which)) for block in blocks)


def sharding_faults(
    blocks: Sequence[Parameter], mesh: MeshSpec, zero: int, gather: str, accumulate: str
) -> list[Fault]:
    """Choices about shards of blocks that lie in none."""
    faults = []
    if gather == "layer" and not in_shards(blocks, mesh, "storage"):
        faults.append(
            Fault(
                "gather='layer'",
                f"at ZeRO level {zero} no block's parameter lies in shards of the batch axes",
                "use zero=3 on batch axes of more than one device, with the blocks named by pipeline=; or "
                "gather='step'",
            )
        )
    if accumulate == "sharded" and (zero < 2 or not in_shards(blocks, mesh, "state")):
        faults.append(
            Fault(
                "accumulate='sharded'",
                f"at ZeRO level {zero} no block's gradient lies in shards of the batch axes",
                "use zero=2 or 3 on batch axes of more than one device, with the blocks named by pipeline=; or "
                "accumulate='full'",
            )
        )
    return faults


def layer_faults(model: Model, placements: Mapping[str, Any]) -> list[Fault]:
    """Blocks are stacked, so the same array has the same spec in each."""
    if model.parts is None:
        return []
    faults = []
    parts, arrays = model.parts, dict[tuple[int, str], list[str]]()
    for kind, layer in zip(parts.kinds, parts.layers, strict=True):
        for inner, path in layer.items():
            arrays.setdefault((kind, inner), []).extend([path] if path in placements else [])
    for paths in arrays.values():
        for path in paths[1:]:
            if placements[path].spec != placements[paths[0]].spec:
                faults.append(
                    Fault(
                        path,
                        f"spec {placements[path].spec} ({placements[path].source}) is not that of {paths[0]}, "
                        f"{placements[paths[0]].spec}; blocks are stacked",
                        "give every block the same spec",
                    )
                )
                break
    return faults


def dtype_faults(model: Model) -> list[Fault]:
    """Parameters that have no gradient."""
    return [
        Fault(
            path,
            f"is a parameter of dtype {leaf.dtype}, and only floating-point and complex numbers are trained",
            "make it a buffer: an nnx.Variable that is no nnx.Param, a Linen collection beside params, or a constant "
            "of the function",
        )
        for path, leaf in model.parameters.items()
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
    ]


def random_faults() -> list[Fault]:
    """Settings of JAX under which a draw depends on the mesh, or initialisation is not Flax's own."""
    faults = []
    impl = getattr(jax.config, "jax_default_prng_impl")  # noqa: B009
    if impl != "threefry2x32":
        faults.append(
            Fault(
                f"jax_default_prng_impl={impl!r}",
                "its draws depend on how an array is sharded",
                "use jax.config.update('jax_default_prng_impl', 'threefry2x32')",
            )
        )
    if not getattr(jax.config, "jax_threefry_partitionable"):  # noqa: B009
        faults.append(
            Fault(
                "jax_threefry_partitionable=False",
                "a device would draw all of an array to keep its share",
                "use jax.config.update('jax_threefry_partitionable', True)",
            )
        )
    return faults


@contextlib.contextmanager
def traced_in(dtype: str) -> Iterator[None]:
    """Names the cause of what JAX refuses in a model.

    A loop that does not keep its dtypes once parameters are in `dtype`; a constraint on an axis that the mesh lacks.
    """
    try:
        yield
    except ValueError as error:
        missing = re.search(r"Resource axis: (\w+) of (.*?) is not found in mesh: \((.*?),?\)", str(error))
        if missing is None:
            raise
        axis, spec, there = missing.groups()
        raise DeclarationError(
            f"mesh axis {axis!r}: a constraint in the model's own code, {spec}, names it, and the mesh has "
            f"{there}; declare it, of size 1 if need be, or change the constraint"
        ) from error
    except TypeError as error:
        if "carry" not in str(error):
            raise
        detail = next((line.strip(" *;") for line in str(error).splitlines() if " has type " in line), str(error))
        raise DeclarationError(
            f"dtype={dtype!r}: a loop of the model starts in a dtype of its own and goes on in that of its parameters "
            f"({detail}); start it in the dtype of its input, or use dtype='float32'"
        ) from error


def activation_faults(option: str, spec: PartitionSpec | None, model: Model, mesh: MeshSpec) -> list[Fault]:
    """What is wrong with a spec of what flows between blocks, whatever flows; `option` is what declares it."""
    if spec is None:
        return []
    name = f"{option}={spec}"
    if model.parts is None:
        return [
            Fault(
                name,
                "the model's parts are not named, so that nothing flows between blocks",
                "pass pipeline=Pipeline(before=..., blocks=..., after=...), or leave it out",
            )
        ]
    faults = []
    for axis in sorted(axes_in(spec)):
        if axis not in mesh.sizes:
            hint = suggestion(axis, mesh.names)
            there = ", ".join(mesh.names)
            faults.append(Fault(name, f"the mesh has no axis {axis!r}, it has {there}", f"{hint}name one of them"))
        elif axis == mesh.stage:
            faults.append(Fault(name, f"{axis!r} is the stage axis, and x is on one stage at a time", "leave it out"))
    return faults


def flow_faults(option: str, spec: PartitionSpec, x: Any, mesh: MeshSpec) -> list[Fault]:
    """Where the spec, whose axes are right, does not fit what flows between blocks.

    Args:
      x: shapes of a microbatch on one shard.
    """
    name, faults = f"{option}={spec}", []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(x)[0]:
        path = f"x {path_of(keys)}".rstrip()
        if len(spec) > leaf.ndim:
            problem = f"has {len(spec)} entries, and {path} {leaf.ndim} dims, {list(leaf.shape)}"
            faults.append(Fault(name, problem, "give one entry for each dim, or fewer"))
            continue
        for dim, entry in enumerate(spec):
            axes = [axis for axis in axes_of(entry) if axis not in mesh.batch]
            size = math.prod(mesh.sizes[axis] for axis in axes)
            if leaf.shape[dim] % size:
                problem = (
                    f"dim {dim} of {path} has size {leaf.shape[dim]}, not divisible by "
                    f"{' x '.join(f'{axis}={mesh.sizes[axis]}' for axis in axes)}"
                )
                faults.append(Fault(name, problem, "shard another dim"))
    return faults


def padding_faults(
    optimizer: optax.GradientTransformation,
    model: Model,
    parameters: Sequence[Parameter],
) -> list[Fault]:
    """Padded parameters whose update might be another than without padding."""
    padded = {p.path: p.stored_shape for p in parameters if p.stored_shape != p.shape}
    if not padded:
        return []
    shapes = {p.path: jax.ShapeDtypeStruct(p.shape, p.dtype) for p in parameters}
    changed = changed_by_padding(optimizer, model, shapes, padded)
    if changed is None:
        return []
    first = next((p for p in parameters if p.path in padded and changed.endswith(f" of {p.path}")), None)
    first = first or next(p for p in parameters if p.path in padded)
    return [
        Fault(
            f"{first.path} ({first.source})",
            f"pad=True may change the optimizer's {changed}: it looks at more than each number alone",
            "shard another dim, or replicate it on purpose with None",
        )
    ]


def check_flow(x: Any, y: Any, name: str = "block") -> None:
    """A block keeps the structure and the shapes of what flows through it."""
    if str(jax.tree.structure(x)) != str(jax.tree.structure(y)):
        raise DeclarationError(
            f"{name}: returns {jax.tree.structure(y)} for x of {jax.tree.structure(x)}; return x's structure"
        )
    for (keys, mine), theirs in zip(jax.tree_util.tree_flatten_with_path(x)[0], jax.tree.leaves(y), strict=True):
        if mine.shape != theirs.shape:
            path = f"x {path_of(keys)}".rstrip()
            raise DeclarationError(
                f"{name}: {path} enters as {list(mine.shape)} and leaves as {list(theirs.shape)}; every "
                "block keeps x's shapes"
            )
