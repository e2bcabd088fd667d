"""What to change where a step does not fit: the savings are the plans' own, and several changes come together."""

from __future__ import annotations

import dataclasses

from shardlab.run.config import Config
from shardlab.run.remedies import remedies
from tests.run.tiny import tiny


def config() -> Config:
    """ZeRO 0 on eight data shards, everything kept for the backward."""
    return tiny("data=8", batch_size=64)


def counted(config: Config) -> int:
    return sum(size for name, size in config.plan().bytes_per_device().items() if name != "padding")


def test_each_change_saves_what_the_plans_differ_by() -> None:
    before = counted(config())
    found = {one.change: one for one in remedies(config(), config().plan(), before, before - 1)}
    for change, scalars in {"--remat full": {"remat": "full"}, "--microbatches 2": {"microbatches": 2}}.items():
        after = counted(dataclasses.replace(config(), **scalars))  # type: ignore[arg-type]
        assert found[change].saves_bytes == before - after > 0
        assert found[change].hbm_bytes == after
        assert found[change].fits


def test_what_the_compiler_needs_beyond_the_plan_stays() -> None:
    before = counted(config())
    found = remedies(config(), config().plan(), before + 10_000_000, before)
    assert all(one.hbm_bytes == before + 10_000_000 - one.saves_bytes for one in found)


def test_the_largest_saving_comes_first_and_several_together_last() -> None:
    before = counted(config())
    single = remedies(config(), config().plan(), before, before - 1)
    assert [one.saves_bytes for one in single] == sorted((one.saves_bytes for one in single), reverse=True)
    best = single[0].saves_bytes
    *singles, together = remedies(config(), config().plan(), before, before - best - 1)
    assert not any(one.fits for one in singles)
    assert together.fits
    assert together.saves_bytes > best
    assert together.change.startswith(singles[0].change)


def test_a_step_that_nothing_makes_fit_has_no_remedy_that_fits() -> None:
    before = counted(config())
    assert not any(one.fits for one in remedies(config(), config().plan(), before, 1))
