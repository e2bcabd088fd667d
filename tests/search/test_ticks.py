"""Counts of schedules are the same whichever process makes them."""

from __future__ import annotations

import time

import pytest

from shardlab.search import ticks as counted
from shardlab.search.ticks import Key, counting_beside, ticks

KEYS: list[Key] = [("1f1b", 4, 8, 1), ("zb_h1", 4, 8, 1), ("interleaved_1f1b", 2, 4, 2), ("gpipe", 2, 4, 1)]


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "_known", {})
    monkeypatch.setattr(counted, "_WORTH_A_PROCESS", 0)


def _wait_for_all() -> None:
    end = time.monotonic() + 60
    while len(counted._known) < len(KEYS):
        assert time.monotonic() < end, f"after a minute {len(counted._known)} of {len(KEYS)} are counted"
        time.sleep(0.01)


def _no_process(*_: object, **__: object) -> None:
    raise AssertionError("a second process is started")


def test_a_second_process_counts_what_this_one_would() -> None:
    alone = {key: counted._count(*key) for key in KEYS}
    with counting_beside(KEYS):
        _wait_for_all()
    assert counted._known == alone
    assert alone["1f1b", 4, 8, 1].cells["W"] == counted._known["1f1b", 4, 8, 1].cells["W"] == 0


def test_what_is_known_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting_beside(KEYS):
        _wait_for_all()
    monkeypatch.setattr(counted.subprocess, "Popen", _no_process)
    monkeypatch.setattr(counted, "_WORTH_A_PROCESS", 1)
    with counting_beside(KEYS):
        assert ticks("gpipe", 2, 4, 1).work["F"] == 4


def test_what_a_second_process_fails_to_count_this_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {key: counted._count(*key) for key in KEYS}
    monkeypatch.setattr(counted.sys, "executable", "/bin/false")
    with counting_beside(KEYS):
        assert {key: ticks(*key) for key in KEYS} == alone


def test_what_a_second_process_has_not_counted_when_it_is_ended_this_one_does() -> None:
    with counting_beside(KEYS):
        pass
    assert {key: ticks(*key) for key in KEYS} == {key: counted._count(*key) for key in KEYS}


def test_few_schedules_are_left_to_be_counted_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "_WORTH_A_PROCESS", 10**6)
    monkeypatch.setattr(counted.subprocess, "Popen", _no_process)
    with counting_beside(KEYS):
        assert counted._known == {}
