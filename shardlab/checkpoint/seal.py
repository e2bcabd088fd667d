"""What makes a saved step a checkpoint: a last file that lists every other with its SHA-256, and says what is in it.

    STEP/state/...      the arrays, as Orbax writes them
    STEP/seal.json      {"sha256": of the rest of it, "step", "about", "tree": {name: shape, dtype, digest}, "files"}

It is written when everything else is there, in one move: a step without a seal, or with one that does not hold, is no
checkpoint, whatever else is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from etils import epath

from shardlab.mesh.faults import DeclarationError

SEAL = "seal.json"
_PIECE = 2**20


class CheckpointError(DeclarationError):
    """A checkpoint that is not what it says, or cannot be written."""


class Unfinished(CheckpointError):
    """A step whose save never came to its seal."""


@dataclass(frozen=True)
class Seal:
    """What a checkpoint holds.

    Attributes:
      step: steps done.
      about: what a run needs beside arrays: the plan, the data's position.
      tree: of every array its shape, dtype and digest, by canonical name.
      files: SHA-256 of every file, by its path in the checkpoint.
    """

    step: int
    about: Mapping[str, Any]
    tree: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]


def write_seal(folder: epath.Path, seal: Seal) -> None:
    """Writes the seal of a step, at once or not at all."""
    held = asdict(seal)
    text = json.dumps({"sha256": _hash(_canonical(held)), **held}, indent=1) + "\n"
    if "://" in str(folder):  # a bucket has a file whole or not at all
        (folder / SEAL).write_text(text)
        return
    new = folder / f"{SEAL}.new"
    new.write_text(text)
    new.replace(folder / SEAL)


def read_seal(folder: epath.Path) -> Seal:
    """The seal of a step.

    Raises:
      Unfinished: there is none.
      CheckpointError: it is not as it was written, or says what no seal says.
    """
    file = folder / SEAL
    try:
        held = json.loads(file.read_text())
        told = held.pop("sha256")
        seal = Seal(**held)
        if told != _hash(_canonical(asdict(seal))):
            raise ValueError("its own SHA-256 is another")
        if problem := _problem(seal, folder.name):
            raise ValueError(problem)
    except FileNotFoundError:
        raise Unfinished(f"checkpoint {folder}: has no {SEAL}: it was never finished; use another") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder}: {SEAL} is damaged ({error}); use another") from error
    return seal


def _problem(seal: Seal, name: str) -> str:
    """What no seal of a step says, although its SHA-256 is right; nothing where all is well."""
    if type(seal.step) is not int or str(seal.step) != name:
        return f"it is that of step {seal.step!r}"
    for what in ("about", "tree", "files"):
        if not isinstance(getattr(seal, what), Mapping):
            return f"{what} is no object"
    if not all(isinstance(one, str) for one in seal.files.values()):
        return "the SHA-256 of a file is no text"
    for array, leaf in seal.tree.items():
        shape = leaf.get("shape") if isinstance(leaf, Mapping) else None
        sizes = shape if isinstance(shape, list) else [None]
        if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
            return f"{array} has no shape"
        if not all(isinstance(leaf.get(what), str) for what in ("dtype", "digest")):
            return f"{array} has no dtype or no digest"
        try:
            kind = jnp.dtype(leaf["dtype"])
        except TypeError:
            return f"{array} has dtype {leaf['dtype'][:40]!r}"
        if kind.hasobject:
            return f"{array} has dtype {leaf['dtype'][:40]!r}"
    return ""


def hashes(folder: epath.Path, share: int = 0, of: int = 1) -> dict[str, str]:
    """SHA-256 of every file of a step but its seal, by path; of several shares, about equally large, of one's files."""
    files = _files(folder)
    if of > 1:
        files.sort(key=lambda file: (-file.stat().length, str(file)))
    return {str(file.relative_to(folder)): _hash_of(file) for file in files[share::of]}


def faults_of_files(folder: epath.Path, seal: Seal, now: Mapping[str, str] | None = None) -> list[str]:
    """What of the files of a step is not as it was sealed; `now` are their hashes, where they are there already."""
    if now is None:
        now = hashes(folder)
    return [
        *(f"{name}: is missing" for name in seal.files if name not in now),
        *(f"{name}: is of no checkpoint" for name in now if name not in seal.files),
        *(f"{name}: its SHA-256 is another" for name, one in seal.files.items() if now.get(name, one) != one),
    ]


def is_link(path: epath.Path) -> bool:
    """Whether it is a link, as only a local directory has them."""
    return os.path.islink(os.fspath(path))


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if is_link(path):
            raise CheckpointError(f"checkpoint {folder}: {path.name} is a link, and none was written; use another")
        if path.is_dir():
            found += _files(path)
        elif path.name not in (SEAL, f"{SEAL}.new"):
            found.append(path)
    return found


def _hash_of(file: epath.Path) -> str:
    made = hashlib.sha256()
    with file.open("rb") as open_file:
        while piece := open_file.read(_PIECE):
            made.update(piece)
    return made.hexdigest()


def _canonical(held: Any) -> bytes:
    return json.dumps(held, sort_keys=True, separators=(",", ":")).encode()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
