"""Real text with no download: the bytes of the Python standard library's own sources, read through Grain.

    files, in the order of a hash of their path, that fit in a size
        |-- 95 of 100 -->  train      windows of S + 1 bytes, shuffled by seed, anew each epoch, no end
        |--  5 of 100 -->  held out   windows of S + 1 bytes, always the same ones

A batch is ``{"tokens": int32 [B, S], "targets": int32 [B, S]}``, targets being tokens moved on by one byte.
B examples a step over all processes, S tokens an example. Batches depend on the text, the seed and B, and on
nothing else: no mesh changes them, and of P processes each reads its own B / P rows of the same batch.

`RandomTokens` has batches of the same form of any vocabulary, for steps that need not learn.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults

Batch = dict[str, np.ndarray]

VOCAB_SIZE = 256
# `encodings` is tables that a program wrote, a tenth of the library.
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class ByteText:
    """A data set of bytes, from Python sources found on the machine.

    Attributes:
      seq_len: S, tokens an example.
      max_megabytes: files are taken as long as they fit in this many millions of bytes.
      held_out_percent: how many files of a hundred are kept from training.
      root: the directory whose ``.py`` files are read, tests and installed packages left out; None for the
        standard library of the Python that runs.

    Raises:
      DeclarationError: for sizes that give no data; for a directory without sources once it is read.

    >>> text = ByteText(seq_len=32)
    >>> batch = next(text.train(4, seed=0))
    >>> batch["tokens"].shape, batch["targets"].shape, batch["targets"].dtype
    ((4, 32), (4, 32), dtype('int32'))
    >>> bool((batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all())
    True
    """

    seq_len: int = 256
    max_megabytes: float = 8.0
    held_out_percent: int = 5
    root: str | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.seq_len < 1:
            faults.append(Fault("seq_len", f"is {self.seq_len}", "give an example at least one token"))
        if not self.max_megabytes > 0:
            faults.append(Fault("max_megabytes", f"is {self.max_megabytes}", "give a positive size"))
        if not 1 <= self.held_out_percent <= 99:
            faults.append(Fault("held_out_percent", f"is {self.held_out_percent}", "give 1 to 99 of 100 files"))
        raise_faults(faults)

    def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a whole batch; nothing is read.

        >>> ByteText(seq_len=32).abstract_batch(4)["tokens"]
        ShapeDtypeStruct(shape=(4, 32), dtype=int32)
        """
        rows = jax.ShapeDtypeStruct((batch_size, self.seq_len), np.int32)
        return {"tokens": rows, "targets": rows}

    def train(self, batch_size: int, *, seed: int = 0, process_index: int = 0, process_count: int = 1) -> Batches:
        """Training batches without end, in an order that `seed` decides.

        Args:
          batch_size: B, over all processes.
          seed: of the shuffle.
          process_index: which rows of each batch to read, of
          process_count: as many equal shares.

        Raises:
          DeclarationError: when B does not divide by the processes, or the text holds fewer than B windows.
        """
        grain = _grain()
        rows = _share(batch_size, process_index, process_count)
        windows = self._windows(held_out=False, at_least=batch_size, why=f"a batch of {batch_size} needs")
        # Nothing remains of an endless repeat; without drop_remainder Grain overflows on its length.
        shares = grain.MapDataset.source(windows).shuffle(seed=seed).repeat().batch(rows, drop_remainder=True)
        mine = shares[process_index::process_count] if process_count > 1 else shares
        # One thread keeps a few batches ahead; more would only take cores from emulated devices.
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        identity: dict[str, int | str] = {
            "text": self._read().digest,
            "seq_len": self.seq_len,
            "batch_size": batch_size,
            "seed": seed,
        }
        return Batches(iter(mine.to_iter_dataset(reading)), identity)

    def held_out(
        self, batch_size: int, num_batches: int, *, process_index: int = 0, process_count: int = 1
    ) -> list[Batch]:
        """The same `num_batches` batches at every call, from files that training never sees.

        Raises:
          DeclarationError: when the held-out text has fewer windows than that.
        """
        rows = _share(batch_size, process_index, process_count)
        wanted = batch_size * num_batches
        windows = self._windows(
            held_out=True, at_least=wanted, why=f"{num_batches} held-out batches of {batch_size} need"
        )
        shares = _grain().MapDataset.source(windows).shuffle(seed=0).batch(rows)
        return [shares[index * process_count + process_index] for index in range(num_batches)]

    def describe(self) -> str:
        """One line: how much text, from where, and how it is split."""
        text = self._read()
        train, kept = (len(Windows(part, self.seq_len)) for part in (text.train, text.held_out))
        megabytes = (text.train.size + text.held_out.size) / 1e6
        return (
            f"{megabytes:.1f} MB of {text.num_files} Python files in {text.root}: "
            f"{train:,} windows of {self.seq_len} bytes to train on, {kept:,} held out"
        )

    def _read(self) -> Text:
        root = self.root if self.root is not None else sysconfig.get_path("stdlib")
        return read_text(root, int(self.max_megabytes * 1e6), self.held_out_percent)

    def _windows(self, *, held_out: bool, at_least: int, why: str) -> Windows:
        text = self._read()
        windows = Windows(text.held_out if held_out else text.train, self.seq_len)
        if len(windows) < at_least:
            part = "held-out" if held_out else "training"
            size = (text.held_out if held_out else text.train).size
            longest = (size - 1) // at_least
            shorter = f"make seq_len {longest} at most, " if longest else ""
            raise DeclarationError(
                f"data: {why} {at_least} examples, the {part} text of {text.root} has {len(windows)} "
                f"windows of {self.seq_len} bytes; {shorter}raise max_megabytes ({self.max_megabytes:g}), or use fewer"
            )
        return windows


@dataclass(frozen=True)
class RandomTokens:
    """Tokens drawn alike from a vocabulary, for steps that are timed, compiled or planned and learn nothing.

    Batches depend on the seed, the batch's place and B; of P processes each makes its own B / P rows.

    Attributes:
      seq_len: S, tokens an example.
      vocab_size: V; a token is 0 to V - 1.

    Raises:
      DeclarationError: for sizes that give no data.

    >>> tokens = RandomTokens(seq_len=32, vocab_size=1000)
    >>> batch = next(tokens.train(4, seed=0))
    >>> batch["tokens"].shape, batch["targets"].shape, batch["targets"].dtype
    ((4, 32), (4, 32), dtype('int32'))
    >>> bool((batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all())
    True
    """

    seq_len: int = 4096
    vocab_size: int = 128_256

    def __post_init__(self) -> None:
        raise_faults(
            Fault(name, f"is {getattr(self, name)}", f"give {what}")
            for name, what in (("seq_len", "an example at least one token"), ("vocab_size", "at least one token"))
            if getattr(self, name) < 1
        )

    def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a whole batch; nothing is drawn.

        >>> RandomTokens(seq_len=32).abstract_batch(4)["tokens"]
        ShapeDtypeStruct(shape=(4, 32), dtype=int32)
        """
        rows = jax.ShapeDtypeStruct((batch_size, self.seq_len), np.int32)
        return {"tokens": rows, "targets": rows}

    def train(self, batch_size: int, *, seed: int = 0, process_index: int = 0, process_count: int = 1) -> Batches:
        """Training batches without end, which `seed` decides.

        Args:
          batch_size: B, over all processes.
          seed: of the tokens.
          process_index: which rows of each batch to make, of
          process_count: as many equal shares.

        Raises:
          DeclarationError: when B does not divide by the processes.
        """
        mine = _Drawn(self, (0, seed), batch_size, _share(batch_size, process_index, process_count), process_index)
        identity: dict[str, int | str] = {
            "tokens": f"random, of {self.vocab_size}",
            "seq_len": self.seq_len,
            "batch_size": batch_size,
            "seed": seed,
        }
        return Batches(mine, identity)

    def held_out(
        self, batch_size: int, num_batches: int, *, process_index: int = 0, process_count: int = 1
    ) -> list[Batch]:
        """The same `num_batches` batches at every call, of draws that training never makes."""
        mine = _Drawn(self, (1, 0), batch_size, _share(batch_size, process_index, process_count), process_index)
        return [next(mine) for _ in range(num_batches)]

    def describe(self) -> str:
        """One line: what is drawn."""
        return f"random tokens, {self.seq_len} an example, of {self.vocab_size:,}"


class _Drawn:
    """Batches drawn one after another; what is a row's depends on its number alone, whoever makes it."""

    def __init__(self, of: RandomTokens, stream: tuple[int, int], batch_size: int, rows: int, index: int) -> None:
        self._of, self._stream, self._batch_size, self._rows = of, stream, batch_size, rows
        self._first, self._done = index * rows, 0

    def __next__(self) -> Batch:
        first = self._done * self._batch_size + self._first
        windows = np.stack([self._window(number) for number in range(first, first + self._rows)])
        self._done += 1
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}

    def _window(self, number: int) -> np.ndarray:
        drawn = np.random.default_rng((*self._stream, number))
        return drawn.integers(self._of.vocab_size, size=self._of.seq_len + 1, dtype=np.int32)

    def get_state(self) -> dict[str, int]:
        return {"batches": self._done}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._done = int(state["batches"])


