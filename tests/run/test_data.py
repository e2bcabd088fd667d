"""The data: every byte once an epoch, the same batches for a seed, positions that go on where they were."""

import json
import math
import re
import subprocess
import sys
import sysconfig
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardlab.mesh.faults import DeclarationError
from shardlab.run.data import Batches, ByteText, RandomTokens, Windows, read_text

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 files of 100 distinct bytes or so, some where no text is read from."""
    root = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for index in range(60):
        path = root / f"package{index % 4}" / f"file{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"# {index}\n".encode() + rng.integers(32, 127, 90 + index, dtype=np.uint8).tobytes())
    for left_out in ("test/a.py", "package0/tests/b.py", "site-packages/c.py", "package0/d.txt"):
        (root / left_out).parent.mkdir(exist_ok=True)
        (root / left_out).write_text("never read")
    return str(root)


def data(root: str, **changes: Any) -> ByteText:
    return ByteText(**{"seq_len": 9, "held_out_percent": 20, "root": root, **changes})


def tokens(batches: Any, count: int) -> np.ndarray:
    return np.stack([batch["tokens"] for batch in islice(batches, count)])


def test_batches_have_the_shapes_announced(root: str) -> None:
    text = data(root)
    announced = text.abstract_batch(6)
    for batch in (next(text.train(6)), text.held_out(6, 1)[0]):
        assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
            name: (rows.shape, rows.dtype) for name, rows in announced.items()
        }
        assert {type(rows) for rows in batch.values()} == {np.ndarray}


def test_targets_are_tokens_moved_on_by_one_byte(root: str) -> None:
    whole = b"".join(path.read_bytes() + b"\0" for path in sorted(Path(root).rglob("file*.py")))
    batch = next(data(root).train(4, seed=1))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    for row in np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1):
        for piece in bytes(row.astype(np.uint8)).split(b"\0"):
            assert piece in whole


def test_every_byte_is_a_target_once() -> None:
    text = np.arange(24, dtype=np.uint8)
    windows = Windows(text, 5)
    assert len(windows) == 4
    targets = np.concatenate([windows[index]["targets"] for index in range(4)])
    np.testing.assert_array_equal(targets, np.arange(1, 21))
    assert [len(Windows(text[:size], 5)) for size in (0, 5, 6, 11)] == [0, 0, 1, 2]


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order(root: str) -> None:
    text = read_text(root, 10**6, 20)
    count = len(Windows(text.train, 9))
    shown = tokens(data(root).train(1, seed=3), 2 * count).reshape(2, count, 9)
    every = np.array([Windows(text.train, 9)[index]["tokens"] for index in range(count)])
    for epoch in shown:
        np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(every, axis=0))
    assert not np.array_equal(shown[0], shown[1])
    assert not np.array_equal(shown[0], every)


def test_the_seed_decides_the_order(root: str) -> None:
    text = data(root)
    once = tokens(text.train(4, seed=5), 6)
    np.testing.assert_array_equal(once, tokens(text.train(4, seed=5), 6))
    assert not np.array_equal(once, tokens(text.train(4, seed=6), 6))
    by_one = tokens(text.train(1, seed=5), 24).reshape(6, 4, 9)
    np.testing.assert_array_equal(once, by_one)


def test_another_process_reads_the_same_text_in_the_same_order(root: str) -> None:
    program = (
        "from shardlab.run.data import ByteText\n"
        f"batch = next(ByteText(seq_len=9, held_out_percent=20, root={root!r}).train(4, seed=5))\n"
        "print(batch['tokens'].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == tokens(data(root).train(4, seed=5), 1)[0].tolist()


@pytest.mark.parametrize("steps", [0, 1, 7, 200])
def test_a_stored_position_goes_on_where_it_was(root: str, steps: int) -> None:
    text = data(root)
    batches = text.train(4, seed=2)
    for _ in range(steps):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = tokens(batches, 5)
    resumed = text.train(4, seed=2)
    next(resumed)
    resumed.set_state(state)
    np.testing.assert_array_equal(tokens(resumed, 5), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_batch_and_any_number_of_them_goes_on(root: str, count: int) -> None:
    text = data(root)

    def readers() -> list[Batches]:
        return [text.train(6, seed=4, process_index=index, process_count=count) for index in range(count)]

    alone, together = text.train(6, seed=4), readers()
    for _ in range(40):
        rows = np.concatenate([next(reader)["targets"] for reader in together])
        np.testing.assert_array_equal(next(alone)["targets"], rows)
    assert {json.dumps(reader.get_state()) for reader in together} == {json.dumps(alone.get_state())}
    more = readers()
    for reader in more:
        reader.set_state(alone.get_state())
    np.testing.assert_array_equal(next(alone)["targets"], np.concatenate([next(reader)["targets"] for reader in more]))


def test_held_out_batches_are_always_the_same_and_shared_alike(root: str) -> None:
    text = data(root)
    whole = text.held_out(4, 3)
    assert len(whole) == 3
    for mine, again in zip(whole, text.held_out(4, 3), strict=True):
        np.testing.assert_array_equal(mine["tokens"], again["tokens"])
    halves = [text.held_out(4, 3, process_index=index, process_count=2) for index in range(2)]
    for index, batch in enumerate(whole):
        rows = np.concatenate([half[index]["tokens"] for half in halves])
        np.testing.assert_array_equal(batch["tokens"], rows)
    rows = np.concatenate([batch["tokens"] for batch in whole])
    assert len(np.unique(rows, axis=0)) == 12


def test_a_file_is_on_one_side_whatever_the_limit_and_left_out_files_on_none(root: str) -> None:
    def sides(max_bytes: int) -> tuple[set[bytes], set[bytes]]:
        text = read_text(root, max_bytes, 20)
        assert text.train.size + text.held_out.size <= max_bytes
        parts = (set(part.tobytes().split(b"\0")) - {b""} for part in (text.train, text.held_out))
        return next(parts), next(parts)

    (train, held_out), (less, less_held_out) = sides(10**6), sides(4000)
    assert len(train) + len(held_out) == 60
    assert not train & held_out
    assert less < train
    assert less_held_out < held_out
    assert 4 <= len(held_out) <= 24


def test_the_standard_library_is_the_default() -> None:
    text = ByteText(max_megabytes=3)
    described = text.describe()
    assert described.startswith(("2.9 MB", "3.0 MB"))
    assert sysconfig.get_path("stdlib") in described
    shown = bytes(next(text.train(64))["tokens"].astype(np.uint8).reshape(-1))
    assert math.isclose(shown.count(b" ") / len(shown), 0.25, abs_tol=0.15)
    assert b"def " in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len: is 0; give an example at least one token"),
        ({"max_megabytes": 0}, "max_megabytes: is 0; give a positive size"),
        ({"held_out_percent": 100}, "held_out_percent: is 100; give 1 to 99 of 100 files"),
        (
            {"seq_len": -1, "held_out_percent": 0},
            "2 faults in the declaration:\n"
            "  1. seq_len: is -1; give an example at least one token\n"
            "  2. held_out_percent: is 0; give 1 to 99 of 100 files",
        ),
    ],
)
def test_sizes_that_give_no_data(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        ByteText(**changes)


def test_text_that_does_not_suffice(root: str) -> None:
    held_out = read_text(root, 10**6, 20).held_out
    windows, longest = len(Windows(held_out, 9)), (held_out.size - 1) // 400
    assert len(Windows(held_out, longest)) >= 400 > len(Windows(held_out, longest + 1))
    message = (
        f"data: 100 held-out batches of 4 need 400 examples, the held-out text of {root} has {windows} "
        f"windows of 9 bytes; make seq_len {longest} at most, raise max_megabytes (8), or use fewer"
    )
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        data(root).held_out(4, 100)
    with pytest.raises(DeclarationError, match=r"windows of 9 bytes; raise max_megabytes \(8\), or use fewer$"):
        data(root).held_out(10**5, 10)  # more windows than bytes
    message = (
        f"data: 1 of the 60 Python files in {root} fit in 0.0002 MB, 0 of them held out; training and "
        "held-out text need a file each: raise max_megabytes, change held_out_percent, or give another root"
    )
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        data(root, max_megabytes=0.0002).train(4)
    with pytest.raises(DeclarationError, match=r"^data: there is no directory '/nowhere'; give the root of some"):
        data("/nowhere").train(4)


@pytest.mark.parametrize(("index", "count"), [(0, 4), (2, 2), (-1, 2)])
def test_shares_that_do_not_exist(root: str, index: int, count: int) -> None:
    message = (
        f"data: a batch of 6 examples cannot be read by process {index} of {count}; make it a "
        f"positive multiple of {count}, and count processes from 0"
    )
    for read in (data(root).train, lambda size, **share: data(root).held_out(size, 1, **share)):
        with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
            read(6, process_index=index, process_count=count)


def test_a_position_in_other_data_is_refused(root: str) -> None:
    state = data(root).train(4, seed=1).get_state()
    message = (
        "data batch_size: is 6, and the stored position is one in data where it was 4; restore with the "
        "settings it was stored with, or start the data anew"
    )
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        data(root).train(6, seed=1).set_state(state)
    for other in (data(root).train(4, seed=2), data(root, seq_len=8).train(4, seed=1)):
        with pytest.raises(DeclarationError, match="the stored position is one in data where it was"):
            other.set_state(state)
    with pytest.raises(DeclarationError, match=r"^data text: is '"):
        data(root, max_megabytes=0.004).train(4, seed=1).set_state(state)


def random_tokens(**changes: Any) -> RandomTokens:
    return RandomTokens(**{"seq_len": 9, "vocab_size": 50, **changes})


def test_random_tokens_are_what_is_announced_and_targets_the_tokens_after_them() -> None:
    drawn = random_tokens()
    announced = drawn.abstract_batch(6)
    for batch in (next(drawn.train(6)), drawn.held_out(6, 1)[0]):
        assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
            name: (rows.shape, rows.dtype) for name, rows in announced.items()
        }
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert set(np.unique(tokens(drawn.train(6), 20))) == set(range(50))
    assert drawn.describe() == "random tokens, 9 an example, of 50"


def test_random_tokens_follow_the_seed_and_no_two_batches_are_alike() -> None:
    drawn = random_tokens()
    first = tokens(drawn.train(4, seed=3), 3)
    np.testing.assert_array_equal(first, tokens(drawn.train(4, seed=3), 3))
    others = [*tokens(drawn.train(4, seed=4), 3), *(batch["tokens"] for batch in drawn.held_out(4, 2)), *first[1:]]
    assert all((first[0] != other).any() for other in others)


def test_processes_share_a_batch_of_random_tokens() -> None:
    drawn = random_tokens()
    shares = [tokens(drawn.train(6, seed=1, process_index=index, process_count=3), 2) for index in range(3)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), tokens(drawn.train(6, seed=1), 2))
    held = [drawn.held_out(6, 2, process_index=index, process_count=2)[1]["targets"] for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(held), drawn.held_out(6, 2)[1]["targets"])


def test_a_position_in_random_tokens_is_stored_and_set() -> None:
    drawn = random_tokens()
    batches = drawn.train(4, seed=2)
    next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected, resumed = next(batches), drawn.train(4, seed=2)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["tokens"], expected["tokens"])
    with pytest.raises(DeclarationError, match=r"^data seed: is 3, and the stored position is one in data where it"):
        drawn.train(4, seed=3).set_state(state)


def test_random_tokens_of_no_size_are_refused() -> None:
    with pytest.raises(DeclarationError) as error:
        random_tokens(seq_len=0, vocab_size=0)
    assert str(error.value) == (
        "2 faults in the declaration:\n  1. seq_len: is 0; give an example at least one token\n"
        "  2. vocab_size: is 0; give at least one token"
    )
