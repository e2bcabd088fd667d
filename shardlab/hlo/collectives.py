"""The collectives of a compiled step: the mesh axes each crosses, the bytes it moves per device and step.

Legend: n devices in a group, b bytes of the operands of one device.

    kind                 payload          wire (ring algorithm)
    all-gather           n b (result)     payload x (n-1)/n
    all-reduce           b                payload x 2(n-1)/n
    reduce-scatter       b                payload x (n-1)/n
    all-to-all           b                payload x (n-1)/n
    collective-permute   b                payload

Loops are counted with their trips, of a conditional's branches only the costliest, as often as its name says that it
is taken (`shardlab.hlo.loops.taken_name`) or else as if always, asynchronous pairs once.
Sizes are those of the compiled program: XLA:CPU reduces bf16 as fp32 (`promoted`), XLA:TPU pads.  Copies that
a kernel starts by itself (Pallas remote DMA) are not HLO collectives and are not seen.

Ring costs: Chan et al. 2007, "Collective communication: theory, practice, and experience".
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from shardlab.hlo.loops import visits
from shardlab.hlo.parse import Computation, HloModule, Instruction, parse

UNKNOWN = ("?",)
_KINDS = {
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-gather": "all-gather",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-broadcast",
    "send": "collective-permute",
}
# Multiples of payload x (n-1)/n; a permute and a broadcast send the payload whole.
_RINGS = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1, "all-to-all": 1}
# Each element of the result comes from one element of the operand, so slicing before or after is the same.
_ELEMENTWISE = frozenset(
    {"bitcast", "copy", "convert", "reshape", "transpose", "get-tuple-element", "optimization-barrier"}
)
_ARITHMETIC = frozenset({"add", "subtract", "multiply", "divide", "negate"})
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_PAIR = re.compile(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:,\s*device_ids=\((.*)\))?\s*\{([^}]*)\}$")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")

_THROUGH_HOSTS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}
_NONE: Mapping[str, int] = MappingProxyType({})

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled step.

    Attributes:
      kind: "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute" (or the rare
        "collective-broadcast").
      axes: the mesh axes it crosses, in mesh order; ("?",) when its groups do not all cross the same ones.
      group_size: devices in a group, n above, as many as the axes multiply to or fewer; for a permute their product.
      count: how often a step runs it.
      payload_bytes: per device and step, as in the table above.
      wire_bytes: per device and step, rounded to a byte.
      dtype: of the first operand.
      loop: the loops around it, as in `Visit.loop`; a `?` there means the count is a lower bound.
      op_name: the JAX operation it came from.
      source: `file:line` of the user's code.
      in_branch: whether a conditional decides if it runs.
      assumed: whether that branch is counted as if it were always taken: count and bytes are upper bounds.
      as_reduce_scatter: an all-reduce of which every device keeps only a slice of 1/n (XLA:CPU leaves
        the two apart).
      promoted: XLA reduces it in a wider type than the program asked for.
      over_slices: it goes through the hosts, from slice to slice of several.
      name: the instruction's, to find it in the text.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    payload_bytes: int
    wire_bytes: int
    dtype: str
    loop: str | None
    op_name: str
    source: str
    in_branch: bool
    assumed: bool
    as_reduce_scatter: bool
    promoted: bool
    name: str
    over_slices: bool = False

    @property
    def exact(self) -> bool:
        """Whether all loops around it have known trip counts; if not, count and bytes are lower bounds."""
        return self.loop is None or "*?" not in self.loop


@dataclass(frozen=True)
class Total:
    """Collectives of one kind over the same axes: how many a step runs, their bytes per device and step.

    `in_branch`: some stand in a branch of which nothing says how often it is taken, and are counted as if always.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    payload_bytes: int
    wire_bytes: int
    exact: bool
    in_branch: bool = False


