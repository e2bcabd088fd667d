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

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardlab.hlo.buffers import Live, live
from shardlab.hlo.collectives import Collective, collectives
from shardlab.hlo.loops import visits
from shardlab.hlo.origin import Cause, cause, path_of
from shardlab.hlo.parse import HloModule
from shardlab.hlo.work import products, scheduled
from shardlab.plan.text import human_bytes

# Forward, recomputed and backward.
_PASSES = 3
_SMALL = 1 << 20


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
    dtype: str | None = None,
    compiler_said: str = "",
    seconds: Callable[[Collective], float] | None = None,
    held: Live | None = None,
    smallest: int = _SMALL,
) -> tuple[Finding, ...]:
    """The findings of a compiled step, costliest first within a code.

    Args:
      axes: sizes of the mesh axes in mesh order.
      dtype: of the compute that was declared ("bfloat16"); None: SL006 is not looked for.
      compiler_said: what the compiler wrote to stderr.
      seconds: of a collective, all its executions together.
      held: `live(module)`, where it is known already.
      smallest: bytes a finding must cost to be one.
    """
    found = collectives(module, axes)
    causes = [cause(module, module.home[one.name].instructions[one.name]) for one in found]
    pairs = list(zip(found, causes, strict=True))
    every = [
        *_sliced(pairs, seconds),
        *_gathered_again(module, pairs, seconds),
        *_reduced_again(module, pairs, seconds),
        *_gathered_activations(pairs, seconds),
        *_involuntary(compiler_said),
        *_wide(module, pairs, dtype, seconds),
        *_padded(live(module) if held is None else held),
    ]
    kept = [one for one in every if one.bytes >= smallest or one.code == "SL005"]
    return tuple(sorted(kept, key=lambda one: (one.code, -one.bytes)))


def _sliced(
    pairs: Sequence[tuple[Collective, Cause]], seconds: Callable[[Collective], float] | None
) -> Iterator[Finding]:
    for one, why in pairs:
        if one.as_reduce_scatter:
            yield Finding(
                "SL001",
                f"{why.what} over {' x '.join(one.axes)}, of which every device keeps 1/{one.group_size}: "
                f"{human_bytes(one.wire_bytes)} on the wire, where a reduce-scatter sends half",
                why.path or why.op_name,
                why.source,
                one.wire_bytes // 2,
                seconds(one) / 2 if seconds else None,
                "TPU and GPU make a reduce-scatter of it unless it spans all axes of the torus; reduce over one axis "
                "after the other",
            )


def _gathered_again(
    module: HloModule, pairs: Sequence[tuple[Collective, Cause]], seconds: Callable[[Collective], float] | None
) -> Iterator[Finding]:
    for path, group in _by_path(pairs, "weights", ("all-gather",)).items():
        whole = _whole(module, path, group[0][0])
        times = sum(one.payload_bytes for one, _ in group) / whole if whole else 0
        if times > _PASSES + 0.5:
            wire = sum(one.wire_bytes for one, _ in group)
            spare = 1 - _PASSES / times
            yield Finding(
                "SL002",
                f"gathered {times:.0f} times a step, {human_bytes(wire)} on the wire",
                path,
                group[0][1].source,
                round(wire * spare),
                sum(seconds(one) for one, _ in group) * spare if seconds else None,
                'gather once a step (gather="step") if the gathered weights fit, or take fewer microbatches',
            )


def _reduced_again(
    module: HloModule, pairs: Sequence[tuple[Collective, Cause]], seconds: Callable[[Collective], float] | None
) -> Iterator[Finding]:
    for path, group in _by_path(pairs, "gradient", ("all-reduce", "reduce-scatter")).items():
        whole = _whole(module, path, group[0][0])
        times = sum(one.payload_bytes for one, _ in group) / whole if whole else 0
        if times > 1.5:
            wire = sum(one.wire_bytes for one, _ in group)
            yield Finding(
                "SL003",
                f"its gradient is reduced {times:.0f} times a step, {human_bytes(wire)} on the wire",
                path,
                group[0][1].source,
                round(wire * (1 - 1 / times)),
                sum(seconds(one) for one, _ in group) * (1 - 1 / times) if seconds else None,
                'accumulate whole gradients and reduce once a step (accumulate="full") if they fit, '
                "or take fewer microbatches",
            )


