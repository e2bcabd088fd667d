"""Whether the search picks well: every plan of three small spaces compiled, and the pick among what was compiled.

    pip install 'shardlab[tpu]' && python benchmarks/search_quality.py --case torus [--keep]
    pip install 'shardlab[gpu-compiler]' && python benchmarks/search_quality.py --case nvlink --case hosts [--keep]

A space is what four chips leave, of a slice, of one host and of two: all meshes, ZeRO 0, 1 and 3 (by layer, in
pieces), the fewest microbatches, 1F1B, one policy of remat, x whole between blocks. The pick is what the search's
estimate puts first among the plans that fit; it is judged by the seconds that `shardlab compile` estimates from the
optimized program of each. The goal is a pick within 5 % of the best.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardlab.run.config import load_config, override
from shardlab.search.candidates import candidates
from shardlab.search.choice import Choice
from shardlab.search.confirm import compiled
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.explain import name
from shardlab.search.search import refusal
from shardlab.search.subject import Subject

CONFIG = "configs/llama3_8b.py"
SMALL = {"model.num_layers": 4, "model.vocab_size": 32000, "model.num_heads": 8, "model.num_kv_heads": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nvlink": ("gpu:h100:1x4", {**SMALL, "model.model_dim": 4096, "model.mlp_dim": 14336, "batch_size": 8}),
    "hosts": ("gpu:a6000:2x2", {**SMALL, "model.model_dim": 2048, "model.mlp_dim": 8192, "batch_size": 8}),
    "torus": ("tpu:v5e:2x2", {**SMALL, "model.model_dim": 2048, "model.mlp_dim": 8192, "batch_size": 8}),
}


KEPT = Path(__file__).with_suffix(".json")
"""Seconds of what was compiled, by case and plan, None where it does not fit: `tests/search/test_quality.py` judges the
search's pick of today by it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this; may be given again")
    parser.add_argument("--keep", action="store_true", help=f"write what was compiled to {KEPT.name}")
    given = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for case in given.case or CASES:
        kept[case] = compile_all(case)
        print(f"  the pick is {judged(ranked(case), kept[case]):+.1%} from the best", flush=True)
        if given.keep:
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def ranked(case: str) -> dict[str, Estimate]:
    """The plans of a case that the search takes to fit, by name, its pick first."""
    target, scalars = CASES[case]
    subject = Subject(override(load_config(CONFIG), scalars), target)
    estimator = Estimator(subject)
    found = [estimator.estimate(choice) for choice in space(subject) if not refusal(estimator, choice)]
    found = sorted((one for one in found if one.needed_bytes <= subject.room), key=lambda one: one.total_seconds)
    named = {f"{name(one, subject)}, M {one.choice.microbatches}, by {one.choice.gather}": one for one in found}
    assert len(named) == len(found), "two plans of one name"
    return named


def compile_all(case: str) -> dict[str, float | None]:
    """Of every plan of a case what `shardlab compile` estimates; printed beside what the search does."""
    target, scalars = CASES[case]
    config, seconds = override(load_config(CONFIG), scalars), {}
    print(f"{case}, {target}")
    for plan, one in ranked(case).items():
        start = time.perf_counter()
        made = compiled(CONFIG, config, scalars, one.choice, target)
        seconds[plan] = made["estimate_seconds"] if made["fits"] else None
        told = made.get("error", "does not fit") if seconds[plan] is None else f"{seconds[plan]:>9.4f}"
        took = time.perf_counter() - start
        print(f"  {plan:<56}{one.total_seconds:>9.4f}{told}   ({took:.0f} s)", flush=True)
    return seconds


def judged(plans: Mapping[str, Estimate], seconds: Mapping[str, float | None]) -> float:
    """How much longer the search's pick takes than the best of what was compiled, in parts of it."""
    pick, fitting = seconds[next(iter(plans))], [found for found in seconds.values() if found is not None]
    return math.inf if pick is None else pick / min(fitting) - 1


def space(subject: Subject) -> Iterator[Choice]:
    """The plans of a case."""
    seen = set()
    for choice in candidates(subject):
        stored = choice.zero, choice.gather, choice.accumulate
        if stored not in ((0, "step", "full"), (1, "step", "full"), (3, "layer", "sharded")):
            continue
        stages = choice.sizes["stage"]
        if choice.schedule != "1f1b" or choice.remat != "full" or choice.microbatches != stages:
            continue
        seen.add(dataclasses.replace(choice, activation=None))
    yield from sorted(seen, key=lambda choice: (choice.mesh, choice.zero))


if __name__ == "__main__":
    main()
