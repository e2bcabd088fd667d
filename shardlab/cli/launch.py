"""The verb `launch`: `train` in several processes on this machine, as the hosts of a pod run it."""

from __future__ import annotations

import sys
from typing import Any

from shardlab.cli.configured import Call, share_of
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.targets import parse_target

ABOUT = (
    "Emulates the hosts of a pod on this machine: shardlab train CONFIG --distributed in several processes, each with "
    "some of the CPU devices, which find each other over the loopback. The output of the first is shown, errors of all."
)
_OWN = ("--processes", "--devices-per-process", "--grace")


def launch(call: Call, arguments: list[str]) -> int:
    """Runs `train` with the arguments but launch's own; the exit status."""
    from shardlab.run.launch import Launch
    from shardlab.run.launch import launch as run

    options = call.options
    together = [] if options.distributed else ["--distributed"]
    command = (sys.executable, "-m", "shardlab", "train", *_without_own(arguments), *together)
    target = parse_target(call.config.mesh.target)
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


def _without_own(arguments: list[str]) -> list[str]:
    """The arguments without launch's own options and their values.

    >>> _without_own(["--processes", "2", "my.py", "--grace=5", "--steps", "3"])
    ['my.py', '--steps', '3']
    """
    rest, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") not in _OWN:
            rest.append(word)
        elif not equals:
            next(words, None)
    return rest
