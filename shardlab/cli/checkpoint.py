"""The verb `checkpoint`: what a run has saved, and whether it is still what was written. No mesh is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shardlab.cli.options import Common, option, read, show
from shardlab.mesh.faults import DeclarationError

if TYPE_CHECKING:
    from shardlab.checkpoint.seal import Seal


@dataclass(frozen=True, kw_only=True)
class _Checkpoint(Common):
    run: str = field(metadata={"help": "the --out directory of a run, or its --checkpoints", "metavar": "RUN"})
    verify: bool = option(False, "check every array's digest and every file's SHA-256")


def checkpoint(arguments: list[str], *, restart: bool) -> int:
    """The verb `checkpoint`: exit status 1 where something is damaged."""
    about = "What a run has saved. With --verify, exit status 1 where a file or an array is not what was written."
    options = read(_Checkpoint, arguments, prog="shardlab checkpoint", about=about)
    from shardlab.checkpoint.seal import Unfinished
    from shardlab.checkpoint.store import Checkpoints

    store = Checkpoints(options.run)
    if not store.folder.is_dir():
        raise DeclarationError(
            f"run {options.run!r}: has no checkpoints; give the --out directory of a run that saves, or what its "
            "--checkpoints named"
        )
    facts: dict[str, Any] = {"directory": str(store.folder), "checkpoints": [], "damaged": [], "unfinished": []}
    lines, damaged = [], 0
    for step, fault in store.found():
        if fault is not None:
            kind = "unfinished" if isinstance(fault, Unfinished) else "damaged"
            facts[kind].append({"step": step, "fault": str(fault)})
            lines.append(f"step {step}: {kind}: {fault}")
            damaged += kind == "damaged"
            continue
        seal = store.seal(step)
        one: dict[str, Any] = {"step": step, "bytes": _bytes(seal), "tree": seal.tree, "about": seal.about}
        lines.append(f"step {step}: {len(seal.tree)} arrays, {one['bytes']:,} bytes, {len(seal.files)} files")
        if options.verify:
            faults = one["faults"] = store.faults(step)
            damaged += len(faults)
            lines += [f"  {fault}" for fault in faults] or ["  every file and array is what was written"]
        facts["checkpoints"].append(one)
    text = "\n".join([f"{store.folder}", *(lines or ["nothing is saved yet"])])
    show(options, facts, text)
    return 1 if options.verify and damaged else 0


def _bytes(seal: Seal) -> int:
    import jax.numpy as jnp

    return sum(math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in seal.tree.values())
