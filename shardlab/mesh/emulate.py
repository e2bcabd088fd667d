"""Emulated devices: n CPU devices made by XLA, with a thread pool in which their collectives cannot deadlock.

Every emulated device that waits in a collective holds a thread of the CPU client's pool, which has about
max(cores, devices) threads: on few cores two collectives that wait at once leave none for the devices they
wait for, and XLA ends the process after 40 s. ``PJRT_NPROC``, read when the client starts, sizes the pool.
The timeouts are longer than XLA's because a slow machine with a busy compiler is not a deadlock.

Nothing here imports JAX: the variables are read when JAX starts its devices, so they are set first.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults

_COUNT = "--xla_force_host_platform_device_count"
# Known to XLA's flag parser under jax 0.10 and 0.12 alike; a flag it does not know ends the process.
_TIMEOUTS = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 60,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "--xla_cpu_collective_timeout_seconds": 600,
}
_MOST_THREADS = 2**14  # all of them are made when JAX starts


def environment(n: int) -> dict[str, str]:
    """The environment variables under which a process that has not started JAX sees n emulated devices.

    Flags and a larger pool already in this process's environment are kept.

    Args:
      n: how many devices.

    Raises:
      DeclarationError: n is not a positive whole number, or this process's environment asks for what cannot be.

    >>> environment(8)["JAX_PLATFORMS"]
    'cpu'
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise DeclarationError(f"emulate: {n!r} devices cannot be made; give a whole number, 1 or more")
    flags = os.environ.get("XLA_FLAGS", "").split()
    raise_faults(_environment_faults(flags))
    flags = [flag for flag in flags if not _is(flag, _COUNT)]
    flags += [f"{name}={value}" for name, value in _TIMEOUTS.items() if not any(_is(flag, name) for flag in flags)]
    flags.append(f"{_COUNT}={n}")
    variables = {
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": str(max(16, 2 * n, _pool())),
        "XLA_FLAGS": " ".join(flags),
    }
    if "JAX_NUM_CPU_DEVICES" in os.environ:  # It would win over the count in XLA_FLAGS.
        variables["JAX_NUM_CPU_DEVICES"] = str(n)
    return variables


def _environment_faults(flags: list[str]) -> Iterator[Fault]:
    """What is wrong with the caller's own variables, of which XLA makes an end of the process or a hang."""
    for flag in flags:
        name, _, value = flag.partition("=")
        if not flag.startswith("--"):
            yield Fault("XLA_FLAGS", f"{flag!r} is no flag", "write --xla_name=value, with spaces between flags alone")
        elif name in _TIMEOUTS and not (value.isascii() and value.isdecimal()):
            yield Fault("XLA_FLAGS", f"{flag!r} is no number of seconds", f"write {name}={_TIMEOUTS[name]}")
    if _pool() > _MOST_THREADS:
        yield Fault("PJRT_NPROC", f"asks for more than {_MOST_THREADS} threads", "give fewer, or leave it unset")


def emulate(n: int) -> None:
    """Makes JAX see n CPU devices in this process, whatever accelerator the machine has.

    To be called before anything starts JAX's devices; importing JAX does not. Called again with the same n,
    or in a process that was started under `environment(n)`, it does nothing.

    Args:
      n: how many devices.

    Raises:
      DeclarationError: n is not a positive whole number, or JAX has already started with other settings; the
        message gives the variables to start Python under instead.

    >>> emulate(8)
    >>> import jax
    >>> jax.device_count()
    8
    """
    variables = environment(n)
    if _started():
        problem = _mismatch(n, variables)
        if problem is not None:
            setting = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            raise DeclarationError(
                f"emulate({n}): JAX has already started, {problem}; call emulate({n}) before anything that "
                "starts JAX (jax.devices(), making an array), restart the kernel in a notebook, or start "
                f"Python under: {setting}"
            )
        return
    os.environ.update(variables)
    jax = sys.modules.get("jax")
    if jax is not None and hasattr(jax, "config"):  # Imported, not started: it read the variables at import.
        jax.config.update("jax_platforms", "cpu")
        if getattr(jax.config, "jax_num_cpu_devices", -1) >= 0:
            jax.config.update("jax_num_cpu_devices", n)


def _is(flag: str, name: str) -> bool:
    return flag.split("=", 1)[0] == name


def _pool() -> int:
    """Threads that the environment already asks for; 0 when it asks for none."""
    text = os.environ.get("PJRT_NPROC", "")
    return int(text[:20]) if text.isascii() and text.isdecimal() else 0


def _started() -> bool:
    """Whether JAX has made its devices; asking must not make them, hence the private module."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(bridge.backends_are_initialized())


def _mismatch(n: int, variables: dict[str, str]) -> str | None:
    """How the started JAX differs from n well-fed CPU devices, or None."""
    jax = sys.modules["jax"]
    platform, count = jax.default_backend(), jax.local_device_count()
    if platform != "cpu" or count != n:
        return f"with {count} {platform} device{'' if count == 1 else 's'}"
    flags = os.environ.get("XLA_FLAGS", "").split()
    missing = [name for name in _TIMEOUTS if not any(_is(flag, name) for flag in flags)]
    if n > 1 and (_pool() < int(variables["PJRT_NPROC"]) or missing):
        return f"with {n} cpu devices but without the thread pool and timeouts that keep their collectives going"
    return None
