"""Files of safetensors: which tensors a folder holds, and folders written. Only headers are read here.

    FOLDER/model.safetensors                  all tensors; or
    FOLDER/model-00001-of-00002.safetensors   some of them each, and
    FOLDER/model.safetensors.index.json       {"weight_map": {tensor: file}}

    8 bytes: length of the header | JSON: {tensor: dtype, shape, [first byte, byte after the last]} | their bytes

What a folder holds comes from anywhere. Nothing in it is executed, what it says is checked before it is believed, and
a file that it names lies in it. The format: https://github.com/huggingface/safetensors. Its own package takes a name
that is there twice for one, names no tensor in most of its errors, and writes a file from memory alone; tests hold
this reader to be no laxer.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from shardlab.mesh.faults import DeclarationError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST = 100_000_000  # bytes of a header or an index; the format's own limit

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Dtypes by their names in a header."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      name: its own.
      file: where it is.
      dtype: as NumPy names it.
      shape: of all of it.
      offset: its first byte, from the start of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def array(self) -> np.ndarray:
        """The file's bytes as an array that nothing is read of until it is copied."""
        if not math.prod(self.shape):
            return np.empty(self.shape, jnp.dtype(self.dtype))
        return np.memmap(self.file, jnp.dtype(self.dtype), "r", self.offset, self.shape)

    def __str__(self) -> str:
        return f"tensor {shown(self.name)} in {self.file}"


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """The tensors that a folder holds, by name.

    Raises:
      DeclarationError: there are none, or it is not what it says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DeclarationError(f"weights {str(folder)!r}: is no directory; give one that holds {SINGLE} or {INDEX}")
    single, index = (os.path.lexists(folder / name) for name in (SINGLE, INDEX))
    if single and index:
        raise DeclarationError(f"weights {folder}: holds {SINGLE} and {INDEX}; remove the one that is not meant")
    if single:
        return _read_file(_inside(folder, SINGLE))
    if not index:
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".safetensors")
        )
        there = f"; it holds {shown(others)}" if others else ""
        raise DeclarationError(
            f"weights {folder}: holds neither {SINGLE} nor {INDEX}{there}; give a folder as save_pretrained of "
            "transformers writes one (a pickle is never read)"
        )
    return _read_parts(folder, _inside(folder, INDEX))


def _read_parts(folder: Path, index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index names: those that it says, each where it says."""
    with index.open("rb") as opened:
        text = opened.read(_MOST + 1)
    if len(text) > _MOST:
        raise DeclarationError(f"weights {index}: is larger than {_MOST:,} bytes; it is no index")
    held = _json(text, str(index))
    where = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise DeclarationError(f"weights {index}: has no weight_map of tensors to files; get the folder anew")
    files = {name: _inside(folder, name) for name in sorted(set(where.values()))}
    found: dict[str, Tensor] = {}
    for file in files.values():
        for name, tensor in _read_file(file).items():
            if name in found:
                raise DeclarationError(f"weights {tensor}: is in {found[name].file} too; remove one of them")
            found[name] = tensor
    for name in sorted({*where, *found}):
        if name not in found:
            raise DeclarationError(f"weights {files[where[name]]}: has no tensor {shown(name)}, and {INDEX} says so")
        if name not in where:
            raise DeclarationError(f"weights {found[name]}: is not in {INDEX}; get the folder anew")
        if found[name].file != files[where[name]]:
            raise DeclarationError(f"weights {found[name]}: {INDEX} says that it is in {where[name]}")
    return found


def _inside(folder: Path, name: str) -> Path:
    """The file of a name, which lies in the folder; in the cache of a hub, beside it, where its links lead.

    Raises:
      DeclarationError: it does not, or is no file.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0") or not name.isprintable():
        raise DeclarationError(f"weights {folder}: {INDEX} names the file {shown(name)}; a file in the folder is meant")
    file = folder / name
    home = folder.resolve()
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        real = file.resolve(strict=True)
        kind = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else "a link that leads to itself"
        raise DeclarationError(f"weights {file}: {why}; get the folder anew") from error
    if not any(real.is_relative_to(root) for root in roots):
        raise DeclarationError(f"weights {file}: is a link out of the folder, to {real}; put the file in its place")
    if not stat.S_ISREG(kind):
        raise DeclarationError(f"weights {file}: is no file; get the folder anew")
    return file


def _read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by its header."""
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        most = min(size - 8, _MOST)
        if size < 8 or length > most:
            raise DeclarationError(
                f"weights {file}: says that its header has {length:,} bytes, of at most {max(most, 0):,}; "
                "it is cut, or no safetensors file"
            )
        header = _json(opened.read(length), str(file))
    if not isinstance(header, dict):
        raise DeclarationError(f"weights {file}: its header is no JSON object; it is no safetensors file")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DeclarationError(f"weights {file}: its __metadata__ is no JSON object of texts; get it anew")
    start, end = 8 + length, 0
    tensors = {}
    places = []
    for name, entry in header.items():
        where = f"weights {file}: tensor {shown(name)}"
        if not name.isprintable():
            raise DeclarationError(f"{where}: has a name that cannot be printed; get it anew")
        dtype, shape, (first, last) = _entry(where, entry)
        tensors[name] = Tensor(name, file, dtype, shape, start + first)
        places.append((first, last, name))
    for first, last, name in sorted(places):
        if first != end:
            way = "overlaps the one before" if first < end else "leaves bytes unused before it"
            raise DeclarationError(
                f"weights {file}: tensor {shown(name)}: starts at byte {first:,}, and {way} ({end:,})"
            )
        end = last
        if start + end > size:
            raise DeclarationError(
                f"weights {file}: tensor {shown(name)}: ends at byte {start + end:,} of {size:,}; the file is cut"
            )
    if start + end != size:
        raise DeclarationError(f"weights {file}: has {size - start - end:,} bytes after its tensors; get it anew")
    return tensors


