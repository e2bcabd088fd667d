"""`Plan`: the document a reviewer reads, a golden test pins and a compiler follows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from shardlab.mesh.spec import MeshSpec
from shardlab.module.model import computed
from shardlab.module.pipeline import Pipeline
from shardlab.pipeline.schedules import Schedule, make_schedule
from shardlab.pipeline.table_csv import from_csv
from shardlab.sharding.rules import axes_of, spec_from_json, spec_to_json


def shard_bytes(shape: tuple[int, ...], dtype: str, spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Bytes that one device holds of an array.

    >>> shard_bytes((8, 4), "float32", PartitionSpec("data"), {"data": 2})
    64
    """
    total = math.prod(shape) * (_KEY_BYTES.get(dtype) or jax.numpy.dtype(dtype).itemsize)
    for entry in spec:
        for axis in () if entry is None else entry if isinstance(entry, tuple) else (entry,):
            total //= sizes[axis]
    return total


# In the order of a printed plan; the last is counted among the parameters.
_HELD = ("parameters", "buffers", "working_copy", "gradients", "optimizer_state", "activations", "padding")
_KEY_BYTES = {"key<fry>": 8, "key<rbg>": 16, "key<urbg>": 16}  # of a random key, which is no number to NumPy


@dataclass(frozen=True)
class Parameter:
    """One parameter of the user's own tree.

    Attributes:
      path: where it sits in the user's model.
      shape: of the whole parameter.
      dtype: of the parameter as it is stored; the step computes in the plan's `dtype`.
      spec: as declared.
      source: the rule, annotation or spec that said so.
      compute: how a step computes with it: the declared axes that are not batch axes. The stage axis is among them
        with ``head="vocab"`` alone.
      storage: how it lies between steps.
      state: how its optimizer state lies, and its gradient once reduced.
      bytes_per_device: of `storage`; for a block of a pipeline, on the devices of its stage.
      stored_shape: `shape`, or, where its rule says ``pad=True``, that with dims rounded up to what their axes divide.
        What is beyond `shape` is zero, and is cut off before the model sees the parameter; of a vocabulary that the
        stages have parts of, `shardlab.cross_entropy` leaves it out.
      read_by: of a parameter outside the blocks of a pipeline, the parts that read it: before, context, after.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    source: str
    compute: PartitionSpec
    storage: PartitionSpec
    state: PartitionSpec
    bytes_per_device: int
    stored_shape: tuple[int, ...]
    read_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """One array that the model holds and that is not trained.

    Attributes:
      path: where it sits in the user's model.
      shape, dtype: of the whole array, as it is stored and computed with.
      spec: how it lies between steps; over the batch axes it is gathered before use.
      source: the rule or spec that said so, or that none did.
      bytes_per_device: for a block of a pipeline, on the devices of its stage.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    source: str
    bytes_per_device: int


