"""`shardlab plan --search` and `shardlab plan --why`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from shardlab.cli.configured import Call, Configured, configured, is_config
from shardlab.cli.options import check_files, show
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults


def search(call: Call) -> int:
    """The ranked plans of a config on a target."""
    from shardlab.search.choice import changed
    from shardlab.search.confirm import confirm
    from shardlab.search.plan_file import PlanFile, write_plan
    from shardlab.search.search import search as run
    from shardlab.search.text import facts, text

    options, config, path = call.options, call.config, call.path
    if options.mesh:
        raise DeclarationError("--mesh: sizes of the mesh are what --search finds; leave out one of the two")
    target = options.target or config.mesh.target
    _check(options, target)
    check_files(options, "out")
    scalars = {name: value for name, value in call.given.items() if name not in ("mesh", "target")}
    subject, found = run(config, target, planned=max(options.confirm, 1))
    if options.confirm:
        best = found.ranked[: options.confirm]
        found = dataclasses.replace(found, confirmed=confirm(path, config, scalars, best, target))
    if options.out:
        if not found.ranked:
            raise DeclarationError(f"--out {options.out}: no plan fits, and there is none to write; see without --out")
        overrides = found.ranked[0].choice.overrides(target)
        write_plan(options.out, PlanFile(path, scalars, overrides, changed(config, overrides).plan()))
    lines = [*(f"note: {remark}" for remark in call.remarks), text(found, subject, config_path=path, top=options.top)]
    if options.out:
        lines.append(f"\nthe first is in {options.out}: shardlab train {path} --plan {options.out}")
    return show(options, facts(found, subject, config_path=path, top=options.top), "\n".join(lines))


def _check(options: Any, target: str) -> None:
    """That the search can be made and its first plans compiled, before it has taken its time.

    Raises:
      DeclarationError: with all that is wrong.
    """
    from shardlab.mesh.offline import compiler_installed, extra_of
    from shardlab.mesh.targets import parse_target

    platform = parse_target(target).platform
    faults = []
    if platform == "cpu":
        faults.append(
            Fault(
                f"target {target}", "has no speeds to rank plans by", "give --target; shardlab targets lists machines"
            )
        )
    if options.top < 1:
        faults.append(Fault("--top", f"is {options.top}", "give at least 1"))
    if options.confirm < 0:
        faults.append(Fault("--confirm", f"is {options.confirm}", "give 0 or more"))
    if options.confirm > 0 and not compiler_installed(platform):
        faults.append(
            Fault(
                f"--confirm {options.confirm}",
                f"the compiler for {target} is not installed",
                f"pip install '{extra_of(platform)}', or leave it out",
            )
        )
    raise_faults(faults)


def why(arguments: list[str]) -> int:
    """``plan --why A B``: two plan files, or two texts of options of the CONFIG that is given too."""
    from shardlab.search.choice import choice_of
    from shardlab.search.estimate import Estimator
    from shardlab.search.plan_file import read_plan
    from shardlab.search.subject import Subject
    from shardlab.search.why import difference, parameters, table

    place = arguments.index("--why")
    names, rest = arguments[place + 1 : place + 3], arguments[:place] + arguments[place + 3 :]
    if len(names) < 2 or any(name.endswith(".py") for name in names):
        raise DeclarationError(
            "plan --why: compares two plans; give two plan files, or two texts of options and a CONFIG: "
            "shardlab plan configs/fsdp.py --why '--zero 1' '--zero 3'"
        )
    has_config = any(is_config(place, text) for place, text in enumerate(rest))
    calls: list[Call] = []
    for name in names:
        given = shlex.split(name)
        if name.endswith(".json"):
            given = [*([] if has_config else [read_plan(name).config]), "--plan", name]
        calls.append(
            configured(Configured, [*given[:1], *rest, *given[1:]] if not has_config else [*rest, *given], "plan", "")
        )
    estimates = []
    for call in calls:
        subject = Subject(call.config, call.config.mesh.target)
        estimates.append(Estimator(subject).estimate(choice_of(call.config)))
    plans = [call.config.plan() for call in calls]
    lines = parameters(plans[0], plans[1])
    targets = [plan.mesh.target for plan in plans]
    if targets[0] != targets[1]:
        lines.insert(0, ("target", targets[0], targets[1]))
    lines += difference(estimates[0], estimates[1])
    rows = [{"what": what, "first": a, "second": b} for what, a, b in lines]
    facts = {"first": names[0], "second": names[1], "differs": rows}
    return show(calls[0].options, facts, table(lines, ("first", "second")))
