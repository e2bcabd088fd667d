"""Optimized HLO text as data: computations, instructions, shapes, calls, and the user's code they came from.

It is read line by line: an instruction is `[ROOT] %name = type opcode(operands), attribute=value, ...`.

    %sum = f32[4,16]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add, ...
     name       type (with layout)   opcode operands                 attributes

Only names, opcodes and the spans of the other parts are found at first; shapes, operands and attributes are
read when asked for: an audit looks at one instruction in a hundred of a text that can be tens of megabytes.

Grammar: https://openxla.org/xla/operation_semantics and `HloInstruction::ToString` in the XLA sources.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

_INSTRUCTION = re.compile(r"\s*(ROOT\s+)?%?([^\s=%(){}]+)\s=\s(.*)", re.DOTALL)
_HEADER = re.compile(r"\s*(ENTRY\s+)?%?([^\s%(){}]+)\s*(?:\(.*)?\{\s*$", re.DOTALL)
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_LEAF = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_PARENTHESIS = re.compile(r'[()"]')
_SEPARATOR = re.compile(r'[(){}\[\]",]')
_REST_OF_STRING = re.compile(r'(?:[^"\\]|\\.)*"', re.DOTALL)
_END = re.compile(r"\s*\}\s*(?:,\s*execution_thread=.*|//.*)?$")
_KEY = re.compile(r"\s*([\w-]+)=")
_CALLEES = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation|called_computations)="
)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclass(frozen=True)
class Shape:
    """One array type: element type, dims (a dynamic dim counts as its bound) and bits per element in memory.

    >>> Shape("bf16", (2, 3), 16).bytes
    12
    """

    dtype: str
    dims: tuple[int, ...]
    bits: int

    @property
    def elements(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of one array of this type, without the padding a tiled layout may add."""
        return -(-self.elements * self.bits // 8)


def shapes(text: str) -> tuple[Shape, ...]:
    """The array types in a type's text, tuples flattened; tokens and opaque values are left out.

    Sub-byte types take a byte an element unless the layout packs them (`E(4)`), as XLA stores them.

    Raises:
      ValueError: a dim has no bound (`f32[?]`), so it has no size.

    >>> [s.bytes for s in shapes("(f32[2,3]{1,0:T(8,128)}, s4[8]{0:E(4)}, token[], f8e4m3fn[<=5])")]
    [24, 4, 5]
    """
    found = []
    for dtype, dims, layout in _LEAF.findall(text):
        if dtype in ("token", "opaque"):
            continue
        if "?" in dims:
            raise ValueError(f"{dtype}[{dims}]: a dim without a bound has no size")
        sizes = tuple(int(d.strip().removeprefix("<=")) for d in dims.split(",")) if dims.strip() else ()
        packed = re.search(r"E\((\d+)\)", layout)
        found.append(Shape(dtype, sizes, int(packed[1]) if packed else _bits(dtype)))
    return tuple(found)


def _bits(dtype: str) -> int:
    width = re.search(r"\d+", dtype)
    return max(8, int(width[0])) if width else 8  # pred is the one type without a number


@dataclass(frozen=True)
class Instruction:
    """One HLO instruction, in the parts it was printed in.

    `operand_text` is what the parentheses hold: of a constant its literal, of a parameter its number.
    """

    name: str
    opcode: str
    type_text: str
    operand_text: str
    attribute_text: str
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The result's array types, tuples flattened."""
        return shapes(self.type_text)

    @property
    def bytes(self) -> int:
        """Bytes of the result, all leaves of a tuple together."""
        return sum(shape.bytes for shape in self.shapes)

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands in order; empty for constants and parameters."""
        if self.opcode in ("constant", "parameter", "iota"):
            return ()
        # An operand may be printed with its type; the name is its last word.
        parts = (part.split() for part in _split(_COMMENT.sub("", self.operand_text)))
        return tuple(words[-1].removeprefix("%") for words in parts if words)

    @cached_property
    def attributes(self) -> Mapping[str, str]:
        """What follows the operands, as text by name: `{"channel_id": "1", "to_apply": "%add", ...}`."""
        found: dict[str, str] = {}
        key = ""
        for part in _split(self.attribute_text):
            match = _KEY.match(part)
            # replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'} is one value with a comma in it.
            if match and match[1] != "device_ids":
                key = match[1]
                found[key] = part[match.end() :].strip()
            elif key:
                found[key] += "," + part
        return found

    def callees(self, attribute: str) -> tuple[str, ...]:
        """The computations an attribute names (`body`, `calls`, `branch_computations`); () if absent."""
        if not _CALLEES.search(self.attribute_text):
            return ()
        names = self.attributes.get(attribute, "").strip("{}").split(",")
        return tuple(name.strip().removeprefix("%") for name in names if name.strip())

    @cached_property
    def op_name(self) -> str:
        """The JAX operation it came from (`jit(f)/shard_map/psum`), "" when XLA kept none."""
        match = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return match[1] if match else ""


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order printed (the schedule's, in scheduled modules)."""

    name: str
    instructions: Mapping[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next((i for i in self.instructions.values() if i.is_root), list(self.instructions.values())[-1])

    @cached_property
    def parameters(self) -> Mapping[int, Instruction]:
        """The parameters by number."""
        return {int(i.operand_text): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Which instructions read each instruction."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}


@dataclass(frozen=True)
class HloModule:
    """A whole compiled program for one device of an SPMD computation."""

    name: str
    computations: Mapping[str, Computation]
    entry: str
    num_partitions: int | None
    replica_count: int
    tables: Mapping[str, Mapping[int, str]] = field(repr=False)
    aliases: str = field(
        default="", repr=False
    )  # outputs that take an argument's place: `{0}: (1, {}, may-alias), ...`

    @cached_property
    def callers(self) -> Mapping[str, tuple[tuple[Computation, Instruction], ...]]:
        """Which instructions name each computation, and where they stand."""
        found: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for attribute in _CALLEES.findall(instruction.attribute_text):
                    for callee in instruction.callees(attribute):
                        found.setdefault(callee, []).append((computation, instruction))
        return {name: tuple(callers) for name, callers in found.items()}

    @cached_property
    def donated(self) -> Mapping[tuple[int, ...], int]:
        """Index of an output, number of the argument whose place it takes."""
        return {
            tuple(int(n) for n in out.split(",") if n.strip()): int(parameter)
            for out, parameter in re.findall(r"\{([\d,\s]*)\}:\s*\((\d+),\s*\{[\d,\s]*\}", self.aliases)
        }

    @cached_property
    def home(self) -> Mapping[str, Computation]:
        """The computation each instruction stands in, by its name, which is given once in a module."""
        return {name: computation for computation in self.computations.values() for name in computation.instructions}

    def stack(self, instruction: Instruction) -> tuple[tuple[str, str], ...]:
        """`file:line` and the function of each Python frame an instruction came from, innermost first.

        Only where XLA prints a table of stack frames; a frame names its caller by number, one more than it is.
        """
        frame = re.search(r"\bstack_frame_id=(\d+)", instruction.attribute_text)
        number = int(frame[1]) if frame else 0
        if number not in self._stacks:
            self._stacks[number] = self._frames(number)
        return self._stacks[number]

    @cached_property
    def _stacks(self) -> dict[int, tuple[tuple[str, str], ...]]:
        return {}

    def _frames(self, number: int) -> tuple[tuple[str, str], ...]:
        found = []
        while number and (row := self.tables.get("StackFrames", {}).get(number)):
            location = self._row("FileLocations", row, "file_location_id")
            line = re.search(r"\bline=(\d+)", location)
            file, function = (
                self._row(table, location, key).strip('"')
                for table, key in (("FileNames", "file_name_id"), ("FunctionNames", "function_name_id"))
            )
            found.append((f"{file}:{line[1]}" if line else file, function))
            parent = re.search(r"\bparent_frame_id=(\d+)", row)
            number = int(parent[1]) - 1 if parent else 0
        return tuple(found)

    def source(self, instruction: Instruction) -> str:
        """`file:line` of the user's code an instruction came from, "" when XLA kept none.

        Newer XLA prints a table of stack frames at the top, and on the instruction an index; older the place.
        """
        metadata = instruction.attributes.get("metadata", "")
        inline = re.search(r'source_file="([^"]*)"(?:.*?source_line=(\d+))?', metadata)
        if inline:
            return f"{inline[1]}:{inline[2]}" if inline[2] else inline[1]
        place = self._row("StackFrames", metadata, "stack_frame_id")
        location = self._row("FileLocations", place, "file_location_id")
        line = re.search(r"\bline=(\d+)", location)
        name = self._row("FileNames", location, "file_name_id")
        return f"{name.strip(chr(34))}:{line[1]}" if name and line else ""

    def _row(self, table: str, text: str, key: str) -> str:
        match = re.search(rf"\b{key}=(\d+)", text)
        return self.tables.get(table, {}).get(int(match[1]), "") if match else ""


def parse(text: str) -> HloModule:
    """The module in `compiled.as_text()`.

    Raises:
      ValueError: the text holds no ENTRY computation, or a line that is neither HLO nor one of its tables.

    >>> module = parse('''
    ... HloModule double, num_partitions=2
    ...
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %sum = f32[4]{0} add(%x, %x), metadata={op_name="jit(double)/add"}
    ... }
    ... ''')
    >>> root = module.computations[module.entry].root
    >>> root.opcode, root.operands, root.bytes, root.op_name
    ('add', ('x', 'x'), 16, 'jit(double)/add')
    """
    name, num_partitions, replica_count, entry, aliases = "", None, 1, "", ""
    computations: dict[str, Computation] = {}
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] | None = None
    lines = iter(text.splitlines())
    for line in lines:
        stripped = line.strip()
        if not stripped or stripped.startswith("//"):
            continue
        if stripped.startswith("HloModule"):
            name = stripped.split(",")[0].split()[1]
            partitions = re.search(r"\bnum_partitions=(\d+)", stripped)
            replicas = re.search(r"\breplica_count=(\d+)", stripped)
            num_partitions = int(partitions[1]) if partitions else None
            replica_count = int(replicas[1]) if replicas else 1
            aliases = _aliases(stripped)
        elif stripped in _TABLES:
            table = tables.setdefault(stripped, {})
        elif table is not None and stripped[0].isdigit():
            number, _, row = stripped.partition(" ")
            table[int(number)] = row
        elif header := _HEADER.match(line):
            table = None
            computations[header[2]] = Computation(header[2], {i.name: i for i in _body(lines)})
            entry = header[2] if header[1] else entry
        else:
            raise ValueError(f"not HLO text: {stripped[:80]!r}")
    if not entry:
        raise ValueError("no ENTRY computation: give the text of a compiled program, compiled.as_text()")
    return HloModule(name, computations, entry, num_partitions, replica_count, tables, aliases)


def _aliases(header: str) -> str:
    """What braces hold after `input_output_alias=` in the first line of a module."""
    _, _, rest = header.partition("input_output_alias={")
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return ""


def _body(lines: Iterator[str]) -> Iterator[Instruction]:
    """The instructions up to the brace that closes the computation; wrapped lines are joined."""
    pending: re.Match[str] | None = None
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None and not _END.match(line):
            if pending is not None and line.strip():
                pending = _INSTRUCTION.match(pending[0] + " " + line.strip())
            continue
        if pending is not None:
            yield _instruction(pending)
        if match is None:
            return
        pending = match
    raise ValueError("the text ends inside a computation: it was cut")


def _instruction(match: re.Match[str]) -> Instruction:
    rest = match[3]
    type_end = _closing(rest, 0) if rest[0] == "(" else rest.find(" ")
    opcode = _OPCODE.match(rest, type_end) if type_end > 0 else None
    if opcode is None:
        raise ValueError(f"not an HLO instruction: {match[0].strip()[:80]!r}")
    end = _closing(rest, opcode.end() - 1)
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        type_text=rest[:type_end],
        operand_text=rest[opcode.end() : end - 1],
        attribute_text=rest[end:].lstrip(", "),
        is_root=match[1] is not None,
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth, position = 0, start
    while match := _PARENTHESIS.search(text, position):
        position = match.end()
        if match[0] == '"':
            position = _after_string(text, position)
            continue
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses: {text[:80]!r}")


def _after_string(text: str, position: int) -> int:
    """The position after the quote that ends a string whose inside starts at `position`."""
    match = _REST_OF_STRING.match(text, position)
    return match.end() if match else len(text)


def _split(text: str) -> Iterator[str]:
    """The parts between commas that no bracket and no string encloses."""
    depth = start = position = 0
    while match := _SEPARATOR.search(text, position):
        position = match.end()
        if match[0] == '"':
            position = _after_string(text, position)
        elif match[0] != ",":
            depth += 1 if match[0] in "({[" else -1
        elif depth == 0:
            yield text[start : match.start()]
            start = position
    if text[start:].strip():
        yield text[start:]
