"""Two processes of four devices each: each reads its own half, and together they write what they read."""

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


@pytest.mark.slow
def test_each_process_reads_what_its_devices_store(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {**os.environ, **environment(4), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.test_weights_of_processes", place, str(number), str(tmp_path)],
            env=variables,
        )
        for number in range(PROCESSES)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * PROCESSES
    finally:
        for process in started:
            process.kill()
    told = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(PROCESSES)]
    assert [one["read"] * PROCESSES for one in told] == [one["stored"] for one in told]
    assert [one["files"] > 3 for one in told] == [True, False]


def process(place: str, number: int, folder: Path) -> None:
    import jax

    jax.distributed.initialize(place, PROCESSES, number)
    import safetensors.numpy

    from shardlab.checkpoint.weights import Weights, load_safetensors, save_safetensors
    from tests.checkpoint.families import GOLDEN
    from tests.checkpoint.test_weights import named, same

    plan, read, parts = named("mixtral", "hybrid"), Weights.read, []

    def noted(self: Weights, *given: Any) -> Any:
        part = read(self, *given)
        parts.append(part.nbytes)
        return part

    setattr(Weights, "read", noted)  # noqa: B010
    parameters = load_safetensors(GOLDEN / "mixtral", plan, "mixtral")
    files = save_safetensors(folder / "out", plan, parameters, "mixtral", max_bytes=20_000)
    if files:
        back, first = (
            {
                name: value
                for file in there.glob("*.safetensors")
                for name, value in safetensors.numpy.load_file(file).items()
            }
            for there in (folder / "out", GOLDEN / "mixtral")
        )
        same(back, first)
    told = {"read": sum(parts), "stored": sum(array.nbytes for array in parameters.values()), "files": len(files)}
    (folder / f"{number}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    process(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
