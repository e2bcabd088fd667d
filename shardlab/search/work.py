"""What one device does of a program, and what that depends on of its compiler."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from shardlab.search.laid import Laid


@dataclass(frozen=True)
class Compiler:
    """What is known of a compiler and of the chip that it compiles for.

    Attributes:
      merges: whether it makes one sum of two that are added; XLA:CPU does not.
      kernels: whether it takes the kernels that a program has beside plain operations (XLA:TPU).
      ridge: operations that the chip does in the time of a byte of its memory; 0 where that is not known.
    """

    merges: bool = True
    kernels: bool = False
    ridge: float = 0.0


@dataclass
class Work:
    """What one device does.

    Attributes:
      flops: of products and convolutions, by the dtype of what is multiplied.
      moved: bytes read from memory and written to it; of products those that they wait for.
      sends: collectives, by kind and axes: how often, and their payload in all (see `shardlab.hlo.collectives`).
      live, bare, gathered: the most bytes that it has made and not used up at once: with all results, without the
        gradients of weights, and without them and with the weights (`shardlab.search.liveness.Live`).
      outs: how its results lie.
    """

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    moved: float = 0.0
    sends: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = field(default_factory=dict)
    live: float = 0.0
    bare: float = 0.0
    gathered: float = 0.0
    outs: tuple[Laid, ...] = ()

    def send(self, kind: str, axes: tuple[str, ...], payload: float, count: float = 1) -> None:
        was = self.sends.get((kind, axes), (0.0, 0.0))
        self.sends[kind, axes] = was[0] + count, was[1] + payload

    def add(self, other: Work, times: float) -> None:
        for dtype, flops in other.flops.items():
            self.flops[dtype] += flops * times
        self.moved += other.moved * times
        for (kind, axes), (count, payload) in other.sends.items():
            self.send(kind, axes, payload * times, count * times)
