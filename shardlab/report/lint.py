"""What a compiled step does that costs and was perhaps not meant: findings with a code, the cost and the way out.

    SL001  an all-reduce of which every device keeps a slice: a reduce-scatter would send half
    SL002  weights gathered more often than a step has passes over them
    SL003  gradients reduced more often than once a step
    SL004  an all-gather of activations
    SL005  an activation made whole on every device to be cut again ("involuntary full rematerialization")
    SL006  matmuls or collectives in float32 where bfloat16 was declared
    SL007  padding of the layout's tiles

They are read from the optimized HLO alone.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardlab.hlo.buffers import Buffer, Live, live
from shardlab.hlo.collectives import Collective, collectives, is_sliced
from shardlab.hlo.loops import visits
from shardlab.hlo.origin import Cause, cause, parts, path_of, user_source
from shardlab.hlo.parse import HloModule, Instruction
from shardlab.hlo.work import products, scheduled
from shardlab.plan.text import human_bytes

PASSES = 3  # over the weights in a step: forward, recomputed, backward
SMALLEST = 1 << 20
_PADDED = 0.2
_NARROW = ("bfloat16", "float16")
_WIDTHS = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s8": 1, "u8": 1}
# What the program says itself, by jax.lax or by a constraint.
_ASKED = frozenset({"sharding_constraint", "all_gather", "all_gather_invariant", "all_to_all", "ppermute", "reshard"})


@dataclass(frozen=True)
class Finding:
    """One thing a compiled step does.

    Attributes:
      code: "SL001", ...
      message: what, with the numbers.
      path: the parameter's path, or the JAX operation.
      source: `file:line` of the user's code, "" where there is none.
      bytes: what it costs, wire or memory, per device and step.
      seconds: what it costs on the links, None where that was not asked or does not apply.
      fix: the way out.
    """

    code: str
    message: str
    path: str
    source: str
    bytes: int
    seconds: float | None
    fix: str

    def __str__(self) -> str:
        at = f" ({self.source})" if self.source else ""
        return f"{self.code} {self.path}{at}: {self.message}; {self.fix}"


def lint(
    module: HloModule,
    axes: Mapping[str, int],
    *,
    slices: Mapping[str, int] | None = None,
    batch: Sequence[str] = (),
    dtype: str | None = None,
    reduce_dtype: str | None = None,
    compiler_said: str = "",
    seconds: Callable[[Collective], float] | None = None,
    held: Live | None = None,
    smallest: int = SMALLEST,
) -> tuple[Finding, ...]:
    """The findings of a compiled step, costliest first within a code.

    Args:
      axes: sizes of the mesh axes in mesh order.
      slices: of several TPU slices, over how many of them an axis runs.
      batch: the axes that split examples.
      dtype: of the compute that was declared ("bfloat16"); None: SL006 is not looked for.  XLA:CPU computes bfloat16 as
        float32, so give None for it.
      reduce_dtype: of the gradients' reductions that was declared; None: theirs is not looked at.
      compiler_said: what the compiler wrote to stderr.
      seconds: of a collective, all its executions together.
      held: `live(module)`, where it is known already.
      smallest: bytes a finding must cost to be one; those of SL005 from the compiler's own words have none.

    Raises:
      ValueError: the program is for another number of devices than the mesh has.

    >>> from shardlab.hlo import parse
    >>> module = parse('''
    ... HloModule step, num_partitions=4
    ... ENTRY %main (x: f32[1024,1024]) -> f32[256,1024] {
    ...   %x = f32[1024,1024]{1,0} parameter(0)
    ...   %sum = f32[1024,1024]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
    ...   %row = s32[] constant(0)
    ...   ROOT %part = f32[256,1024]{1,0} dynamic-slice(%sum, %row, %row), dynamic_slice_sizes={256,1024}
    ... }
    ... ''')
    >>> [(one.code, one.bytes) for one in lint(module, {"data": 4})]
    [('SL001', 3145728)]
    """
    step = _Step(module, axes, slices or {}, seconds)
    every = [
        *_sliced(step),
        *_gathered_again(step),
        *_reduced_again(step),
        *_gathered_activations(step, batch),
        *_involuntary(step, compiler_said),
        *_wide(step, dtype, reduce_dtype),
        *_padded(live(module) if held is None else held),
    ]
    kept = [one for one in every if one.bytes >= smallest or one.bytes == 0]
    return tuple(sorted(kept, key=lambda one: (one.code, -one.bytes)))


class _Found(NamedTuple):
    one: Collective
    why: Cause


class _Moved(NamedTuple):
    """What a step moves of a parameter over some axes, and how often it moves the whole of it."""

    path: str
    axes: tuple[str, ...]
    source: str
    times: float
    wire: float
    seconds: float | None


class _Step:
    """The collectives of a step with their causes."""

    def __init__(
        self,
        module: HloModule,
        axes: Mapping[str, int],
        slices: Mapping[str, int],
        seconds: Callable[[Collective], float] | None,
    ) -> None:
        self.module, self.axes, self._seconds = module, axes, seconds
        found = collectives(module, axes, slices=slices)
        self.found = [_Found(one, cause(module, self.instruction(one))) for one in found]
        self.parameters = {
            path_of(parameter.op_name): parameter.shapes[0]
            for parameter in module.computations[module.entry].parameters.values()
            if ".parameters" in parameter.op_name and parameter.shapes
        }
        subsets = (c for k in range(len(axes) + 1) for c in itertools.combinations(axes.values(), k))
        self.products = sorted({math.prod(sizes) for sizes in subsets})

    def instruction(self, one: Collective) -> Instruction:
        return self.module.home[one.name].instructions[one.name]

    def seconds(self, group: Iterable[_Found], part: float = 1.0) -> float | None:
        """Of some collectives, or of a part of them."""
        return None if self._seconds is None else sum(self._seconds(one) for one, _ in group) * part

    def grouped(self, key: Callable[[_Found], Hashable | None]) -> list[list[_Found]]:
        """Those with the same key together; those with None left out."""
        groups: dict[Hashable, list[_Found]] = {}
        for found in self.found:
            at = key(found)
            if at is not None:
                groups.setdefault(at, []).append(found)
        return list(groups.values())

    def parameters_of(self, role: str, kinds: Sequence[str]) -> Iterator[_Moved]:
        """Of each parameter in that role, and each tuple of axes, what a step moves of it."""
        found: dict[tuple[str, tuple[str, ...]], _Moved] = {}
        for one, why in self.found:
            if one.kind not in kinds:
                continue
            made_of = parts(self.module, self.instruction(one))
            for part in made_of:
                if part.role != role or len(part.paths) != 1:
                    continue
                share = part.bytes / max(sum(p.bytes for p in made_of), 1)
                path = part.paths[0]
                seconds = None if self._seconds is None else self._seconds(one) * share
                had = found.get((path, one.axes), _Moved(path, one.axes, why.source, 0.0, 0.0, seconds and 0.0))
                found[path, one.axes] = had._replace(
                    times=had.times + one.count * self._covers(path, one, share),
                    wire=had.wire + one.wire_bytes * share,
                    seconds=None if seconds is None else (had.seconds or 0.0) + seconds,
                )
        yield from found.values()

    def _covers(self, path: str, one: Collective, share: float) -> float:
        """What part of a parameter one execution moves: one layer of a stack, or all of it."""
        shape = self.parameters.get(path)
        if shape is None or not one.count:
            return 1.0
        moved = one.payload_bytes * share / one.count / _WIDTHS.get(one.dtype, 4)
        layers = shape.dims[0] if "*" in path and shape.dims else 1
        devices = math.prod(self.axes.get(axis, 1) for axis in one.axes)
        if one.group_size < devices:  # one of several that follow each other on parts of an axis
            return moved / (shape.elements * devices)
        # A device stores a piece; what is moved is that many pieces together as some of the axes have devices.
        for part in (1 / layers, 1.0):
            if any(abs(moved / (shape.elements * part * n) - 1) < _PADDED for n in self.products):
                return part
        whole = next((n for n in self.products if shape.elements * n >= moved), self.products[-1])
        return moved / (shape.elements * whole)


def _wire(group: Iterable[_Found]) -> int:
    return sum(one.wire_bytes for one, _ in group)


def _over(one: Collective) -> str:
    return f"over {' x '.join(one.axes)}"


def _thing(why: Cause) -> str:
    """What findings are put together by: of parameters the role, of an activation which it is."""
    return why.what if why.role == "activation" else why.role


def _others(group: Sequence[_Found]) -> str:
    return f" and {len({f.why.what for f in group}) - 1} like it" if len({f.why.what for f in group}) > 1 else ""


def _asked(why: Cause) -> bool:
    return why.op_name.rpartition("/")[2] in _ASKED


def _sliced(step: _Step) -> Iterator[Finding]:
    for group in step.grouped(lambda f: (_thing(f.why), f.one.axes) if f.one.as_reduce_scatter else None):
        one, why = max(group, key=lambda f: f.one.wire_bytes)
        yield Finding(
            "SL001",
            f"{why.what}{_others(group)} {_over(one)}, of which every device keeps 1/{one.group_size}, "
            f"{sum(f.one.count for f in group)} a step: {human_bytes(_wire(group))} on the wire, "
            "where a reduce-scatter sends half",
            why.path or why.op_name or one.name,
            why.source,
            _wire(group) // 2,
            step.seconds(group, 0.5),
            "reduce over one or two axes of the torus at a time: XLA:TPU makes no reduce-scatter over all three, "
            "XLA:CPU makes none",
        )


def _gathered_again(step: _Step) -> Iterator[Finding]:
    yield from _again(
        "SL002",
        step.parameters_of("weights", ("all-gather",)),
        PASSES,
        PASSES + 0.5,
        "gathered",
        'gather once a step (gather="step") if the whole weights fit, or take fewer microbatches',
    )


def _reduced_again(step: _Step) -> Iterator[Finding]:
    yield from _again(
        "SL003",
        step.parameters_of("gradient", ("all-reduce", "reduce-scatter")),
        1,
        1.5,
        "its gradient is reduced",
        'add up whole gradients and reduce once a step (accumulate="full") if they fit, or take fewer microbatches',
    )


def _again(code: str, moved: Iterable[_Moved], needed: int, most: float, what: str, fix: str) -> Iterator[Finding]:
    """Of parameters that are moved as often, one finding, by the one that sends most."""
    groups: dict[tuple[int, tuple[str, ...]], list[_Moved]] = {}
    for one in moved:
        if one.times > most:
            groups.setdefault((round(one.times), one.axes), []).append(one)
    for (times, axes), group in groups.items():
        first = max(group, key=lambda one: one.wire)
        also = f", and that of {len(group) - 1} more" if len(group) > 1 else ""
        known = all(one.seconds is not None for one in group)
        yield Finding(
            code,
            f"{what} {times} times a step over {' x '.join(axes)}{also}: "
            f"{human_bytes(round(sum(one.wire for one in group)))} on the wire",
            first.path,
            first.source,
            round(sum(one.wire * (1 - needed / one.times) for one in group)),
            sum((one.seconds or 0.0) * (1 - needed / one.times) for one in group) if known else None,
            fix,
        )


def _gathered_activations(step: _Step, batch: Sequence[str]) -> Iterator[Finding]:
    # A sum over an axis may be taken apart into a reduce-scatter and an all-gather: that is tensor parallelism.
    apart = {f.one.axes for f in step.found if f.why.role == "activation" and f.one.kind == "reduce-scatter"}

    def key(f: _Found) -> Hashable | None:
        wanted = _asked(f.why) or (f.one.axes in apart and not set(f.one.axes) & set(batch))
        gathers = f.one.kind == "all-gather" and f.why.role == "activation"
        counts = gathers and not wanted and not _recut(step, f)
        return (f.why.what, f.why.source, f.one.axes) if counts else None

    for group in step.grouped(key):
        one, why = group[0]
        yield Finding(
            "SL004",
            f"{why.what} {_over(one)}, {sum(f.one.count for f in group)} a step: "
            f"{human_bytes(_wire(group))} on the wire",
            why.op_name or one.name,
            why.source,
            _wire(group),
            step.seconds(group),
            "constrain it (jax.lax.with_sharding_constraint), or shard the parameters that read it alike",
        )


def _recut(step: _Step, f: _Found) -> bool:
    """Whether an activation is gathered of which every device then keeps a slice."""
    if f.one.kind != "all-gather" or f.why.role != "activation" or _asked(f.why):
        return False
    computation, instruction = step.module.home[f.one.name], step.instruction(f.one)
    return any(n > 1 and is_sliced(step.module, computation, instruction, n) for n in step.products)


def _involuntary(step: _Step, compiler_said: str) -> Iterator[Finding]:
    way_out = "constrain the value before and after to specs that differ in one dim (jax.lax.with_sharding_constraint)"

    def key(f: _Found) -> Hashable | None:
        return (f.why.what, f.why.source) if _recut(step, f) else None

    seen = set()
    for group in step.grouped(key):
        one, why = group[0]
        seen.add(why.op_name)
        yield Finding(
            "SL005",
            f"{why.what} {_over(one)}, of which every device keeps a slice, {sum(f.one.count for f in group)} a step: "
            f"{human_bytes(_wire(group))} on the wire, where an all-to-all or a permute would do",
            why.op_name or one.name,
            why.source,
            _wire(group),
            step.seconds(group),
            way_out,
        )
    for op_name, source, before, after in involuntary(compiler_said):
        if op_name in seen:
            continue
        named = (i for c in step.module.computations.values() for i in c.instructions.values() if i.op_name == op_name)
        sources = (user_source(step.module, one)[0] for one in named) if not source else iter((source,))
        yield Finding(
            "SL005",
            f"the partitioner makes it whole on every device to cut it again, from {before} to {after}",
            op_name,
            next(sources, ""),
            0,
            None,
            way_out,
        )


def involuntary(compiler_said: str) -> tuple[tuple[str, str, str, str], ...]:
    """Operation, `file:line`, sharding before and after of each full rematerialization that the compiler wrote of.

    >>> involuntary('''spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The compiler cannot go from
    ... sharding {devices=[2,1]<=[2]} to {devices=[1,2]<=[2]} efficiently for HLO operation %a = f32[4,4] add(%b, %c),
    ... sharding={devices=[2,1]<=[2]}, metadata={op_name="jit(f)/add" source_file="m.py" source_line=3}.''')
    (('jit(f)/add', 'm.py:3', '{devices=[2,1]<=[2]}', '{devices=[1,2]<=[2]}'),)
    """
    found = []
    for said in re.split(r"(?=Involuntary full rematerialization)", compiler_said)[1:]:
        change = re.search(r"from\s+sharding\s+(\{.*?\})\s+to\s+(\{.*?\})\s+(?:efficiently|without)", said, re.DOTALL)
        operation = re.search(r"HLO\s+operation:?\s+%?([\w.\-]+)", said)
        name = re.search(r'op_name="([^"]*)"', said)
        file = re.search(r'source_file="([^"]*)".*?source_line=(\d+)', said)
        found.append(
            (
                name[1] if name else operation[1] if operation else "an operation",
                f"{file[1]}:{file[2]}" if file else "",
                change[1] if change else "?",
                change[2] if change else "?",
            )
        )
    return tuple(dict.fromkeys(found))


def _wide(step: _Step, dtype: str | None, reduce_dtype: str | None) -> Iterator[Finding]:
    def key(f: _Found) -> Hashable | None:
        declared = reduce_dtype if f.why.role == "gradient" else dtype
        wide = f.one.dtype == "f32" and declared in _NARROW and not f.one.promoted
        return (f.one.kind, _thing(f.why), f.one.axes) if wide else None

    for group in step.grouped(key):
        one, why = max(group, key=lambda f: f.one.wire_bytes)
        yield Finding(
            "SL006",
            f"{why.what}{_others(group)} {_over(one)} in float32, {human_bytes(_wire(group))} on the wire, "
            f"where {dtype} was declared",
            why.path or why.op_name or one.name,
            why.source,
            _wire(group) // 2,
            step.seconds(group, 0.5),
            "cast before it; of gradients reduce_dtype says",
        )
    if dtype not in _NARROW:
        return
    runs = visits(step.module, lambda where, i: 0.0)
    matmuls: dict[str, tuple[int, int, str]] = {}
    for computation in scheduled(step.module):
        n = runs[computation.name].executions if computation.name in runs else 0
        for instruction in computation.instructions.values():
            wide = n * sum(flops for kind, flops in products(step.module, computation, instruction) if kind == "f32")
            if wide:
                why = cause(step.module, instruction)
                flops, size, source = matmuls.get(why.op_name, (0, 0, why.source))
                matmuls[why.op_name] = (flops + wide, size + n * instruction.bytes, source)
    for op_name, (flops, size, source) in matmuls.items():
        yield Finding(
            "SL006",
            f"a matmul in float32, {flops / 1e12:.3g} TFLOP a step, where {dtype} was declared",
            op_name,
            source,
            size // 2,
            None,
            "cast both operands",
        )


def _padded(held: Live) -> Iterator[Finding]:
    groups: dict[str, list[Buffer]] = {}
    for one in held.buffers:
        if one.padding > _PADDED * one.bytes:
            groups.setdefault(one.shape, []).append(one)
    for shape, group in groups.items():
        op_name = group[0].op_name
        padding, size = sum(one.padding for one in group), sum(one.bytes for one in group)
        many = f"{len(group)} of " if len(group) > 1 else ""
        yield Finding(
            "SL007",
            f"{many}{shape}, {human_bytes(padding)} of {human_bytes(size)} are the layout's padding",
            path_of(op_name) if group[0].kind == "argument" else op_name or group[0].name,
            group[0].source,
            padding,
            None,
            "make the two minor dims multiples of the tile (head dim and vocabulary of 128)",
        )
