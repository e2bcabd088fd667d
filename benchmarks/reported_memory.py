"""What XLA:TPU reports of a step's memory against its own buffer assignment.

    pip install 'shardlab[tpu]' && python benchmarks/reported_memory.py 6 12 43

Compiles rows of `benchmarks/predicted.py`, keeps what `--xla_dump_to` writes, and prints of each, in GiB

    reported   `temp_size_in_bytes` of the compiled step
    assigned   the heap of its buffer assignment in HBM
    passing    the most that lies in it at once but for what loops carry
    2a - p     2 x assigned - passing, and how far it is from what is reported

which is what `shardlab/search/beyond.py` says is reported. jax 0.10.2, libtpu 0.0.42.1:

                                  reported  assigned   passing    2a - p
 1 1b tpu:v5e:4x4                    4.182     3.647     3.111     4.182  +0.00%
 2 1b tpu:v5e:4x4                    7.865     5.438     3.091     7.786  -1.01%
 3 1b tpu:v5e:4x4                   10.401     7.380     4.494    10.266  -1.29%
 4 1b tpu:v6e:4x4                   10.100     8.031     5.961    10.100  -0.00%
 5 1b tpu:v6e:8x8                    3.209     2.849     2.490     3.209  -0.00%
 6 8b tpu:v5p:4x4x8                  6.111     4.103     2.096     6.111  -0.00%
 7 8b tpu:v5p:4x4x8                  7.186     5.706     4.227     7.186  -0.00%
 8 8b tpu:v5p:4x4x8                  9.235     6.660     4.109     9.210  -0.27%
 9 8b tpu:v5p:4x4x4                 21.366    17.026    12.686    21.366  -0.00%
10 8b tpu:v5e:8x8                    5.271     4.236     3.201     5.271  +0.00%
11 8b tpu:v5e:16x16                  5.070     4.060     3.049     5.070  +0.00%
12 8b tpu:v6e:8x8                    5.372     3.819     2.266     5.371  -0.01%
13 70b tpu:v5p:4x8x8                15.378    10.470     5.562    15.378  -0.00%
14 70b tpu:v5p:4x8x8                27.530    24.140    20.750    27.530  -0.00%
15 70b tpu:v5p:8x8x16               14.990    10.089     5.189    14.990  -0.00%
21 1b tpu:v5e:4x4                    4.758     3.721     2.685     4.758  +0.00%
22 1b tpu:v6e:4x4                   12.898    10.901     8.905    12.898  -0.00%
23 8b tpu:v5e:8x8                    7.726     6.035     4.344     7.727  +0.00%
24 8b tpu:v6e:16x16                  4.056     3.051     2.051     4.050  -0.14%
25 8b tpu:v6e:8x8                    9.205     6.203     3.201     9.205  -0.00%
26 8b tpu:v5p:4x4x4                  9.227     6.245     3.264     9.227  -0.00%
27 8b tpu:v5p:4x4x4                 21.790    18.706    15.621    21.790  -0.00%
28 70b tpu:v5p:4x4x8                16.118    11.089     6.060    16.117  -0.00%
29 70b tpu:v6e:16x16                15.361    10.462     5.562    15.361  -0.00%
30 70b tpu:v5p:8x8x8                48.078    44.537    40.995    48.078  -0.00%
31 70b tpu:v6e:16x16                27.083    23.916    20.750    27.083  -0.00%
35 8b tpu:v6e:16x16                  9.018     6.034     3.049     9.018  -0.00%
36 70b tpu:v5p:4x8x8                22.445    16.535    10.625    22.445  -0.00%
37 8b tpu:v5e:16x16                  7.028     5.725     4.421     7.029  +0.00%
38 1b tpu:v6e:8x8                    3.518     3.012     2.506     3.518  -0.00%
39 8b tpu:v5p:4x4x8                  6.101     4.133     2.165     6.101  -0.00%
40 8b tpu:v6e:8x8                    4.211     3.204     2.203     4.205  -0.14%
41 1b/4 tpu:v5e:4x4                  3.348     3.187     3.026     3.348  +0.00%
42 8b/4 tpu:v5p:4x4x8                2.873     2.117     1.361     2.873  -0.00%
43 8b/4 tpu:v6e:8x8                  2.162     1.890     1.618     2.162  -0.00%
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.predicted import ROWS, planned
from shardlab.search.choice import changed
from shardlab.search.plan_file import PlanFile, write_plan

GIB = 2**30
# What a loop carries, and what its body makes of that in place.
_CARRIED = re.compile(r"\(phi\)|dynamic[-_]update[-_]slice")


class Value(NamedTuple):
    """A value of a buffer assignment: when it is there, in the schedule's order, and how many bytes it has."""

    first: int
    last: int
    size: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="+", help="rows of benchmarks/predicted.py that are for TPUs")
    print(f"{'':<32}{'reported':>10}{'assigned':>10}{'passing':>10}{'2a - p':>10}")
    for row in parser.parse_args().rows:
        with tempfile.TemporaryDirectory(prefix="shardlab-") as folder:
            reported = compiled(row, Path(folder))["memory"]["temp_bytes"]
            assigned, passing = assignment(Path(folder))
        found = 2 * assigned - passing
        figures = "".join(f"{size / GIB:>10.3f}" for size in (reported, assigned, passing, found))
        print(f"{row:>2} {' '.join(map(str, ROWS[row][:2])):<29}{figures}{found / reported - 1:>+8.2%}", flush=True)


