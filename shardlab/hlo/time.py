"""How long the compute of one step takes on one device: the compiler's own cycles where it prints them, or a roofline.

    seconds of an instruction = estimated cycles / clock                            XLA:TPU prints them
                              = max(FLOPs / peak of the dtype, bytes / bandwidth)   where it does not, and elsewhere

times the executions of the computation it stands in.  What counts is what the device runs one after the other: the
instructions of the entry and of what loops, branches and calls run.  A fusion is one of them, whatever it consists of,
so its inside adds FLOPs and no time of its own.  Collectives are left to `shardlab.hlo.overlap`.

Roofline: Williams, Waterman, Patterson 2009.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shardlab.hlo.loops import visits
from shardlab.hlo.origin import named, part_of
from shardlab.hlo.parse import Computation, HloModule, Instruction
from shardlab.hlo.work import COLLECTIVES, moved, products, scheduled, target

# Of the published peak and bandwidth, what good kernels reach: 8192^3 bf16 products at 0.69 of an H200's 989 TFLOP/s
# under its power cap, copies at 0.9 of its 4.8 TB/s.  With these, train steps of decoders on one H100 (989 TFLOP/s,
# 3.35 TB/s, jax 0.11.2, AdamW) are estimated at, of what was measured: 0.97 (8 layers of 2048, 16,384 tokens, cuDNN
# attention, 100 ms), 1.12 (the same with attention as plain XLA, 164 ms), 0.68 (12 layers of 768, plain XLA, 99 ms).
COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY = 0.7, 0.9

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAMES = {"bf16": "bfloat16", "f16": "bfloat16", "f32": "float32", "f64": "float64", "s8": "int8", "u8": "int8"}
# No time of their own: names for what is there, or starts and ends of what runs beside.
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "optimization-barrier",
        "opt-barrier",
        "while",
        "conditional",
        "call",
        "domain",
        "add-dependency",
    }
)
# Custom calls that name what is there.
_NO_WORK = frozenset({"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"})


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
      flops: peak FLOP/s by dtype ("bfloat16", "float32", "float8", "int8"); a dtype that is not there takes float32's,
        and that the highest.  Where there is "tf32", float32 takes it: XLA:GPU multiplies so by default.
      bandwidth: bytes a second of the device's memory.
      clock: Hz of the compiler's estimated cycles; None where it prints none.
      compute_efficiency: the part of the peak that matmuls reach; of what the compiler estimates nothing is taken off.
      memory_efficiency: the part of the bandwidth that is reached.

    >>> Rates({"bfloat16": 100.0}, 10.0, compute_efficiency=0.5).peak("f32")
    50.0
    """

    flops: Mapping[str, float]
    bandwidth: float
    clock: float | None = None
    compute_efficiency: float = COMPUTE_EFFICIENCY
    memory_efficiency: float = MEMORY_EFFICIENCY

    def peak(self, dtype: str) -> float:
        """FLOP/s reached with operands of an HLO dtype (`bf16`)."""
        name = "float8" if dtype.startswith("f8") else _NAMES.get(dtype, dtype)
        if name == "float32" and "tf32" in self.flops:
            name = "tf32"
        known = self.flops.get(name) or self.flops.get("float32") or max(self.flops.values())
        return known * self.compute_efficiency


@dataclass(frozen=True)
class Piece:
    """What one instruction adds to a step.

    Attributes:
      computation: where it stands.
      name: the instruction's.
      opcode: "fusion", "copy", "custom-call", ...
      executions: how often a step runs it.
      seconds: of all executions together.
      bound: "compute" or "memory", whichever of the roofline's two times is longer.
      flops: of the dots and convolutions in it, all executions.
      bytes: read from and written to the device's memory, all executions.
      estimated: whether the seconds are the compiler's estimate.
      op_name: the JAX operation it came from.
      source: `file:line` of the user's code.
      part: the class or function of the model it stands in ("Attention"), or the module of shardlab's.
      phase: "forward", "recomputed" or "backward".
    """

    computation: str
    name: str
    opcode: str
    executions: int
    seconds: float
    bound: str
    flops: int
    bytes: int
    estimated: bool
    op_name: str
    source: str
    part: str
    phase: str


@dataclass(frozen=True)
class LeftOut:
    """An instruction whose time nothing tells: it counts 0 seconds, or those of its bytes."""

    computation: str
    name: str
    executions: int
    reason: str
    op_name: str


