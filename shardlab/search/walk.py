"""A walk over a program: how its values lie, and what is sent where they are needed otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from shardlab.search.laid import Dims, Laid, local_bytes
from shardlab.search.program import Op, Program
from shardlab.search.work import Compiler, Work


class Walk:
    """Where a walk over a program stands: how its values lie so far, and what was done for it.

    Attributes:
      at: how each value lies.
      place: of the operation that is walked.
      whole: what was gathered before.
      unstored: what is made by operations that are fused into what reads them.
      extra: by place, bytes that gathered copies take until the end of the program.
    """

    def __init__(self, program: Program, ins: Sequence[Laid], sizes: Mapping[str, int], compiler: Compiler) -> None:
        self.program, self.sizes, self.values, self.compiler = program, sizes, program.values, compiler
        self.at = {
            number: ins[number] if number < program.num_ins else Laid(((),) * len(value.shape))
            for number, value in enumerate(self.values)
        }
        self.work = Work()
        self.place = 0
        self.whole: dict[tuple[int, Dims], Laid] = {}
        self.unstored: set[int] = set()
        self.extra: dict[int, float] = {}

    def bytes(self, number: int) -> float:
        """That one device holds of a value."""
        return local_bytes(self.values[number], self.at[number].dims, self.sizes)

    def size(self, axes: Iterable[str]) -> int:
        """Devices of the axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def fits(self, number: int, dim: int, axes: tuple[str, ...]) -> bool:
        """Whether the axes can split a dim."""
        size = self.values[number].shape[dim]
        return size % self.size(axes) == 0 and size >= self.size(axes)

    def parts(self, number: int) -> int:
        """In how many it is cut."""
        return self.size(axis for axes in self.at[number].dims for axis in axes)

    def merged(self, numbers: Sequence[int]) -> Dims:
        """The dims of what several values of one shape make: each dim split as the value is that splits it the most."""
        ndim = len(self.values[numbers[0]].shape)
        used: set[str] = set()
        dims: list[tuple[str, ...]] = []
        # What is laid out already speaks before what is still to be summed.
        order = sorted(numbers, key=lambda number: (bool(self.at[number].partial), -self.parts(number)))
        for dim in range(ndim):
            axes: tuple[str, ...] = ()
            for number in order:
                mine = tuple(axis for axis in self.at[number].dims[dim] if axis not in used)
                if self.size(mine) > self.size(axes):
                    axes = mine
            dims.append(axes)
            used.update(axes)
        # An axis that another value has on another dim stays where the most split one has it.
        return tuple(dims)

    def lay(
        self, op: Op, dims: Dims, *, partial: tuple[str, ...] = (), itemsize: int = 0, weight: bool = False
    ) -> None:
        """Lays all that an operation makes alike."""
        for out in op.outs:
            self.at[out] = Laid(dims, partial, itemsize, weight)

    def summed(self, number: int, like: Dims | None = None) -> Laid:
        """A value whose parts have been summed; in shards where `like` is, if it lies so."""
        now = self.at[number]
        if not now.partial:
            return now
        value, dims = self.values[number], list(now.dims)
        scale = now.itemsize / value.itemsize if now.itemsize else 1.0
        payload = local_bytes(value, now.dims, self.sizes) * scale
        for axis in now.partial:
            where = next((dim for dim, axes in enumerate(like or ()) if axis in axes), None)
            if where is not None and self.fits(number, where, (*dims[where], axis)):
                self.work.send("reduce-scatter", (axis,), payload)
                dims[where] = (*dims[where], axis)
                payload /= self.sizes[axis]
            else:
                self.work.send("all-reduce", (axis,), payload)
        found = Laid(tuple(dims), weight=now.weight)
        self.at[number] = found
        return found

    def gathered(self, number: int, dims: Dims) -> Laid:
        """A value as `dims` has it: what splits it beyond that is gathered, what splits it less is cut for nothing."""
        now = self.summed(number, dims)
        if now.dims == dims:
            return now
        value = self.values[number]
        kept = tuple(tuple(axis for axis in have if axis in want) for have, want in zip(now.dims, dims, strict=True))
        if kept != now.dims:
            key = (number, kept)
            if key not in self.whole:
                self.whole[key] = Laid(kept, weight=now.weight)
                payload = local_bytes(value, kept, self.sizes)
                axes = tuple(
                    axis for have, keep in zip(now.dims, kept, strict=True) for axis in have if axis not in keep
                )
                moved = [axis for axis in axes if any(axis in want for want in dims)]
                if moved and len(moved) == len(axes):
                    # To another dim: each device keeps a part of what it has.
                    self.work.send("all-to-all", axes, local_bytes(value, now.dims, self.sizes))
                else:
                    self.work.send("all-gather", axes, payload)
                    self.extra[self.place] = self.extra.get(self.place, 0.0) + payload
        return Laid(dims, weight=now.weight)
