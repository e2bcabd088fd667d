"""Counts of schedules are the same whichever process makes them."""

from __future__ import annotations

import pytest

from shardlab.search import ticks as counted
from shardlab.search.ticks import Key, Ticks, count_in_two, ticks

KEYS: list[Key] = [("1f1b", 4, 8, 1), ("zb_h1", 4, 8, 1), ("interleaved_1f1b", 2, 4, 2), ("gpipe", 2, 4, 1)]


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "_known", {})
    monkeypatch.setattr(counted, "_WORTH_A_PROCESS", 0)


def test_a_second_process_counts_what_this_one_would() -> None:
    alone = {key: counted._count(*key) for key in KEYS}
    count_in_two(KEYS)
    assert counted._known == alone
    assert alone["1f1b", 4, 8, 1].cells["W"] == counted._known["1f1b", 4, 8, 1].cells["W"] == 0


def test_each_schedule_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count_in_two(KEYS)

    def again(*key: object) -> Ticks:
        raise AssertionError(f"{key} is known")

    monkeypatch.setattr(counted, "_count", again)
    count_in_two(KEYS)
    assert ticks("gpipe", 2, 4, 1).work["F"] == 4


def test_what_a_second_process_fails_to_count_this_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {key: counted._count(*key) for key in KEYS}
    monkeypatch.setattr(counted.sys, "executable", "/bin/false")
    count_in_two(KEYS)
    assert len(counted._known) == 2
    assert {key: ticks(*key) for key in KEYS} == alone


def test_few_schedules_are_left_to_be_counted_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "_WORTH_A_PROCESS", 10**6)
    count_in_two(KEYS)
    assert counted._known == {}
