"""Emulated devices, each case in a process of its own: what JAX has started cannot be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import shardlab.mesh
from shardlab.mesh.emulate import emulate, environment
from shardlab.mesh.faults import DeclarationError

ROOT = Path(__file__).parents[2]
COUNT = "--xla_force_host_platform_device_count"


def python(code: str, **variables: str) -> str:
    """What `code` prints in a fresh process whose environment says nothing of devices."""
    told = ("XLA_FLAGS", "PJRT_NPROC", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    clean = {name: value for name, value in os.environ.items() if name not in told}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags_of(variables: dict[str, str]) -> list[str]:
    return variables["XLA_FLAGS"].split()


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable says anything of devices."""
    for name in ("XLA_FLAGS", "PJRT_NPROC", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unset")
def test_the_variables_of_a_subprocess() -> None:
    assert environment(12) == {
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "24",
        "XLA_FLAGS": "--xla_cpu_collective_call_warn_stuck_timeout_seconds=60 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600 "
        f"{COUNT}=12",
    }


@pytest.mark.usefixtures("unset")
def test_the_pool_is_never_smaller_than_16_threads() -> None:
    assert environment(2)["PJRT_NPROC"] == "16"


def test_the_users_flags_and_larger_pool_stay_and_the_count_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {COUNT}=3 --xla_cpu_collective_timeout_seconds=7")
    monkeypatch.setenv("PJRT_NPROC", "64")
    flags = flags_of(environment(8))
    assert "--xla_a=1" in flags
    assert "--xla_cpu_collective_timeout_seconds=7" in flags
    assert [flag for flag in flags if flag.startswith(COUNT)] == [f"{COUNT}=8"]
    assert sum("xla_cpu_collective_timeout_seconds" in flag for flag in flags) == 1
    assert environment(8)["PJRT_NPROC"] == "64"


def test_this_process_is_already_right() -> None:
    emulate(8)


def test_a_fresh_process() -> None:
    code = "from shardlab.mesh.emulate import emulate; emulate(6); import jax; print(jax.devices())"
    assert python(code).count("CpuDevice") == 6


def test_jax_imported_but_not_started_and_asked_for_another_count() -> None:
    code = """
import jax, jax.numpy
from shardlab.mesh.emulate import emulate
emulate(5)
emulate(5)
print(jax.default_backend(), jax.device_count())
emulate(5)
"""
    assert python(code) == "cpu 5\n"
    assert python(code, JAX_NUM_CPU_DEVICES="2", XLA_FLAGS=f"{COUNT}=3") == "cpu 5\n"


def test_the_environment_of_a_subprocess_is_enough() -> None:
    code = "from shardlab.mesh.emulate import emulate; import jax; print(jax.device_count()); emulate(4)"
    assert python(code, **environment(4)) == "4\n"


def test_importing_it_imports_no_jax() -> None:
    # Under bare packages: what `shardlab` itself imports is not its concern.
    code = f"""
import sys
from pathlib import Path
from types import ModuleType
mesh = Path({str(Path(shardlab.mesh.__file__).parent)!r})
for name, folder in (("shardlab", mesh.parent), ("shardlab.mesh", mesh)):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]
from shardlab.mesh.emulate import emulate
emulate(3)
print("jax" in sys.modules)
"""
    assert python(code) == "False\n"


STARTED = """
import jax
jax.devices()
from shardlab.mesh.emulate import emulate
try:
    emulate(8)
except ValueError as error:
    print(error)
"""
WAY_OUT = (
    "call emulate(8) before anything that starts JAX (jax.devices(), making an array), restart the kernel "
    "in a "
    "notebook, or start Python under: JAX_PLATFORMS=cpu PJRT_NPROC=16 "
    "XLA_FLAGS='--xla_cpu_collective_call_warn_stuck_timeout_seconds=60 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600 "
    f"{COUNT}=8'\n"
)


def test_jax_has_started_with_another_count() -> None:
    assert python(STARTED, JAX_PLATFORMS="cpu") == (
        f"emulate(8): JAX has already started, with 1 cpu device; {WAY_OUT}"
    )


def test_jax_has_started_without_the_thread_pool() -> None:
    assert python(STARTED, JAX_PLATFORMS="cpu", XLA_FLAGS=f"{COUNT}=8") == (
        "emulate(8): JAX has already started, with 8 cpu devices but without the thread pool and timeouts "
        "that "
        f"keep their collectives going; {WAY_OUT}"
    )


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "8"])
def test_a_count_that_is_none(count: int) -> None:
    with pytest.raises(DeclarationError) as error:
        emulate(count)
    assert str(error.value) == f"emulate: {count!r} devices cannot be made; give a whole number, 1 or more"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("XLA_FLAGS", "flags.txt", "XLA_FLAGS: 'flags.txt' is no flag; write --xla_name=value, with spaces between"),
        ("XLA_FLAGS", f"{COUNT} 4", "XLA_FLAGS: '4' is no flag; write"),
        (
            "XLA_FLAGS",
            "--xla_cpu_collective_timeout_seconds=abc",
            "XLA_FLAGS: '--xla_cpu_collective_timeout_seconds=abc' is no number of seconds; write",
        ),
        ("PJRT_NPROC", "1000000", "PJRT_NPROC: asks for more than 16384 threads; give fewer, or leave it unset"),
        ("PJRT_NPROC", "9" * 5000, "PJRT_NPROC: asks for more than 16384 threads; give fewer, or leave it unset"),
    ],
)
@pytest.mark.usefixtures("unset")
def test_variables_that_would_end_the_process(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(DeclarationError) as error:
        environment(8)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("text", ["abc", "", "-5", "99\u0662", "1e9"])
@pytest.mark.usefixtures("unset")
def test_a_pool_that_is_no_number_is_replaced(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PJRT_NPROC", text)
    assert environment(64)["PJRT_NPROC"] == "128"


STRESS = [sys.executable, str(ROOT / "benchmarks/emulation_stress.py"), "--devices=8", "--steps=300"]


@pytest.mark.slow
@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="jax 0.12 was not seen to deadlock on this loop")
def test_without_its_pool_collectives_deadlock_and_with_it_they_do_not() -> None:
    """Of 8 devices a pool of 8 threads; XLA's timeouts are shortened, so that it gives up after 8 s."""
    without = subprocess.run(
        [*STRESS, "--pool=8", "--warn=2", "--kill=8"], capture_output=True, text=True, timeout=300, check=False
    )
    assert without.returncode == 1
    assert "ended with -6" in without.stdout
    assert "This thread has been waiting for `" in without.stderr
    done = subprocess.run(
        [*STRESS, "--warn=60", "--kill=200"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
