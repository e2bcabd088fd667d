"""What a run leaves on disk, and the same read back.

DIR/metrics.jsonl     a JSON object a step: step, loss, grad_norm, seconds, tokens; eval_loss where there was one
DIR/report.json       what was compiled and what came of it
DIR/plan.json         the plan
DIR/parameters.npz    the trained arrays by the user's own paths, fit for any mesh
DIR/loss.png          the loss curve
DIR/checkpoints/      where it saves: see `shardlab.checkpoint.store`
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NotRequired, TypedDict

import numpy as np

from shardlab.mesh.faults import DeclarationError, suggestion

METRICS, REPORT, PLAN, PARAMETERS, CURVE = FILES = (
    "metrics.jsonl",
    "report.json",
    "plan.json",
    "parameters.npz",
    "loss.png",
)


class Row(TypedDict):
    """A step: its number from 1, the loss of the parameters it started from, wall seconds, tokens it learnt from.

    `eval_loss` is of the parameters after the step; `skipped` says that no update was made. A number that is not finite
    is None, since JSON has no other.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    seconds: float
    tokens: int
    eval_loss: NotRequired[float | None]
    skipped: NotRequired[bool]


@dataclass(frozen=True)
class RunRecord:
    """A run that has ended: where it is, its rows, its report."""

    directory: Path
    rows: tuple[Row, ...]
    report: Mapping[str, Any]


class MetricsFile:
    """`DIR/metrics.jsonl`, written a row at a time; each row is on disk before the next step's is made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with MetricsFile(Path(directory)) as file:
    ...         file.write(Row(step=1, loss=float("nan"), grad_norm=2.0, seconds=0.5, tokens=64))
    ...     print((Path(directory) / "metrics.jsonl").read_text(), end="")
    {"step": 1, "loss": null, "grad_norm": 2.0, "seconds": 0.5, "tokens": 64}
    """

    def __init__(self, directory: Path, *, append: bool = False) -> None:
        self._file: IO[str] = (directory / METRICS).open("a" if append else "w")

    def write(self, row: Row) -> None:
        """Adds a row."""
        self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Writes `DIR/report.json`."""
    (directory / REPORT).write_text(json.dumps(plain(report), indent=1, allow_nan=False) + "\n")


def read_run(directory: str | Path) -> RunRecord:
    """The run that a directory holds.

    Raises:
      DeclarationError: it is no directory of a run that has ended.
    """
    directory = Path(directory)
    if not (directory / REPORT).is_file():
        if directory.is_dir():
            ended = "the run in it has not ended" if (directory / METRICS).is_file() else "there is no run in it"
            why, hint = f"has no {REPORT}: {ended}", ""
        else:
            near = sorted(str(path.parent) for path in directory.parent.glob(f"*/{REPORT}"))
            why, hint = "is no directory", suggestion(str(directory), near)
        raise DeclarationError(f"run {str(directory)!r}: {why}; {hint}{_WAY_OUT}")
    report = _object(directory / REPORT, (directory / REPORT).read_bytes())
    return RunRecord(directory, tuple(read_rows(directory)), report)


def read_rows(directory: Path) -> Iterator[Row]:
    """The rows of `DIR/metrics.jsonl`.

    Raises:
      DeclarationError: there is no such file, or a line of it is no row.
    """
    file = directory / METRICS
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DeclarationError(f"run {str(directory)!r}: {METRICS}: {error.strerror}; {_WAY_OUT}") from None
    for number, line in enumerate(lines, start=1):
        row: Any = _object(file, line, f" line {number}")
        yield row


_WAY_OUT = "give the --out directory of a run that has ended"


def _object(file: Path, text: bytes, where: str = "") -> dict[str, Any]:
    """The JSON object that a file, or a line of it, is to hold."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        problem = f"{file.name}{where} is damaged ({error})"
        raise DeclarationError(f"run {str(file.parent)!r}: {problem}; {_WAY_OUT}") from None
    return found


def write_arrays(directory: Path, arrays: Iterable[tuple[str, Any]]) -> None:
    """Writes `DIR/parameters.npz`: whole arrays, each with its path, one at a time, so that any mesh can take them.

    An array of a dtype that is not NumPy's own, such as bfloat16, is written as float32, which holds its every number.
    """
    # Not np.savez, for which a path such as `file` is an argument of its own.
    with zipfile.ZipFile(directory / PARAMETERS, "w") as archive:
        for path, value in arrays:
            array = np.asarray(value)
            if array.dtype.kind == "V":
                array = array.astype(np.float32)  # a file would call it raw bytes
            with archive.open(f"{path}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_arrays(directory: str | Path) -> dict[str, np.ndarray]:
    """The arrays of `DIR/parameters.npz`.

    Raises:
      DeclarationError: the directory holds none, or what is no arrays.
    """
    file = Path(directory) / PARAMETERS
    if not file.is_file():
        raise DeclarationError(f"run {str(directory)!r}: holds no {PARAMETERS}; {_WAY_OUT}")
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise ValueError("an array is in it twice")
            return {name.removesuffix(".npy"): _array(archive, name) for name in names}
    except Exception as error:  # whatever zipfile and NumPy make of what is damaged
        first = str(error).partition("\n")[0]
        problem = f"{PARAMETERS} is damaged ({type(error).__name__}: {first})"
        raise DeclarationError(f"run {str(directory)!r}: {problem}; {_WAY_OUT}") from None


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of numbers; NumPy's reader runs nothing that a file holds."""
    with archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name} has dtype {array.dtype}")
    return array


def plain(value: Any) -> Any:
    """The value with None for every number that is not finite, which JSON cannot hold.

    >>> plain({"loss": float("inf"), "steps": (1, 2.0)})
    {'loss': None, 'steps': [1, 2.0]}
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
