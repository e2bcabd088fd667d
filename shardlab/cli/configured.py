"""The verbs that take a CONFIG: its scalars as options, its mesh given anew, and emulated devices started for it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardlab.cli.options import Common, option, read
from shardlab.mesh import processes
from shardlab.mesh.emulate import emulate, environment
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.targets import Target, parse_target

if TYPE_CHECKING:
    from shardlab.run.config import Config
    from shardlab.run.view import View
    from shardlab.search.plan_file import PlanFile


@dataclass(frozen=True, kw_only=True)
class Configured(Common):
    """Options of the verbs that take a CONFIG, before the config's own scalars."""

    mesh: str = option("", "sizes of the declared axes; one not named becomes 1", "AXIS=N,...")
    target: str = option("", "another machine, as cpu:4 or tpu:v5p:4x8x8", "MACHINE")
    plan: str = option("", "a plan file, as plan --search --out writes one", "FILE")


@dataclass(frozen=True)
class Call:
    """A verb called on a config: the verb's own options, and the config with what was given anew.

    `remarks` are facts about what was given that no plan can know.
    """

    options: Any
    path: str
    config: Config
    given: dict[str, Any]
    remarks: list[str]

    def view(self) -> View:
        """What the user sees; on standard error where standard output is for JSON."""
        from shardlab.run.view import make_view

        return make_view(sys.stderr if self.options.json else sys.stdout)


def configured(kind: type, arguments: list[str], verb: str, about: str, **defaults: Any) -> Call:
    """The call of a verb on a config. `defaults` are the verb's own, before what the user gives."""
    from shardlab.run.config import load_config, override, scalars, scalars_of_every_config

    prog = f"shardlab {verb} CONFIG"
    place = next((k for k, text in enumerate(arguments) if is_config(k, text)), None)
    if place is None:
        if "-h" in arguments or "--help" in arguments:
            about += " What a config declares is the default: for its values, give it before --help."
            read(kind, ["--help"], prog=prog, about=about, scalars=scalars_of_every_config(), defaults=False)
        raise DeclarationError(
            f"{verb}: CONFIG is missing; give a config file first: shardlab {verb} configs/quickstart.py"
        )
    path, rest = arguments[place], arguments[:place] + arguments[place + 1 :]
    # What a config prints is no part of the JSON that standard output may be for.
    with _interrupted_afterwards(), contextlib.redirect_stdout(sys.stderr):
        config = load_config(path)
    config = dataclasses.replace(config, **defaults)
    held = _plan_file(rest)
    if held is not None:
        config = held.apply(config)
    known = scalars(config)
    options = read(kind, rest, prog=prog, about=about, scalars=known)
    given = {}
    for scalar in known:
        value = options
        for name in scalar.name.split("."):
            value = getattr(value, name)
        if value != scalar.value:
            given[scalar.name] = value
    config = override(config, given)
    for name in ("mesh", "target"):
        if getattr(options, name):
            given[name] = getattr(options, name)
    # A search finds the sizes of the mesh, and the config's need not be those of its target.
    if (options.mesh or options.target) and not getattr(options, "search", False):
        mesh = config.mesh.override(options.mesh or config.mesh.sizes, target=options.target or None)
        config = dataclasses.replace(config, mesh=mesh)
    if config.dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    if held is not None:
        held.check(config.plan(), options.plan)
    return Call(options, path, config, given, _remarks(config, rest))


def _plan_file(arguments: Sequence[str]) -> PlanFile | None:
    """The plan file among the options: the others start from the config as it changes it."""
    for place, text in enumerate(arguments):
        name, equals, value = text.partition("=")
        if name == "--plan":
            from shardlab.search.plan_file import read_plan

            return read_plan(value if equals else "".join(arguments[place + 1 : place + 2]))
    return None


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Until it is left, the first Ctrl-C waits; the second is a KeyboardInterrupt.

    A config imports JAX and NumPy, and makes an ImportError of a Ctrl-C that comes meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def is_config(place: int, text: str) -> bool:
    """CONFIG comes first; after options only a Python file can be told from an option's value."""
    return text.endswith(".py") or (place == 0 and not text.startswith("-"))


def _remarks(config: Config, arguments: list[str]) -> list[str]:
    # The plan notes a schedule that it ignores, but cannot tell the default from one that was asked for.
    asked = any(text.partition("=")[0] == "--schedule" for text in arguments)
    stages = config.mesh.sizes[config.mesh.stage] if config.mesh.stage else 1
    if asked and stages == 1 and config.schedule == "1f1b":
        return ["schedule 1f1b is ignored: one stage only accumulates its microbatches"]
    return []


def start(config: Config, *, restart: bool) -> None:
    """Emulated devices for a CPU target; of several processes each has its share.

    A config file that has started JAX with other settings is not asked to do otherwise: the process is started
    again, once, with the right settings in its environment.
    """
    machine = parse_target(config.mesh.target)
    if machine.platform != "cpu" or machine.text == "local":
        return
    if processes.count() > 1:
        emulate(share_of(machine, processes.count()))
        return
    try:
        emulate(machine.num_devices)
    except DeclarationError:
        if not restart or _RESTARTED in os.environ:
            raise
        variables = {**os.environ, **environment(machine.num_devices), _RESTARTED: "1"}
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, variables)


def share_of(machine: Target, count: int) -> int:
    """How many of a CPU target's devices each of several processes has.

    Raises:
      DeclarationError: the devices do not divide.
    """
    each, rest = divmod(machine.num_devices, count)
    if rest:
        raise DeclarationError(
            f"target {machine.text}: {machine.num_devices} devices do not divide by {count} processes; give another "
            "--target, or another number of processes"
        )
    return each


_RESTARTED = "SHARDLAB_RESTARTED"
