"""The checkpoints of a run: saved beside the steps, sealed when they are whole, and read onto any plan.

    DIR/checkpoints/STEP/       Orbax writes the arrays, in parts, while the run goes on; then `seal` makes it count

DIR is a local directory, or one of a bucket, gs://BUCKET/PATH.

What is kept is removed only when a newer one is sealed, so that one is there whatever ends the process.

Of several processes each writes and reads what its own devices hold, in a directory that all of them see, and hashes
its share of the files. The first looks at what is there, seals and removes, and what it finds is told to all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from shardlab.checkpoint.canonical import Canonical
from shardlab.checkpoint.digest import digest, digest_of
from shardlab.checkpoint.seal import (
    CheckpointError,
    Seal,
    Unfinished,
    faults_of_files,
    hashes,
    is_link,
    read_seal,
    write_seal,
)
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.mesh.processes import by_first, count, index, of_all, to_first
from shardlab.step.state import TrainState

FOLDER = "checkpoints"
# Counts the saves of this process, as each of the others does.
_SAVES = itertools.count()


class Checkpoints:
    """The checkpoints in a directory.

    Args:
      directory: of the run, or another: a local path, or one of a bucket (``gs://bucket/run``).
      keep: how many of the last ones to keep, at least 1.
      keep_every: keep also those of steps that divide by this; 0 keeps none.

    Raises:
      DeclarationError: they cannot be kept there.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, keep_every: int = 0) -> None:
        raise_faults(
            Fault(name, f"is {value}", f"give {least} or more")
            for name, value, least in (("keep", keep, 1), ("keep_every", keep_every, 0))
            if value < least
        )
        self.folder = _place(str(directory)) / FOLDER
        self._keep, self._keep_every = keep, keep_every
        self._sealing: threading.Thread | None = None
        self._error: Exception | None = None

    # What is there.

    def steps(self) -> list[int]:
        """Steps whose checkpoint is sealed, in order."""
        return [step for step, fault in self.found() if fault is None]

    def found(self) -> Iterator[tuple[int, CheckpointError | None]]:
        """Every step that there is something of, in order, and why it is no checkpoint, or None.

        Raises:
          CheckpointError: the bucket cannot be read.
        """
        with _named(self.folder):
            if not self.folder.is_dir():
                return
            for step in sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()):
                try:
                    read_seal(self.folder / str(step))
                except CheckpointError as error:
                    yield step, error
                else:
                    yield step, None

    def seal(self, step: int) -> Seal:
        """What the checkpoint of a step holds.

        Raises:
          CheckpointError: there is none, or it is damaged.
        """
        return read_seal(self.folder / str(step))

    # Saving.

    def save(self, canonical: Canonical, state: TrainState, about: Mapping[str, Any]) -> None:
        """Saves a state. It returns when the arrays are safe from the next step, and writes beside what follows.

        Until then the devices hold the state twice, as it lies and as it is saved; afterwards the host holds it.

        Raises:
          CheckpointError: this one, or the one before, cannot be written.
        """
        self.wait()
        folder = self.folder / str(int(state.step))
        by_first(lambda: self._clear(folder), error=CheckpointError)
        arrays, digests = canonical.arrays_of(state)
        # What Orbax does first all processes do together, in order with the collectives of the steps.
        writing = _begin(folder, arrays) if count() > 1 else None
        copies = _on_host(arrays) if writing is None else {}

        key = f"{folder}/{next(_SAVES)}"

        def written() -> dict[str, str]:
            with _named(folder):
                # In every process, once all of them have written.
                (writing or _begin(folder, _without_shards(copies))).result()
                return hashes(folder, index(), count())

        def seal() -> None:
            try:
                found = to_first(written, key, error=CheckpointError)
                if found is not None:
                    with _named(folder):
                        tree = _tree(canonical, np.asarray(digests))
                        write_seal(folder, Seal(int(folder.name), about, tree, _of_all_files(found)))
                        self._remove()
            except Exception as error:  # told by the run's own thread, at the next save or at the end
                self._error = error

        self._sealing = threading.Thread(target=seal, name=f"sealing the checkpoint of step {folder.name}")
        self._sealing.start()

    def wait(self) -> None:
        """Until what is being saved is sealed.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._sealing is None:
            return
        self._sealing.join()
        self._sealing = None
        error, self._error = self._error, None

        def tell() -> None:
            if error is not None:
                raise error

        of_all(tell, error=CheckpointError)

    def let_end(self) -> None:
        """Until what is being saved is sealed or has failed, whichever; of several processes none waits for others."""
        if self._sealing is not None and count() == 1:
            self._sealing.join()

    def _clear(self, folder: epath.Path) -> None:
        """Makes room for a step."""
        with _named(folder):
            if is_link(self.folder):
                raise CheckpointError(
                    f"checkpoints {self.folder}: is a link, and steps are removed from what it leads to; give the "
                    "directory itself"
                )
            if is_link(folder) or folder.exists():
                _remove(folder)
            self.folder.mkdir(parents=True, exist_ok=True)

    def _remove(self) -> None:
        """Removes what need not be kept, older ones first, and what saves that never finished left behind."""
        found = dict(self.found())
        whole = [step for step, fault in found.items() if fault is None]
        for step in whole[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                _remove(self.folder / str(step))
        for path in self.folder.iterdir():
            unfinished = path.name.isdecimal() and isinstance(found.get(int(path.name)), Unfinished)
            if unfinished or ".orbax-checkpoint-tmp" in path.name:
                _remove(path)

    # Reading.

    def load(self, canonical: Canonical, step: int) -> TrainState:
        """The state of a step on the plan of `canonical`, whatever plan saved it.

        Raises:
          CheckpointError: there is none, it is damaged, or an array is not what was saved.
          DeclarationError: the arrays of the plan are others: by path, before any is read.
        """
        folder, arrays = self.folder / str(step), {}

        def look() -> dict[str, Any]:
            seal = self.seal(step)
            raise_faults(_differences(seal, canonical, folder))
            return asdict(seal)

        def hashed() -> dict[str, str]:
            with _named(folder):
                return hashes(folder, index(), count())

        seal = Seal(**by_first(look, error=CheckpointError))
        damaged = faults_of_files(folder, seal, _of_all_files(of_all(hashed, error=CheckpointError)))
        if damaged:
            raise CheckpointError(f"checkpoint {folder}: {'; '.join(damaged)}; use another checkpoint")

        def read() -> None:
            with _named(folder):
                arrays.update(ocp.load(folder, dict(canonical.leaves)))
            _check(arrays, seal, folder, _digest_on(canonical.mesh))

        of_all(read, error=CheckpointError)
        return canonical.state_of(arrays)

    def array(self, step: int, name: str) -> np.ndarray:
        """An array of a step by its canonical name, on this host alone.

        Raises:
          CheckpointError: it is not there, or not what was saved.
        """
        folder, seal = self.folder / str(step), self.seal(step)
        with _named(folder):
            array = _alone(folder, seal, name)
        _check({name: array}, seal, folder, digest_of)
        return np.asarray(array)

    def faults(self, step: int) -> list[str]:
        """What of a step's checkpoint is not as it was saved: its files by SHA-256, its arrays by digest."""
        folder = self.folder / str(step)
        try:
            seal = read_seal(folder)
            return [*faults_of_files(folder, seal), *_faults_of_arrays(folder, seal)]
        except CheckpointError as error:
            return [str(error)]


