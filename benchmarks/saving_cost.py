"""What saving costs the steps: of the quickstart, a checkpoint every 20 steps, the part of the time that saves take.

    python benchmarks/saving_cost.py [--steps 100] [--every 20]

Of one run: the seconds for which saves held the steps up (what the devices copy, and waiting for the save before), and
how much longer the first half of the steps after a save took, while files were written, than the second, as a part of
all steps.

On two cores (jax 0.10.2, 0.53 s a step) five saves of these 229 arrays held the steps up for 0.11 s (0.2 %), and the
steps beside them took 1.4 and 2.8 % longer in two runs. On 16 cores (jax 0.11.2, 0.10 s a step) five saves held them up
for 0.04 s (0.3 %), and beside them steps took 2.5, 2.5, 2.9 and 3.1 % longer in four. When Orbax was given arrays in
shards it was up to 6.8 %: Python of Orbax beside Python of the steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from shardlab.mesh.emulate import emulate
from shardlab.run.config import load_config, override


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of the run")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    given = parser.parse_args()
    emulate(8)
    from shardlab.run.loop import train
    from shardlab.run.resume import Saving

    config = override(load_config("configs/quickstart.py"), {"steps": given.steps})
    with tempfile.TemporaryDirectory(prefix="shardlab-saving-") as folder:
        record = train(config, Path(folder, "run"), saving=Saving(every=given.every))
    # The run's own first steps aside: the first half of those after a save, and the second.
    halves: tuple[list[float], list[float]] = [], []
    for row in record.rows[given.every :]:
        halves[(row["step"] - 1) % given.every >= given.every // 2].append(row["seconds"])
    seconds, beside = [row["seconds"] for row in record.rows], halves[0]
    usual = statistics.median(halves[1])
    held, slower = record.report["seconds_held_up_by_saving"], sum(beside) - usual * len(beside)
    whole = sum(seconds)
    print(
        f"{given.steps} steps, {whole:.1f} s, {usual:.3f} s a step; {given.steps // given.every} saves held them up "
        f"for {held:.2f} s ({held / whole:.1%}), and beside them steps took {slower:+.2f} s ({slower / whole:+.1%})"
    )


if __name__ == "__main__":
    main()