class Batches(Iterator[Batch]):
    """An endless iterator over batches whose position can be stored and set.

    >>> text = ByteText(seq_len=8)
    >>> batches = text.train(2, seed=0)
    >>> first, state, second = next(batches), batches.get_state(), next(batches)
    >>> resumed = text.train(2, seed=0)
    >>> resumed.set_state(state)
    >>> bool((next(resumed)["tokens"] == second["tokens"]).all())
    True
    """

    def __init__(self, iterator: Any, identity: Mapping[str, int | str]) -> None:
        self._iterator = iterator
        self._identity = dict(identity)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as plain data for JSON: Grain's own state, and what it is a position in.

        It is the same on every process, and after a change of the mesh or of the number of processes.
        """
        return {**self._identity, "position": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a stored position.

        Raises:
          DeclarationError: when it is a position in other data: another text, length, batch size or seed.
        """
        raise_faults(
            Fault(
                f"data {name}",
                f"is {value!r}, and the stored position is one in data where it was {state.get(name)!r}",
                "restore with the settings it was stored with, or start the data anew",
            )
            for name, value in self._identity.items()
            if state.get(name) != value
        )
        self._iterator.set_state(dict(state["position"]))


class Windows:
    """Random access to windows of `seq_len` + 1 bytes that overlap by one: each byte is a target once."""

    def __init__(self, text: np.ndarray, seq_len: int) -> None:
        self._text, self._seq_len = text, seq_len

    def __len__(self) -> int:
        return max(0, self._text.size - 1) // self._seq_len

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self._seq_len
        window = self._text[start : start + self._seq_len + 1].astype(np.int32)
        return {"tokens": window[:-1], "targets": window[1:]}

    def __repr__(self) -> str:
        return f"Windows({self._text.size} bytes, seq_len={self._seq_len})"