def collectives(
    text: str | HloModule, axes: Mapping[str, int], *, slices: Mapping[str, int] = _NONE, every_branch: bool = False
) -> tuple[Collective, ...]:
    """The collectives of a compiled step, in the order of the text.

    Args:
      text: `compiled.as_text()`, or what `parse` made of it.
      axes: sizes of the mesh axes in mesh order; a partition's id is its row-major position in the mesh.
      slices: of several TPU slices, over how many of them an axis runs: the program is that of one.
      every_branch: list also those in branches that are not the costliest, with count and bytes 0.

    Raises:
      ValueError: the text is not HLO, or the program is for another number of devices than the mesh has.

    >>> found = collectives('''
    ... HloModule step, num_partitions=4
    ... ENTRY %main (x: f32[6]) -> f32[6] {
    ...   %x = f32[6]{0} parameter(0)
    ...   ROOT %sum = f32[6]{0} all-reduce(%x), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
    ... }
    ... ''', {"data": 2, "tensor": 2})
    >>> [(c.kind, c.axes, c.count, c.payload_bytes, c.wire_bytes) for c in found]
    [('all-reduce', ('data',), 1, 24, 24)]
    """
    module = parse(text) if isinstance(text, str) else text
    found = each_once(module, axes, slices)
    step = visits(module, lambda name, i: _wire(found[name, i.name]) if (name, i.name) in found else 0.0)
    listed = []
    for (name, _), one in found.items():
        visit = step.get(name)
        if visit is None or (visit.executions == 0 and not every_branch):
            continue
        listed.append(
            _replace(
                one,
                count=visit.executions,
                payload_bytes=one.payload_bytes * visit.executions,
                wire_bytes=round(_wire(one) * visit.executions),
                loop=visit.loop,
                in_branch=visit.in_branch,
                assumed=visit.assumed,
            )
        )
    return tuple(listed)


def totals(found: Iterable[Collective], *, sliced_as_reduce_scatter: bool = False) -> tuple[Total, ...]:
    """Collectives merged by kind and axes, most wire bytes first.

    Args:
      sliced_as_reduce_scatter: count an all-reduce of which only slices are kept (`as_reduce_scatter`) as
        the reduce-scatter that GPUs and TPUs make of it, at half the wire bytes.

    >>> one = Collective("all-gather", ("data",), 2, 3, 96, 48, "f32", None, "", "", *(False,) * 4, "g")
    >>> [(t.count, t.wire_bytes) for t in totals([one, one])]
    [(6, 96)]
    """
    rows: dict[tuple[str, tuple[str, ...]], Total] = {}
    for one in found:
        fold = sliced_as_reduce_scatter and one.as_reduce_scatter
        kind = "reduce-scatter" if fold else one.kind
        wire = round(one.wire_bytes / 2) if fold else one.wire_bytes
        row = rows.get((kind, one.axes), Total(kind, one.axes, 0, 0, 0, True))
        rows[kind, one.axes] = Total(
            kind,
            one.axes,
            row.count + one.count,
            row.payload_bytes + one.payload_bytes,
            row.wire_bytes + wire,
            row.exact and one.exact,
            row.in_branch or one.assumed,
        )
    return tuple(sorted(rows.values(), key=lambda row: (-row.wire_bytes, row.kind, row.axes)))