def compiled(row: int, folder: Path) -> dict[str, Any]:
    """What `shardlab compile` reports of a row, with the compiler's dumps in `folder`."""
    path, scalars, config, choice = planned(row)
    overrides = choice.overrides(ROWS[row][1])
    write_plan(folder / "plan.json", PlanFile(path, scalars, overrides, changed(config, overrides).plan()))
    command = [sys.executable, "-m", "shardlab", "compile", path, "--plan", str(folder / "plan.json"), "--json"]
    # As the process that `compile` starts for itself: its compiler's files are kept there.
    told = subprocess.run(
        command, env={**os.environ, "SHARDLAB_COMPILING": str(folder)}, capture_output=True, text=True
    )
    if told.returncode:
        raise SystemExit(told.stderr)
    facts: dict[str, Any] = json.loads(told.stdout)
    return facts


def assignment(folder: Path) -> tuple[int, int]:
    """The bytes of the heap in HBM, and of them the most that are there at once but for what loops carry."""
    (file,) = folder.glob("dump/*after_optimizations-buffer-assignment.txt")
    spans = dict(_spans(Path(str(file).replace("-buffer-assignment", "-live-range")).read_text()))
    heap = re.search(r"^allocation \d+: size (\d+), preallocated-temp:\n((?: value: .*\n)*)", file.read_text(), re.M)
    assert heap is not None
    found = re.findall(r"^ value: <\d+ (.+?) @\d+> \(size=(\d+),", heap[2], re.M)
    values = (Value(*spans[name], int(size)) for name, size in found if not _CARRIED.search(name))
    return int(heap[1]), most(values)


def _spans(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    begin, end = text.index("BufferLiveRange:"), text.index("Live ranges at")
    for name, index, first, last in re.findall(r"^\s+(\S+?)(\{[\d,]*\}):(\d+)-(\d+)", text[begin:end], re.M):
        yield name + index, (int(first), int(last))
        if index == "{}":
            yield name, (int(first), int(last))


def most(values: Iterable[Value]) -> int:
    """The most bytes that are there at once."""
    change: dict[int, int] = {}
    for value in values:
        change[value.first] = change.get(value.first, 0) + value.size
        change[value.last + 1] = change.get(value.last + 1, 0) - value.size
    found = now = 0
    for time in sorted(change):
        now += change[time]
        found = max(found, now)
    return found


if __name__ == "__main__":
    main()
