"""Targets: the machine a step is compiled for, as text, and how many devices it has.

=====================  ==========================================================================
``cpu:8``              8 emulated CPU devices (`shardlab.emulate`)
``tpu:v5p:4x8x8``      a TPU slice by its generation and the shape of its torus, in chips
``2*tpu:v5e:16x16``    two such slices, joined by the data-centre network (DCN)
``gpu:h200:8x8``       hosts x GPUs of a host
``local``              whatever JAX finds here; reading it starts JAX
=====================  ==========================================================================
"""

from __future__ import annotations

import dataclasses
import math
import re

from shardlab.mesh.faults import Fault, nearest, raise_faults, suggestion

# Dims of the torus, in chips. A chip is one JAX device (v4 and v5p join their two cores: "megacore"), but on v7x two.
TPU_KINDS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "v7x": 3}
DEVICES_PER_CHIP = {"v7x": 2}
# Chips of a pod, the largest slice: https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x. A pod of v5e and v6e is
# 16 x 16, and libtpu 0.0.42.1 ends the process on a longer dim of v5e.
_POD = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "v7x": 9216}
_LONGEST = {"v5e": 16, "v6e": 16}
# More than any machine that was built: every device of a target is laid out, one by one.
_MOST_DEVICES, _LONGEST_TEXT = 2**20, 100
GPU_KINDS = ("a100", "h100", "h200", "b200", "gb200", "a6000")  # Those of which `shardlab.mesh.chips` has a record.


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
      platform: ``"cpu"``, ``"tpu"``, ``"gpu"``; of a local target, what JAX found.
      kind: the chip, ``"v5p"``; ``""`` on CPU.
      num_devices: how many JAX devices it has, of all slices.
      text: as declared.
      shape: the torus of a slice in chips, or (hosts, GPUs of a host), or (devices,).
      slices: how many TPU slices, joined by DCN.
    """

    platform: str
    kind: str
    num_devices: int
    text: str
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        return self.text


def parse_target(text: str) -> Target:
    """The target that `text` names.

    Raises:
      DeclarationError: the text is none of the forms, or names a chip that is not known.

    >>> parse_target("tpu:v5p:4x8x8").num_devices
    256
    >>> parse_target("gpu:h200:8x8").shape
    (8, 8)
    >>> parse_target("2*tpu:v5e:16x16").num_devices
    512
    """
    target, faults = read_target(text)
    raise_faults(faults)
    assert target is not None
    return target


def read_target(text: str) -> tuple[Target | None, list[Fault]]:
    """The target, or None and what is wrong with the text."""
    where = f"target {text!r}"
    forms = "write cpu:8, tpu:v5p:4x8x8, gpu:h200:8x8 or local"
    if not isinstance(text, str):
        return None, [Fault(where, "is not text", forms)]
    if len(text) > _LONGEST_TEXT:
        return None, [Fault(f"target of {len(text)} letters", "is longer than any machine's name", forms)]
    many = re.fullmatch(r"([1-9]\d*)\*(tpu:.*)", text, re.ASCII)
    slices = int(many[1]) if many else 1
    platform, *rest = (many[2] if many else text).split(":")
    if text == "local":
        import jax  # Only this form needs devices.

        return Target(jax.default_backend(), "", jax.device_count(), text, (jax.device_count(),)), []
    if platform not in ("cpu", "tpu", "gpu"):
        if "*" in platform:
            return None, [Fault(where, "is not slices of a TPU", "write several slices like 2*tpu:v5e:16x16")]
        near = nearest(platform, ("cpu", "tpu", "gpu", "local"))
        hint = f"did you mean {near!r}? " if near else ""
        return None, [Fault(where, f"{platform!r} is no platform", hint + forms)]
    if len(rest) != (1 if platform == "cpu" else 2) or not all(rest):
        return None, [Fault(where, f"has {len(rest) + 1} part{'s' if rest else ''}", forms)]
    kind = "" if platform == "cpu" else rest[0]
    if platform == "tpu" and kind not in TPU_KINDS:
        return None, [_unknown(where, kind, tuple(TPU_KINDS))]
    if platform == "gpu" and kind not in GPU_KINDS:
        return None, [_unknown(where, kind, GPU_KINDS)]
    dims = {"cpu": 1, "tpu": TPU_KINDS.get(kind, 0), "gpu": 2}[platform]
    example = {"cpu": "8", "tpu": "4x8x8" if dims == 3 else "4x4", "gpu": "8x8"}[platform]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest[-1], re.ASCII) or rest[-1].count("x") != dims - 1:
        sizes = "1 size" if dims == 1 else f"{dims} sizes"
        return None, [Fault(where, f"{rest[-1]!r} is not {sizes} of 1 or more", f"write it like {example}")]
    shape = tuple(int(size) for size in rest[-1].split("x"))
    if platform == "tpu" and (fault := _beyond_a_pod(where, kind, shape)):
        return None, [fault]
    devices = slices * math.prod(shape) * DEVICES_PER_CHIP.get(kind, 1)
    if devices > _MOST_DEVICES:
        return None, [Fault(where, f"has {devices} devices, more than {_MOST_DEVICES}", "declare a smaller machine")]
    return Target(platform, kind, devices, text, shape, slices), []


def _beyond_a_pod(where: str, kind: str, shape: tuple[int, ...]) -> Fault | None:
    chips, most = math.prod(shape), _POD[kind]
    slices = "several slices are written 2*tpu:v5e:16x16"
    if max(shape) > _LONGEST.get(kind, max(shape)):
        return Fault(where, f"has a dim of {max(shape)} chips, a pod of {kind} has 16 x 16", slices)
    if chips > most:
        return Fault(where, f"has {chips} chips in a slice, a pod of {kind} has {most}", slices)
    return None


def _unknown(where: str, kind: str, kinds: tuple[str, ...]) -> Fault:
    return Fault(where, f"{kind!r} is not one of {', '.join(kinds)}", suggestion(kind, kinds) + "write one of them")