def _by_path(
    pairs: Sequence[tuple[Collective, Cause]], role: str, kinds: tuple[str, ...]
) -> dict[str, list[tuple[Collective, Cause]]]:
    found: dict[str, list[tuple[Collective, Cause]]] = {}
    for one, why in pairs:
        if why.role == role and one.kind in kinds and len(why.paths) == 1:
            found.setdefault(f"{why.paths[0]}", []).append((one, why))
    return found


def _whole(module: HloModule, path: str, one: Collective) -> int:
    """Bytes of a parameter as one collective of it handles it: gathered over its axes, in its dtype."""
    for parameter in module.computations[module.entry].parameters.values():
        if ".parameters" in parameter.op_name and path_of(parameter.op_name) == path:
            whole = one.kind != "all-reduce" or one.as_reduce_scatter
            width = {"bf16": 2, "f16": 2, "f32": 4}.get(one.dtype, 1)
            return parameter.shapes[0].elements * width * (one.group_size if whole else 1)
    return 0


def _gathered_activations(
    pairs: Sequence[tuple[Collective, Cause]], seconds: Callable[[Collective], float] | None
) -> Iterator[Finding]:
    groups: dict[tuple[str, str, tuple[str, ...]], list[tuple[Collective, Cause]]] = {}
    for one, why in pairs:
        if one.kind == "all-gather" and why.role == "activation":
            groups.setdefault((why.what, why.source, one.axes), []).append((one, why))
    for (what, source, axes), group in groups.items():
        wire = sum(one.wire_bytes for one, _ in group)
        yield Finding(
            "SL004",
            f"{what} over {' x '.join(axes)}, {sum(one.count for one, _ in group)} a step, "
            f"{human_bytes(wire)} on the wire",
            group[0][1].op_name,
            source,
            wire,
            sum(seconds(one) for one, _ in group) if seconds else None,
            "if it was not asked for (as by sequence parallelism), constrain it, or shard what reads it alike",
        )


def _involuntary(compiler_said: str) -> Iterator[Finding]:
    for match in re.finditer(r"[^\n]*Involuntary full rematerialization[^\n]*", compiler_said):
        line = match[0]
        name = re.search(r'op_name="([^"]*)"', line)
        source = re.search(r'source_file="([^"]*)".*?source_line=(\d+)', line)
        shardings = re.findall(r"\{(?:devices|replicated|maximal)[^}]*\}", line)
        op = re.search(r"operation:?\s*(%?[\w.\-]+) = (\S+) ([\w-]+)", line)
        yield Finding(
            "SL005",
            "the partitioner replicates it in full and cuts it again"
            + (f", from {shardings[0]} to {shardings[-1]}" if len(shardings) > 1 else ""),
            name[1] if name else op[1] if op else "an operation",
            f"{source[1]}:{source[2]}" if source else "",
            0,
            None,
            "constrain the value before and after it to specs one step apart (with_sharding_constraint)",
        )


def _wide(
    module: HloModule,
    pairs: Sequence[tuple[Collective, Cause]],
    dtype: str | None,
    seconds: Callable[[Collective], float] | None,
) -> Iterator[Finding]:
    if dtype not in ("bfloat16", "float16"):
        return
    for one, why in pairs:
        if one.dtype == "f32" and one.kind != "collective-permute" and not one.promoted:
            yield Finding(
                "SL006",
                f"{why.what} over {' x '.join(one.axes)} in float32, {human_bytes(one.wire_bytes)} on the wire; "
                f"{dtype} was declared",
                why.path or why.op_name,
                why.source,
                one.wire_bytes // 2,
                seconds(one) / 2 if seconds else None,
                "reduce in bfloat16 (reduce_dtype), or cast before",
            )
    step = visits(module, lambda where, i: 0.0)
    for computation in scheduled(module):
        runs = step[computation.name].executions if computation.name in step else 0
        for instruction in computation.instructions.values():
            wide = sum(n for kind, n in products(module, computation, instruction) if kind == "f32") * runs
            if wide:
                why = cause(module, instruction)
                yield Finding(
                    "SL006",
                    f"a matmul in float32, {wide / 1e12:.3g} TFLOP a step; {dtype} was declared",
                    why.op_name,
                    why.source,
                    instruction.bytes * runs,
                    None,
                    "cast both operands",
                )


def _padded(held: Live) -> Iterator[Finding]:
    for one in held.buffers:
        if one.padding * 5 > one.bytes:
            yield Finding(
                "SL007",
                f"{one.shape}: {human_bytes(one.padding)} of {human_bytes(one.bytes)} is padding",
                one.op_name or one.name,
                one.source,
                one.padding,
                None,
                "make the minor dims multiples of the tile (128 wide), or another dim the minor one",
            )
