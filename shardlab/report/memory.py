"""The memory of a compiled step on one device, as the compiler reports it before anything has run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from shardlab.plan.text import human_bytes


class HasMemoryAnalysis(Protocol):
    """What is asked of a compiled step; `jax.stages.Compiled` has it."""

    def memory_analysis(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      argument_bytes: what is handed in: the state and the batch.
      output_bytes: what is handed back, donated arguments included.
      alias_bytes: outputs that live where a donated argument was; these take no memory of their own.
      temp_bytes: everything in between: activations, gradients, communication buffers.
      code_bytes: the program.
      peak_bytes: the most that is there at once but for the program; 0 where the compiler does not say.

    >>> print(Memory(4096, 4096, 4096, 1536, 0))
    arguments       4.0 KiB
    outputs         4.0 KiB
    of them alias   4.0 KiB
    temporaries     1.5 KiB
    code                0 B
    total           5.5 KiB
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    peak_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All that is reported of a step: arguments + temporaries + outputs that alias nothing + code.

        XLA:TPU reports more than it needs (`shardlab.search.beyond`).
        """
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes + self.code_bytes

    def to_json(self) -> dict[str, int]:
        """The fields and the total, by name."""
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes}

    @classmethod
    def from_json(cls, fields: Mapping[str, int]) -> Memory:
        """The record `to_json` came from."""
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields})

    def __str__(self) -> str:
        rows = (
            ("arguments", self.argument_bytes),
            ("outputs", self.output_bytes),
            ("of them alias", self.alias_bytes),
            ("temporaries", self.temp_bytes),
            ("code", self.code_bytes),
            ("total", self.total_bytes),
        )
        return "\n".join(f"{name:<14}{human_bytes(size):>9}" for name, size in rows)


def memory(compiled: HasMemoryAnalysis) -> Memory:
    """The memory of a compiled function, per device.

    Raises:
      ValueError: the backend gives no memory analysis.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("the backend gives no memory analysis; compile for cpu, tpu or gpu to have one")
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        peak_bytes=stats.peak_memory_in_bytes,
    )