@dataclass(frozen=True)
class Times:
    """The compute of a step on one device, most seconds first."""

    pieces: tuple[Piece, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def seconds(self) -> float:
        """All pieces, one after the other."""
        return sum(piece.seconds for piece in self.pieces)

    @property
    def flops(self) -> int:
        """Of dots and convolutions, loops counted: what an MFU is made of."""
        return sum(piece.flops for piece in self.pieces)

    @property
    def bytes(self) -> int:
        """Read from and written to the device's memory."""
        return sum(piece.bytes for piece in self.pieces)

    def bound(self, which: str) -> float:
        """Seconds of the pieces bound by "compute" or by "memory"."""
        return sum(piece.seconds for piece in self.pieces if piece.bound == which)

    def by(self, key: Callable[[Piece], str]) -> dict[str, float]:
        """Seconds by a name made of each piece, most first: `times.by(lambda piece: piece.part)`."""
        found: dict[str, float] = {}
        for piece in self.pieces:
            found[key(piece)] = found.get(key(piece), 0.0) + piece.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def times(module: HloModule, rates: Rates) -> Times:
    """The time of every instruction that the device runs one after the other.

    Raises:
      ValueError: the compiler printed cycles and no clock was given.

    >>> from shardlab.hlo.parse import parse
    >>> module = parse('''
    ... HloModule product
    ... ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
    ...   %a = f32[8,4]{1,0} parameter(0)
    ...   %b = f32[4,2]{1,0} parameter(1)
    ...   ROOT %c = f32[8,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }
    ... ''')
    >>> found = times(module, Rates({"float32": 128.0}, 56.0, compute_efficiency=1.0, memory_efficiency=1.0))
    >>> found.flops, found.bytes, found.seconds, found.pieces[0].bound
    (128, 224, 4.0, 'memory')
    """
    once = seconds_once(module, rates)
    step = visits(module, lambda where, i: once[where, i.name].seconds if (where, i.name) in once else 0.0)
    pieces, left_out = [], []
    for (where, name), one in once.items():
        visit = step.get(where)
        if visit is None or visit.executions == 0:
            continue
        instruction, n = module.computations[where].instructions[name], visit.executions
        if one.reason:
            left_out.append(LeftOut(where, name, n, one.reason, instruction.op_name))
        op_name, source = named(module, instruction)
        part, phase = part_of(module, instruction)
        pieces.append(
            Piece(
                computation=where,
                name=name,
                opcode=instruction.opcode,
                executions=n,
                seconds=one.seconds * n,
                bound=one.bound,
                flops=one.flops * n,
                bytes=one.bytes * n,
                estimated=one.estimated,
                op_name=op_name,
                source=source,
                part=part,
                phase=phase,
            )
        )
    return Times(tuple(sorted(pieces, key=lambda piece: -piece.seconds)), tuple(left_out))


class Once(NamedTuple):
    """One execution of an instruction; `reason` says why its seconds are not known, "" when they are.

    `products` are the seconds of its matrix products alone, at the rates given.
    """

    seconds: float
    products: float
    bound: str
    flops: int
    bytes: int
    estimated: bool
    reason: str


def seconds_once(module: HloModule, rates: Rates) -> dict[tuple[str, str], Once]:
    """One execution of each instruction with work, by the names of its computation and its own.

    Where the compiler estimates cycles, kernels that it has none for count at the rate that its products reach.

    Raises:
      ValueError: the compiler printed cycles and no clock was given.
    """
    found = {
        (computation.name, instruction.name): one
        for computation in scheduled(module)
        for instruction in computation.instructions.values()
        if (one := _once(module, computation, instruction, rates)) is not None
    }
    estimated = [one for one in found.values() if one.estimated and one.bound == "compute"]
    if not estimated:
        return found
    pace = sum(one.seconds for one in estimated) / sum(one.products for one in estimated)
    return {
        key: one if one.estimated or one.bound == "memory" else one._replace(seconds=one.products * pace)
        for key, one in found.items()
    }


def _once(module: HloModule, computation: Computation, instruction: Instruction, rates: Rates) -> Once | None:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return None
    if opcode.removesuffix("-start") in COLLECTIVES or opcode == "async-start":
        return None
    made = products(module, computation, instruction)
    if not made and communicates(module, instruction):
        return None
    count, size = sum(n for _, n in made), moved(module, computation, instruction)
    if opcode.endswith("-start"):
        return Once(0.0, 0.0, "memory", 0, size, estimated=False, reason="an asynchronous copy, beside the compute")
    computing = sum(n / rates.peak(dtype) for dtype, n in made)
    moving = size / (rates.bandwidth * rates.memory_efficiency)
    bound = "compute" if computing > moving else "memory"
    cycles = _CYCLES.search(instruction.attribute_text)
    if cycles:
        if rates.clock is None:
            raise ValueError(
                f"{instruction.name}: the compiler estimates {cycles[1]} cycles and no clock was given; "
                "give the clock of the chip it compiled for, Rates(..., clock=)"
            )
        return Once(int(cycles[1]) / rates.clock, computing, bound, count, size, estimated=True, reason="")
    if opcode == "custom-call" and target(instruction) in _NO_WORK:
        return None
    if opcode == "custom-call" and not count:
        return Once(
            moving, 0.0, "memory", 0, size, estimated=False, reason=f"a kernel, {target(instruction)}: bytes alone"
        )
    return Once(max(computing, moving), computing, bound, count, size, estimated=False, reason="")


def communicates(module: HloModule, instruction: Instruction) -> bool:
    """Whether an instruction is a fusion with a collective in it, as XLA:TPU writes a reduce-scatter."""
    if instruction.opcode != "fusion":
        return False
    inner = module.computations[instruction.callees("calls")[0]]
    return any(
        i.opcode.removesuffix("-start") in COLLECTIVES or communicates(module, i) for i in inner.instructions.values()
    )
