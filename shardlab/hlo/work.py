"""The work in an instruction: FLOPs of the matmuls in it, bytes it reads from and writes to the device's memory.

A fusion's work is that of its inside: the FLOPs of its dots, the bytes of its operands and results.  Of a buffer that
is only sliced, the slice counts; of one that is updated in place, the update.  What is on the chip already (TPU's
VMEM) moves no bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from shardlab.hlo.layout import DEVICE, Stored, leaves, stored
from shardlab.hlo.parse import Computation, HloModule, Instruction
from shardlab.hlo.splash import splash_products

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_WINDOW = re.compile(r"(\w+)=([\w\-x]+)")
_DIMS = re.compile(r'"(lhs|rhs)_(contracting|batch)_dimensions":\[([^\]]*)\]')
_SCORES = re.compile(
    r'"intermediate_tensor_(?:shape|dimensions)":.*?"dimensions":\[([^\]]*)\]|"intermediate_tensor_dimensions":\[([^\]]*)\]'
)
_KERNEL = re.compile(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)')
COLLECTIVES = frozenset(
    {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
        "all-to-all",
        "ragged-all-to-all",
        "collective-permute",
        "collective-broadcast",
        "send",
        "recv",
    }
)
# Only their result's bytes are read of their first operand.
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# Their first operand is changed where it lies.
IN_PLACE = frozenset({"dynamic-update-slice", "scatter"})
_RENAMES = frozenset({"bitcast", "get-tuple-element", "reshape"})


def target(instruction: Instruction) -> str:
    """What a custom call calls, "" for anything else."""
    match = _TARGET.search(instruction.attribute_text) if instruction.opcode == "custom-call" else None
    return match[1] if match else ""


def flops(module: HloModule, computation: Computation, instruction: Instruction) -> int:
    """Of the dots and convolutions, two a multiplication and addition; of a fusion, of those in it.

    >>> from shardlab.hlo.parse import parse
    >>> module = parse('''
    ... HloModule product
    ... ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
    ...   %a = f32[8,4]{1,0} parameter(0)
    ...   %b = f32[4,2]{1,0} parameter(1)
    ...   ROOT %c = f32[8,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }
    ... ''')
    >>> main = module.computations[module.entry]
    >>> flops(module, main, main.root)
    128
    """
    return sum(count for _, count in products(module, computation, instruction))


def products(module: HloModule, computation: Computation, instruction: Instruction) -> list[tuple[str, int]]:
    """The dtype of the operands and the FLOPs of every dot, convolution and known kernel in an instruction."""
    opcode = instruction.opcode
    if opcode == "fusion":
        inner = module.computations[instruction.callees("calls")[0]]
        return [one for i in inner.instructions.values() if i.opcode in _WORKS for one in products(module, inner, i)]
    if opcode not in _WORKS:
        return []
    operands = _operands(computation, instruction)
    dtype = operands[0].shape.dtype if operands else ""
    if opcode == "dot":
        contracted = _numbers(instruction.attributes.get("lhs_contracting_dims", "{}"))
        depth = math.prod(operands[0].shape.dims[d] for d in contracted)
        return [(dtype, 2 * instruction.shapes[0].elements * depth)]
    if opcode == "convolution":
        return [(dtype, _convolution(instruction, operands[0].shape.dims, operands[1].shape.dims))]
    count = _kernel(instruction, operands)
    return [(dtype, count)] if count else splash_products(instruction, operands)


_WORKS = frozenset({"fusion", "dot", "convolution", "custom-call"})


def _convolution(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """XLA:TPU writes dots as convolutions; only positions of the window that meet an element multiply."""
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attributes["dim_labels"])
    assert labels is not None
    result = instruction.shapes[0].dims
    window = dict(_WINDOW.findall(instruction.attributes.get("window", "")))
    count = math.prod(result[k] for k, label in enumerate(labels[3]) if label in "bf") * rhs[labels[2].index("i")]
    for k, label in enumerate(sorted(c for c in labels[1] if c.isdigit())):

        def of(name: str, default: int, k: int = k) -> int:
            return int(window[name].split("x")[k]) if name in window else default

        size = rhs[labels[2].index(label)]
        low = int(window["pad"].split("x")[k].split("_")[0]) if "pad" in window else 0
        count *= _meetings(
            lhs[labels[1].index(label)],
            size,
            result[labels[3].index(label)],
            of("stride", 1),
            low,
            of("lhs_dilate", 1),
            of("rhs_dilate", 1),
        )
    groups = int(instruction.attributes.get("batch_group_count", "1"))
    return 2 * count // groups


def _meetings(base: int, size: int, places: int, stride: int, low: int, spread: int, gap: int) -> int:
    """How many pairs of a result's place and a window's place fall on an element, not on padding or between."""
    if stride == 1 and spread == 1 and gap == 1 and low == 0 and places + size - 1 <= base:
        return places * size
    if size * places > 1 << 20:
        return min(places * size, base * max(size, places))
    last = (base - 1) * spread
    return sum(
        1
        for place in range(places)
        for k in range(size)
        if 0 <= (at := place * stride + k * gap - low) <= last and at % spread == 0
    )


def _kernel(instruction: Instruction, operands: list[Stored]) -> int:
    """FLOPs of a custom call: cuBLAS and Triton matmuls, cuDNN attention, kernels that say their cost; else 0."""
    name, text = target(instruction), instruction.attribute_text
    said = _KERNEL.search(text)
    if said:
        return int(said[1])
    if name.startswith(("__cublas", "__triton_gemm", "__onednn$matmul")) and len(operands) > 1:
        dims = {(side, what): _numbers(numbers.replace('"', "")) for side, what, numbers in _DIMS.findall(text)}
        lhs = operands[0].shape.dims
        depth = math.prod(lhs[d] for d in dims.get(("lhs", "contracting"), [len(lhs) - 1]))
        return 2 * instruction.shapes[0].elements * depth
    if name.startswith("__cudnn$fmha"):
        scores = _SCORES.search(text)
        sizes = _numbers((scores[1] or scores[2]).replace('"', "")) if scores else []
        if len(sizes) == 4:
            depth = operands[0].shape.elements // (sizes[0] * sizes[1] * sizes[2])
            # Two matmuls forward; backward five, the scores' once more among them.  A causal mask halves them.
            matmuls = 5 if "Backward" in name else 2
            return 2 * matmuls * math.prod(sizes) * depth // (2 if "CAUSAL" in text else 1)
    return 0


def moved(module: HloModule, computation: Computation, instruction: Instruction) -> int:
    """Bytes an execution reads from and writes to the device's memory.

    >>> from shardlab.hlo.parse import parse
    >>> module = parse('''
    ... HloModule slice
    ... ENTRY %main (a: f32[100,4], i: s32[]) -> f32[1,4] {
    ...   %a = f32[100,4]{1,0} parameter(0)
    ...   %i = s32[] parameter(1)
    ...   ROOT %row = f32[1,4]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,4}
    ... }
    ... ''')
    >>> main = module.computations[module.entry]
    >>> moved(module, main, main.root)  # 16 in, 16 out
    32
    """
    opcode = instruction.opcode
    if opcode in _SLICES:
        return 2 * _here(instruction.type_text)
    if opcode in IN_PLACE:
        update = computation.instructions.get(instruction.operands[-1 if opcode == "scatter" else 1])
        return 2 * _here(update.type_text) if update else 0
    read = 0
    if opcode == "fusion":
        inner = module.computations[instruction.callees("calls")[0]]
        for number, name in enumerate(instruction.operands):
            source = computation.instructions.get(name)
            if source is not None and number in inner.parameters and _here(source.type_text):
                read += min(_here(source.type_text), _read(module, inner, inner.parameters[number]))
        return read + _written(module, inner, inner.root, instruction)
    for name in instruction.operands:
        source = computation.instructions.get(name)
        read += _here(source.type_text) if source is not None else 0
    return read + _here(instruction.type_text)


def _here(type_text: str) -> int:
    return sum(one.stored for one in stored(type_text) if one.space == DEVICE)


def _read(module: HloModule, inner: Computation, value: Instruction) -> int:
    """Bytes that a fused computation reads of one of its values: slices of it, or all."""
    whole = sum(one.stored for one in stored(value.type_text))
    read = 0
    for user in inner.users.get(value.name, ()):
        if user.opcode in _RENAMES:
            read += _read(module, inner, user)
        elif user.opcode in _SLICES and user.operands[0] == value.name:
            read += sum(one.stored for one in stored(user.type_text))
        elif user.opcode in IN_PLACE and user.operands[0] == value.name and _ends(inner, user):
            continue
        elif user.opcode == "fusion":
            nested = module.computations[user.callees("calls")[0]]
            for number, name in enumerate(user.operands):
                if name == value.name and number in nested.parameters:
                    read += _read(module, nested, nested.parameters[number])
        else:
            return whole
        if read >= whole:
            return whole
    return read


def _ends(inner: Computation, value: Instruction) -> bool:
    """Whether a value of a fused computation is its result, or an element of it."""
    if value.is_root:
        return True
    users = inner.users.get(value.name, ())
    return bool(users) and all(user.opcode in ("tuple", "bitcast") and _ends(inner, user) for user in users)


def _written(module: HloModule, inner: Computation, root: Instruction, fusion: Instruction) -> int:
    """Bytes that a fusion writes: of an update in place, the update."""
    outer = [one for _, one in leaves(fusion.type_text)]
    made = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for one, instruction in zip(outer, made, strict=False):
        if one is None or one.space != DEVICE:
            continue
        update = _update(module, inner, instruction)
        total += one.stored if update is None else update
    return total


def _update(module: HloModule, inner: Computation, made: Instruction) -> int | None:
    """Bytes of what a value that is updated in place is updated with; None for any other."""
    while made.opcode in _RENAMES and made.operands[0] in inner.instructions:
        made = inner.instructions[made.operands[0]]
    if made.opcode in IN_PLACE:
        update = inner.instructions[made.operands[-1 if made.opcode == "scatter" else 1]]
        return sum(one.stored for one in stored(update.type_text))
    if made.opcode == "fusion":
        nested = module.computations[made.callees("calls")[0]]
        return _update(module, nested, nested.root)
    return None


def _operands(computation: Computation, instruction: Instruction) -> list[Stored]:
    found: list[Stored] = []
    for name in instruction.operands:
        source = computation.instructions.get(name)
        found += stored(source.type_text) if source is not None else ()
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.strip("{}").split(",") if number.strip()]


def scheduled(module: HloModule) -> Iterator[Computation]:
    """The computations whose instructions run one after the other: the entry and what loops, branches and calls run."""
    seen: set[str] = set()
    waiting = [module.entry]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in module.computations:
            continue
        seen.add(name)
        computation = module.computations[name]
        yield computation
        for instruction in computation.instructions.values():
            for attribute in _RUNS.get(instruction.opcode, ()):
                waiting += instruction.callees(attribute)


_RUNS = {
    "while": ("body", "condition"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply", "called_computations"),
    "async-start": ("calls", "called_computation"),
}
