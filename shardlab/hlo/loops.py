"""How often each computation runs in one step: loops multiply, the costliest branch counts.

How often a branch is taken is not in a program, unless whoever wrote it has said so in the conditional's name
(`taken_name`, as a `jax.named_scope`), which XLA keeps.

A computation called from two places runs for both.  Trip counts come from XLA's own `known_trip_count` where
it is printed (CPU, GPU) and else from the loop itself (TPU), which must count:

    condition:  counter < bound          body:  counter + step          before the loop:  counter = start
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from shardlab.hlo.parse import Computation, HloModule, Instruction

_KNOWN = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"?(\d+)')
_INTEGER = re.compile(r"\s*(-?\d+)\s*$")
_TAKEN = re.compile(r"taken_(\d+)_of_(\d+)/(?:cond|while)$")
_SAME_VALUE = frozenset({"copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier"})
_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}
# These run what they name in `calls` or `to_apply` once; a reduction's `to_apply` is arithmetic on elements.
_CALLERS = frozenset({"fusion", "call", "async", "custom-call"})


@dataclass(frozen=True)
class Visit:
    """What one step does with a computation.

    Attributes:
      executions: how often it runs; 0 when it is reached only through a branch that is not the costliest.
      loop: the while loops around it, outermost first, with their trip counts (`while.2*7/while.1*5`; `*?`
        where the count is not in the program and one trip is assumed); None outside loops.
      in_branch: whether a conditional, or a loop of one trip at most, decides if it runs.
      assumed: whether a branch around it is counted as if it were always taken, since nothing says how often it is.
    """

    executions: int
    loop: str | None
    in_branch: bool
    assumed: bool


class _Call(NamedTuple):
    computation: str
    times: int
    loop: str | None  # the loop this call makes
    branch_of: int | None  # which branch of the conditional it is
    taken: tuple[int, int] | None = None  # how often the conditional takes its costliest branch, of how many times


def taken_name(what: str, taken: int, of: int) -> str:
    """The name of a conditional that takes its costliest branch `taken` times in every `of`.

    >>> taken_name("head", 8, 20)
    'head_taken_8_of_20'
    """
    return f"{what}_taken_{taken}_of_{of}"


def visits(module: HloModule, cost: Callable[[str, Instruction], float]) -> dict[str, Visit]:
    """The visit of every computation that a step can reach, the entry first.

    Args:
      cost: of one execution of an instruction of the named computation.  Only its sums are compared, between
        the branches of a conditional; the first of equal branches wins.
    """
    calls: dict[str, list[list[_Call]]] = {}
    weights: dict[str, float] = {}
    order: list[str] = []  # callees before callers

    def weigh(name: str) -> float:
        if name in weights:
            return weights[name]
        computation = module.computations[name]
        total = 0.0
        calls[name] = []
        for instruction in computation.instructions.values():
            total += cost(name, instruction)
            made = _calls(module, computation, instruction)
            if made:
                costs = [call.times * weigh(call.computation) for call in made]
                taken, of = made[0].taken or (1, 1)
                total += max(costs) * taken / of if made[0].branch_of is not None else sum(costs)
                calls[name].append(made)
        weights[name] = total
        order.append(name)
        return total

    weigh(module.entry)
    found = {module.entry: Visit(1, None, in_branch=False, assumed=False)}
    for name in reversed(order):
        here = found[name]
        for made in calls[name]:
            costliest = max(range(len(made)), key=lambda k: made[k].times * weights[made[k].computation])
            for k, call in enumerate(made):
                branch = call.branch_of is not None
                times = here.executions * call.times * (0 if branch and k != costliest else 1)
                taken, of = call.taken or (1, 1)
                # A loop that XLA has peeled has a conditional in each part, and says nothing of one alone.
                known = call.taken is not None and times * taken % of == 0
                if known:
                    times = times * taken // of
                before = found.get(call.computation)
                loops = [loop for loop in (here.loop, call.loop) if loop]
                found[call.computation] = Visit(
                    executions=times + (before.executions if before else 0),
                    loop=before.loop if before else "/".join(loops) or None,
                    in_branch=here.in_branch or branch or (before is not None and before.in_branch),
                    assumed=here.assumed or (branch and not known) or (before is not None and before.assumed),
                )
    return found


def _calls(module: HloModule, computation: Computation, instruction: Instruction) -> list[_Call]:
    opcode = instruction.opcode
    if opcode == "while" and is_branch(module, instruction):
        return [_Call(body, 1, None, 0, _taken(instruction)) for body in instruction.callees("body")]
    if opcode == "while":
        trips = trip_count(module, computation, instruction)
        loop = f"{instruction.name}*{'?' if trips is None else trips}"
        times = 1 if trips is None else trips
        return [_Call(body, times, loop, None) for body in instruction.callees("body")] + [
            _Call(condition, times + 1, loop, None) for condition in instruction.callees("condition")
        ]
    if opcode == "conditional":
        branches = instruction.callees("branch_computations") or (
            instruction.callees("true_computation") + instruction.callees("false_computation")
        )
        return [_Call(branch, 1, None, k, _taken(instruction)) for k, branch in enumerate(branches)]
    if opcode.removesuffix("-start") in _CALLERS:  # the -done of an asynchronous call may name it again
        names = ("calls", "to_apply", "called_computations")
        return [_Call(callee, 1, None, None) for name in names for callee in instruction.callees(name)]
    return []


def _taken(branching: Instruction) -> tuple[int, int] | None:
    """How often its costliest branch is taken, of how many times, if its name says so."""
    said = _TAKEN.search(branching.op_name)
    return (int(said[1]), int(said[2])) if said and 0 < int(said[2]) >= int(said[1]) else None


def is_branch(module: HloModule, loop: Instruction) -> bool:
    """Whether a while loop runs once or not at all: its body takes away what its condition reads."""
    condition, body = (module.computations[loop.callees(name)[0]] for name in ("condition", "body"))
    asked = _origin(condition, condition.root)
    if asked.opcode != "get-tuple-element" or body.root.opcode != "tuple":
        return False
    left = _origin(body, body.instructions[body.root.operands[int(asked.attributes["index"])]])
    return left.opcode == "constant" and left.operand_text == "false"


def _origin(computation: Computation, instruction: Instruction) -> Instruction:
    """The instruction whose value this one hands on."""
    while instruction.opcode in _SAME_VALUE or instruction.opcode == "copy-start":
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def trip_count(module: HloModule, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a while loop of `computation` runs; None if the program does not say.

    >>> from shardlab.hlo.parse import parse
    >>> module = parse('''
    ... HloModule count
    ... %body (s: (s32[])) -> (s32[]) {
    ...   %s = (s32[]) parameter(0)
    ...   %i = s32[] get-tuple-element(%s), index=0
    ...   %one = s32[] constant(1)
    ...   %next = s32[] add(%i, %one)
    ...   ROOT %t = (s32[]) tuple(%next)
    ... }
    ... %condition (s.1: (s32[])) -> pred[] {
    ...   %s.1 = (s32[]) parameter(0)
    ...   %i.1 = s32[] get-tuple-element(%s.1), index=0
    ...   %bound = s32[] constant(12)
    ...   ROOT %less = pred[] compare(%i.1, %bound), direction=LT
    ... }
    ... ENTRY %main () -> (s32[]) {
    ...   %zero = s32[] constant(0)
    ...   %start = (s32[]) tuple(%zero)
    ...   ROOT %while.1 = (s32[]) while(%start), condition=%condition, body=%body
    ... }
    ... ''')
    >>> main = module.computations[module.entry]
    >>> trip_count(module, main, main.root)
    12
    """
    known = _KNOWN.search(loop.attribute_text)
    if known:
        return int(known[1])
    comparison = _comparison(module, module.computations[loop.callees("condition")[0]])
    if comparison is None:
        return None
    left, right, direction = comparison
    if left.slot is None or (right.slot is not None and not _changes(module, loop, left.slot)):
        left, right, direction = right, left, _SWAPPED.get(direction, "")
    if left.slot is None:
        return None
    step = _changes(module, loop, left.slot)
    start = _before(module, computation, loop.operands[0], left.slot)
    bound = right.offset
    if right.slot is not None:
        kept = _changes(module, loop, right.slot) == 0
        value = _before(module, computation, loop.operands[0], right.slot) if kept else None
        if value is None:
            return None
        bound += value
    return None if step is None or start is None else _trips(start + left.offset, bound, step, direction)


