"""Why a collective or a buffer is there: the parameter or the layer it belongs to, the line of the user's model.

all-gather          back through converts, slices and the carries of loops to `state.parameters['mlp/up/kernel']`
reduce-scatter      on through sums and the carries of loops to the output that takes that parameter's place
anything else       the JAX operation, the function of the model it stands in, forward or backward
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardlab.hlo.layout import leaves
from shardlab.hlo.parse import Computation, HloModule, Instruction
from shardlab.hlo.work import COLLECTIVES, target

Index = tuple[int, ...]
# What hands on its first operand's elements, all or some of them, in some order.
_CARRY = frozenset(
    {
        "bitcast-convert", "convert", "copy-start", "reshape", "transpose", "slice", "dynamic-slice", "pad",
        "reduce-precision", "slice-start", "dynamic-slice-start",
    }
)  # fmt: skip
_MOVES = COLLECTIVES | {f"{one}-start" for one in COLLECTIVES}
_SAME = frozenset({"bitcast", "copy", "optimization-barrier", "opt-barrier"})
_JOIN = frozenset({"concatenate", "dynamic-update-slice"})
# On the way of a gradient to its parameter: sums, scalings, the optimizer's arithmetic.
_ARITHMETIC = frozenset(
    {
        "add",
        "subtract",
        "multiply",
        "divide",
        "negate",
        "select",
        "sqrt",
        "rsqrt",
        "maximum",
        "minimum",
        "power",
        "clamp",
    }
)
# XLA:TPU's names for a value that lies in parts, or is on its way.
_VIEWS = frozenset({"ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"})
_LIMIT = 4000
_SHARDLAB = re.compile(r"/shardlab/(?!models/)[\w/]+\.py:")


@dataclass(frozen=True)
class Cause:
    """Where a collective or a buffer comes from.

    Attributes:
      what: in words: "all-gather of blocks/*/mlp/up/kernel (weights)".
      paths: the parameters it belongs to, none of an activation.
      role: "weights", "gradient", "optimizer state", "updated weights", "input" or "activation".
      op_name: the JAX operation.
      source: `file:line` of the user's code.
    """

    what: str
    paths: tuple[str, ...]
    role: str
    op_name: str
    source: str

    @property
    def path(self) -> str | None:
        """The first of the paths, None without."""
        return self.paths[0] if self.paths else None


def cause(module: HloModule, instruction: Instruction) -> Cause:
    """The cause of an instruction.

    >>> from shardlab.hlo.parse import parse
    >>> module = parse('''
    ... HloModule step, num_partitions=2
    ... ENTRY %main (x: f32[4]) -> bf16[8] {
    ...   %x = f32[4]{0} parameter(0), metadata={op_name="state.parameters['head/kernel']"}
    ...   %half = bf16[4]{0} convert(%x)
    ...   ROOT %all = bf16[8]{0} all-gather(%half), channel_id=1, replica_groups={{0,1}}, dimensions={0}
    ... }
    ... ''')
    >>> cause(module, module.computations["main"].root).what
    'all-gather of head/kernel (weights)'
    """
    op_name, source = named(module, instruction)
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    of = f"{kind} of " if kind in COLLECTIVES else ""
    made_of = parts(module, instruction)
    sizes: dict[str, int] = {}
    for part in made_of:
        sizes[part.role] = sizes.get(part.role, 0) + part.bytes
    main = max(sizes, key=lambda role: sizes[role])
    paths = tuple(dict.fromkeys(path for part in made_of if part.role == main for path in part.paths))
    more = " and others" if len(sizes) > 1 else ""
    if main == "activation":
        thing = _activation(module, instruction, op_name)
    elif main == "gradient":
        thing = f"the gradient of {_listed(paths)}"
    else:
        thing = f"{_listed(paths)} ({main})"
    return Cause(f"{of}{thing}{more}", paths, main, op_name, source)


@dataclass(frozen=True)
class Part:
    """What one operand of a collective is; `bytes` are the operand's."""

    role: str
    paths: tuple[str, ...]
    bytes: int


