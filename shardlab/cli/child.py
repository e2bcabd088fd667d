"""A verb run in a process of its own, since a compiler may end the process it runs in, and take all of its memory.

What compilers write by themselves (libtpu, absl) goes to a file, and is shown only where it says why a process ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shardlab.mesh.faults import DeclarationError

_FOLDER = "SHARDLAB_COMPILING"
_LOG = "compiler.log"
# The child's log has the compiler's warnings too: an audit reads them.
_LOGGED = dict.fromkeys(("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"), "1")
# What must stay free of the machine's memory while a compiler works, and how often that is looked at.
_RESERVE, _SECONDS = 2**29, 0.25
_FATAL = re.compile(r"^F\d{4} .*?\] (.*)$|^.*(?:Check failed|LLVM ERROR|Fatal Python error): ?(.*)$", re.MULTILINE)
_OPERATION = re.compile(r"%[\w.-]+ = .*")


def folder() -> Path | None:
    """Where this process may put what its compiler writes, if it is the child of `in_child`."""
    return Path(os.environ[_FOLDER]) if _FOLDER in os.environ else None


def in_child(arguments: Sequence[str]) -> int:
    """Runs ``shardlab ARGUMENTS`` in a process of its own; its exit status.

    Raises:
      DeclarationError: the compiler ended the process, or was stopped because the machine's memory was nearly full.
    """
    with tempfile.TemporaryDirectory(prefix="shardlab-") as place:
        environment = {**_LOGGED, **os.environ, _FOLDER: place}
        process = subprocess.Popen([sys.executable, "-m", "shardlab", *arguments], env=environment)
        try:
            free = _wait(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if free is not None:
            raise DeclarationError(
                f"{arguments[0]}: the compiler was stopped with {free / 2**30:.1f} GiB of this machine's memory left; "
                "compile on a machine with more, or close what else runs here; a model with fewer layers takes less"
            )
        if process.returncode < 0:
            log = Path(place, _LOG)
            raise DeclarationError(_ended(arguments[0], process.returncode, log.read_text(errors="replace")))
        return process.returncode


def quiet_compiler() -> None:
    """From now on what anything but Python writes to standard error goes to the log of `in_child`, in its child."""
    place = folder()
    if place is not None:
        sys.stderr.flush()
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        with (place / _LOG).open("w") as log:
            os.dup2(log.fileno(), 2)


def compiler_log() -> str:
    """What the compiler has written so far; nothing in a process that is no child."""
    place = folder()
    log = place / _LOG if place is not None else None
    return log.read_text(errors="replace") if log is not None and log.exists() else ""


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Waits for the end; what was left of the machine's memory where the process had to be stopped for it."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS)
            return None
        free = _free_memory()
        if free is not None and free < _RESERVE:
            process.kill()
            process.wait()
            return free


def _free_memory() -> int | None:
    """Bytes that programs can still have; None where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _ended(verb: str, status: int, log: str) -> str:
    """What is said of a process that a signal ended: the compiler's last words, and the operation they name."""
    name = signal.Signals(-status).name
    found = list(_FATAL.finditer(log))
    if not found:
        tail = [line for line in log.splitlines() if line.strip()][-1:]
        said = tail[0] if tail else "it said nothing"
    else:
        said = next(part for part in found[-1].groups() if part)
    operation = _OPERATION.search(log, found[-1].start() if found else 0)
    at = f"; at {operation[0][:300]}" if operation and operation[0] not in said else ""
    return (
        f"{verb}: the compiler ended its process ({name}): {said}{at}; it is a fault of the compiler: change what the "
        "operation comes from (another spec, or another axis), or use another version of JAX"
    )
