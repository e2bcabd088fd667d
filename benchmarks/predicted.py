"""What the search predicts of a plan against what the compiler makes of it: memory and bytes on the wire.

    pip install 'shardlab[tpu]' && python benchmarks/predicted.py [--only TEXT] [--layers 8] [--gpu]

Each row is a plan of configs/llama3_8b.py, configs/llama3_70b.py or a model of a billion parameters, compiled by a
`shardlab compile` of its own, with all layers or, to be done sooner, with fewer. Of each: HBM predicted and as the
compiler reports it (arguments + temporaries + outputs that alias nothing + code), wire bytes a device and step
predicted and read from the optimized program, seconds predicted and as the audit estimates them. At the end the mean
and the worst of the differences.

Measured with jax 0.10.2 and libtpu 0.0.42 on 18 such plans, one at a time, most with 8 layers or fewer. The goal, 5 %
in the mean and 10 % at the worst, is not met: without sequence parallelism (15 plans) the median difference is 6.8 % of
HBM and 6.6 % of the wire, and some are far off:

    HBM     pipelines within 9 %, FSDP over a v5p slice within 7 %; FSDP over both dims of a v5e slice, FSDP with a
            tensor axis inside, and GPUs need 16 to 25 % more than is predicted; where everything is kept and a tensor
            axis splits the layers less than half is needed, for XLA:TPU cuts what is kept over that axis
    wire    data, tensor and ZeRO 1 within 2 % (7 % where a float32 sum goes out in bfloat16); pipelines 15 to 18 %
            more than predicted where XLA:TPU makes an all-reduce of some of their reduce-scatters; with an activation
            spec that cuts the sequence three times as much, for XLA:TPU gathers in every chunk of the attention
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from shardlab.run.config import load_config, override
from shardlab.search.choice import Choice
from shardlab.search.confirm import compiled
from shardlab.search.estimate import Estimator
from shardlab.search.subject import Subject

BILLION = {
    "model.num_layers": 16,
    "model.model_dim": 2048,
    "model.num_heads": 32,
    "model.num_kv_heads": 8,
    "model.head_dim": 64,
    "model.mlp_dim": 8192,
}
FSDP = {"zero": 3, "gather": "layer", "accumulate": "sharded", "remat": "full"}
ZERO_1 = {"zero": 1, "remat": "full"}

# Model, target, batch, sizes of data, stage and tensor, what else; x whole between blocks unless it is said.
ROWS: tuple[tuple[str, str, int, tuple[int, int, int], dict[str, Any]], ...] = (
    ("1b", "tpu:v5e:4x4", 32, (16, 1, 1), {"zero": 0, "remat": "full"}),
    ("1b", "tpu:v5e:4x4", 32, (16, 1, 1), FSDP),
    ("1b", "tpu:v5e:4x4", 32, (4, 1, 4), ZERO_1),
    ("1b", "tpu:v5e:4x4", 64, (4, 4, 1), {**ZERO_1, "microbatches": 8}),
    ("1b", "tpu:v6e:4x4", 32, (16, 1, 1), ZERO_1),
    ("1b", "tpu:v6e:8x8", 128, (64, 1, 1), {**FSDP, "microbatches": 2}),
    ("8b", "tpu:v5p:4x4x8", 128, (128, 1, 1), FSDP),
    ("8b", "tpu:v5p:4x4x8", 128, (32, 1, 4), FSDP),
    ("8b", "tpu:v5p:4x4x8", 256, (32, 4, 1), {**FSDP, "microbatches": 8}),
    ("8b", "tpu:v5p:4x4x4", 128, (16, 2, 2), {**ZERO_1, "microbatches": 4}),
    ("8b", "tpu:v5e:8x8", 64, (64, 1, 1), FSDP),
    ("8b", "tpu:v5e:16x16", 256, (256, 1, 1), FSDP),
    ("8b", "tpu:v6e:8x8", 64, (32, 1, 2), FSDP),
    ("70b", "tpu:v5p:4x8x8", 256, (256, 1, 1), FSDP),
    ("70b", "tpu:v5p:4x8x8", 256, (64, 1, 4), FSDP),
    ("70b", "tpu:v5p:8x8x16", 1024, (1024, 1, 1), FSDP),
    ("1b", "gpu:h100:1x8", 16, (8, 1, 1), ZERO_1),
    ("8b", "gpu:h100:8x8", 64, (64, 1, 1), FSDP),
    ("8b", "gpu:h100:8x8", 64, (16, 1, 4), FSDP),
    ("8b", "gpu:h200:8x8", 128, (16, 4, 1), {**ZERO_1, "microbatches": 8}),
    ("70b", "gpu:h200:64x8", 512, (512, 1, 1), FSDP),
)

CONFIGS = {"1b": "configs/llama3_8b.py", "8b": "configs/llama3_8b.py", "70b": "configs/llama3_70b.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose text holds this")
    parser.add_argument("--layers", type=int, default=0, help="layers of every model; 0: its own")
    parser.add_argument("--gpu", action="store_true", help="the rows of GPUs too")
    given = parser.parse_args()
    print(f"{'model, target, data x stage x tensor':<52}{'HBM GiB':>16}{'':>7}{'wire GB':>18}{'':>7}{'seconds':>16}")
    hbm, wire = [], []
    for model, target, batch, sizes, options in ROWS:
        label = f"{model} {target} {'x'.join(map(str, sizes))} {_words(options)}"
        if given.only not in label or (target.startswith("gpu") and not given.gpu):
            continue
        scalars: dict[str, Any] = {"batch_size": batch} | (BILLION if model == "1b" else {})
        if given.layers:
            scalars["model.num_layers"] = given.layers
        config = override(load_config(CONFIGS[model]), scalars)
        choice = Choice(mesh=tuple(zip(("data", "stage", "tensor"), sizes, strict=True)), **options)
        predicted = Estimator(Subject(config, target)).estimate(choice)
        start = time.perf_counter()
        made = compiled(CONFIGS[model], config, scalars, choice, target)
        if "error" in made or made["wire_bytes"] is None:
            print(f"{label:<52}{made.get('error', 'does not fit')}", flush=True)
            continue
        hbm.append(predicted.hbm_bytes / made["hbm_bytes"] - 1)
        wire.append(predicted.wire_bytes / made["wire_bytes"] - 1)
        pairs = (
            f"{predicted.hbm_bytes / 2**30:>8.2f}{made['hbm_bytes'] / 2**30:>8.2f}{hbm[-1]:>+7.1%}",
            f"{predicted.wire_bytes / 1e9:>9.2f}{made['wire_bytes'] / 1e9:>9.2f}{wire[-1]:>+7.1%}",
            f"{predicted.total_seconds:>8.3f}{made['estimate_seconds']:>8.3f}",
        )
        print(f"{label:<52}{''.join(pairs)}   ({time.perf_counter() - start:.0f} s)", flush=True)
    for name, found in (("HBM", hbm), ("wire", wire)):
        if found:
            sizes_ = sorted(abs(one) for one in found)
            print(f"{name}: mean {sum(sizes_) / len(sizes_):.1%}, worst {sizes_[-1]:.1%} of {len(found)} plans")


def _words(options: dict[str, Any]) -> str:
    words = [f"ZeRO {options.get('zero', 0)}"]
    if options.get("gather") == "layer":
        words.append("by layer")
    if options.get("microbatches", 1) > 1:
        words.append(f"M {options['microbatches']}")
    return ", ".join(words)


if __name__ == "__main__":
    main()
