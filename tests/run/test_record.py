"""What a run leaves on disk: rows that are there at once, plain JSON, whole arrays; and what is no run."""

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.run.record import (
    FILES,
    MetricsFile,
    Row,
    plain,
    read_arrays,
    read_rows,
    read_run,
    write_arrays,
    write_report,
)

ROWS = [
    Row(step=1, loss=2.5, grad_norm=1.5, seconds=0.25, tokens=64),
    Row(step=2, loss=1.25, grad_norm=0.5, seconds=0.125, tokens=64, eval_loss=2.0),
]


def test_the_files_of_a_run() -> None:
    assert FILES == ("metrics.jsonl", "report.json", "plan.json", "parameters.npz", "loss.png")


def test_a_run_is_read_back(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as file:
        for row in ROWS:
            file.write(row)
    write_report(tmp_path, {"mesh": {"data": 8}, "steps": 2})
    record = read_run(str(tmp_path))
    assert (record.directory, record.rows) == (tmp_path, tuple(ROWS))
    assert record.report == {"mesh": {"data": 8}, "steps": 2}


def test_a_row_is_on_disk_before_the_next_is_made(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as file:
        for count, row in enumerate(ROWS, start=1):
            file.write(row)
            assert list(read_rows(tmp_path)) == ROWS[:count]


def test_an_earlier_runs_rows_are_gone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    with MetricsFile(tmp_path):
        assert list(read_rows(tmp_path)) == []


def test_what_json_cannot_hold_is_null(tmp_path: Path) -> None:
    nan, infinite = float("nan"), float("inf")
    with MetricsFile(tmp_path) as file:
        file.write(Row(step=1, loss=nan, grad_norm=infinite, seconds=0.5, tokens=64, eval_loss=-infinite))
    write_report(tmp_path, {"losses": [1.0, nan], "nested": {"norm": infinite}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("metrics.jsonl", "report.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    record = read_run(tmp_path)
    (row,) = record.rows
    assert (row["loss"], row["grad_norm"], row["eval_loss"], row["seconds"]) == (None, None, None, 0.5)
    assert record.report == {"losses": [1.0, None], "nested": {"norm": None}}


def test_plain_data_keeps_what_is_plain() -> None:
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": (3,)}}
    assert plain(value) == {"a": [1, 2.5, "x", None, True], "b": {"c": [3]}}


def test_arrays_are_read_back_bit_for_bit_by_the_users_paths(tmp_path: Path) -> None:
    arrays = {
        "blocks/0/up/kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "count": np.int32(3),
        "wide": jnp.linspace(0, 1, 5),
        "empty": np.zeros((0, 4), np.float16),
    }
    write_arrays(tmp_path, arrays.items())
    found = read_arrays(str(tmp_path))
    assert set(found) == set(arrays)
    for path, array in arrays.items():
        assert found[path].dtype == np.asarray(array).dtype
        np.testing.assert_array_equal(found[path], array)


def test_a_path_may_be_any_name_and_a_dtype_that_numpy_lacks_is_widened(tmp_path: Path) -> None:
    narrow = jnp.array([1.0, -2.5, 3e38], jnp.bfloat16)
    write_arrays(tmp_path, [("file", np.arange(3)), ("allow_pickle", np.ones(2)), ("narrow", narrow)])
    found = read_arrays(tmp_path)
    assert set(found) == {"file", "allow_pickle", "narrow"}
    assert found["narrow"].dtype == np.float32
    np.testing.assert_array_equal(found["narrow"].astype(jnp.bfloat16), narrow)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    run = tmp_path / "first"
    run.mkdir()
    other = tmp_path / "first2"
    other.mkdir()
    write_report(other, {})
    for name, why in ((None, "there is no run in it"), ("metrics.jsonl", "the run in it has not ended")):
        if name is not None:
            (run / name).write_text("")
        message = f"run {str(run)!r}: has no report.json: {why}; give the --out directory of a run that has ended"
        with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
            read_run(run)
    message = f"run {str(run)!r}: holds no parameters.npz; give the --out directory of a run that has ended"
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        read_arrays(run)
    write_report(run, {})
    typed = str(tmp_path / "frist")
    message = f"run {typed!r}: is no directory; did you mean {str(run)!r}? give the --out directory of a run that"
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}"):
        read_run(typed)


BROKEN = {
    "nothing": b"",
    "text": b"no json",
    "no UTF-8": b"\xff\xfe",
    "without end": b"[" * 100_000,
    "a list": b"[]",
    "a number of thousands of digits": b"1" * 5000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_report_or_a_row_that_is_no_object(tmp_path: Path, name: str) -> None:
    write_report(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + (BROKEN[name] or b" ") + b"\n")
    with pytest.raises(DeclarationError, match=rf"^run '{tmp_path}': metrics\.jsonl line 2 is damaged \(.*; give the"):
        read_run(tmp_path)
    (tmp_path / "report.json").write_bytes(BROKEN[name])
    with pytest.raises(DeclarationError, match=rf"^run '{tmp_path}': report\.json is damaged \(.*\); give the"):
        read_run(tmp_path)


def test_metrics_that_are_a_directory(tmp_path: Path) -> None:
    write_report(tmp_path, {})
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DeclarationError, match=r"metrics\.jsonl: Is a directory; give the --out directory"):
        read_run(tmp_path)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n"


def hostile(**arrays: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


class Opened:
    """What a pickle is that runs code when it is read."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('run')",)


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Opened()], dtype=object), allow_pickle=True)
    return file.getvalue()


HOSTILE = {
    "no archive": b"text",
    "a pickle": pickle.dumps(Opened()),
    "objects": hostile(a=objects()),
    "code in the header": hostile(
        a=header("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1,)}")
    ),
    "no memory is as large": hostile(a=header("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}")),
    "texts": hostile(a=header("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}") + b"a\0\0\0"),
    "no array": hostile(a=b"text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_parameters_that_are_no_numbers_are_refused_and_run_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "parameters.npz").write_bytes(HOSTILE[name])
    with pytest.raises(DeclarationError, match=rf"^run '{tmp_path}': parameters\.npz is damaged \(\w+: .*\); give the"):
        read_arrays(tmp_path)


def test_an_array_that_is_there_twice(tmp_path: Path) -> None:
    write_arrays(tmp_path, {"a": np.ones(2)}.items())
    with zipfile.ZipFile(tmp_path / "parameters.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.npy", archive.read("a.npy"))
    with pytest.raises(DeclarationError, match="an array is in it twice"):
        read_arrays(tmp_path)
