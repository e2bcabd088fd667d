"""A verb in a process of its own: what ends the process is said in one message, and compilers' noise is kept away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardlab.cli import child
from shardlab.mesh.faults import DeclarationError

CONFIG = """
import os
def config():
    {body}
"""


def compile_with(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """`shardlab compile` of a config that does something of its own when it is loaded, which only the child does."""
    config = tmp_path / "bad.py"
    config.write_text(CONFIG.format(body=body))
    command = [sys.executable, "-m", "shardlab", "compile", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_compiler_that_ends_its_process_is_one_message_with_its_last_words(tmp_path: Path) -> None:
    fatal = "F1125 12:00:00.000000 77 hlo.cc:42] Check failed: opcode is a copy; %sum = bf16[4]{0} all-reduce(%x)\\n"
    log = "pathlib.Path(os.environ['SHARDLAB_COMPILING'], 'compiler.log')"
    done = compile_with(tmp_path, f"import pathlib; {log}.write_text({fatal!r}); os.abort()".replace("\\\\n", "\\n"))
    assert done.returncode == 2
    assert done.stdout == ""
    first, *rest = done.stderr.strip().splitlines()[-1:]
    assert (
        "the compiler ended its process (SIGABRT): Check failed: opcode is a copy; %sum = bf16[4]{0} all-reduce(%x)"
        in first
    )
    assert not rest


def test_the_status_of_the_child_is_that_of_the_verb(tmp_path: Path) -> None:
    done = compile_with(tmp_path, "os._exit(7)")
    assert done.returncode == 7


def test_a_compiler_that_takes_the_machines_memory_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((2**40, 2**28))
    monkeypatch.setattr(child, "_free_memory", lambda: next(free))
    slow = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(child.subprocess, "Popen", lambda *_, **__: slow)
    with pytest.raises(DeclarationError, match=r"^compile: the compiler was stopped with 0\.2 GiB of this machine's"):
        child.in_child(["compile", "config.py"])
    assert slow.poll() is not None


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "it said nothing"),
        ("noise\nlast words\n", "last words"),
        ("F1125 a.cc:1] first\nF1125 b.cc:2] second\nnoise", "second"),
        ("LLVM ERROR: out of registers\n", "out of registers"),
    ],
)
def test_the_last_words_are_found_in_what_the_compiler_wrote(log: str, said: str) -> None:
    assert f"(SIGSEGV): {said};" in child._ended("compile", -11, log)


def test_an_operation_named_after_the_last_words_is_said() -> None:
    log = "F1125 a.cc:1] Check failed: rank\nwhile compiling\n  %dot.3 = f32[2]{0} dot(%a, %b)\n"
    assert "(SIGABRT): Check failed: rank; at %dot.3 = f32[2]{0} dot(%a, %b);" in child._ended("compile", -6, log)