@dataclass(frozen=True)
class Text:
    """The text that was read: uint8, files joined by a zero byte.

    Attributes:
      root: where it was read.
      num_files: how many files.
      train: the bytes to train on.
      held_out: the bytes that are kept from training.
      digest: of both, to know the text again.
    """

    root: str
    num_files: int
    train: np.ndarray
    held_out: np.ndarray
    digest: str


@functools.lru_cache(maxsize=4)
def read_text(root: str, max_bytes: int, held_out_percent: int) -> Text:
    """The sources under `root`, split by file.

    Files are taken in the order of a hash of their path, so that a limit takes a fair sample; another part of
    the hash says whether a file is held out, so that a file is on the same side whatever the limit.

    Raises:
      DeclarationError: when there is no such directory, or it holds no file to train on or none to hold out.
    """
    found = sorted((hashlib.sha256(name.encode()).digest(), name) for name in _sources(Path(root)))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    total = 0
    for digest, name in found:
        content = (Path(root) / name).read_bytes() + b"\0"
        if total + len(content) > max_bytes:
            continue
        total += len(content)
        parts[int.from_bytes(digest[-8:], "big") % 100 < held_out_percent].append(content)
    if not parts[False] or not parts[True]:
        taken = len(parts[False]) + len(parts[True])
        raise DeclarationError(
            f"data: {taken} of the {len(found)} Python files in {root} fit in {max_bytes / 1e6:g} MB, "
            f"{len(parts[True])} of them held out; training and held-out text need a file each: raise "
            "max_megabytes, change held_out_percent, or give another root"
        )
    train, held_out = (b"".join(parts[side]) for side in (False, True))
    return Text(
        root=root,
        num_files=len(parts[False]) + len(parts[True]),
        train=np.frombuffer(train, np.uint8),
        held_out=np.frombuffer(held_out, np.uint8),
        digest=hashlib.sha256(train + held_out).hexdigest()[:16],
    )


def _sources(root: Path) -> Iterator[str]:
    """Paths of the ``.py`` files under `root`, relative to it, with slashes."""
    if not root.is_dir():
        raise DeclarationError(f"data: there is no directory {str(root)!r}; give the root of some Python files")
    # A directory that is left out is not entered: site-packages can hold twenty times the files of the library.
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _LEFT_OUT]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and path.is_file():
                yield path.relative_to(root).as_posix()


def _share(batch_size: int, process_index: int, process_count: int) -> int:
    """Rows of a batch that one process reads."""
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise DeclarationError(
            f"data: a batch of {batch_size} examples cannot be read by process {process_index} of "
            f"{process_count}; make it a positive multiple of {process_count}, and count processes from 0"
        )
    return batch_size // process_count


def _grain() -> Any:
    """Grain, imported when data is first read: it takes a second, and a plan reads none."""
    import grain

    return grain
