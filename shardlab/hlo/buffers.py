"""Which buffers a scheduled program holds at once: how much at most, and which those are.

    time          0  1  2  3  4  5  6        a value lives from the instruction that makes it to the last that reads it;
    argument      ====================       one that a while loop carries, or that is updated in place, keeps its
    %a = ...         =======                 buffer: together they are one row.  The peak is the column with most bytes.
    loop's carry           ===========

The text is walked in the order of its schedule, a loop's body once where the loop stands.  Sizes are those of the
layout, padding included; what lies on the chip or with the host is not counted.  Arguments are there from the first to
the last instruction, an output that is given a donated argument's buffer with it, another output has its own.

What XLA adds is not in the text: gaps between buffers of different lives (fragmentation), kernels' scratch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardlab.hlo.layout import DEVICE, leaves
from shardlab.hlo.origin import named
from shardlab.hlo.parse import Computation, HloModule, Instruction
from shardlab.hlo.work import IN_PLACE

Index = tuple[int, ...]
_INDICES = re.compile(r'"indices":\[([^\]]*)\]')
_OUTPUT_TO_OPERAND = re.compile(r"\{([\d,\s]*)\}:\s*\((\d+),\s*\{([\d,\s]*)\}")
# What hands on the buffer it reads.
_SAME = frozenset({"bitcast", "optimization-barrier", "opt-barrier", "domain", "add-dependency"})
# Elementwise, so a result may take the place of an operand that is not read again.
_ELEMENTWISE = frozenset(
    {
        "abs", "add", "and", "ceil", "clamp", "compare", "convert", "copy", "cosine", "divide", "exponential", "floor",
        "log", "maximum", "minimum", "multiply", "negate", "not", "or", "power", "remainder", "rsqrt", "select", "sign",
        "sine", "sqrt", "subtract", "tanh", "xor",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """A buffer that is live at the peak.

    Attributes:
      name: of the instruction whose value it holds then.
      computation: where that stands.
      shape: its type, with the layout.
      bytes: with padding.
      padding: of them, bytes that hold nothing.
      kind: "argument", "output" (one that has no argument's place) or "temporary".
      parameter: the argument's number, None of others.
      op_name: the JAX operation it came from; an argument's path (`state.parameters['head/kernel']`).
      source: `file:line` of the user's code.
    """

    name: str
    computation: str
    shape: str
    bytes: int
    padding: int
    kind: str
    parameter: int | None
    op_name: str
    source: str


@dataclass(frozen=True)
class Live:
    """What is live at the peak.

    Attributes:
      peak_bytes: all together.
      argument_bytes: of arguments.
      output_bytes: of outputs that have no argument's place.
      temporary_bytes: of everything else.
      at: the instruction at the peak.
      op_name: of the instruction at the peak.
      buffers: the live ones, largest first.
    """

    peak_bytes: int
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    at: str
    op_name: str
    buffers: tuple[Buffer, ...]


@dataclass
class _Value:
    """What one leaf of an instruction holds; `last` is when it is last read."""

    number: int
    size: int
    padding: int
    instruction: Instruction
    computation: str
    shape: str
    first: int
    last: int


Leaves = dict[Index, int]  # by index in the tuple, the number of the value


@dataclass
class _Walk:
    module: HloModule
    time: int = 0
    values: list[_Value] = field(default_factory=list)
    buffer: list[int] = field(default_factory=list)  # union-find over values
    moments: list[Instruction] = field(default_factory=list)
    candidates: list[tuple[int, int, int]] = field(default_factory=list)  # value, result in its place, time

    def make(self, computation: str, instruction: Instruction, skip: Sequence[Index] = ()) -> Leaves:
        """New values for the leaves of an instruction that are not in `skip`."""
        made = {}
        for index, stored in leaves(instruction.type_text):
            if index in skip or stored is None:
                continue
            size = stored.stored if stored.space == DEVICE else 0
            number = len(self.values)
            shape = _leaf_text(instruction.type_text, index)
            value = _Value(
                number, size, stored.padding if size else 0, instruction, computation, shape, self.time, self.time
            )
            self.values.append(value)
            self.buffer.append(number)
            made[index] = number
        return made

    def root(self, number: int) -> int:
        while self.buffer[number] != number:
            self.buffer[number] = self.buffer[self.buffer[number]]
            number = self.buffer[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Two values are in one buffer; only such that lie in the same memory can be."""
        if bool(self.values[one].size) == bool(self.values[other].size):
            a, b = sorted((self.root(one), self.root(other)))
            self.buffer[b] = a

    def through(self, computation: Computation, arguments: Sequence[Leaves] | None) -> Leaves:
        """Walks a computation; `arguments` None makes values for its parameters.  The leaves of its root."""
        held: dict[str, Leaves] = {}
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "parameter":
                number = int(instruction.operand_text)
                held[instruction.name] = (
                    self.make(computation.name, instruction) if arguments is None else arguments[number]
                )
                continue
            if opcode == "tuple":
                held[instruction.name] = {
                    (k, *index): value
                    for k, operand in enumerate(instruction.operands)
                    for index, value in held.get(operand, {}).items()
                }
                continue
            if opcode == "get-tuple-element":
                k = int(instruction.attributes["index"])
                source = held.get(instruction.operands[0], {})
                held[instruction.name] = {index[1:]: value for index, value in source.items() if index[0] == k}
                continue
            if opcode in _SAME:
                held[instruction.name] = held.get(instruction.operands[0], {})
                continue
            self.time += 1
            self.moments.append(instruction)
            for operand in instruction.operands:
                for value in held.get(operand, {}).values():
                    self.values[value].last = self.time
            held[instruction.name] = self.result(computation, instruction, held)
        ends = held.get(computation.root.name, {})
        for value in ends.values():
            self.values[value].last = self.time
        return ends

    def result(
        self,
        computation: Computation,
        instruction: Instruction,
        held: Mapping[str, Leaves],
    ) -> Leaves:
        opcode, operands = instruction.opcode, [held.get(name, {}) for name in instruction.operands]
        if opcode == "while":
            return self.loop(computation, instruction, operands[0])
        if opcode in ("call", "conditional"):
            return self.call(computation, instruction, operands)
        if opcode.endswith("-done") or opcode == "async-update":
            return self.done(computation, instruction, operands[0])
        skip: Leaves = {}
        if opcode.endswith("-start") or opcode == "send":
            skip = self.start(instruction, operands)
        made = self.make(computation.name, instruction, tuple(skip))
        made.update(skip)
        for index, value in _shared(instruction, operands):
            if index in made:
                self.join(value, made[index])
        for index, value in self.maybe_shared(computation, instruction, operands):
            if index in made:
                self.candidates.append((value, made[index], self.time))
        return made

    def settle(self, kept: set[int]) -> None:
        """Gives results the places of values that nothing reads again; none of those in `kept`."""
        members: dict[int, list[int]] = {}
        for number in range(len(self.values)):
            members.setdefault(self.root(number), []).append(number)
        for value, result, time in self.candidates:
            one, other = self.root(value), self.root(result)
            if one == other or self.values[value].last > time or one in kept:
                continue
            # Not where the buffer holds another value while the result lives, as that of a loop's carry may.
            pairs = ((a, b) for a in members[one] for b in members[other] if (a, b) != (value, result))
            if any(self._meet(a, b) for a, b in pairs):
                continue
            self.join(value, result)
            members[self.root(value)] = members.pop(one) + members.pop(other)

    def _meet(self, one: int, other: int) -> bool:
        a, b = self.values[one], self.values[other]
        return a.first <= b.last and b.first <= a.last

    def start(self, instruction: Instruction, operands: Sequence[Leaves]) -> Leaves:
        """The leaves of a start that are its operands; the rest it makes."""
        if instruction.opcode == "copy-start":
            return {(1,): operands[0][()]} if () in operands[0] else {}
        if instruction.opcode in ("all-reduce-start", "recv"):
            return {}
        indices = {index for index, _ in leaves(instruction.type_text)}
        lone = operands[0].items() if len(operands) == 1 else ()
        given = {(0, *index): value for index, value in lone if (0, *index) in indices}
        each = ((0, k, *index) for k, one in enumerate(operands) for index in one)
        return given or {index: operands[index[1]][index[2:]] for index in each if index in indices}

    def done(self, computation: Computation, instruction: Instruction, started: Leaves) -> Leaves:
        """What a done hands on: the results its start has made."""
        opcode = instruction.opcode
        if opcode == "async-update":
            return dict(started)
        of = {"copy-done": (0,), "recv-done": (0,), "all-reduce-done": ()}.get(opcode, (1,))
        handed = {index[len(of) :]: value for index, value in started.items() if index[: len(of)] == of}
        wanted = [index for index, one in leaves(instruction.type_text) if one is not None]
        if opcode == "recv-done":
            handed = {(0, *index): value for index, value in handed.items()}
        if sorted(handed) == sorted(wanted):
            return handed
        return self.make(computation.name, instruction)

    def loop(self, computation: Computation, instruction: Instruction, carried: Leaves) -> Leaves:
        """A while loop: what it carries keeps its buffers, from before it to after it."""
        body, condition = (self.module.computations[instruction.callees(name)[0]] for name in ("body", "condition"))
        inside = self.make(body.name, body.parameters[0])
        for index, value in inside.items():
            if index in carried:
                self.join(carried[index], value)
        self.through(condition, [inside])
        after = self.through(body, [inside])
        self.time += 1
        self.moments.append(instruction)
        result = self.make(computation.name, instruction)
        for index, value in result.items():
            for other in (inside.get(index), after.get(index)):
                if other is not None:
                    self.join(other, value)
        return result

    def call(self, computation: Computation, instruction: Instruction, operands: Sequence[Leaves]) -> Leaves:
        """A call, or a conditional: each branch is walked, the result is in one place."""
        if instruction.opcode == "call":
            (name,) = instruction.callees("to_apply") or instruction.callees("called_computations")
            return self.through(self.module.computations[name], operands)
        names = instruction.callees("branch_computations") or (
            instruction.callees("true_computation") + instruction.callees("false_computation")
        )
        ends = [self.through(self.module.computations[name], [operands[k + 1]]) for k, name in enumerate(names)]
        self.time += 1
        self.moments.append(instruction)
        # The operands are needed until the last branch could have run.
        for leaf in operands:
            for value in leaf.values():
                self.values[value].last = max(self.values[value].last, self.time)
        result = self.make(computation.name, instruction)
        for index, value in result.items():
            for end in ends:
                if index in end:
                    self.join(end[index], value)
        return result

    def maybe_shared(
        self, computation: Computation, instruction: Instruction, operands: Sequence[Leaves]
    ) -> Iterator[tuple[Index, int]]:
        """Indices of results that can take the place of a value that is read, if nothing reads that again."""
        opcode, text = instruction.opcode, instruction.attribute_text
        _, said, lists = text.partition('"aliasing_operands":')
        if said:
            flat = [(k, value) for k, one in enumerate(operands) for value in one.values()]
            results = [index for index, one in leaves(instruction.type_text) if one is not None]
            for indices in _INDICES.findall(lists):
                numbers = [int(n) for n in indices.replace('"', "").split(",")]
                given = [n for n in numbers if n < len(instruction.operands)]
                taken = [n - len(instruction.operands) for n in numbers if n >= len(instruction.operands)]
                if len(flat) == len(instruction.operands) and given and taken and taken[0] < len(results):
                    yield results[taken[0]], flat[given[0]][1]
            return
        if opcode in _ELEMENTWISE or opcode == "fusion":
            for index, k in self._fits(instruction, computation):
                if () in operands[k]:
                    yield index, operands[k][()]

    def _fits(self, instruction: Instruction, computation: Computation) -> Iterator[tuple[Index, int]]:
        """Where XLA:CPU and XLA:GPU may put a result: in an operand of the same size, read element by element."""
        taken: set[int] = set()
        inner = None
        if instruction.opcode == "fusion":
            inner = self.module.computations[instruction.callees("calls")[0]]
        for place, (index, stored) in enumerate(leaves(instruction.type_text)):
            for k, name in enumerate(instruction.operands):
                source = computation.instructions.get(name)
                kept = leaves(source.type_text) if source is not None else ()
                if stored is None or k in taken or len(kept) != 1 or kept[0][1] is None:
                    continue
                if kept[0][1].stored != stored.stored:
                    continue
                if inner is not None and not _elementwise(inner, k, place):
                    continue
                taken.add(k)
                yield index, k
                break


def live(module: HloModule) -> Live:
    """The buffers of a scheduled program at the moment it holds most.

    >>> from shardlab.hlo.parse import parse
    >>> found = live(parse('''
    ... HloModule step, is_scheduled=true, input_output_alias={ {}: (0, {}, may-alias) }
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0), metadata={op_name="x"}
    ...   %wide = f32[100]{0} broadcast(%x), dimensions={0}
    ...   %more = f32[50]{0} slice(%wide), slice={[0:50]}
    ...   ROOT %y = f32[4]{0} slice(%more), slice={[0:4]}
    ... }
    ... '''))
    >>> found.peak_bytes, found.at, [(one.name, one.kind, one.bytes) for one in found.buffers]
    (616, 'more', [('wide', 'temporary', 400), ('more', 'temporary', 200), ('x', 'argument', 16)])
    """
    walk = _Walk(module)
    entry = module.computations[module.entry]
    ends = walk.through(entry, None)
    arguments = {
        walk.root(n): int(value.instruction.operand_text)
        for n, value in enumerate(walk.values)
        if value.instruction.opcode == "parameter" and value.computation == entry.name and value.size
    }
    walk.settle(set(arguments))
    arguments = {walk.root(n): number for n, number in arguments.items()}
    outputs: set[int] = set()
    for index, number in ends.items():
        if walk.root(number) in arguments:
            continue
        if module.donated.get(index) in arguments.values():
            walk.values[number].size = 0  # what was in that buffer before may have been a temporary
        elif walk.values[number].size:
            outputs.add(walk.root(number))
    spans: dict[int, list[_Value]] = {}
    for held in walk.values:
        if held.size and held.instruction.opcode != "constant":
            spans.setdefault(walk.root(held.number), []).append(held)
    change = [0] * (walk.time + 2)
    for n, members in spans.items():
        if n in arguments or n in outputs:
            continue
        for first, last, size in _merged(members):
            change[first] += size
            change[last + 1] -= size
    peak = total = at = 0
    for moment, step in enumerate(change):
        total += step
        if total > peak:
            peak, at = total, moment
    buffers = []
    for n, members in spans.items():
        kind = "argument" if n in arguments else "output" if n in outputs else "temporary"
        here = [value for value in members if value.first <= at <= value.last]
        if kind == "temporary" and not here:
            continue
        # Of a loop's carry what was put into it says more than that it is carried.
        made = [value for value in [*here[::-1], *members] if value.instruction.opcode not in ("parameter", "while")]
        shown = members[0] if kind == "argument" or not made else made[0]
        buffers.append(_buffer(module, shown, members, kind, arguments.get(n)))
    of = {kind: sum(b.bytes for b in buffers if b.kind == kind) for kind in ("argument", "output", "temporary")}
    fullest = walk.moments[at - 1] if at else entry.root
    return Live(
        peak_bytes=sum(of.values()),
        argument_bytes=of["argument"],
        output_bytes=of["output"],
        temporary_bytes=of["temporary"],
        at=fullest.name,
        op_name=fullest.op_name,
        buffers=tuple(sorted(buffers, key=lambda one: -one.bytes)),
    )


def _buffer(module: HloModule, shown: _Value, members: Sequence[_Value], kind: str, number: int | None) -> Buffer:
    made = [v.instruction for v in (shown, *members) if v.instruction.opcode not in ("parameter", "while")]
    origin = next((found for one in made if (found := named(module, one))[0]), ("", ""))
    if kind == "argument":
        origin = shown.instruction.op_name, ""
    return Buffer(
        name=shown.instruction.name,
        computation=shown.computation,
        shape=shown.shape,
        bytes=max(value.size for value in members),
        padding=max(members, key=lambda value: value.size).padding,
        kind=kind,
        parameter=number,
        op_name=origin[0],
        source=origin[1],
    )


def _merged(members: Sequence[_Value]) -> Iterator[tuple[int, int, int]]:
    """The times in which any of the values of a buffer lives, with its bytes."""
    size = max(value.size for value in members)
    first, last = -1, -2
    for value in sorted(members, key=lambda value: value.first):
        if value.first > last:
            if last >= first:
                yield first, last, size
            first, last = value.first, value.last
        last = max(last, value.last)
    yield first, last, size


def _shared(instruction: Instruction, operands: Sequence[Leaves]) -> Iterator[tuple[Index, int]]:
    """Indices of results that are in the place of a value that is read."""
    if instruction.opcode in IN_PLACE and () in operands[0]:
        yield (), operands[0][()]
    said = instruction.attributes.get("output_to_operand_aliasing", "")
    for out, operand, inside in _OUTPUT_TO_OPERAND.findall(said):
        leaf = operands[int(operand)].get(_index(inside))
        if leaf is not None:
            yield _index(out), leaf


def _elementwise(inner: Computation, k: int, place: int) -> bool:
    """Whether a fused computation reads its parameter `k` element by element on the way to a result."""
    root = inner.root
    ends = {root.operands[place]} if root.opcode == "tuple" else {root.name}
    if k not in inner.parameters:
        return False
    waiting, seen, met = [inner.parameters[k]], set(), False
    while waiting:
        value = waiting.pop()
        met = met or value.name in ends
        for user in inner.users.get(value.name, ()):
            if user.name in seen or user.opcode == "tuple":
                continue
            seen.add(user.name)
            updated = user.opcode in IN_PLACE and user.operands[0] == value.name
            if not (user.opcode in _ELEMENTWISE or user.opcode in ("bitcast", "reshape") or updated):
                return False
            waiting.append(user)
    return met


def _index(text: str) -> Index:
    return tuple(int(n) for n in text.split(",") if n.strip())


def _leaf_text(type_text: str, index: Index) -> str:
    if not index:
        return type_text
    flat = [i for i, _ in leaves(type_text)]
    texts = re.findall(r"\b[a-z]\w*\[[^\]]*\](?:\{[^}]*\})?", type_text)
    return texts[flat.index(index)]
