"""What a model's parts cost a device, by how the automatic axes split them: tables that plans are priced from.

Everything is linear in the examples of a microbatch: a constant for the weights and a share for each example, from two
traces (`shardlab.search.parts`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from shardlab.module.model import Model
from shardlab.search.laid import Laid, laid, local_bytes
from shardlab.search.parts import ROWS, Part, Parts, Traced
from shardlab.search.propagate import propagate
from shardlab.search.work import Compiler, Work
from shardlab.sharding.rules import axes_of

Specs = Mapping[str, PartitionSpec]


@dataclass(frozen=True)
class Linear:
    """A number that grows with the examples: ``constant + share * rows``.

    >>> Linear(1.0, 2.0).at(3), (Linear(1.0, 2.0) + Linear(1.0, 0.0)).at(1)
    (7.0, 4.0)
    """

    constant: float = 0.0
    share: float = 0.0

    def at(self, rows: float) -> float:
        return self.constant + self.share * rows

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.constant + other.constant, self.share + other.share)

    def __sub__(self, other: Linear) -> Linear:
        return Linear(self.constant - other.constant, self.share - other.share)

    @staticmethod
    def through(few: float, many: float) -> Linear:
        """From what it is with `ROWS` examples and with twice as many."""
        share = (many - few) / ROWS
        return Linear(few - share * ROWS, share)


@dataclass(frozen=True)
class Cost:
    """What a device does in one run of a program.

    Attributes:
      flops: of products, by the dtype of what is multiplied.
      moved: bytes between memory and the cores, but for products.
      sends: (kind, axes) -> how often, and payload bytes.
      live, bare, gathered: bytes that it makes and holds at once: with all results; without those that are
        gradients of weights; without them and with the weights.
    """

    flops: Mapping[str, Linear]
    moved: Linear
    sends: Mapping[tuple[str, tuple[str, ...]], tuple[float, Linear]]
    live: Linear
    bare: Linear
    gathered: Linear

    def __add__(self, other: Cost) -> Cost:
        sends = dict(self.sends)
        for key, (count, payload) in other.sends.items():
            was = sends.get(key, (0.0, Linear()))
            sends[key] = was[0] + count, was[1] + payload
        flops = {
            dtype: self.flops.get(dtype, Linear()) + other.flops.get(dtype, Linear())
            for dtype in {**self.flops, **other.flops}
        }
        most = (max(getattr(self, name), getattr(other, name), key=lambda one: one.at(1)) for name in _HELD)
        return Cost(flops, self.moved + other.moved, sends, *most)


_HELD = ("live", "bare", "gathered")
NOTHING = Cost({}, Linear(), {}, Linear(), Linear(), Linear())


@dataclass(frozen=True)
class BlockCost:
    """What a block of one kind costs under one policy of remat.

    Attributes:
      forward, backward: of one microbatch.
      first: of a split backward, what the stage before waits for; the rest is the difference.
      kept: bytes that it keeps from one to the other, beside x.
      kept_x: bytes of x that it keeps, as x is kept.
      crossing: of a split backward, about what goes from one half to the other: cotangents of what products make.
    """

    forward: Cost
    backward: Cost
    first: Cost
    kept: Linear
    kept_x: Linear
    crossing: Linear


@dataclass(frozen=True)
class Split:
    """How the automatic axes split a model: the specs of its parameters, and of what flows between blocks.

    Attributes:
      sizes: of the automatic axes of more than one device.
      compute: by path, of one block of each kind and of what is outside blocks: only axes of `sizes`.
      flow, saved: of x between blocks, and where it is kept.
    """

    sizes: tuple[tuple[str, int], ...]
    compute: tuple[tuple[str, PartitionSpec], ...]
    flow: PartitionSpec
    saved: PartitionSpec


class Costs:
    """Costs of a model's parts, each found once.

    Args:
      parts: the parts, which are traced when they are first asked for.
      compiler: what is known of what they are compiled by.
    """

    def __init__(self, parts: Parts, compiler: Compiler | None = None) -> None:
        self.parts, self.compiler = parts, compiler or Compiler()
        self.ends = functools.cache(self._ends)
        self.block = functools.cache(self._block)
        self.flow_bytes = functools.cache(self._flow_bytes)

    @property
    def model(self) -> Model:
        return self.parts.model

    def _ends(self, name: str, split: Split, remat: str = "none") -> tuple[Cost, Cost]:
        """Of "before", "after" or the "whole" model: the forward; the backward, of the latter two with its forward."""
        pair = self.parts.pair(name, 0, remat)
        forward = self._cost(pair, split, lambda part: part.forward)
        backward = self._cost(pair, split, lambda part: part.backward)
        return forward[0], backward[0]

    def _block(self, kind: int, remat: str, split: Split) -> BlockCost:
        pair = self.parts.pair("block", kind, remat)
        forward, works = self._cost(pair, split, lambda part: part.forward)
        flow = split.flow
        kept_lays = [
            [
                lay if what == "kept" else Laid(_dims(flow, len(lay.dims), dict(split.sizes)))
                for lay, (what, _) in zip(work.outs, part.forward.outs, strict=True)
                if what.startswith("kept")
            ]
            for work, part in zip(works, pair, strict=True)
        ]
        backward, _ = self._cost(pair, split, lambda part: part.backward, kept_lays)
        first, _ = self._cost(pair, split, lambda part: part.backward, kept_lays, only="dx")
        kept, of_x = [], []
        for part, work in zip(pair, works, strict=True):
            program, sizes = part.forward.program, dict(split.sizes)
            held = {"kept": 0.0, "kept x": 0.0}
            seen: set[int] = set()
            for number, lay, (what, _) in zip(program.outs, work.outs, part.forward.outs, strict=True):
                if number in seen:
                    continue
                seen.add(number)
                if what == "kept" and number >= 0:
                    held["kept"] += local_bytes(program.values[number], lay.dims, sizes)
                elif what == "kept x" and number >= 0:
                    value = program.values[number]
                    held["kept x"] += local_bytes(value, _dims(split.saved, len(value.shape), sizes), sizes)
            kept.append(held["kept"])
            of_x.append(held["kept x"])
        return BlockCost(forward, backward, first, Linear.through(*kept), Linear.through(*of_x), backward.live)

    def _flow_bytes(self, split: Split) -> tuple[Linear, Linear]:
        """Bytes of x as it flows, and as it is kept."""
        sizes = dict(split.sizes)
        found = []
        for spec in (split.flow, split.saved):
            each = []
            for rows in (ROWS, 2 * ROWS):
                total = 0.0
                for leaf in jax.tree.leaves(self.parts.x(rows)):
                    parts = math.prod(sizes[a] for axes in _dims(spec, len(leaf.shape), sizes) for a in axes)
                    total += math.prod(leaf.shape) * leaf.dtype.itemsize / parts
                each.append(total)
            found.append(Linear.through(*each))
        return found[0], found[1]

    def _cost(
        self,
        pair: tuple[Part, Part],
        split: Split,
        which: Callable[[Part], Traced | None],
        kept: list[list[Laid]] | None = None,
        only: str = "",
    ) -> tuple[Cost, list[Work]]:
        works = []
        for place, part in enumerate(pair):
            traced = which(part)
            if traced is None:
                return NOTHING, []
            works.append(self._work(traced, split, kept[place] if kept else [], only))
        few, many = works
        flops = {
            dtype: Linear.through(few.flops.get(dtype, 0.0), many.flops.get(dtype, 0.0))
            for dtype in {**few.flops, **many.flops}
        }
        sends = {}
        for key in {**few.sends, **many.sends}:
            (count, a), (_, b) = few.sends.get(key, (0.0, 0.0)), many.sends.get(key, (0.0, 0.0))
            sends[key] = count, Linear.through(a, b)
        moved, *held = (Linear.through(getattr(few, name), getattr(many, name)) for name in ("moved", *_HELD))
        return Cost(flops, moved, sends, *held), works

    def work(self, part: Part, split: Split) -> Work:
        """Of one trace of a block under `full` remat, what its backward does."""
        assert part.backward is not None
        x = Laid(
            _dims(split.flow, len(part.forward.program.values[part.forward.program.outs[0]].shape), dict(split.sizes))
        )
        kept = [x for what, _ in part.backward.ins if what == "kept"]
        return self._work(part.backward, split, kept, "")

    def _work(self, traced: Traced, split: Split, kept: list[Laid], only: str) -> Work:
        """One propagation, from how the inputs lie to how the results must."""
        sizes, compute = dict(split.sizes), dict(split.compute)
        program = traced.program
        places = list(range(len(traced.outs)))
        if only:
            places = [place for place in places if traced.outs[place][0] == only]
            program = program.only(places)
        left = iter(kept)
        ins = []
        for value, (what, path) in zip(program.values, traced.ins, strict=False):
            ndim = len(value.shape)
            if what == "values":
                ins.append(Laid(_dims(compute.get(path, PartitionSpec()), ndim, sizes), weight=True))
            elif what in ("x", "dx"):
                ins.append(Laid(_dims(split.flow, ndim, sizes)))
            elif what == "kept":
                ins.append(next(left))
            else:
                ins.append(laid(ndim, {}))
        gradients = [number for number, place in enumerate(places) if traced.outs[place][0] == "gradient"]
        wanted = self._wanted(traced, split, only)
        return propagate(program, ins, sizes, wanted, compiler=self.compiler, gradients=gradients)

    def _wanted(self, traced: Traced, split: Split, only: str) -> list[Any]:
        """How each result is to lie, or None where it may lie as it comes."""
        sizes, compute = dict(split.sizes), dict(split.compute)
        wanted: list[Any] = []
        for what, path in traced.outs:
            if only and what != only:
                continue
            if what in ("x", "dx"):
                wanted.append(split.flow)
            elif what == "gradient":
                wanted.append(compute.get(path, PartitionSpec()))
            else:
                wanted.append(None)
        return [None if spec is None else (lambda ndim, spec=spec: _dims(spec, ndim, sizes)) for spec in wanted]


def _dims(spec: PartitionSpec, ndim: int, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    entries = [tuple(axis for axis in axes_of(entry) if axis in sizes) for entry in spec][:ndim]
    return (*entries, *(() for _ in range(ndim - len(entries))))