def _place(directory: str) -> epath.Path:
    """A directory where Orbax can write.

    Raises:
      DeclarationError: it is of another store, or what reads buckets is not installed.
    """
    scheme, colon, rest = directory.partition("://")
    if not colon:
        return epath.Path(Path(directory).absolute())
    if scheme != "gs":
        raise DeclarationError(
            f"checkpoints {directory!r}: Orbax writes to directories and to gs:// alone; give gs://BUCKET/PATH, or a "
            "directory, and copy that elsewhere: what is not copied whole is told and never read"
        )
    if not rest.strip("/"):
        raise DeclarationError(f"checkpoints {directory!r}: names no bucket; give gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise DeclarationError(f"checkpoints {directory!r}: needs gcsfs; run pip install 'shardlab[gcs]'")
    import fsspec

    # A listing that is kept would not have what TensorStore and other processes have written since.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(directory)


def _remove(path: epath.Path) -> None:
    """Removes a step; of a link to one, the link alone."""
    if is_link(path):
        path.unlink()
    else:
        path.rmtree()


def _faults_of_arrays(folder: epath.Path, seal: Seal) -> Iterator[str]:
    """Arrays, read one at a time, whose digest is another."""
    for name in seal.tree:
        try:
            array = _alone(folder, seal, name)
        except Exception as error:  # whatever Orbax and TensorStore make of what is damaged
            yield f"{name}: cannot be read ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            continue
        if _hex(digest_of(array)) != seal.tree[name]["digest"]:
            yield f"{name}: its digest is another"


def _alone(folder: epath.Path, seal: Seal, name: str) -> jax.Array:
    """One array, read onto one device of the host."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    leaf = seal.tree[name]
    wanted = jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]), sharding=device)
    array: jax.Array = ocp.load(folder, {other: wanted if other == name else ocp.PLACEHOLDER for other in seal.tree})[
        name
    ]
    return array


def _differences(seal: Seal, canonical: Canonical, folder: epath.Path) -> Iterator[Fault]:
    """Where the arrays of a checkpoint and of a plan are others."""
    way_out = "resume with the model and the optimizer that saved it, or start anew without --resume"
    for name in sorted({*seal.tree, *canonical.leaves}):
        saved, mine = seal.tree.get(name), canonical.leaves.get(name)
        if saved is None:
            yield Fault(name, f"is not in the checkpoint {folder}", way_out)
        elif mine is None:
            yield Fault(name, f"is in the checkpoint {folder}, and not in this model", way_out)
        else:
            for what, a, b in (
                ("shape", tuple(saved["shape"]), mine.shape),
                ("dtype", saved["dtype"], mine.dtype.name),
            ):
                if a != b:
                    yield Fault(name, f"has {what} {b} here and {a} in the checkpoint {folder}", way_out)


def _check(arrays: Mapping[str, jax.Array], seal: Seal, folder: epath.Path, digest_of: Callable[[Any], Any]) -> None:
    wrong = [name for name, array in arrays.items() if _hex(digest_of(array)) != seal.tree[name]["digest"]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"checkpoint {folder}: {', '.join(wrong[:3])}{more}: what is read is not what was saved (another digest); "
            "use another checkpoint"
        )


def _of_all_files(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The hashes that several processes made of their shares, in the order of the files."""
    return dict(sorted(item for one in found for item in one.items()))


def _begin(folder: epath.Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> Any:
    """Begins to write; its `result` waits for the end."""
    context = ocp.Context()
    # A replica is written whole; cut among them, each piece would be a program of its own.
    context.array.saving.use_replica_parallel = False
    # Who reads says how arrays are to lie.
    context.array.saving.enable_write_sharding_file = False
    with _named(folder), context:
        return ocp.save_async(folder, dict(arrays), overwrite=True)


def _on_host(arrays: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """The arrays in the memory of the host, where nothing that the devices do next is short of it."""
    if jax.devices()[0].platform == "cpu":
        return arrays
    kept = {name: array.sharding.with_memory_kind("pinned_host") for name, array in arrays.items()}
    return jax.block_until_ready(jax.device_put(dict(arrays), kept))


def _without_shards(arrays: Mapping[str, jax.Array]) -> Mapping[str, jax.Array | np.ndarray]:
    """Arrays of the host in one piece each: of shards Orbax runs three times the Python, for which steps wait."""
    if jax.devices()[0].platform == "cpu":
        return {name: np.asarray(array) for name, array in arrays.items()}
    # Pinned, and large: they are not held twice.
    return arrays


def _tree(canonical: Canonical, digests: np.ndarray) -> dict[str, dict[str, Any]]:
    """What a seal says of arrays."""
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "digest": _hex(digest)}
        for (name, leaf), digest in zip(canonical.leaves.items(), digests, strict=True)
    }


@functools.cache
def _digest_on(mesh: Mesh) -> Any:
    # Every process reads it.
    return jax.jit(digest, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _hex(value: jax.Array | np.ndarray) -> str:
    return "".join(f"{int(word):08x}" for word in np.asarray(value))


@contextlib.contextmanager
def _named(folder: epath.Path) -> Iterator[None]:
    """Errors of what lies beneath told as of a checkpoint."""
    try:
        yield
    except DeclarationError:
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {error.strerror or f'{type(error).__name__}: {error}'}") from error
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"checkpoint {folder}: {type(error).__name__}: {first}") from error