def parts(module: HloModule, instruction: Instruction) -> tuple[Part, ...]:
    """The parts of a collective that XLA has combined of several, one an operand; one part of any other instruction."""
    computation = module.home[instruction.name]
    if instruction.opcode.removesuffix("-start") not in COLLECTIVES or not instruction.operands:
        ends = [index for index, _ in leaves(instruction.type_text)]
        return (_part(module, computation, instruction, instruction.name, ends, instruction.bytes),)
    found = []
    for k, name in enumerate(instruction.operands):
        size = computation.instructions[name].bytes if name in computation.instructions else 0
        found.append(_part(module, computation, instruction, name, [_result(instruction, k)], size))
    return tuple(found)


def _part(
    module: HloModule,
    computation: Computation,
    instruction: Instruction,
    value: str,
    ends: Sequence[Index],
    size: int,
) -> Part:
    back = list(_origins(module, computation, value))
    for role, prefix in (("weights", ".parameters"), ("optimizer state", ".optimizer"), ("input", "")):
        paths = tuple(dict.fromkeys(path_of(name) for name in back if prefix in name))
        if paths:
            return Part(role, paths, size)
    paths = tuple(dict.fromkeys(path_of(name) for name in _ends(module, computation, instruction, ends)))
    if paths:
        return Part("updated weights" if instruction.opcode.startswith("all-gather") else "gradient", paths, size)
    return Part("activation", (), size)


def path_of(op_name: str) -> str:
    """The path of a parameter in the name JAX gives an argument.

    >>> path_of("state.parameters['blocks/*/up/kernel']"), path_of("state.optimizer[0].mu['blocks'][3]['up']")
    ('blocks/*/up/kernel', 'blocks/3/up')
    >>> path_of("state.step")
    'step'
    """
    name = op_name.replace("\\'", "'")
    _, _, rest = name.rpartition(".")
    keys = [quoted or number for quoted, number in re.findall(r"\['([^']*)'\]|\[(\d+)\]", rest or name)]
    return "/".join(keys) if keys else re.sub(r"\[.*", "", rest or name)


def user_source(module: HloModule, instruction: Instruction) -> tuple[str, str]:
    """The innermost frame of the user's own code, `file:line` and function.

    Frames outside shardlab's are of who called it, and no part of the model: then shardlab's own frame is given, and
    XLA's choice where there is no stack.
    """
    ours = None
    for place, function in module.stack(instruction):
        if _SHARDLAB.search(place):
            ours = ours or (place, "")
        elif "site-packages" not in place and "/jax/" not in place and ours is None:
            return place, function
    return ours or (module.source(instruction), "")


def named(module: HloModule, instruction: Instruction) -> tuple[str, str]:
    """JAX operation and user's line: an instruction's own, or of the fusion around it, its reader, or its operand."""
    for one in _nearest(module, instruction, module.home[instruction.name]):
        if one.op_name:
            return one.op_name, user_source(module, one)[0]
    return "", ""


def _nearest(module: HloModule, instruction: Instruction, computation: Computation) -> Iterator[Instruction]:
    yield instruction
    for _, caller in module.callers.get(computation.name, ()):
        if caller.opcode in ("fusion", "async-start"):
            yield caller
    yield from computation.users.get(instruction.name, ())
    here = instruction
    for _ in range(8):
        if not here.operands or here.operands[0] not in computation.instructions:
            return
        here = computation.instructions[here.operands[0]]
        yield here


def _listed(paths: tuple[str, ...]) -> str:
    return ", ".join(paths) if len(paths) <= 2 else f"{paths[0]} and {len(paths) - 1} more"


def _activation(module: HloModule, instruction: Instruction, op_name: str) -> str:
    part, phase = part_of(module, instruction)
    words = op_name.rpartition("/")[2] or "a value"
    return words + (f" in {part}" if part else "") + (f" ({phase})" if phase != "forward" else "")


