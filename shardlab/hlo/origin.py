"""Why a collective or a buffer is there: the parameter or the layer it belongs to, the line of the user's model.

all-gather          back through converts, slices and the carries of loops to `state.parameters['mlp/up/kernel']`
reduce-scatter      on through sums and the carries of loops to the output that takes that parameter's place
anything else       the JAX operation, the function of the model it stands in, forward or backward
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shardlab.hlo.parse import Computation, HloModule, Instruction

Index = tuple[int, ...]
# What hands on its first operand's elements, all or some of them, in some order.
_CARRY = frozenset(
    {
        "bitcast", "bitcast-convert", "convert", "copy", "copy-start", "copy-done", "reshape", "transpose", "slice",
        "dynamic-slice", "optimization-barrier", "opt-barrier", "all-gather", "reduce-scatter", "all-reduce",
        "all-to-all", "collective-permute", "all-gather-start", "all-gather-done", "all-reduce-start",
        "all-reduce-done", "collective-permute-start", "collective-permute-done", "pad", "reduce-precision",
        "slice-start", "slice-done", "dynamic-slice-start", "dynamic-slice-done",
    }
)  # fmt: skip
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
    kind = instruction.opcode.removesuffix("-start").removesuffix("-done")
    computation = module.home[instruction.name]
    op_name, source = _named(module, instruction, computation)
    back = list(dict.fromkeys(_origins(module, computation, instruction)))
    for role, prefix in (("weights", ".parameters"), ("optimizer state", ".optimizer"), ("input", "")):
        paths = tuple(dict.fromkeys(path_of(name) for name in back if prefix in name))
        if paths:
            return Cause(f"{kind} of {_listed(paths)} ({role})", paths, role, op_name, source)
    paths = tuple(dict.fromkeys(path_of(name) for name in _ends(module, computation, instruction)))
    if paths and kind == "all-gather":
        return Cause(f"{kind} of {_listed(paths)} (updated weights)", paths, "updated weights", op_name, source)
    if paths:
        return Cause(f"{kind} of the gradient of {_listed(paths)}", paths, "gradient", op_name, source)
    return Cause(f"{kind} of {_activation(module, instruction, op_name)}", (), "activation", op_name, source)


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


def _named(module: HloModule, instruction: Instruction, computation: Computation) -> tuple[str, str]:
    """The op_name and the user's line, of the fusion around it, or of who made its operand, where it has none."""
    for one in _nearest(module, instruction, computation):
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
    computation = module.home[instruction.name]
    named = next((one for one in _nearest(module, instruction, computation) if one.op_name), instruction)
    _, function = user_source(module, named)
    words = op_name.rpartition("/")[2] or "a value"
    backward = "transpose(" in op_name
    again = "rematted_computation" in op_name
    phase = "recomputed" if again else "backward" if backward else ""
    inside = f" in {function}" if function else ""
    return f"{words}{inside}" + (f" ({phase})" if phase else "")


def _origins(module: HloModule, computation: Computation, instruction: Instruction) -> Iterator[str]:
    """The names of the arguments that a value is copied from."""
    seen: set[tuple[str, str, Index]] = set()
    waiting: list[tuple[Computation, str, Index]] = [(computation, name, ()) for name in instruction.operands]
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
        elif one.opcode == "while" and _unchanged(module, one, index):
            waiting.append((here, one.operands[0], index))
        elif one.opcode in _CARRY and one.operands:
            waiting.append((here, one.operands[0], index if one.opcode in _SAME else ()))
        elif one.opcode in _JOIN:
            waiting += [(here, operand, ()) for operand in one.operands]
        elif one.opcode == "custom-call" and len(one.operands) == 1:
            waiting.append((here, one.operands[0], ()))


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


def _ends(module: HloModule, computation: Computation, instruction: Instruction) -> Iterator[str]:
    """The names of the arguments whose places a value ends in, through sums and an optimizer's arithmetic."""
    places = dict(module.donated)
    entry = module.computations[module.entry]
    elements = max((shape.elements for shape in instruction.shapes), default=0)
    if elements <= 1:
        return
    seen: set[tuple[str, str, Index]] = set()
    waiting: list[tuple[Computation, str, Index]] = [(computation, instruction.name, ())]
    while waiting and len(seen) < _LIMIT:
        here, name, index = waiting.pop()
        if (here.name, name, index) in seen:
            continue
        seen.add((here.name, name, index))
        value = here.instructions[name]
        if value.is_root:
            if here.name == module.entry:
                number = places.get(index)
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
        if not index or int(user.attributes["index"]) == index[0]:
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
    elif (user.opcode in _CARRY and numbers[0] == 0) or user.opcode in _JOIN or user.opcode in _ARITHMETIC:
        yield here, user.name, ()
