"""Two processes that save, and go on from what others saved: one launch for all pairs of plans.

    python -m tests.checkpoint.two_processes FOLDER

FOLDER/PLAN/checkpoints    what one process saved on each of `PLANS`, there before, and two processes on each of `TWO`
FOLDER/PLAN/arrays.npz     the arrays that it has
FOLDER/0.json, 1.json      of each process: what it found, as `Found`
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from shardlab.checkpoint import Checkpoints
from shardlab.mesh import processes
from tests.checkpoint.plans import PLANS, TWO, Planned, planned


@dataclass(frozen=True)
class Found:
    """What a process found.

    Attributes:
      losses: of the third step of each of `TWO` that saved after the second.
      read: by the plan that saved and then that which read it: names of arrays of which this process holds another
        number than was saved, how many arrays it looked at, and the loss of the third step.
    """

    losses: dict[str, float]
    read: dict[str, dict[str, tuple[list[str], int, float]]]


def found(folder: Path) -> Found:
    """What this one of two processes finds; the other calls it too."""
    ready = {name: planned(this) for name, this in TWO.items()}
    losses = {}
    for name, this in ready.items():
        arrays, losses[name] = this.save(folder / name)
        if processes.index() == 0:
            np.savez(folder / name / "arrays.npz", **arrays)  # type: ignore[arg-type]
    processes.of_all(lambda: None)  # the other reads what the first has written
    return Found(losses, {a: {b: _read(folder / a, ready[b]) for b in TWO} for a in (*PLANS, *TWO)})


def _read(saved: Path, this: Planned) -> tuple[list[str], int, float]:
    state = Checkpoints(saved).load(this.canonical, 2)
    arrays = this.canonical.arrays_of(state)[0]
    with np.load(saved / "arrays.npz") as wanted:
        assert arrays.keys() == set(wanted)
        wrong = [
            name
            for name, array in arrays.items()
            if not all(np.array_equal(shard.data, wanted[name][shard.index]) for shard in array.addressable_shards)
        ]
    return wrong, len(arrays), this.next_loss(state, 2)


def main(folder: Path) -> int:
    """Starts two processes, each of which comes here again."""
    from shardlab.run.launch import Launch, launch

    return launch(Launch((sys.executable, "-m", __spec__.name, str(folder)), 2, 4))


if __name__ == "__main__":
    import os

    where = Path(sys.argv[1])
    if processes.PLACE not in os.environ:
        sys.exit(main(where))
    processes.join()
    (where / f"{processes.index()}.json").write_text(json.dumps(asdict(found(where))))