def part_of(module: HloModule, instruction: Instruction) -> tuple[str, str]:
    """The class or function of the model an instruction stands in ("Attention"), and its phase.

    What shardlab itself does is of the module that does it ("shardlab.step.update").
    """
    home = module.home[instruction.name]
    one = next((one for one in _nearest(module, instruction, home) if one.op_name), instruction)
    place, function = user_source(module, one)
    phase = "forward"
    if "rematted_computation" in one.op_name:
        phase = "recomputed"
    elif "transpose(" in one.op_name:
        phase = "backward"
    if ours := _SHARDLAB.search(place):
        return ours[0][1:].partition(".py")[0].replace("/", "."), phase
    return function.partition(".<locals>")[0].removesuffix(".__call__").strip("<>"), phase


def _origins(module: HloModule, computation: Computation, value: str) -> Iterator[str]:
    """The names of the arguments that a value is copied from."""
    seen: set[tuple[str, str, Index]] = set()
    waiting: list[tuple[Computation, str, Index]] = [(computation, value, ())]
    while waiting and len(seen) < _LIMIT:
        here, name, index = waiting.pop()
        if (here.name, name, index) in seen or name not in here.instructions:
            continue
        seen.add((here.name, name, index))
        one = here.instructions[name]
        if one.opcode == "parameter":
            if here.name == module.entry:
                if one.op_name:
                    yield one.op_name
            else:
                waiting += _handed(module, here, int(one.operand_text), index)
        elif one.opcode == "get-tuple-element":
            waiting.append((here, one.operands[0], (int(one.attributes["index"]), *index)))
        elif one.opcode == "tuple" and index:
            waiting.append((here, one.operands[index[0]], index[1:]))
        elif one.opcode == "fusion":
            inner = module.computations[one.callees("calls")[0]]
            waiting.append((inner, inner.root.name, index))
        elif (one.opcode == "while" and _unchanged(module, one, index)) or one.opcode in _SAME:
            waiting.append((here, one.operands[0], index))
        elif one.opcode.endswith("-done"):
            waiting.append((here, one.operands[0], _started(one, index)))
        elif one.opcode in _CARRY or one.opcode in _MOVES:
            waiting.append((here, one.operands[_operand(one, index)], ()))
        elif one.opcode in _JOIN or (one.opcode == "custom-call" and (len(one.operands) == 1 or target(one) in _VIEWS)):
            waiting += [(here, operand, ()) for operand in one.operands]


def _handed(
    module: HloModule, computation: Computation, number: int, index: Index
) -> Iterator[tuple[Computation, str, Index]]:
    """What callers hand in as a parameter; of a loop what it starts with, if it keeps that."""
    for outer, caller in module.callers.get(computation.name, ()):
        if caller.opcode == "while":
            if _unchanged(module, caller, index):
                yield outer, caller.operands[0], index
        elif caller.opcode == "conditional":
            branches = caller.callees("branch_computations") or (
                caller.callees("true_computation") + caller.callees("false_computation")
            )
            yield from ((outer, caller.operands[k + 1], index) for k, b in enumerate(branches) if b == computation.name)
        elif number < len(caller.operands):
            yield outer, caller.operands[number], index


def _unchanged(module: HloModule, loop: Instruction, index: Index) -> bool:
    """Whether a loop hands on an element of its carry as it got it."""
    body = module.computations[loop.callees("body")[0]]
    if not index or body.root.opcode != "tuple" or index[0] >= len(body.root.operands):
        return False
    value = body.instructions[body.root.operands[index[0]]]
    while value.opcode in ("copy", "bitcast", "copy-done", "copy-start", "optimization-barrier"):
        value = body.instructions[value.operands[0]]
    return (
        value.opcode == "get-tuple-element"
        and int(value.attributes["index"]) == index[0]
        and body.instructions[value.operands[0]].opcode == "parameter"
    )


