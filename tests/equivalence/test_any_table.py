"""Tables at random that the checker passes, compiled: the reference's numbers, on any mesh and number of layers.

What their programs read is shown on symbols, for hundreds of them, by `tests/pipeline/test_valid_tables.py`.
"""

from __future__ import annotations

import random

import pytest

from tests.equivalence.cases import Case, case
from tests.equivalence.test_equivalence import check
from tests.pipeline.tables import valid_table

LAYERS = {"mlp-5-layers": 5, "mlp-7-layers": 7, "mlp-24-layers": 24, "pure-auxiliary": 3}


def drawn(seed: int, most: int) -> Case:
    """A table for 2 to `most` devices, a model with a layer at least for each stage, and what else makes a case."""
    rng = random.Random(seed)
    table = valid_table(rng, devices=rng.randint(2, most), microbatches=rng.randint(1, 6))
    stages, room = table.num_devices, 8 // table.num_devices
    data = rng.choice([size for size in (1, 2) if size <= room])
    tensor = rng.choice([size for size in (1, 2) if size * data <= room])
    head = rng.choice(["examples", "last_stage"])
    # A microbatch is dealt out over the stages where they share the head.
    rows = stages if head == "examples" else rng.randint(1, 2)
    return case(
        rng.choice([name for name, layers in LAYERS.items() if layers >= table.num_stages]),
        optimizer="steady",
        data=data,
        stage=stages,
        tensor=tensor,
        batch=rows * table.num_microbatches * data,
        schedule=table,
        microbatches=table.num_microbatches,
        head=head,
        zero=rng.randint(0, 3) if data > 1 else 0,
        remat=rng.choice(["none", "full"]),
    )


@pytest.mark.parametrize("seed", range(2))
def test_equals_the_reference(seed: int) -> None:
    check(drawn(seed, 4))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(2, 6), *range(100, 160)])
def test_many_equal_the_reference(seed: int) -> None:
    check(drawn(seed, 8))