def _entry(where: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and bytes of a tensor, as a header says."""
    whole = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    if not whole or not _counts(entry["shape"]) or not _counts(entry["data_offsets"], 2):
        raise DeclarationError(f"{where}: has no dtype, shape and data_offsets alone, but {shown(entry)}")
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DeclarationError(f"{where}: has dtype {shown(dtype)}; those that can be read are {', '.join(DTYPES)}")
    needed = math.prod(shape) * jnp.dtype(DTYPES[dtype]).itemsize
    if last - first != needed:
        raise DeclarationError(
            f"{where}: is {dtype} of shape {shown(list(shape))}, {shown(needed)} bytes, and has {shown(last - first)}"
        )
    return DTYPES[dtype], shape, (first, last)


def _counts(value: Any, length: int | None = None) -> bool:
    """Whether it is a list of whole numbers from 0."""
    right = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return right and length in (None, len(value))


def _json(text: bytes, where: str) -> Any:
    """What JSON says, in which no name is there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise DeclarationError(f"weights {where}: names {shown(twice)} twice; get it anew")
        return made

    try:
        return json.loads(text.decode(), object_pairs_hook=once)
    except DeclarationError:
        raise
    except (ValueError, RecursionError) as error:
        raise DeclarationError(f"weights {where}: is no JSON where it should be ({shown(str(error))})") from error


def shown(value: Any) -> str:
    """What a file says, for a message: escaped, and not longer than a line.

    >>> shown("model.norm.weight"), len(shown("x" * 1000))
    ("'model.norm.weight'", 80)
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Writing.


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: name, dtype as NumPy names it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def check_free(folder: Path) -> None:
    """That a folder holds no weights which others would take the place of.

    Raises:
      DeclarationError: it does, or is no directory.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise DeclarationError(f"out {str(folder)!r}: is no directory; give another")
    there = sorted(path.name for path in folder.glob("*.safetensors*")) if folder.is_dir() else []
    if there:
        raise DeclarationError(f"out {str(folder)!r}: holds {shown(there)}; remove them, or give another directory")


def write_folder(folder: Path, entries: Sequence[Entry], values: Iterator[np.ndarray], max_bytes: int) -> list[Path]:
    """Writes tensors to a folder, in the order of both, files of at most `max_bytes`; a larger tensor has its own.

    One of `values` is held at a time.

    Returns:
      The files, the index last where there are several.
    """
    check_free(folder)
    parts = list(_parts(entries, max_bytes))
    names = (
        [SINGLE]
        if len(parts) == 1
        else [f"model-{k:05}-of-{len(parts):05}.safetensors" for k in range(1, len(parts) + 1)]
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in zip(names, parts, strict=True):
            with _new(folder / name) as file:
                file.write(_header(part))
                for entry in part:
                    value = np.asarray(next(values), jnp.dtype(entry.dtype))
                    assert value.shape == entry.shape
                    file.write(value.reshape(-1).view(np.uint8).data)
        if len(parts) > 1:
            index = {
                "metadata": {"total_size": sum(entry.bytes for entry in entries)},
                "weight_map": {entry.name: name for name, part in zip(names, parts, strict=True) for entry in part},
            }
            names.append(INDEX)
            with _new(folder / INDEX) as file:
                file.write((json.dumps(index, indent=2) + "\n").encode())
        for name in names:
            (folder / f"{name}{_UNFINISHED}").replace(folder / name)
    except OSError as error:
        raise DeclarationError(f"out {str(folder)!r}: {error.strerror or error}") from error
    return [folder / name for name in names]


_UNFINISHED = ".unfinished"


def _new(file: Path) -> IO[bytes]:
    """A file under a name of its own until all are whole."""
    return file.with_name(f"{file.name}{_UNFINISHED}").open("xb")


def _parts(entries: Sequence[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    """The entries, by file."""
    part: list[Entry] = []
    full = start = len(_header([])) + 8
    for entry in entries:
        line = len(json.dumps([entry.name, entry.shape])) + 100  # of a tensor in a header, at most
        if part and full + line + entry.bytes > max_bytes:
            yield part
            part, full = [], start
        part.append(entry)
        full += line + entry.bytes
    yield part


def _header(part: Sequence[Entry]) -> bytes:
    """Length and header of a file, to a multiple of 8 bytes."""
    held: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    codes: Mapping[str, str] = {name: code for code, name in DTYPES.items()}
    first = 0
    for entry in part:
        offsets = [first, first + entry.bytes]
        held[entry.name] = {"dtype": codes[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        first = offsets[1]
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
