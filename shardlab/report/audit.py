"""A compiled step, audited: what it holds, what it sends and why, how long it takes, and what is odd about it.

Everything is read from what the compiler made; what the plan predicted stands beside it. The facts are plain data, the
same on a terminal, as JSON and as a page.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from shardlab.hlo.buffers import Live, live
from shardlab.hlo.collectives import Collective, collectives
from shardlab.hlo.origin import Cause, cause, path_of
from shardlab.hlo.overlap import Overlap, overlaps
from shardlab.hlo.parse import HloModule, parse
from shardlab.hlo.time import Times
from shardlab.mesh.chips import Chip, chip_of
from shardlab.mesh.topology import Layout, lay_out
from shardlab.plan.plan import Parameter, Plan
from shardlab.plan.text import sibling_pattern
from shardlab.report.audit_text import audit_text
from shardlab.report.estimate import estimate_facts, model_flops, seconds_on, step_overlaps, wire_by_axes
from shardlab.report.lint import lint
from shardlab.report.lint_plan import lint_plan
from shardlab.report.memory import memory
from shardlab.report.summary import plan_facts
from shardlab.sharding.rules import canonical, spec_text
from shardlab.step.compile import CompiledStep
from shardlab.step.refusals import OutOfMemory

_LARGEST = 40  # buffers that are listed


@dataclass(frozen=True)
class Audit:
    """What was found, as plain data fit for JSON; bytes and seconds are of one device and step.

    Attributes:
      facts: by name; ``hbm_bytes``, ``hbm_capacity_bytes``, ``fits``, ``memory``, ``categories``, ``largest``,
        ``collectives``, ``wire_bytes``, ``estimate_seconds``, ``mfu``, ``bound_by``, ``estimate``, ``lints``,
        ``compile_seconds``, and what was compiled for what: ``target``, ``mesh``, ``plan``, ``layout``, ``versions``.
    """

    facts: Mapping[str, Any]

    @property
    def fits(self) -> bool:
        """Whether a device of the target has the memory."""
        return self.facts["fits"]

    def __str__(self) -> str:
        return audit_text(self.facts)


def audit_step(step: CompiledStep, *, log: str = "", about: Mapping[str, Any] | None = None) -> Audit:
    """The audit of a compiled step.

    Args:
      step: compiled for the devices here, or for a target that is not here.
      log: what the compiler wrote while it worked, which may name what it could not do well.
      about: further facts, as the config and what was given anew.
    """
    start = time.perf_counter()
    found = memory(step.compiled)
    flops = model_flops(step.model, step.plan, step.batch_shapes)
    facts = {
        **_declared(step.plan),
        **(about or {}),
        "memory": found.to_json(),
        **_held(step.plan, found.total_bytes, found.peak_bytes and found.peak_bytes + found.code_bytes),
        **_read(step.plan, step.text, found.total_bytes, found.code_bytes, flops, log),
        "remedies": [],
        "trace_seconds": step.trace_seconds,
        "compile_seconds": step.compile_seconds,
    }
    if facts["layout"] is not None:
        said = [facts["layout"]["words"], *(f"Gradients over {one.axis}: {one.why}" for one in step.scatters)]
        facts["layout"] = facts["layout"] | {"words": "\n".join(said)}
    return Audit({**facts, "audit_seconds": time.perf_counter() - start})


def audit_refused(
    plan: Plan,
    refusal: OutOfMemory,
    *,
    text: str | None,
    flops: int,
    seconds: float,
    log: str = "",
    remedies: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, Any] | None = None,
) -> Audit:
    """The audit of a step that the compiler found too large.

    Args:
      plan: of the step.
      refusal: what the compiler said.
      text: the optimized program, where the compiler has left it.
      flops: `shardlab.report.estimate.model_flops`.
      seconds: that it took to trace and compile.
      remedies: what to change.
    """
    start = time.perf_counter()
    counted = sum(size for name, size in plan.bytes_per_device().items() if name != "padding")
    needed = refusal.needed_bytes or counted
    facts = {
        **_declared(plan),
        **(about or {}),
        "memory": None,
        **_held(plan, needed),
        "fits": False,
        **(_read(plan, text, needed, 0, flops, log) if text else _UNREAD),
        "remedies": list(remedies),
        "trace_seconds": None,
        "compile_seconds": seconds,
    }
    return Audit({**facts, "audit_seconds": time.perf_counter() - start})


def _declared(plan: Plan) -> dict[str, Any]:
    """What was compiled, for what, by what."""
    return {
        "config": None,
        "overrides": {},
        "target": plan.mesh.target,
        "num_devices": plan.mesh.num_devices,
        "mesh": plan.mesh.sizes,
        "versions": {"jax": jax.__version__} | _compiler(plan),
        "plan": plan_facts(plan),
        "parameters": _parameters(plan),
        "layout": _layout_facts(plan),
    }


def _compiler(plan: Plan) -> dict[str, str]:
    """The compiler's own version; XLA:CPU and XLA:GPU come with jaxlib."""
    name = {"tpu": "libtpu"}.get(plan.mesh.machine.platform, "jaxlib")
    try:
        return {"compiler": f"{name} {importlib.metadata.version(name)}"}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _parameters(plan: Plan) -> list[dict[str, Any]]:
    """The plan's parameters, siblings of several layers together."""
    groups: dict[Any, list[Parameter]] = {}
    for one in plan.parameters:
        key = sibling_pattern(one.path), one.shape, one.dtype, one.spec, one.storage, one.bytes_per_device
        groups.setdefault(key, []).append(one)
    return [
        {
            "path": group[0].path if len(group) == 1 else pattern,
            "count": len(group),
            "shape": list(shape),
            "dtype": dtype,
            "spec": spec_text(canonical(spec)),
            "storage": spec_text(canonical(storage)),
            "source": sibling_pattern(group[0].source),
            "bytes_per_device": size,
        }
        for (pattern, shape, dtype, spec, storage, size), group in groups.items()
    ]


