"""Two processes of four devices each: each hashes its share of a checkpoint, and what one cannot do ends both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardlab.mesh.emulate import environment

PROCESSES = 2
# Of a process that waits for one which has failed, JAX's heartbeat takes 100 s to find out.
BEFORE_ANY_HEARTBEAT = 90


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {**os.environ, **environment(4), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.checkpoint.test_store_of_processes", place, str(folder)]
    started = [subprocess.Popen([*command, str(number)], env=variables) for number in range(PROCESSES)]
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * PROCESSES
    finally:
        for process in started:
            process.kill()
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(PROCESSES)]


@pytest.mark.slow
def test_each_process_hashes_its_share_when_it_saves_and_when_it_loads(told: list[dict[str, Any]]) -> None:
    for when in ("saved", "loaded"):
        first, second = (set(one[when]) for one in told)
        assert not first & second
        assert first | second == set(told[0]["files"])
        # Each has written a file of its arrays.
        assert [sum("/d/" in name and "ocdbt.process_" in name for name in one) for one in (first, second)] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["flipped", "unsealed", "unhashed", "unwritten"])
def test_what_one_process_finds_or_cannot_do_all_are_told(told: list[dict[str, Any]], what: str) -> None:
    said = {
        "flipped": "its SHA-256 is another; use another checkpoint",
        "unsealed": "No space left on device",
        "unhashed": "process 1: checkpoint",
        "unwritten": "holds ['model.safetensors']; remove them, or give another directory",
    }[what]
    for number, one in enumerate(told):
        if (what, number) != ("unhashed", 1):  # who has failed tells it in its own words
            assert said in one[what]
    assert all(one["seconds"] < BEFORE_ANY_HEARTBEAT for one in told)


def process(place: str, folder: Path, number: int) -> None:
    import dataclasses
    import errno
    import time

    import jax
    import jax.numpy as jnp

    jax.distributed.initialize(place, PROCESSES, number)
    from jax.experimental.multihost_utils import sync_global_devices

    from shardlab.checkpoint import Canonical, Checkpoints, seal, store
    from shardlab.checkpoint.names import Name, Names
    from shardlab.checkpoint.weights import save_safetensors
    from shardlab.mesh.faults import DeclarationError
    from shardlab.step.compile import compile_train_step
    from tests.run.tiny import tiny

    config = tiny("data=8", zero=3)
    plan = config.plan()
    step = compile_train_step(config.model, config.loss, config.make_optimizer(), plan, config.abstract_batch())
    canonical, state = Canonical(step.model, plan, step.optimizer, step.mesh), step.init(0)
    files: list[str] = []
    told: dict[str, Any] = {}

    def noted(file: Any, hash_of: Any = seal._hash_of) -> Any:
        files.append(str(file.relative_to(folder / "run" / "checkpoints" / "0")))
        return hash_of(file)

    def failing(*given: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def error_of(work: Any) -> str:
        try:
            work()
        except DeclarationError as error:
            return str(error)
        return "no error"

    def saved(run: Checkpoints, at: int) -> None:
        run.save(canonical, dataclasses.replace(state, step=jnp.full_like(state.step, at)), {})
        run.wait()

    run = Checkpoints(folder / "run")
    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(seal, "_hash_of", noted)
        saved(run, 0)
        told["saved"] = files[:]
        run.load(canonical, 0)
        told["loaded"], told["files"] = files[len(told["saved"]) :], list(run.seal(0).files)
    begun = time.monotonic()
    data = max(
        (folder / "run" / "checkpoints" / "0").rglob("ocdbt.process_1/d/*"), key=lambda file: file.stat().st_size
    )
    if number == 0:
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    sync_global_devices("flipped")
    told["flipped"] = error_of(lambda: run.load(canonical, 0))
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(store, "write_seal", failing)
        told["unsealed"] = error_of(lambda: saved(run, 1))
    with pytest.MonkeyPatch.context() as broken:
        if number == 1:
            broken.setattr(store, "hashes", failing)
        told["unhashed"] = error_of(lambda: saved(run, 2))
    if number == 0:
        (folder / "weights").mkdir()
        (folder / "weights" / "model.safetensors").write_text("mine")
    names = Names(tuple(Name(one.path, one.path) for one in plan.parameters))
    told["unwritten"] = error_of(lambda: save_safetensors(folder / "weights", plan, state.parameters, names))
    told["seconds"] = time.monotonic() - begun
    (folder / f"{number}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    process(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
