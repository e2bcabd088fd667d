"""Files of safetensors that are not what they say: each is refused, by file and tensor, before it is believed."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.checkpoint.safetensors import INDEX, SINGLE, Entry, read_folder, write_folder
from shardlab.mesh.faults import DeclarationError

DATA = bytes(range(64))


def entry(shape: Any, first: Any, last: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def raw(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


WHOLE = {"a": entry([2, 4], 0, 32), "b": entry([8], 32, 64)}

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "says that its header has 0 bytes, of at most 0"),
    "cut in its length": (b"\x01\x00\x00", "says that its header has 1 bytes, of at most 0"),
    "a header longer than the file": (raw(WHOLE, length=2**60), r"says that its header has 1,152,921,504,606,846,976"),
    "a header longer than is allowed": (raw(WHOLE, length=2**63), "it is cut, or no safetensors file"),
    "a header that ends early": (raw(WHOLE, length=30), "is no JSON where it should be"),
    "a pickle": (b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00cposix\nsystem", "says that its header has"),
    "no JSON": (raw(b"{'a': 1}"), "is no JSON where it should be"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "is no JSON where it should be"),
    "UTF-16": (raw(json.dumps(WHOLE).encode("utf-16")), "is no JSON where it should be"),
    "a name that is no text": (raw(b'{"\\ud800":{}}'), r"tensor '\\ud800': has a name that cannot be printed"),
    "metadata that are no texts": (raw(WHOLE | {"__metadata__": {"a": 1}}), "__metadata__ is no JSON object of texts"),
    "deep": (raw(b'{"a":' + b"[" * 100_000), "is no JSON where it should be"),
    "a number of many digits": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "is no JSON where it should be"),
    "a list": (raw([1, 2]), "its header is no JSON object"),
    "a name twice": (raw(b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"}}'), "names 'a' twice"),
    "a field twice": (raw(b'{"a":{"dtype":"F32","dtype":"F64"}}'), "names 'dtype' twice"),
    "no entry": (raw({"a": 5}), "tensor 'a': has no dtype, shape and data_offsets alone, but 5"),
    "a field too many": (raw({"a": entry([16], 0, 64) | {"run": "rm"}}), "tensor 'a': has no dtype, shape and"),
    "a negative dim": (raw({"a": entry([-2, -8], 0, 64)}), "tensor 'a': has no dtype, shape and data_offsets"),
    "a dim that is no number": (raw({"a": entry([True, 16.0], 0, 64)}), "tensor 'a': has no dtype, shape and"),
    "one offset": (raw({"a": entry([16], 0, 64) | {"data_offsets": [0]}}), "tensor 'a': has no dtype, shape and"),
    "an unknown dtype": (raw({"a": entry([16], 0, 64, "F99")}), "tensor 'a': has dtype 'F99'; those that can be read"),
    "a dtype that is none": (raw({"a": entry([16], 0, 64, ["F32"])}), r"tensor 'a': has dtype \['F32'\]"),
    "a dtype of another size": (
        raw({"a": entry([16], 0, 64, "BF16")}),
        r"'a': is BF16 of shape \[16\], 32 bytes, and has",
    ),
    "a shape of another size": (raw({"a": entry([4], 0, 64)}), r"'a': is F32 of shape \[4\], 16 bytes, and has 64"),
    "a shape past all sizes": (raw({"a": entry([2**40] * 9, 0, 64)}), "tensor 'a': is F32 of shape"),
    "bytes that end before they begin": (raw({"a": entry([], 64, 0)}), "tensor 'a': is F32 of shape"),
    "bytes past the end": (raw({"a": entry([2**34], 0, 2**36)}), "tensor 'a': ends at byte .* the file is cut"),
    "a cut file": (raw(WHOLE, DATA[:60]), "tensor 'b': ends at byte .* the file is cut"),
    "bytes that overlap": (
        raw({"a": entry([8], 0, 32), "b": entry([12], 16, 64)}),
        "'b': starts at byte 16, and overlaps",
    ),
    "bytes of two": (raw({"a": entry([16], 0, 64), "b": entry([16], 0, 64)}), "'b': starts at byte 0, and overlaps"),
    "bytes of none": (
        raw({"a": entry([4], 0, 16), "b": entry([8], 32, 64)}),
        "'b': starts at byte 32, and leaves bytes",
    ),
    "bytes behind": (raw(WHOLE, DATA + b"#!/bin/sh"), "has 9 bytes after its tensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_what_it_says_is_refused(name: str, tmp_path: Path) -> None:
    data, said = HOSTILE[name]
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(DeclarationError, match=said) as told:
        read_folder(tmp_path)
    assert str(tmp_path / SINGLE) in str(told.value)
    assert len(str(told.value)) < 600


def test_a_header_that_lies_allocates_nothing(tmp_path: Path) -> None:
    """Of its own length, in a file as long, all holes, too; of a shape, of a shape and offsets."""
    file = tmp_path / SINGLE
    for data, holes in (
        (raw(WHOLE, length=99_000_000), 0),
        (raw(WHOLE, length=10**9), 2**32),
        (raw({"a": entry([2**38], 0, 2**40)}), 0),
        (raw({"a": entry([2**60], 0, 2**62)}), 0),
    ):
        file.write_bytes(data)
        os.truncate(file, len(data) + holes)
        tracemalloc.start()
        with pytest.raises(DeclarationError):
            read_folder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(raw({"\x1b[2J" + "x" * 9999: 5}))
    with pytest.raises(DeclarationError, match=r"tensor '\\x1b\[2Jx+\.\.\.: has a name that"):
        read_folder(tmp_path)


def index_of(folder: Path, where: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def outside(folder: Path) -> Path:
    """A folder beside a whole file that is not in it."""
    (folder / "secret.safetensors").write_bytes(raw(WHOLE))
    inner = folder / "inner"
    inner.mkdir()
    return inner


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "./x", "a/../../secret.safetensors", "..", ".", "", "a\0b", "a\nb"]
)
def test_a_file_that_is_not_in_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    inner = outside(tmp_path)
    index_of(inner, {"a": name, "b": name})
    with pytest.raises(DeclarationError, match=r"names the file .*; a file in the folder is meant"):
        read_folder(inner)


def test_nor_is_one_by_its_whole_path_or_by_a_link(tmp_path: Path) -> None:
    inner, secret = outside(tmp_path), tmp_path / "secret.safetensors"
    index_of(inner, {"a": str(secret), "b": str(secret)})
    with pytest.raises(DeclarationError, match="a file in the folder is meant"):
        read_folder(inner)
    index_of(inner, {"a": "x.safetensors", "b": "x.safetensors"})
    (inner / "x.safetensors").symlink_to(secret)
    with pytest.raises(DeclarationError, match=r"x.safetensors: is a link out of the folder"):
        read_folder(inner)
    (inner / INDEX).unlink()
    (inner / INDEX).symlink_to(secret)
    with pytest.raises(DeclarationError, match=r"index.json: is a link out of the folder"):
        read_folder(inner)
    (inner / INDEX).unlink()
    (inner / SINGLE).symlink_to(inner / SINGLE)
    with pytest.raises(DeclarationError, match=SINGLE):
        read_folder(inner)


def test_links_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "1234", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abcd").write_bytes(raw(WHOLE))
    (snapshot / SINGLE).symlink_to(Path("../../blobs/abcd"))
    assert read_folder(snapshot).keys() == WHOLE.keys()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE)
    opened = os.open(
        tmp_path / SINGLE, os.O_RDWR
    )  # with this and something in it, a reader that is wrong does not wait
    os.write(opened, raw(WHOLE))
    with pytest.raises(DeclarationError, match="is no file"):
        read_folder(tmp_path)
    os.close(opened)


def parts(folder: Path) -> dict[str, str]:
    """Two files, and which tensor is where."""
    for name, file in (("a", "1.safetensors"), ("b", "2.safetensors")):
        (folder / file).write_bytes(raw({name: entry([16], 0, 64)}))
    return {"a": "1.safetensors", "b": "2.safetensors"}


def other_map(where: dict[str, str], folder: Path) -> None:
    index_of(folder, {"a": where["b"], "b": where["a"]})


def one_too_many(where: dict[str, str], folder: Path) -> None:
    index_of(folder, {**where, "c": where["a"]})


def one_too_few(where: dict[str, str], folder: Path) -> None:
    (folder / where["b"]).write_bytes(raw(WHOLE | {"c": entry([0], 64, 64)} | {"a": entry([8], 0, 32)}))
    (folder / where["a"]).write_bytes(raw({}, b""))
    index_of(folder, {"b": where["b"], "a": where["b"]})


def one_twice(where: dict[str, str], folder: Path) -> None:
    (folder / where["b"]).write_bytes(raw(WHOLE))
    index_of(folder, where)


def no_file(where: dict[str, str], folder: Path) -> None:
    index_of(folder, {**where, "b": "3.safetensors"})


def no_map(where: dict[str, str], folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def wrong_map(where: dict[str, str], folder: Path) -> None:
    index_of(folder, {"a": ["1.safetensors"]})


def same_name(where: dict[str, str], folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}')


def both(where: dict[str, str], folder: Path) -> None:
    index_of(folder, where)
    (folder / SINGLE).write_bytes(raw(WHOLE))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_map, r"tensor 'a' in .*1.safetensors: .*index.json says that it is in 2.safetensors"),
        (one_too_many, r"1.safetensors: has no tensor 'c', and model.safetensors.index.json says so"),
        (one_too_few, r"tensor 'c' in .*2.safetensors: is not in model.safetensors.index.json"),
        (one_twice, r"tensor 'a' in .*2.safetensors: is in .*1.safetensors too"),
        (no_file, r"3.safetensors: No such file"),
        (no_map, "has no weight_map of tensors to files"),
        (wrong_map, "has no weight_map of tensors to files"),
        (same_name, "index.json: names 'a' twice"),
        (both, "holds model.safetensors and model.safetensors.index.json"),
    ],
)
def test_an_index_that_is_not_what_the_files_are_is_refused(
    change: Callable[..., None], said: str, tmp_path: Path
) -> None:
    change(parts(tmp_path), tmp_path)
    with pytest.raises(DeclarationError, match=said):
        read_folder(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(DeclarationError, match=r"holds \['pytorch_model.bin'\]; .*\(a pickle is never read\)"):
        read_folder(tmp_path)
    with pytest.raises(DeclarationError, match="is no directory"):
        read_folder(tmp_path / "nowhere")


SMALL = st.one_of(
    st.integers(-1, 70), st.sampled_from([2**31, 2**63, 2**64]), st.booleans(), st.floats(), st.text(max_size=2)
)
ENTRIES = st.builds(
    lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    st.sampled_from(["F32", "F16", "BF16", "U8", "F64", "F99", 3]),
    st.lists(st.one_of(st.integers(0, 8), SMALL), max_size=3),
    st.lists(st.one_of(st.sampled_from([0, 16, 32, 64]), SMALL), min_size=1, max_size=3),
)


@pytest.mark.parametrize("tries", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_nothing_is_read_that_the_formats_own_package_refuses(tries: int, tmp_path: Path) -> None:
    """And what is read is what it reads."""

    @settings(max_examples=tries, deadline=None)
    @given(
        entries=st.dictionaries(st.text(max_size=3), st.one_of(ENTRIES, ENTRIES, SMALL), max_size=4),
        whole=st.booleans(),
        flip=st.one_of(st.none(), st.tuples(st.integers(0, 300), st.integers(1, 255))),
        cut=st.one_of(st.none(), st.integers(0, 300)),
    )
    def reads(entries: dict[str, Any], whole: bool, flip: Any, cut: int | None) -> None:
        data = bytearray(raw(WHOLE if whole else entries))
        if flip is not None:
            data[flip[0] % len(data)] ^= flip[1]
        (tmp_path / SINGLE).write_bytes(bytes(data[:cut]))
        try:
            ours = read_folder(tmp_path)
        except DeclarationError:
            return
        with safetensors.safe_open(tmp_path / SINGLE, "numpy") as theirs:
            assert set(theirs.keys()) == ours.keys()
            for name, tensor in ours.items():
                np.testing.assert_array_equal(tensor.array(), theirs.get_tensor(name))

    reads()


def test_what_is_written_is_what_the_formats_own_package_reads(tmp_path: Path) -> None:
    values: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=ml_dtypes.bfloat16),
        "c": np.array(np.nan, np.float32),
        "d": np.zeros((0, 4), np.int8),
        "e": np.arange(24, dtype=np.float32).reshape(4, 6).T,
    }
    entries = [Entry(name, value.dtype.name, value.shape) for name, value in values.items()]
    (file,) = write_folder(tmp_path / "one", entries, iter(values.values()), 10**6)
    assert file.name == SINGLE
    for name, value in safetensors.numpy.load_file(file).items():
        assert value.dtype == values[name].dtype
        np.testing.assert_array_equal(value, values[name])
    files = write_folder(tmp_path / "many", entries, iter(values.values()), 390)
    assert [file.name for file in files] == [*(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)), INDEX]
    assert all(file.stat().st_size <= 390 for file in files[:-1])
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    for name, value in values.items():
        with safetensors.safe_open(tmp_path / "many" / index["weight_map"][name], "numpy") as held:
            np.testing.assert_array_equal(held.get_tensor(name), value)
    for folder in ("one", "many"):
        found = read_folder(tmp_path / folder)
        assert found.keys() == values.keys()
        for name, value in values.items():
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype.name)
            np.testing.assert_array_equal(found[name].array(), value)


def test_weights_that_are_there_stay(tmp_path: Path) -> None:
    (tmp_path / "model-00007-of-00007.safetensors").write_bytes(b"mine")
    one = [Entry("a", "float32", (1,))]
    with pytest.raises(DeclarationError, match=r"holds \['model-00007-of-00007.safetensors'\]; remove them, or give"):
        write_folder(tmp_path, one, iter([np.zeros(1)]), 100)
    (tmp_path / "model-00007-of-00007.safetensors").unlink()
    target = tmp_path / "elsewhere"
    (tmp_path / SINGLE).symlink_to(target)
    with pytest.raises(DeclarationError, match="holds"):
        write_folder(tmp_path, one, iter([np.zeros(1)]), 100)
    assert not target.exists()
    with pytest.raises(DeclarationError, match="is no directory"):
        write_folder(tmp_path / SINGLE, one, iter([np.zeros(1)]), 100)