def each_once(
    module: HloModule, axes: Mapping[str, int], slices: Mapping[str, int] = _NONE
) -> dict[tuple[str, str], Collective]:
    """One execution of each collective, by the names of its computation and its instruction.

    Raises:
      ValueError: the program is for another number of devices than the mesh has.
    """
    within = {name: size // slices.get(name, 1) for name, size in axes.items()}
    devices = math.prod(within.values())
    if module.num_partitions is not None and module.num_partitions * module.replica_count != devices:
        sizes = ", ".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(
            f"the program is compiled for {module.num_partitions * module.replica_count} devices, "
            f"the mesh ({sizes}) has {devices}; give the axes of the mesh it was compiled with"
        )
    mesh = tuple(within.items())
    found = {}
    chains = set()
    for name, computation in module.computations.items():
        for instruction in computation.instructions.values():
            one = _once(module, computation, instruction, mesh, slices)
            if one is None:
                continue
            fusions = [caller for _, caller in module.callers.get(name, ()) if caller.opcode == "fusion"]
            if fusions:
                one = _fused(module, one, fusions[0])
            # XLA:TPU overlaps a collective with matmuls by fusing its start, a piece of it with each matmul,
            # and its end: copies of one instruction, with the chain's number.  One of them stands for all.
            chain = _CHAIN.search(instruction.attributes.get("frontend_attributes", ""))
            key = (one.kind, instruction.attributes.get("channel_id"), chain[1]) if chain else None
            if key is None or key not in chains:
                found[name, instruction.name] = one
            if key is not None:
                chains.add(key)
    return found


def _fused(module: HloModule, one: Collective, fusion: Instruction) -> Collective:
    """A collective inside a fusion, which XLA:TPU writes for what it runs as one kernel."""
    # Its reduce-scatter is an all-reduce and the slice, and the full result is never made.
    if one.as_reduce_scatter:
        one = _replace(one, kind="reduce-scatter", as_reduce_scatter=False)
    return _replace(one, op_name=one.op_name or fusion.op_name, source=one.source or module.source(fusion))


def _replace(one: Collective, **changes: object) -> Collective:
    return Collective(**{**one.__dict__, **changes})


def _wire(one: Collective) -> float:
    """Wire bytes of a collective's payload."""
    rings = _RINGS.get(one.kind)
    if rings is None:
        return one.payload_bytes
    return one.payload_bytes * rings * (one.group_size - 1) / one.group_size


def _once(
    module: HloModule,
    computation: Computation,
    instruction: Instruction,
    mesh: tuple[tuple[str, int], ...],
    slices: Mapping[str, int],
) -> Collective | None:
    """One execution of an instruction; None if it is no collective or crosses no axis."""
    opcode = instruction.opcode.removesuffix("-start")
    kind = _KINDS.get(opcode)
    if kind is None:
        return None
    # XLA:TPU sends to other slices through the hosts, whose runtime makes a collective of what they send.
    through = _THROUGH_HOSTS.search(instruction.attribute_text) if opcode == "send" else None
    if through:
        kind = _BETWEEN_SLICES.get(through[1], "collective-permute")
        names, size = tuple(slices), math.prod(slices.values())
    elif kind == "collective-permute":
        names, size = _permute_axes(_pairs(instruction), mesh)
    else:
        names, size = _group_axes(module, instruction, mesh)
    if size < 2:
        return None
    operands = [computation.instructions[name] for name in instruction.operands if name in computation.instructions]
    if opcode in ("send", "ragged-all-to-all"):
        operands = operands[:1]  # the others are a token, and the output buffer with its offsets
    payload = sum(operand.bytes for operand in operands) * (size if kind == "all-gather" else 1)
    sliced = kind == "all-reduce" and is_sliced(module, computation, instruction, size)
    reducers = instruction.callees("to_apply")
    return Collective(
        kind=kind,
        axes=names,
        group_size=size,
        count=1,
        payload_bytes=payload,
        wire_bytes=0,
        dtype=next((shape.dtype for operand in operands for shape in operand.shapes), ""),
        loop=None,
        op_name=instruction.op_name,
        source=module.source(instruction),
        in_branch=False,
        assumed=False,
        as_reduce_scatter=sliced,
        promoted=any(name.endswith("_promoted") for name in reducers),
        over_slices=through is not None,
        name=instruction.name,
    )


def is_sliced(module: HloModule, computation: Computation, instruction: Instruction, n: int) -> bool:
    """Whether every reader of a value takes 1/n of it by a dynamic-slice, directly or inside a fusion."""
    users = computation.users.get(instruction.name, ())
    if not users or instruction.is_root:
        return False
    return all(_slices(module, computation, instruction, user, n) for user in users)


def _slices(module: HloModule, computation: Computation, read: Instruction, user: Instruction, n: int) -> bool:
    elements = sum(shape.elements for shape in user.shapes)
    whole = sum(shape.elements for shape in read.shapes)
    if user.opcode == "dynamic-slice":
        return user.operands[0] == read.name and elements * n == whole
    if user.opcode in _ELEMENTWISE or user.opcode.endswith("-done"):
        return is_sliced(module, computation, user, n)
    if user.opcode in _ARITHMETIC and elements == whole:
        return is_sliced(module, computation, user, n)
    if user.opcode != "fusion":
        return False
    inner = module.computations[user.callees("calls")[0]]
    numbers = [k for k, operand in enumerate(user.operands) if operand == read.name]
    return all(is_sliced(module, inner, inner.parameters[k], n) for k in numbers)


def _group_axes(
    module: HloModule, instruction: Instruction, mesh: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, ...], int]:
    text = instruction.attributes.get("replica_groups", "{}")
    if text == "{}" and "channel_id" not in instruction.attributes and (module.num_partitions or 1) > 1:
        return UNKNOWN, module.replica_count  # without a channel all replicas take part, not all partitions
    return _axes_of_groups(text, mesh)


