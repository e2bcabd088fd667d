"""The published records: complete, in step with the targets, and what the compiler itself says of a chip."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from shardlab.mesh.chips import CHIPS, Chip, chip_of
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.offline import compile_environment
from shardlab.mesh.targets import DEVICES_PER_CHIP, GPU_KINDS, TPU_KINDS, Target, parse_target


def test_there_is_a_record_for_every_kind_that_a_target_may_name() -> None:
    assert {kind for platform, kind in CHIPS if platform == "tpu"} == set(TPU_KINDS)
    assert {kind for platform, kind in CHIPS if platform == "gpu"} == set(GPU_KINDS)
    for (platform, kind), chip in CHIPS.items():
        assert (platform, kind) == (chip.platform, chip.kind)
        assert chip.dims == TPU_KINDS.get(kind, 0)
        assert chip.devices_per_chip == DEVICES_PER_CHIP.get(kind, 1)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.kind)
def test_a_record_is_whole(chip: Chip) -> None:
    assert len(chip.sources) >= 3
    assert 0.9 * chip.hbm_bytes < chip.usable_hbm_bytes <= chip.hbm_bytes
    assert min(chip.hbm_bandwidth, chip.clock_hz, *chip.flops.values()) > 0
    assert chip.flops["bfloat16"] > 0
    if chip.platform == "tpu":
        assert chip.ici_links == 2 * chip.dims
        assert min(chip.ici_bandwidth, chip.dcn_bandwidth) > 0
        assert chip.dcn_bandwidth < chip.ici_bandwidth
    else:
        assert chip.gpu is not None
        assert chip.island >= chip.host > 0
        assert 0 < chip.network_bandwidth < chip.nvlink_bandwidth


def test_chip_of() -> None:
    assert chip_of(parse_target("2*tpu:v5e:16x16")).kind == "v5e"
    assert chip_of(parse_target("gpu:gb200:18x4")).island == 72


def test_no_record_for_emulated_devices() -> None:
    with pytest.raises(DeclarationError) as error:
        chip_of(parse_target("cpu:8"))
    assert str(error.value) == (
        "target cpu:8: a CPU has no published record; its emulated devices show structure, not speed"
    )


def test_a_local_device_is_known_by_what_jax_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")])
    assert chip_of(Target("gpu", "", 8, "local", (8,))).kind == "h100"


def test_no_record_for_a_local_device_that_is_not_known() -> None:
    with pytest.raises(DeclarationError) as error:
        chip_of(Target("gpu", "", 8, "local", (8,)))
    assert str(error.value) == (
        "target local: no record names this device; there are a100, a6000, b200, gb200, h100, h200, v4, v5e, v5p, v6e, "
        "v7x"
    )


ASK = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from shardlab.mesh.offline import compile_devices
from shardlab.mesh.targets import parse_target
found = {}
for text in sys.argv[1:]:
    whole = NamedSharding(Mesh(np.array(compile_devices(parse_target(text))), ("d",)), P())
    square = lambda n, dtype: jax.ShapeDtypeStruct((n, n), dtype)
    try:
        jax.jit(lambda x: jnp.sin(x) + x, in_shardings=whole).lower(square(2**18, jnp.float32)).compile()
    except Exception as error:
        refusal = str(error)
    product = jax.jit(lambda x: x @ x, in_shardings=whole).lower(square(4096, jnp.bfloat16)).compile()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\\d+)"', product.as_text())))
    found[text] = (refusal, 2 * 4096**3 / cycles)
print(json.dumps(found))
"""


@pytest.mark.tpu
def test_what_the_compiler_says_of_memory_and_speed() -> None:
    texts = ["tpu:v4:2x2x1", "tpu:v5e:2x2", "tpu:v5p:2x2x1", "tpu:v6e:2x2", "tpu:v7x:2x2x1"]
    done = subprocess.run(
        [sys.executable, "-c", ASK, *texts],
        env={**os.environ, **compile_environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text, (refusal, per_cycle) in json.loads(done.stdout).items():
        chip = chip_of(parse_target(text))
        available = re.search(r"exceeds available HBM \(([\d.]+)G\)", refusal)
        assert available is not None, refusal
        assert chip.usable_hbm_bytes == int(float(available[1]) * 2**30)
        # A large product runs near the peak, never beyond it.
        assert 0.85 < per_cycle * chip.clock_hz / chip.flops["bfloat16"] <= 1.0, (text, per_cycle)
