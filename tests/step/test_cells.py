"""Order that a cell of a schedule's table asks of XLA."""

from __future__ import annotations

import re

import pytest

from tests.equivalence.cases import case, compiled


@pytest.mark.parametrize(("zero", "accumulate", "held"), [(2, "sharded", 1), (1, "full", 0)])
def test_gradients_in_pieces_leave_the_head_together_with_that_of_x(zero: int, accumulate: str, held: int) -> None:
    """Else XLA:TPU may make them after the blocks' backward, and hold the logits through it."""
    step = compiled(case("decoder", data=2, zero=zero, accumulate=accumulate))
    barriers = re.findall(r"optimization_barrier .* : (.*)", step.lowered.as_text())
    kernel, x = "tensor<8x16xf32>", "tensor<4x6x16xf32>"  # half of [16, 16]; four examples of six tokens
    assert sum(x in one and kernel in one for one in barriers) == held
