"""The verb `compile`: a plan compiled for a machine that need not be there, and what was compiled, audited."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.cli.child import compiler_log, folder, in_child, quiet_compiler
from shardlab.cli.configured import Call, Configured, configured, start
from shardlab.cli.options import check_files, option, show
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults, suggestion
from shardlab.run.output import write

if TYPE_CHECKING:
    from shardlab.plan.plan import Plan
    from shardlab.report.audit import Audit
    from shardlab.run.config import Config
    from shardlab.run.remedies import Remedy


_DUMP = "dump"


@dataclass(frozen=True, kw_only=True)
class _Compile(Configured):
    hlo: str = option("", "write the optimized program that the report was read from", "FILE")
    save: str = option("", "write the audit as JSON, for shardlab diff", "FILE")
    html: str = option("", "write the report as one page that needs no network", "FILE")
    fail_on: str = option("", "exit with 1 where a lint of these codes fires: SL001,SL004, or any", "CODES")


def compile_(arguments: list[str], *, restart: bool) -> int:
    """The verb `compile`: exit status 1 where the step does not fit, or a lint of `--fail-on` fires."""
    if folder() is None and not {"-h", "--help"} & set(arguments):
        return in_child(["compile", *arguments])
    about = "The step compiled for the target, which need not be there, and an audit of what was compiled."
    call = configured(_Compile, arguments, "compile", about)
    options = call.options
    codes = _codes(options.fail_on)
    check_files(options, "hlo", "save", "html")
    audit, text = _compiled(call, restart=restart)
    for name, written in (("hlo", text), ("save", json.dumps(audit.facts, indent=1))):
        if path := getattr(options, name):
            _write(path, written)
    if options.html:
        from shardlab.report.html import page

        _write(options.html, page(audit.facts))
    show(options, audit.facts, str(audit))
    fired = sorted({lint["code"] for lint in audit.facts["lints"] if "any" in codes or lint["code"] in codes})
    for code in fired:
        write(f"shardlab: {code} fired, and --fail-on names it", sys.stderr)
    return 0 if audit.fits and not fired else 1


def _compiled(call: Call, *, restart: bool) -> tuple[Audit, str]:
    """The audit, and the optimized HLO it was read from."""
    config = call.config
    start(config, restart=restart)
    quiet_compiler()
    view = call.view()  # of the standard error that the user sees, not of the compiler's
    import jax

    from shardlab.mesh.offline import compile_devices, compile_options
    from shardlab.module.model import read_model
    from shardlab.report.audit import audit_refused, audit_step
    from shardlab.report.estimate import model_flops
    from shardlab.step.compile import compile_train_step
    from shardlab.step.refusals import OutOfMemory

    machine = config.mesh.machine
    if machine.platform == "tpu" and (place := folder()) is not None:
        # What does not fit is compiled to the end and then refused: the program is here, and nowhere else.
        dump = f"--xla_dump_to={place / _DUMP} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
    devices = None
    if machine.platform != "cpu" and machine.text != "local":
        # An accelerator that is here is left alone, and the CUDA plugin does not look for its libraries.
        jax.config.update("jax_platforms", "cpu")
        devices = compile_devices(machine)
    began = time.perf_counter()
    with view.phase("planning"):
        plan = config.plan()
    planned = time.perf_counter()
    for note in (*plan.notes, *call.remarks):
        view.say(f"note: {note}")
    given = call.given | ({"plan": call.options.plan} if call.options.plan else {})
    about = {"config": call.path, "overrides": given, "plan_seconds": planned - began}
    try:
        with view.phase(f"compiling for {machine}"):
            step = compile_train_step(
                config.model,
                config.loss,
                config.make_optimizer(),
                plan,
                config.abstract_batch(),
                devices=devices,
                compiler_options=compile_options(machine) | config.options_of_xla(),
            )
    except OutOfMemory as refusal:
        seconds, text = time.perf_counter() - planned, _left_behind()
        needed, capacity = refusal.needed_bytes, refusal.capacity_bytes
        with view.phase("it does not fit: looking for what would help"):
            helps = () if needed is None or capacity is None else _helps(config, plan, needed, capacity)
        with view.phase("reading what the compiler left"):
            shapes = config.abstract_batch()
            audit = audit_refused(
                plan,
                refusal,
                text=text,
                flops=model_flops(read_model(config.model, shapes, plan.pipeline), plan, shapes),
                seconds=seconds,
                log=compiler_log(),
                remedies=[dataclasses.asdict(remedy) for remedy in helps],
                about=about,
            )
        return audit, text or ""
    with view.phase("reading the compiled program"):
        return audit_step(step, log=compiler_log(), about=about), step.text


def _helps(config: Config, plan: Plan, needed: int, capacity: int) -> tuple[Remedy, ...]:
    """What to change of a config that does not fit: its options, and the sizes of its mesh."""
    from shardlab.cli.other_meshes import other_mesh
    from shardlab.module.model import read_model
    from shardlab.run.remedies import remedies

    # Each change makes a plan of the same model: it is read once.
    config = dataclasses.replace(config, model=read_model(config.model, config.abstract_batch(), config.pipeline))
    mesh = other_mesh(config, needed, capacity)
    return (*remedies(config, plan, needed, capacity), *((mesh,) if mesh is not None else ()))


def _left_behind() -> str | None:
    """The optimized program of a step that the compiler has refused, if it was written."""
    place = folder()
    found = [] if place is None else sorted(place.glob(f"{_DUMP}/*jit_step*.after_optimizations.txt"))
    return found[-1].read_text() if found else None


def _codes(text: str) -> set[str]:
    """The codes of `--fail-on`, each of which some lint has: one that never fires would guard nothing."""
    from shardlab.report.lint_plan import CODES

    codes = {code.strip() for code in text.split(",") if code.strip()}
    known = [*CODES, "any"]
    raise_faults(
        Fault("--fail-on", f"{code!r} is the code of no lint", f"{suggestion(code, known)}there are {', '.join(known)}")
        for code in sorted(codes - set(known))
    )
    return codes


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise DeclarationError(f"{path}: cannot be written: {error.strerror}; give another file") from error
