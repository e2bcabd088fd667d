"""Targets as text: what each form means, and the full message where it means nothing."""

import jax
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.targets import parse_target


@pytest.mark.parametrize(
    ("text", "platform", "kind", "shape", "num_devices"),
    [
        ("cpu:8", "cpu", "", (8,), 8),
        ("tpu:v5p:4x8x8", "tpu", "v5p", (4, 8, 8), 256),
        ("tpu:v6e:16x16", "tpu", "v6e", (16, 16), 256),
        ("gpu:h200:8x8", "gpu", "h200", (8, 8), 64),
        ("tpu:v7x:4x4x4", "tpu", "v7x", (4, 4, 4), 128),
        ("2*tpu:v5e:16x16", "tpu", "v5e", (16, 16), 512),
        ("3*tpu:v7x:2x2x1", "tpu", "v7x", (2, 2, 1), 24),
    ],
)
def test_forms(text: str, platform: str, kind: str, shape: tuple[int, ...], num_devices: int) -> None:
    target = parse_target(text)
    found = (target.platform, target.kind, target.shape, target.num_devices, str(target))
    assert found == (platform, kind, shape, num_devices, text)


def test_slices() -> None:
    assert parse_target("2*tpu:v5e:16x16").slices == 2
    assert parse_target("tpu:v5e:16x16").slices == parse_target("gpu:h200:8x8").slices == 1


def test_local_is_what_jax_finds() -> None:
    assert parse_target("local").num_devices == jax.device_count() == 8


FORMS = "write cpu:8, tpu:v5p:4x8x8, gpu:h200:8x8 or local"
BAD = {
    "": f"target '': '' is no platform; {FORMS}",
    "gpus:h200:8x8": f"target 'gpus:h200:8x8': 'gpus' is no platform; did you mean 'gpu'? {FORMS}",
    "locale": f"target 'locale': 'locale' is no platform; did you mean 'local'? {FORMS}",
    "cpu": f"target 'cpu': has 1 part; {FORMS}",
    "tpu:v5p": f"target 'tpu:v5p': has 2 parts; {FORMS}",
    "cpu:0": "target 'cpu:0': '0' is not 1 size of 1 or more; write it like 8",
    "tpu:v5:4x8x8": "target 'tpu:v5:4x8x8': 'v5' is not one of v4, v5e, v5p, v6e, v7x; did you mean 'v5p'? "
    "write one "
    "of them",
    "tpu:v5e:4x8x8": "target 'tpu:v5e:4x8x8': '4x8x8' is not 2 sizes of 1 or more; write it like 4x4",
    "tpu:v5p:8x8": "target 'tpu:v5p:8x8': '8x8' is not 3 sizes of 1 or more; write it like 4x8x8",
    "2*gpu:h100:8x8": "target '2*gpu:h100:8x8': is not slices of a TPU; write several slices like 2*tpu:v5e:16x16",
    "0*tpu:v5e:4x4": "target '0*tpu:v5e:4x4': is not slices of a TPU; write several slices like 2*tpu:v5e:16x16",
    "tpu:v6e:16x32": "target 'tpu:v6e:16x32': has a dim of 32 chips, a pod of v6e has 16 x 16; several slices are "
    "written 2*tpu:v5e:16x16",
    "tpu:v5p:32x32x32": "target 'tpu:v5p:32x32x32': has 32768 chips in a slice, a pod of v5p has 8960; several slices "
    "are written 2*tpu:v5e:16x16",
    "gpu:mi300x:1x8": "target 'gpu:mi300x:1x8': 'mi300x' is not one of a100, h100, h200, b200, gb200, a6000; write one "
    "of them",
    "gpu:h200:131073x8": "target 'gpu:h200:131073x8': has 1048584 devices, more than 1048576; declare a smaller "
    "machine",
    "9999999999*tpu:v5e:16x16": "target '9999999999*tpu:v5e:16x16': has 2559999999744 devices, more than 1048576; "
    "declare a smaller machine",
    "cpu:" + "9" * 5000: f"target of 5004 letters: is longer than any machine's name; {FORMS}",
    "cpu:1\u0662": "target 'cpu:1\u0662': '1\u0662' is not 1 size of 1 or more; write it like 8",  # 2 in Arabic
    "gpu:h200:64": "target 'gpu:h200:64': '64' is not 2 sizes of 1 or more; write it like 8x8",
}


@pytest.mark.parametrize("text", BAD)
def test_malformed(text: str) -> None:
    with pytest.raises(DeclarationError) as error:
        parse_target(text)
    assert str(error.value) == BAD[text]