def _layout_facts(plan: Plan) -> dict[str, Any] | None:
    layout = layout_of(plan)
    if layout is None:
        return None
    return {
        "words": layout.explanation,
        "drawing": layout.draw(),
        "axes": [
            {
                "axis": axis.axis,
                "size": axis.size,
                "tier": axis.tier,
                "bandwidth": axis.bandwidth,
                "words": axis.words,
            }
            for axis in layout.axes
        ],
    }


def layout_of(plan: Plan) -> Layout | None:
    """How the axes lie on the target's links; None for CPU and for the devices here, of which these are not known."""
    return None if _chip(plan) is None else lay_out(plan.mesh)


def _chip(plan: Plan) -> Chip | None:
    machine = plan.mesh.machine
    return None if machine.platform == "cpu" or machine.text == "local" else chip_of(machine)


def _held(plan: Plan, reported: int, peak: int = 0) -> dict[str, Any]:
    chip = _chip(plan)
    capacity = None if chip is None else chip.usable_hbm_bytes
    # XLA:TPU refuses what does not fit, and reports more than it needs of what does.
    accepted = plan.mesh.machine.platform == "tpu"
    return {
        "hbm_bytes": reported,
        "hbm_peak_bytes": peak or None,
        "hbm_capacity_bytes": capacity,
        "fits": capacity is None or accepted or reported <= capacity,
    }


_UNREAD: dict[str, Any] = {
    "categories": {},
    "largest": [],
    "collectives": [],
    "wire_bytes": None,
    "wire_bytes_by_axis": {},
    "estimate_seconds": None,
    "mfu": None,
    "bound_by": None,
    "estimate": None,
    "lints": [],
}


def _read(plan: Plan, text: str, needed: int, code: int, flops: int, log: str) -> dict[str, Any]:
    """What the optimized program says."""
    module = parse(text)
    found = collectives(module, plan.mesh.sizes, slices=plan.mesh.slices)
    causes = [cause(module, module.home[one.name].instructions[one.name]) for one in found]
    held = live(module)
    chip, layout = _chip(plan), layout_of(plan)
    timed: dict[str, Any] = dict.fromkeys(("estimate_seconds", "mfu", "bound_by", "estimate"))
    seconds: Callable[[Collective], float] | None = None
    if chip is None or layout is None:
        beside = overlaps(module, found, lambda one: 0.0, Times((), ()))
    else:
        seconds = seconds_on(layout, module)
        compute, beside = step_overlaps(module, found, layout, chip)
        timed = estimate_facts(plan, compute, beside, layout, chip, flops)
    pairs = zip(beside.each, causes, strict=True)
    rows = _merged(_row(one, why, timed=seconds is not None) for one, why in pairs)
    # XLA:CPU computes and sums bfloat16 as float32.
    declared = (None, None) if chip is None else (plan.dtype, plan.reduce_dtype)
    findings = lint(
        module,
        plan.mesh.sizes,
        slices=plan.mesh.slices,
        batch=plan.mesh.batch,
        dtype=declared[0],
        reduce_dtype=declared[1],
        compiler_said=log,
        seconds=seconds,
        held=held,
    )
    findings += lint_plan(plan, text, found, layout)
    return {
        **_held_by(plan, module, held, needed, code),
        "collectives": rows,
        "wire_bytes": sum(row["wire_bytes"] for row in rows),
        "wire_bytes_by_axis": wire_by_axes(rows),
        **timed,
        "lints": [dataclasses.asdict(finding) for finding in findings],
    }