def _trips(start: int, bound: int, step: int, direction: str) -> int | None:
    if direction in ("GT", "GE") and step < 0:  # counting down mirrors counting up
        start, bound, step, direction = -start, -bound, -step, _SWAPPED[direction]
    if direction == "NE" and step != 0 and (bound - start) % step == 0 and (bound - start) // step >= 0:
        return (bound - start) // step
    if direction in ("LT", "LE") and step > 0:
        return max(0, -((start - bound - (direction == "LE")) // step))
    return None


class _Affine(NamedTuple):
    """`state[slot] + offset`, where state is the tuple a computation gets; a constant when slot is None."""

    slot: int | None
    offset: int


def _affine(
    module: HloModule,
    computation: Computation,
    name: str,
    arguments: tuple[_Affine | None, ...] | None = None,
) -> _Affine | None:
    """An instruction as an affine value; `arguments` are those of a fused computation, else None."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        literal = _INTEGER.match(instruction.operand_text)
        return _Affine(None, int(literal[1])) if literal else None
    if opcode == "parameter" and arguments is not None:
        number = int(instruction.operand_text)
        return arguments[number] if number < len(arguments) else None
    if opcode == "get-tuple-element" and arguments is None:
        source = computation.instructions.get(operands[0])
        is_state = source is not None and source.opcode == "parameter" and len(computation.parameters) == 1
        return _Affine(int(instruction.attributes["index"]), 0) if is_state else None
    if opcode in _SAME_VALUE or opcode == "copy-start":
        return _affine(module, computation, operands[0], arguments)
    if opcode in ("add", "subtract"):
        left, right = (_affine(module, computation, operand, arguments) for operand in operands)
        if left is None or right is None or (right.slot is not None and (left.slot is not None or opcode != "add")):
            return None
        sign = 1 if opcode == "add" else -1
        return _Affine(left.slot if left.slot is not None else right.slot, left.offset + sign * right.offset)
    inner = _callee(module, instruction)
    if inner is not None:
        values = tuple(_affine(module, computation, operand, arguments) for operand in operands)
        return _affine(module, inner, inner.root.name, values)
    return None


def _callee(module: HloModule, instruction: Instruction) -> Computation | None:
    names = instruction.callees("calls") or instruction.callees("to_apply")
    called = instruction.opcode in ("fusion", "call") and names
    return module.computations.get(names[0]) if called else None


def _comparison(module: HloModule, condition: Computation) -> tuple[_Affine, _Affine, str] | None:
    """The two sides of the comparison a loop's condition returns, looking into one fusion around it."""
    root, place, arguments = condition.root, condition, None
    inner = _callee(module, root)
    if inner is not None:
        arguments = tuple(_affine(module, condition, operand) for operand in root.operands)
        root, place = inner.root, inner
    if root.opcode != "compare":
        return None
    left, right = (_affine(module, place, operand, arguments) for operand in root.operands)
    return None if left is None or right is None else (left, right, root.attributes.get("direction", ""))


def _changes(module: HloModule, loop: Instruction, slot: int) -> int | None:
    """What one trip adds to a slot of the state; None when that is no constant."""
    body = module.computations[loop.callees("body")[0]]
    if body.root.opcode != "tuple" or slot >= len(body.root.operands):
        return None
    after = _affine(module, body, body.root.operands[slot])
    return after.offset if after is not None and after.slot == slot else None


def _before(module: HloModule, computation: Computation, tuple_name: str, slot: int) -> int | None:
    """An element of a tuple, traced to where it was made; None when it is no constant."""
    made = computation.instructions.get(tuple_name)
    if made is None:
        return None
    if made.opcode in _SAME_VALUE:
        return _before(module, computation, made.operands[0], slot)
    if made.opcode == "parameter":
        return _handed_in(module, computation, slot)
    value = _affine(module, computation, made.operands[slot]) if made.opcode == "tuple" else None
    if value is None or value.slot is None:
        return None if value is None else value.offset
    start = _handed_in(module, computation, value.slot)
    return None if start is None else start + value.offset


def _handed_in(module: HloModule, computation: Computation, slot: int) -> int | None:
    """An element of the tuple a computation gets: the same from every caller, and kept if that is a loop."""
    values: set[int | None] = set()
    for outer, caller in module.callers.get(computation.name, ()):
        passes_on = caller.opcode == "call" or (caller.opcode == "while" and _changes(module, caller, slot) == 0)
        values.add(_before(module, outer, caller.operands[0], slot) if passes_on else None)
    return values.pop() if len(values) == 1 else None
