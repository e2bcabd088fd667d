"""What XLA:TPU reports of a device's memory beyond what its program holds at once.

Its buffer assignment (`--xla_dump_to`) takes little more than what is live. But what it reports as `temp` is

    assigned + (assigned - passing)

where `passing` is the most that is live at once but for what loops carry: libtpu adds the assignment's gaps to it, and
takes for a gap whatever it does not see, since what a loop carries (accumulators, the stack of what blocks keep, x) has
no start of its own there. `benchmarks/reported_memory.py` compiles a step and shows both sides, which were
equal within 0.01 % in 30 of 35 steps of 4 to 80 layers and within 1.3 % in the others, jax 0.10.2, libtpu 0.0.42.1.

The compiler refuses a step for what is assigned: one for v5e with 12.9 GiB assigned and 0.8 GiB of arguments compiles
for its 15.75 GiB, and 17.2 GiB are reported of it.

So two things are needed of a plan, `held` and `passing` (`shardlab.search.memory.Moment`); here are the gaps that
fragments leave, which are measurements of the same steps. XLA:GPU takes at most 0.1 GiB.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardlab.search.memory import Moment

FAST = {"v4": 128 * 2**20, "v5e": 112 * 2**20, "v6e": 96 * 2**20}
"""Fast memory of a core that values are kept in, in bytes; of other chips `SMALL_FAST`. From the same assignments."""
SMALL_FAST = 48 * 2**20
TICK_GAPS = 0.4
"""Gaps of a step with a loop over ticks, in parts of the head's largest gradient: four have 0.2 to 0.8."""
OVER_SLICES = 2
"""Where the head's gradient is summed over slices, so often it is there more: as it is sent, and in gaps. Seven steps
of few layers on two slices of v5e lie within 11 % of their memory."""
CODE = 40 * 2**20
"""The program itself: 31 to 64 MiB in those steps."""


def apart(kind: str, x: float, gradient: float) -> float:
    """What the head holds more where its gradient does not fit into the place of its weights.

    x is there until the gradient of the head's weights is made, and what comes back takes another place, which cuts
    into theirs. In fast memory both leave it whole: so it is of v6e with at most 32 MiB of x, and not of 64; of v5p
    always. v5e keeps the weights meanwhile.

    Args:
      kind: of the chip.
      x: bytes of x on a device, as a product reads it.
      gradient: of the head's weights, the largest.
    """
    return gradient if kind != "v5e" and 2 * x > FAST.get(kind, SMALL_FAST) else 0.0


def with_gaps(
    moments: Mapping[str, Moment], gradient: float, gap: float, *, ticks: bool, over: bool
) -> dict[str, Moment]:
    """The moments with what fragments take.

    Args:
      moments: by part of the step.
      gradient: bytes of the largest gradient of the head.
      gap: what the head holds more (`apart`).
      ticks: whether the step has a loop over ticks.
      over: whether that gradient is summed over slices.
    """
    everywhere = OVER_SLICES * gradient if over else TICK_GAPS * gradient if ticks else 0.0
    more = {name: everywhere + (gap if name == "after" else 0.0) for name in moments}
    return {name: moment._replace(held=moment.held + more[name]) for name, moment in moments.items()}


def counted_twice(moments: Mapping[str, Moment]) -> float:
    """What is reported of a step, in bytes, that it does not need.

    >>> counted_twice({"after": Moment(10.0, 4.0), "B": Moment(8.0, 5.0)})
    5.0
    """
    return max(moment.held for moment in moments.values()) - max(moment.passing for moment in moments.values())