def _row(beside: Overlap, why: Cause, *, timed: bool) -> dict[str, Any]:
    one = beside.collective
    return {
        "kind": one.kind,
        "axes": list(one.axes),
        "count": one.count,
        "payload_bytes": one.payload_bytes,
        "wire_bytes": one.wire_bytes,
        "async": beside.asynchronous,
        "cause": in_words(why.what),
        "path": why.path,
        "source": why.source,
        "loop": one.loop,
        "in_loop": one.loop is not None,
        "exact": one.exact,
        "in_branch": one.assumed,
        "seconds": beside.seconds if timed else None,
        "exposed_seconds": beside.exposed_seconds if timed else None,
    }


def _merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in numbers alone as one, most wire bytes first."""
    numbers = ("count", "payload_bytes", "wire_bytes", "seconds", "exposed_seconds")
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        key = tuple(
            tuple(value) if isinstance(value, list) else value for name, value in row.items() if name not in numbers
        )
        into = found.setdefault(key, {**row, **dict.fromkeys(numbers)})
        for name in numbers:
            if row[name] is not None:
                into[name] = (into[name] or 0) + row[name]
    return sorted(found.values(), key=lambda row: -row["wire_bytes"])


# What shardlab's own modules hold and send.
_OWN = {
    "shardlab.step.slots": "activations that wait for their stage",
    "shardlab.step.cells": "what is kept for the backward",
    "shardlab.step.pipelined": "what is kept for the backward",
    "shardlab.step.phases": "activations and their gradients between stages",
    "shardlab.step.region": "what stages or shards of the batch share",
    "shardlab.step.compile": "weights, cast or gathered",
    "shardlab.step.scatter": "gradients",
    "shardlab.step.update": "the optimizer's update",
    "shardlab.plan.optimizer": "the optimizer's update",
}


_SENT = {"shardlab.step.cells": "what stages share before and after the blocks"}


def in_words(what: str, *, held: bool = False) -> str:
    """The cause of a collective, or of a buffer that is held, with what a module of shardlab's own has it for.

    >>> in_words("collective-permute of ppermute in shardlab.step.phases")
    'collective-permute of activations and their gradients between stages (ppermute)'
    """
    operation, _, module = what.rpartition(" in ")
    if module not in _OWN:
        return what
    kind, of, operation = operation.rpartition(" of ")
    words = _OWN[module] if held else _SENT.get(module, _OWN[module])
    return f"{kind}{of}{words} ({operation})"


_CATEGORIES = {
    "weights": "gathered weights",
    "updated weights": "gathered weights",
    "gradient": "gradients",
    "optimizer state": "optimizer update",
    "activation": "activations",
    "input": "activations",
}


def _held_by(plan: Plan, module: HloModule, held: Live, needed: int, code: int) -> dict[str, Any]:
    """The memory by what it is for, and the largest buffers.

    Arguments are the plan's arrays; what is live beside them at the peak is told by its cause. What the compiler needs
    beyond the buffers that its program names is the rest.
    """
    counted = plan.bytes_per_device()
    state = {
        "parameters": counted["parameters"],
        "optimizer state": counted["optimizer_state"],
        "arrays not trained": counted["buffers"],
    }
    found = {name: size for name, size in state.items() if size}
    found["batch and keys"] = max(held.argument_bytes - sum(found.values()), 0)
    largest: list[dict[str, Any]] = []
    for buffer in held.buffers:
        why = cause(module, module.home[buffer.name].instructions[buffer.name])
        if buffer.kind == "argument":
            category = "optimizer state" if ".optimizer" in buffer.op_name else "parameters"
            what = path_of(buffer.op_name)
            if ".parameters" not in buffer.op_name and ".optimizer" not in buffer.op_name:
                category, what = "batch and keys", buffer.op_name
        else:
            category = _CATEGORIES[why.role]
            words = in_words(why.what, held=True)
            what = words.partition(" of ")[2] or words
            found[category] = found.get(category, 0) + buffer.bytes
        if len(largest) < _LARGEST:
            largest.append(
                {
                    "bytes": buffer.bytes,
                    "what": what,
                    "path": why.path,
                    "shape": buffer.shape,
                    "category": category,
                    "source": buffer.source,
                }
            )
    found["code"] = code
    rest = needed - sum(found.values())
    # Where the compiler puts more in one place than its program shows, less is live than was counted.
    name = "rest of what the compiler needs" if rest > 0 else "activations"
    found[name] = found.get(name, 0) + rest
    return {"categories": found, "largest": largest}
