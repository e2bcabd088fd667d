"""The verb `launch`: `train` in several processes on this machine, as the hosts of a pod run it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from shardlab.cli.configured import Configured, configured, is_config, share_of
from shardlab.cli.options import option, read
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.targets import parse_target


@dataclass(frozen=True, kw_only=True)
class _Launch:
    config: str = field(metadata={"help": "a config file, as of train", "metavar": "CONFIG"})
    processes: int = option(2, "how many processes")
    devices_per_process: int = option(0, "emulated devices of each; 0: the target's, shared alike")
    grace: int = option(120, "seconds that they have to end by themselves when asked to, before they are killed")


_OWN = ("--processes", "--devices-per-process", "--grace")


def launch(arguments: list[str], *, train: type[Configured]) -> int:
    """The verb `launch`; `train` are the options of that verb."""
    own, rest = _split(arguments)
    place = next((k for k, text in enumerate(rest) if is_config(k, text)), None)
    about = (
        "Emulates the hosts of a pod on this machine: shardlab train CONFIG --distributed in several processes, each "
        "with some of the CPU devices, which find each other over the loopback. Options of train are passed on: see "
        "shardlab train --help."
    )
    if place is None:
        if not {"-h", "--help"} & {*rest}:
            raise DeclarationError(
                "launch: CONFIG is missing; give a config file: shardlab launch --processes 2 configs/quickstart.py"
            )
        own = [*own, "--help"]
    options = read(
        _Launch, [*own, *(rest[place : place + 1] if place is not None else [])], prog="shardlab launch", about=about
    )
    target = parse_target(configured(train, rest, "train", about).config.mesh.target)
    from shardlab.run.launch import Launch
    from shardlab.run.launch import launch as run

    together = [] if "--distributed" in rest else ["--distributed"]
    command = (sys.executable, "-m", "shardlab", "train", *rest, *together)
    return run(Launch(command, options.processes, _devices(options, target), options.grace))


def _devices(options: Any, target: Any) -> int:
    """Devices of each process.

    Raises:
      DeclarationError: the target is not emulated, or has another number of devices.
    """
    if options.processes < 1:
        raise DeclarationError(f"--processes: is {options.processes}; give 1 or more")
    if target.platform != "cpu" or target.text == "local":
        raise DeclarationError(
            f"launch: emulates CPU devices, and the target is {target.text}; give --target cpu:8, or start shardlab "
            "train --distributed on every host (configs/launch has templates)"
        )
    each = options.devices_per_process or share_of(target, options.processes)
    if each * options.processes != target.num_devices:
        raise DeclarationError(
            f"launch: {options.processes} processes of {each} devices are {each * options.processes}, and the target "
            f"{target.text} has {target.num_devices}; give --target cpu:{each * options.processes} and a --mesh of as "
            "many"
        )
    return each


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Launch's own options with their values, and the rest."""
    own, rest = [], []
    words = iter(arguments)
    for word in words:
        if word.partition("=")[0].replace("_", "-") in _OWN:
            own += [word] if "=" in word else [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            rest.append(word)
    return own, rest
