"""What makes a saved step a checkpoint: a last file that lists every other with its SHA-256, and says what is in it.

    STEP/state/...      the arrays, as Orbax writes them
    STEP/seal.json      {"sha256": of the rest of it, "step", "about", "tree": {name: shape, dtype, digest}, "files"}

It is written when everything else is on disk, in one move: a step without a seal, or with one that does not hold, is no
checkpoint, whatever else is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
    new = folder / f"{SEAL}.new"
    new.write_text(text)
    new.replace(folder / SEAL)


def read_seal(folder: epath.Path) -> Seal:
    """The seal of a step.

    Raises:
      Unfinished: there is none.
      CheckpointError: it is not as it was written.
    """
    file = folder / SEAL
    try:
        held = json.loads(file.read_text())
        told = held.pop("sha256")
        seal = Seal(**held)
        if told != _hash(_canonical(asdict(seal))):
            raise ValueError("its own SHA-256 is another")
    except FileNotFoundError:
        raise Unfinished(f"checkpoint {folder}: has no {SEAL}: it was never finished; use another") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"checkpoint {folder}: {SEAL} is damaged ({error}); use another") from error
    return seal


def hashes(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of every file of a step but its seal, by path."""
    return {str(file.relative_to(folder)): _hash_of(file) for file in _files(folder)}


def faults_of_files(folder: epath.Path, seal: Seal) -> list[str]:
    """What of the files of a step is not as it was sealed."""
    now = hashes(folder)
    return [
        *(f"{name}: is missing" for name in seal.files if name not in now),
        *(f"{name}: is of no checkpoint" for name in now if name not in seal.files),
        *(f"{name}: its SHA-256 is another" for name, one in seal.files.items() if now.get(name, one) != one),
    ]


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in sorted(folder.iterdir()):
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