def _ends(
    module: HloModule, computation: Computation, instruction: Instruction, results: Sequence[Index]
) -> Iterator[str]:
    """The names of the arguments whose places a value ends in, through sums and an optimizer's arithmetic."""
    if max((shape.elements for shape in instruction.shapes), default=0) <= 1:
        return
    entry = module.computations[module.entry]
    seen: set[tuple[str, str, Index]] = set()
    waiting: list[tuple[Computation, str, Index]] = [(computation, instruction.name, index) for index in results]
    while waiting and len(seen) < _LIMIT:
        here, name, index = waiting.pop()
        if (here.name, name, index) in seen:
            continue
        seen.add((here.name, name, index))
        value = here.instructions[name]
        if value.is_root:
            if here.name == module.entry:
                number = module.donated.get(index)
                if number is not None and entry.parameters[number].op_name:
                    yield entry.parameters[number].op_name
                continue
            for outer, caller in module.callers.get(here.name, ()):
                if caller.opcode in ("fusion", "call", "conditional", "async-start"):
                    waiting.append((outer, caller.name, index))
                elif caller.opcode == "while" and here.name in caller.callees("body"):
                    waiting += [(outer, caller.name, index), (here, here.parameters[0].name, index)]
        for user in here.users.get(name, ()):
            waiting += _on(module, here, value, index, user)


def _on(
    module: HloModule, here: Computation, value: Instruction, index: Index, user: Instruction
) -> Iterator[tuple[Computation, str, Index]]:
    """Where a value goes with one of its readers."""
    numbers = [k for k, operand in enumerate(user.operands) if operand == value.name]
    if user.opcode == "get-tuple-element":
        if index and int(user.attributes["index"]) == index[0]:
            yield here, user.name, index[1:]
    elif user.opcode == "tuple":
        yield from ((here, user.name, (k, *index)) for k in numbers)
    elif user.opcode == "fusion":
        inner = module.computations[user.callees("calls")[0]]
        yield from ((inner, inner.parameters[k].name, index) for k in numbers if k in inner.parameters)
    elif user.opcode == "while":
        body = module.computations[user.callees("body")[0]]
        yield body, body.parameters[0].name, index
    elif user.opcode == "call":
        inner = module.computations[user.callees("to_apply")[0]]
        yield from ((inner, inner.parameters[k].name, index) for k in numbers)
    elif user.opcode in _SAME:
        yield here, user.name, index
    elif user.opcode.endswith("-done"):
        yield here, user.name, () if user.opcode == "copy-done" else index[user.opcode != "all-reduce-done" :]
    elif user.opcode in _MOVES or (user.opcode in _CARRY and numbers[0] == 0):
        yield from ((here, user.name, _result(user, k)) for k in numbers)
    elif user.opcode in _JOIN or user.opcode in _ARITHMETIC:
        yield here, user.name, ()
    elif user.opcode == "custom-call" and target(user) in _VIEWS:
        yield here, user.name, (1,) if target(user) == "AsyncCollectiveStart" else ()


def _result(instruction: Instruction, k: int) -> Index:
    """Where in its result an instruction puts what it makes of its operand `k`."""
    opcode = instruction.opcode
    if not instruction.type_text.startswith("(") or opcode in _SAME:
        return ()
    if opcode == "copy-start":
        return (0,)
    several = (k,) if len(instruction.operands) > 1 else ()
    if opcode in _MOVES and opcode.endswith("-start") and opcode != "all-reduce-start":
        return (1, *several)
    return (1,) if opcode.endswith("-start") and opcode != "all-reduce-start" else several


def _operand(instruction: Instruction, index: Index) -> int:
    """The operand that an element of the result is made of: the inverse of `_result`."""
    if instruction.opcode in _MOVES and len(instruction.operands) > 1 and index:
        return index[-1]
    return 0


def _started(done: Instruction, index: Index) -> Index:
    """Where the result of a done is in that of its start."""
    if done.opcode == "all-reduce-done":
        return index
    return (0,) if done.opcode == "copy-done" else (1, *index)
