"""The verb `compile`: a plan compiled for a machine that need not be there, and what was compiled, audited."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlab.cli.child import compiler_log, folder, in_child, quiet_compiler
from shardlab.cli.configured import Call, Configured, configured, start
from shardlab.cli.options import option, show
from shardlab.mesh.faults import DeclarationError
from shardlab.run.output import write

if TYPE_CHECKING:
    from shardlab.report.audit import Audit


@dataclass(frozen=True, kw_only=True)
class _Compile(Configured):
    hlo: str = option("", "write the optimized program that the report was read from", "FILE")
    save: str = option("", "write the audit as JSON, for shardlab diff", "FILE")
    html: str = option("", "write the report as one page that needs no network", "FILE")
    fail_on: str = option("", "exit with 1 where a lint of these codes fires: SL001,SL004, or any", "CODES")


def compile_(arguments: list[str], *, restart: bool) -> int:
    """The verb `compile`: exit status 1 where the step does not fit, or a lint of `--fail-on` fires."""
    if folder() is None:
        return in_child(["compile", *arguments])
    about = "The step compiled for the target, which need not be there, and an audit of what was compiled."
    call = configured(_Compile, arguments, "compile", about)
    audit, text = _compiled(call, restart=restart)
    options = call.options
    for name, written in (("hlo", text), ("save", json.dumps(audit.to_json(), indent=1))):
        if path := getattr(options, name):
            _write(path, written)
    if options.html:
        from shardlab.report.html import page

        _write(options.html, page(audit))
    show(options, audit.to_json(), str(audit))
    codes = {code.strip() for code in options.fail_on.split(",") if code.strip()}
    fired = [lint for lint in audit.lints if "any" in codes or lint.code in codes]
    for lint in fired:
        write(f"shardlab: {lint.code} fired, and --fail-on names it", sys.stderr)
    return 0 if audit.fits and not fired else 1


def _compiled(call: Call, *, restart: bool) -> tuple[Audit, str]:
    """The audit, and the optimized HLO it was read from."""
    config, view = call.config, call.view()
    start(config, restart=restart)
    quiet_compiler()
    from shardlab.mesh.offline import compile_devices, compiler_options
    from shardlab.report.audit import audit_refused, audit_step
    from shardlab.step.compile import compile_train_step
    from shardlab.step.out_of_memory import OutOfMemory

    machine = config.mesh.machine
    devices = None if machine.platform == "cpu" or machine.text == "local" else compile_devices(machine)
    began = time.perf_counter()
    with view.phase("planning"):
        plan = config.plan()
    planned = time.perf_counter()
    for note in (*plan.notes, *call.remarks):
        view.say(f"note: {note}")
    facts = {"config": call.path, "overrides": call.given, "plan_seconds": planned - began}
    try:
        with view.phase(f"compiling for {machine}"):
            step = compile_train_step(
                config.model,
                config.loss,
                config.make_optimizer(),
                plan,
                config.abstract_batch(),
                devices=devices,
                compiler_options=compiler_options(machine),
            )
    except OutOfMemory as refusal:
        with view.phase("reading what the compiler left"):
            return audit_refused(plan, refusal, _dumped(), seconds=time.perf_counter() - planned, facts=facts)
    with view.phase("reading the compiled program"):
        return audit_step(step, log=compiler_log(), facts=facts), step.text


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise DeclarationError(f"{path}: cannot be written: {error.strerror}; give another file") from error