@dataclass(frozen=True)
class StateLeaf:
    """One array of the optimizer's state: path in its tree, shape, dtype, spec, bytes per device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes_per_device: int


@dataclass(frozen=True)
class Stack:
    """Arrays of one name from every block, stored as one array [slots, ...] with the stage axis on slots.

    Attributes:
      name: the path with ``*`` for the block.
      members: the path in each slot; None is a pad slot of zeros, which only fills a shorter stage.
    """

    name: str
    members: tuple[str | None, ...]


@dataclass(frozen=True)
class Plan:
    """Where every array lives and what the step will do.

    Made by `make_plan`; immutable, printable, and the same after a round trip through JSON.

    Attributes:
      mesh: the declared mesh and the roles of its axes.
      pipeline: the parts of the model, or None when it is taken whole.
      parameters: every parameter of the user's tree, in its order.
      buffers: every array that the model holds and that is not trained; replicated unless a rule says otherwise.
      stacks: how the arrays of the blocks are stored together.
      layers: number of blocks in each stage; empty without parts.
      kinds: of each block, which kind it is: blocks of one kind are one program and lie in the same stacks.
      virtual: stages that a device of the stage axis holds.
      optimizer_state: every array of the optimizer's state.
      update: ``"stacked"`` or ``"per-layer"``: on which tree the optimizer runs.
      schedule: name of the pipeline schedule.
      table_csv: the table of a schedule that is none of those with a name, as CSV; or None.
      num_microbatches: microbatches a step.
      zero: ZeRO level, 0 to 3.
      remat: what the forward pass keeps: ``"none"`` (everything), ``"full"`` (a block's input), ``"stage"`` (a stage's
        input; ``"stage/full"``: its blocks' inputs while it runs again), or the name of a policy of
        `jax.checkpoint_policies`; or one of these for each stage.
      dtype: what the step computes in.
      reduce_dtype: what gradients are summed over the batch axes in; within a device they accumulate in at least
        float32.
      head: ``"examples"``, ``"last_stage"`` or ``"vocab"``: how `before` and `after` are spread over the stages.
      batch: path, shape and dtype of every leaf of the batch.
      batch_axes_manual: whether gradients accumulate per shard and are reduced once; False lets XLA place every
        reduction (needed where the model computes statistics over the batch).
      activation_bytes: what one stage keeps of one microbatch, per device; 0 without parts.
      recomputed_bytes: of ``remat="stage"``, what a backward computes again of one microbatch before it begins, and
        where it is split keeps from I to W.
      cut_bytes: where backwards are split, what one stage keeps of one microbatch from I to W beside all that.
      gather: when weights that lie in shards of the batch axes are gathered: ``"step"``, all once a step, or
        ``"layer"``, each layer's whenever it is used.
      accumulate: gradients over the microbatches: ``"full"``, reduced once a step, or ``"sharded"``, each layer's
        reduce-scattered in every backward, and those of `before` and `after` whenever a microbatch has passed them.
      sends: when what a tick makes for another stage is sent: ``"direct"``, at its end, or ``"delayed"``, during the
        next tick, beside what that computes.
      scatter: how gradients are scattered over a batch axis: ``"auto"``, what is faster on the links; ``"whole"``, at
        once; or over parts of it, one after another: ``"data=32x8"``.
      activation_spec: the spec of what flows between blocks, or None.
      saved_activation_spec: the spec of the same where it is kept for the backward; None: as it flows.
      notes: what was decided and not declared.
    """

    mesh: MeshSpec
    pipeline: Pipeline | None
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    stacks: tuple[Stack, ...]
    layers: tuple[int, ...]
    kinds: tuple[int, ...]
    virtual: int
    optimizer_state: tuple[StateLeaf, ...]
    update: str
    schedule: str
    table_csv: str | None
    num_microbatches: int
    zero: int
    remat: str | tuple[str, ...]
    dtype: str
    reduce_dtype: str
    head: str
    batch: tuple[tuple[str, tuple[int, ...], str], ...]
    batch_axes_manual: bool
    activation_bytes: int
    recomputed_bytes: int
    cut_bytes: int
    gather: str
    accumulate: str
    sends: str
    scatter: str
    activation_spec: PartitionSpec | None
    saved_activation_spec: PartitionSpec | None
    notes: tuple[str, ...]

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages, virtual ones too; 1 without a pipeline."""
        return max(len(self.layers), 1)

    @property
    def num_stage_devices(self) -> int:
        """Number of devices on the stage axis; 1 without a pipeline."""
        return self.num_stages // self.virtual

    @property
    def batch_size(self) -> int:
        """Global examples a step."""
        return self.batch[0][1][0]

    @property
    def microbatch_rows(self) -> int:
        """Examples of one microbatch on one shard of the batch."""
        shards = self.mesh.batch_size_divisor if self.batch_axes_manual else 1
        return self.batch_size // shards // self.num_microbatches

    @property
    def vocabulary(self) -> dict[str, int]:
        """The parameters that the stages have a part of each, computing with it, and the dim that is cut."""
        if self.num_stage_devices == 1:
            return {}
        dims = ((p.path, dim) for p in self.parameters for dim, entry in enumerate(p.compute) if self._by_stage(entry))
        return dict(dims)

    def _by_stage(self, entry: Any) -> bool:
        return self.mesh.stage in axes_of(entry)

    @property
    def num_parameters(self) -> int:
        """Trained numbers in the user's model; padding does not count."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    def table(self) -> Schedule:
        """The schedule, as a table of ticks x devices."""
        if self.table_csv is not None:
            return from_csv(self.table_csv, self.schedule, delayed=self.sends == "delayed")
        return make_schedule(
            self.schedule,
            stages=self.num_stage_devices,
            microbatches=self.num_microbatches,
            virtual=self.virtual,
            delayed=self.sends == "delayed",
        )

    def in_pieces(self, parameter: Parameter) -> bool:
        """Whether its gradient adds up in pieces, reduced whenever there is more of it.

        Not what the context reads: each stage has a gradient of that in every backward.
        """
        if self.accumulate != "sharded":
            return False
        if any(parameter.path in stack.members for stack in self.stacks):
            return True
        named = {
            axis for entry in parameter.state if entry for axis in (entry if isinstance(entry, tuple) else (entry,))
        }
        return bool(named & set(self.mesh.batch)) and bool(parameter.read_by) and "context" not in parameter.read_by

    def bytes_per_device(self) -> dict[str, int]:
        """Bytes on the fullest device.

        Parameters, buffers (arrays not trained), working_copy (of the parameters, as a step computes with them: cast,
        and gathered over the batch axes and, outside blocks, the stages), gradients, optimizer_state, activations (in
        flight, and of split backwards what waits for W), padding.
        """
        from shardlab.pipeline.cost import peak_in_flight, peak_waiting

        sizes = self.mesh.sizes
        stacked = {path: stack for stack in self.stacks for path in stack.members if path}
        totals = dict.fromkeys(_HELD, 0)
        padding = [0] * self.num_stage_devices
        seen: set[str] = set()
        accumulate = "float64" if self.dtype == "float64" else "float32"
        for parameter in self.parameters:
            stack = stacked.get(parameter.path)
            missing = [0] * self.num_stage_devices
            copies = 1
            if stack is not None:
                if stack.name in seen:
                    continue
                seen.add(stack.name)
                copies = len(stack.members) // self.num_stage_devices
                missing = [stack.members[at : at + copies].count(None) for at in range(0, len(stack.members), copies)]
            padded = round(
                parameter.bytes_per_device * (1 - math.prod(parameter.shape) / math.prod(parameter.stored_shape))
            )
            for device, none in enumerate(missing):
                padding[device] += parameter.bytes_per_device * none + padded * (copies - none)
            totals["parameters"] += parameter.bytes_per_device * copies
            totals["working_copy"] += self._working_bytes(parameter, copies, in_block=stack is not None)
            kind = computed(parameter.dtype, accumulate)
            spec = parameter.state if self.in_pieces(parameter) else parameter.compute
            totals["gradients"] += shard_bytes(parameter.stored_shape, kind, spec, sizes) * copies
        for buffer in self.buffers:
            stack = stacked.get(buffer.path)
            if stack is None or stack.name not in seen:
                copies = 1 if stack is None else len(stack.members) // self.num_stage_devices
                totals["buffers"] += buffer.bytes_per_device * copies
            seen |= set() if stack is None else {stack.name}
        # Of one device: with blocks of several kinds a device that lacks one has another.
        totals["padding"] = max(padding)
        totals["optimizer_state"] = sum(leaf.bytes_per_device for leaf in self.optimizer_state)
        if self.layers:
            # Buffers that all devices have alike, as long as the fullest one's.
            table = self.table()
            kept, waiting = max(peak_in_flight(table)), max(peak_waiting(table))
            between = self.recomputed_bytes + self.cut_bytes
            totals["activations"] = self.activation_bytes * kept + self.recomputed_bytes + between * waiting
        return totals

    def _working_bytes(self, parameter: Parameter, copies: int, *, in_block: bool) -> int:
        """What a device holds of `copies` parameters to compute with; nothing where it computes with those stored."""
        kind, sizes = computed(parameter.dtype, self.dtype), self.mesh.sizes
        stored, used = (
            shard_bytes(parameter.stored_shape, kind, spec, sizes) for spec in (parameter.storage, parameter.compute)
        )
        by_layer = in_block and self.gather == "layer" and stored != used
        # Of blocks that are gathered when they are used, one at a time is whole.
        cast = stored * copies if kind != parameter.dtype else 0
        return cast + used if by_layer else used * copies if cast or stored != used else 0

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives an equal plan back."""
        return json.dumps(_encode(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote."""
        return _decode(json.loads(text))

    def diff(self, other: Plan) -> tuple[str, ...]:
        """What differs in `other`, a line each; empty when the plans are equal."""
        lines = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs:
                continue
            if field.name in ("parameters", "buffers", "optimizer_state"):
                lines += _diff_rows(field.name, mine, theirs)
            else:
                lines.append(f"{field.name}: {mine} -> {theirs}")
        return tuple(lines)

    def __str__(self) -> str:
        from shardlab.plan.text import describe

        return describe(self)


def _diff_rows(name: str, mine: Any, theirs: Any) -> list[str]:
    left, right = ({row.path: row for row in rows} for rows in (mine, theirs))
    lines = []
    for path in {**left, **right}:
        if path not in right:
            lines.append(f"{name} {path}: only in the first plan")
        elif path not in left:
            lines.append(f"{name} {path}: only in the second plan")
        else:
            for field in dataclasses.fields(left[path]):
                was, now = getattr(left[path], field.name), getattr(right[path], field.name)
                if was != now:
                    lines.append(f"{name} {path}: {field.name} {was} -> {now}")
    return lines


def _encode(value: Any) -> Any:
    if isinstance(value, PartitionSpec):
        return {"spec": spec_to_json(value)}
    if isinstance(value, MeshSpec):
        return {"mesh": value.to_json()}
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(data: dict[str, Any]) -> Plan:
    def plain(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"spec"}:
            return spec_from_json(value["spec"])
        if isinstance(value, dict) and set(value) == {"mesh"}:
            return MeshSpec.from_json(value["mesh"])
        return tuple(plain(item) for item in value) if isinstance(value, list) else value

    def rows(kind: type, items: list[dict[str, Any]]) -> tuple[Any, ...]:
        return tuple(kind(**{key: plain(value) for key, value in item.items()}) for item in items)

    kinds = {"parameters": Parameter, "buffers": Buffer, "optimizer_state": StateLeaf, "stacks": Stack}
    fields: dict[str, Any] = {}
    for key, value in data.items():
        fields[key] = rows(kinds[key], value) if key in kinds else plain(value)
    fields["pipeline"] = None if data["pipeline"] is None else Pipeline(**data["pipeline"])
    return Plan(**fields)
