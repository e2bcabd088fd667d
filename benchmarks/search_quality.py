"""Whether the search picks well: every plan of three small spaces compiled, and the pick among what was compiled.

    pip install 'shardlab[tpu,gpu-compiler]' && python benchmarks/search_quality.py [--case NAME] [--most 40]

A space is what four chips leave, of a slice, of one host and of two: all meshes, ZeRO 0, 1 and 3 (by layer, in
pieces), the fewest microbatches, 1F1B, one policy of remat, x whole between blocks. The pick is what the search's
estimate puts first among the plans that fit; it is judged by the seconds that `shardlab compile` estimates from the
optimized program of each. The goal is a pick within 5 % of the best.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from shardlab.run.config import load_config, override
from shardlab.search.candidates import candidates
from shardlab.search.choice import Choice
from shardlab.search.confirm import compiled
from shardlab.search.estimate import Estimator
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="one of them")
    parser.add_argument("--most", type=int, default=0, help="compile only so many of the plans, the first by estimate")
    given = parser.parse_args()
    for case, (target, scalars) in CASES.items():
        if given.case in (None, case):
            judge(case, target, scalars, given.most)


def judge(case: str, target: str, scalars: dict[str, Any], most: int) -> None:
    """Compiles the plans of one case, and prints each and how far the pick is from the best."""
    config = override(load_config(CONFIG), scalars)
    subject = Subject(config, target)
    estimator = Estimator(subject)
    found = [estimator.estimate(choice) for choice in space(subject) if not refusal(estimator, choice)]
    found = sorted((one for one in found if one.hbm_bytes <= subject.room), key=lambda one: one.total_seconds)
    print(f"{case}, {target}: {len(found)} plans")
    seconds = {}
    for one in found[: most or None]:
        start = time.perf_counter()
        made = compiled(CONFIG, config, scalars, one.choice, target)
        label = f"  {name(one, subject)}, M {one.choice.microbatches}, {one.choice.gather}"
        if made.get("estimate_seconds") is None or not made["fits"]:
            print(f"{label:<58}{made.get('error', 'does not fit')}", flush=True)
            continue
        seconds[one.choice] = made["estimate_seconds"]
        both = f"{one.total_seconds:>9.4f}{made['estimate_seconds']:>9.4f}"
        print(f"{label:<58}{both}   ({time.perf_counter() - start:.0f} s)", flush=True)
    if seconds:
        pick, best = next(iter(seconds.values())), min(seconds.values())
        print(f"  the pick is {pick / best - 1:+.1%} from the best of {len(seconds)}", flush=True)


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
