"""Declarations at random: each trains with the reference's numbers, or is refused with a message.

Here a few, of the models that compile fastest, the same every time. `python benchmarks/fuzz.py` tries 2,000 of every
model, in processes of their own, so that one that hangs or ends its process is told with its declaration.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings

from tests.equivalence.declarations import Declaration, attempt, declarations


@settings(
    max_examples=6,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(declarations(("pure-odd", "mlp-1-layer")))
def test_each_trains_as_the_reference_or_is_refused(this: Declaration) -> None:
    outcome = attempt(this)
    assert outcome == "trained" or outcome.startswith("refused: ")