@functools.lru_cache(maxsize=1024)
def _axes_of_groups(text: str, mesh: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """The axes that groups of devices span, in mesh order, and the size of a group."""
    sizes = tuple(size for _, size in mesh)
    groups = replica_groups(text) or (tuple(range(math.prod(sizes))),)
    n = max(len(group) for group in groups)
    if sorted(device for group in groups for device in group) != list(range(math.prod(sizes))):
        return UNKNOWN, n
    places = [[_coordinates(device, sizes) for device in group] for group in groups]
    spanned = {tuple(k for k in range(len(sizes)) if len({place[k] for place in group}) > 1) for group in places}
    # All cross the same axes: these, or, of groups with fewer devices than they multiply to, a part of them.
    if len(spanned) == 1 and all(len(group) == n for group in groups):
        return tuple(mesh[k][0] for k in spanned.pop()), n
    return UNKNOWN, n


def _permute_axes(pairs: Groups, mesh: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """The axes along which some source and target differ, and the product of their sizes."""
    sizes = tuple(size for _, size in mesh)
    if any(device >= math.prod(sizes) for pair in pairs for device in pair):
        return UNKNOWN, 2
    places = [(_coordinates(source, sizes), _coordinates(target, sizes)) for source, target in pairs]
    crossed = [k for k in range(len(sizes)) if any(source[k] != target[k] for source, target in places)]
    return tuple(mesh[k][0] for k in crossed), math.prod(sizes[k] for k in crossed)


def _pairs(instruction: Instruction) -> Groups:
    """Source and target of each transfer; () for a send to the host or to another program."""
    text = instruction.attributes.get("source_target_pairs")
    if text is None:  # a permute that XLA:GPU took apart keeps its pairs as a remark on the send
        remark = re.search(r'_xla_send_recv_source_target_pairs="([^"]*)"', instruction.attribute_text)
        text = remark[1] if remark else ""
    return tuple((int(a), int(b)) for a, b in _PAIR.findall(text))


def _coordinates(device: int, sizes: Sequence[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        device, coordinate = divmod(device, size)
        place.append(coordinate)
    return tuple(reversed(place))


def replica_groups(text: str) -> Groups:
    """The groups of devices in any of the three forms XLA prints; () for `{}`, which means all devices.

    Raises:
      ValueError: the text has none of the forms.

    >>> replica_groups("{{0,2},{1,3}}")
    ((0, 2), (1, 3))
    >>> replica_groups("[2,2]<=[2,2]T(1,0)")  # count the devices on a 2x2 grid, transpose, cut rows of 2
    ((0, 2), (1, 3))
    >>> replica_groups("mesh['a'=2,'b'=2] {'a'}")  # by axes of a mesh; 'b':(1)2 is a part of one
    ((0, 2), (1, 3))
    """
    text = text.strip()
    if match := _IOTA.match(text):
        width = _numbers(match[1])[-1]
        order = _transposed(_numbers(match[2]), match[3])
        return tuple(tuple(order[i : i + width]) for i in range(0, len(order), width))
    if match := _MESH.match(text):
        return _mesh_groups(match[1], match[2], match[3])
    if re.fullmatch(r"\{[\s\d,{}]*\}", text):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,\s]+)\}", text))
    raise ValueError(f"replica groups in a form that is not known: {text!r}")


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> Groups:
    """Groups along some axes, or parts of axes, of the mesh XLA printed (whose names may be its own)."""
    axis_sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", axes)}
    # `name:(before)size` is the part of an axis after the first `before`: split each axis at those cuts.
    parts = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", grouped)
    cuts: dict[str, set[int]] = {name: {1, size} for name, size in axis_sizes.items()}
    spans: set[tuple[str, int, int]] = set()
    for name, before, size in parts:
        start, stop = (int(before), int(before) * int(size)) if size else (1, axis_sizes[name])
        cuts[name] |= {start, stop}
        spans.add((name, start, stop))
    sizes: list[int] = []
    chosen: list[int] = []
    for name in axis_sizes:
        edges = sorted(cuts[name])
        for start, stop in itertools.pairwise(edges):
            if any(name == n and first <= start and stop <= last for n, first, last in spans):
                chosen.append(len(sizes))
            sizes.append(stop // start)
    order = list(range(math.prod(sizes)))
    if device_ids is not None:
        iota = _ORDER.match(device_ids)
        order = _transposed(_numbers(iota[1]), iota[2]) if iota else _numbers(device_ids)
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, device in enumerate(order):
        place = _coordinates(position, sizes)
        groups.setdefault(tuple(c for k, c in enumerate(place) if k not in chosen), []).append(device)
    return tuple(tuple(group) for group in groups.values())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _transposed(dims: Sequence[int], permutation: str | None) -> list[int]:
    """0, 1, 2, ... on a grid of `dims`, read in row-major order after its dims were permuted."""
    strides = [math.prod(dims[k + 1 :]) for k in range(len(dims))]
    order = _numbers(permutation) if permutation else list(range(len(dims)))
    values = [0]
    for k in order:
        values = [value + i * strides[k] for value in values for i in range(dims[k])]
    return values
