"""What one device does of a traced program whose inputs lie in shards: operations, memory traffic, what it sends.

A value lies as its spec says, axes by dim, over the automatic axes of a mesh; what an operation makes lies as what it
is made of. Where an axis splits a dim that is summed, every device has a part of a sum, and the sum is

    taken at once     all-reduce, where the next operation needs it whole
    kept in parts     reduce-scatter, where what it meets next lies in shards of that axis
    waited for        where it is only added to another part of a sum: one collective for both, as XLA:GPU and XLA:TPU
                      merge them and XLA:CPU does not (`Compiler.merges`)

and a value that an operation needs otherwise than it lies is gathered, once for all that need it so. Of two dims that
one axis would split, a weight keeps it; else the one that is not summed over. This is less than GSPMD knows (it looks
ahead too) and is what it does for the common ways to cut a layer: `tests/search/test_propagate.py` compares both.

Elementwise operations are taken to be fused into what reads them: they move no memory and hold none, but what they are
made of stays until then. What is held at once is the sum of what is made and not yet read for the last time.

Source of the rules: GSPMD (Xu et al. 2021, arXiv 2105.04663), Megatron-LM (arXiv 1909.08053, 2205.05198).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardlab.search.program import Op, Program, Value

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Laid:
    """How a value lies.

    Attributes:
      dims: the axes that split each dim.
      partial: the axes over whose devices it is still to be summed.
      itemsize: bytes of a number in which that sum is taken.
      weight: whether it is a parameter, or one in another form.
    """

    dims: Dims
    partial: tuple[str, ...] = ()
    itemsize: int = 0
    weight: bool = False


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
      live: the most bytes that it has made and not used up at once.
      outs: how its results lie.
    """

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    moved: float = 0.0
    sends: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = field(default_factory=dict)
    live: float = 0.0
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


def propagate(
    program: Program,
    ins: Sequence[Laid],
    sizes: Mapping[str, int],
    wanted: Sequence[Any] | None = None,
    *,
    compiler: Compiler | None = None,
) -> Work:
    """What one device does of `program`.

    Args:
      program: traced with whole shapes.
      ins: how its inputs lie.
      sizes: of the automatic axes.
      compiler: what is known of it.
      wanted: for each result a function from its number of dims to how it is to lie; None: as it comes.

    >>> import jax, jax.numpy as jnp
    >>> from shardlab.search.program import flat
    >>> program = flat(jax.make_jaxpr(lambda w, v, x: jnp.tanh(x @ w) @ v)(
    ...     jnp.ones((8, 32)), jnp.ones((32, 8)), jnp.ones((4, 8))))
    >>> ins = [laid(2, {1: ("tensor",)}), laid(2, {0: ("tensor",)}), laid(2, {})]
    >>> work = propagate(program, ins, {"tensor": 4})
    >>> dict(work.flops), work.outs[0].partial
    ({'float32': 1024.0}, ('tensor',))
    """
    return _Walk(program, sizes, compiler or Compiler()).run(ins, wanted)


def laid(ndim: int, dims: Mapping[int, tuple[str, ...]], *, weight: bool = False) -> Laid:
    """A value of `ndim` dims, some of them split.

    >>> laid(2, {1: ("tensor",)}).dims
    ((), ('tensor',))
    """
    return Laid(tuple(tuple(dims.get(dim, ())) for dim in range(ndim)), weight=weight)


def local_bytes(value: Value, dims: Dims, sizes: Mapping[str, int]) -> float:
    """Bytes that one device holds of a value."""
    return value.bytes / math.prod(sizes[axis] for axes in dims for axis in axes)


_SUMS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
# What XLA computes where it is read.
_FUSED = frozenset(
    {
        *[
            "add",
            "sub",
            "mul",
            "div",
            "rem",
            "neg",
            "sign",
            "floor",
            "ceil",
            "round",
            "exp",
            "exp2",
            "log",
            "log1p",
            "expm1",
            "tanh",
            "logistic",
            "sin",
            "cos",
            "tan",
            "pow",
        ],
        *[
            "integer_pow",
            "sqrt",
            "rsqrt",
            "cbrt",
            "square",
            "abs",
            "max",
            "min",
            "and",
            "or",
            "not",
            "xor",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "select_n",
            "clamp",
        ],
        *[
            "convert_element_type",
            "bitcast_convert_type",
            "is_finite",
            "erf",
            "erfc",
            "erf_inv",
            "add_any",
            "copy",
            "copy_p",
            "name",
        ],
        *[
            "stop_gradient",
            "broadcast_in_dim",
            "iota",
            "reshape",
            "squeeze",
            "expand_dims",
            "transpose",
            "rev",
            "slice",
            "pad",
        ],
        *["sharding_constraint", "optimization_barrier", "reduce_precision", "shift_left", "shift_right_logical"],
        *[
            "shift_right_arithmetic",
            "real",
            "imag",
            "conj",
            "complex",
            "random_wrap",
            "random_unwrap",
            "random_bits",
            "threefry2x32",
        ],
        *[
            "random_fold_in",
            "nextafter",
            "mul_any",
            "zeros_like",
            "dynamic_slice",
            "mesh_cast",
            "pvary",
            "split",
            "concatenate",
        ],
    }
)
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
_COUNTED = frozenset({"gather", "scatter", "scatter-add", "scatter_add"})  # by their rules: they touch a part
_LINEAR = frozenset({"neg", "convert_element_type", "reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p"})
_LINEAR |= {"name", "optimization_barrier", "reduce_precision"}
_JOINED = frozenset({"add", "add_any", "sub"})


class _Walk:
    """One walk over a program."""

    def __init__(self, program: Program, sizes: Mapping[str, int], compiler: Compiler) -> None:
        self.program, self.sizes, self.values, self.compiler = program, sizes, program.values, compiler
        self.at: dict[int, Laid] = {}
        self.work = Work()
        self.whole: dict[tuple[int, Dims], Laid] = {}  # gathered before
        self.unstored: set[int] = set()  # made by operations that are fused into what reads them
        self.extra: dict[int, float] = {}  # by op, bytes that gathered copies take until the end of the program

    def run(self, ins: Sequence[Laid], wanted: Sequence[Any] | None = None) -> Work:
        program = self.program
        for number in range(len(self.values)):
            if number < program.num_ins:
                self.at[number] = ins[number]
            else:
                self.at[number] = Laid(((),) * len(self.values[number].shape))
        inner: dict[int, float] = {}
        for place, op in enumerate(program.ops):
            inner[place] = self._operation(place, op)
        nothing = Laid(())
        self.place = len(program.ops)
        for out, lay in zip(program.outs, wanted or (), strict=False):
            if lay is not None and out >= 0:
                self.at[out] = self.gathered(out, lay(len(self.values[out].shape)))
        self.work.outs = tuple(self.at[out] if out >= 0 else nothing for out in program.outs)
        self.work.live = self._live(inner)
        return self.work

    # One operation.

    def _operation(self, place: int, op: Op) -> float:
        """Lays what it makes; the bytes that it holds while it runs, of a loop those of an iteration."""
        self.place = place
        name = op.name
        if name == "scan":
            return self._scan(op)
        if op.bodies and name in ("while", "cond"):
            return self._branches(op)
        before = sum(self.work.flops.values())
        rule = _RULES.get(name)
        if rule is not None:
            rule(self, op)
        elif name in _SUMS:
            self._reduce(op)
        else:
            self._elementwise(op)
        if name in _FUSED:
            if name not in _LINEAR or not self.unstored.isdisjoint(op.ins):
                self.unstored.update(op.outs)
        elif name not in _COUNTED:
            size = sum(self._bytes(number) for number in (*op.ins, *op.outs) if number >= 0)
            if name in _PRODUCTS:
                # They are read while it computes; what takes longer is waited for.
                done = sum(self.work.flops.values()) - before
                size = max(0.0, size - done / self.compiler.ridge) if self.compiler.ridge else 0.0
                written = self.unstored.intersection(op.ins)
                size += sum(self._bytes(number) for number in written)
                self.unstored -= written
            self.work.moved += size
        return 0.0

    def _bytes(self, number: int) -> float:
        return local_bytes(self.values[number], self.at[number].dims, self.sizes)

    def _size(self, axes: Iterable[str]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def _fits(self, number: int, dim: int, axes: tuple[str, ...]) -> bool:
        size = self.values[number].shape[dim]
        return size % self._size(axes) == 0 and size >= self._size(axes)

    # Moves.

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
            if where is not None and self._fits(number, where, (*dims[where], axis)):
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

    # Rules.

    def _set(
        self, op: Op, dims: Dims, *, partial: tuple[str, ...] = (), itemsize: int = 0, weight: bool = False
    ) -> None:
        for out in op.outs:
            self.at[out] = Laid(dims, partial, itemsize, weight)

    def _elementwise(self, op: Op) -> None:
        ins = [number for number in op.ins if number >= 0]
        out = op.outs[0]
        shape = self.values[out].shape
        full = [number for number in ins if self.values[number].shape == shape]
        if not full or any(self.values[other].shape != shape for other in op.outs):
            self._unknown(op, ins)
            return
        lays = [self.at[number] for number in full]
        parts = {lay.partial for lay in lays}
        one = len(parts) == 1 and lays[0].partial
        if one and (
            (op.name in _LINEAR and len(ins) == 1)
            or (self.compiler.merges and op.name in _JOINED and len(full) == len(ins) == len(op.ins))
        ):
            dims = self._merged(full)
            for number in full:
                if self.at[number].dims != dims:
                    self.summed(number)
            if all(self.at[number].partial for number in full):
                size = max(lay.itemsize for lay in lays)
                self._set(op, dims, partial=lays[0].partial, itemsize=size, weight=False)
                return
        dims = self._merged(full)
        for number in full:
            self.gathered(number, dims)
        for number in ins:
            if number not in full:
                self.summed(number)
        self._set(op, dims, weight=all(self.at[number].weight for number in full))

    def _merged(self, numbers: Sequence[int]) -> Dims:
        """The dims of what several values of one shape make: each dim split as the value is that splits it the most."""
        ndim = len(self.values[numbers[0]].shape)
        used: set[str] = set()
        dims: list[tuple[str, ...]] = []
        # What is laid out already speaks before what is still to be summed.
        order = sorted(numbers, key=lambda number: (bool(self.at[number].partial), -self._parts(number)))
        for dim in range(ndim):
            axes: tuple[str, ...] = ()
            for number in order:
                mine = tuple(axis for axis in self.at[number].dims[dim] if axis not in used)
                if self._size(mine) > self._size(axes):
                    axes = mine
            dims.append(axes)
            used.update(axes)
        # An axis that another value has on another dim stays where the most split one has it.
        return tuple(dims)

    def _parts(self, number: int) -> int:
        return self._size(axis for axes in self.at[number].dims for axis in axes)

    def _unknown(self, op: Op, ins: Sequence[int]) -> None:
        """An operation of which nothing is known: its inputs are whole; a leading dim that lasts keeps its split."""
        first = next((number for number in ins if self.values[number].shape), None)
        for out in op.outs:
            shape = self.values[out].shape
            dims: list[tuple[str, ...]] = [()] * len(shape)
            if first is not None and shape and self.values[first].shape[0] == shape[0]:
                dims[0] = self.at[first].dims[0]
            self.at[out] = Laid(tuple(dims))
        for number in ins:
            now = self.at[number].dims
            keep = tuple(
                axes if dim == 0 and first is not None and axes == self.at[first].dims[0] else ()
                for dim, axes in enumerate(now)
            )
            self.gathered(number, keep)

    def _constraint(self, op: Op) -> None:
        spec = getattr(op.params["sharding"], "spec", ())
        (number,) = op.ins
        dims: list[tuple[str, ...]] = [()] * len(self.values[number].shape)
        for dim, entry in enumerate(spec):
            axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            if not isinstance(entry, str | tuple) and entry is not None:  # unconstrained
                axes = self.at[number].dims[dim]
            dims[dim] = tuple(axis for axis in axes if self.sizes.get(axis, 1) > 1)
        found = self.gathered(number, tuple(dims))
        self._set(op, tuple(dims), weight=found.weight)

    def _dot(self, op: Op) -> None:
        left, right = op.ins
        (lc, rc), (lb, rb) = op.params["dimension_numbers"]
        lhs, rhs = self.summed(left), self.summed(right)
        ldims, rdims = list(lhs.dims), list(rhs.dims)
        lfree = [dim for dim in range(len(ldims)) if dim not in (*lc, *lb)]
        rfree = [dim for dim in range(len(rdims)) if dim not in (*rc, *rb)]
        for a, b in (*zip(lb, rb, strict=True), *zip(lc, rc, strict=True)):
            if ldims[a] != rdims[b]:
                # Cut the one that is whole; of two that are cut otherwise the more finely cut stays.
                axes = max(ldims[a], rdims[b], key=self._size)
                ldims[a] = rdims[b] = axes
        for axis in {axis for axes in (*ldims, *rdims) for axis in axes}:
            self._one_place(axis, (lhs, ldims, lc, lb, lfree), (rhs, rdims, rc, rb, rfree))
        self.gathered(left, tuple(ldims))
        self.gathered(right, tuple(rdims))
        partial = tuple(dict.fromkeys(axis for dim in lc for axis in ldims[dim]))
        dims = tuple([ldims[dim] for dim in lb] + [ldims[dim] for dim in lfree] + [rdims[dim] for dim in rfree])
        (out,) = op.outs
        self.at[out] = Laid(dims, partial, self.values[out].itemsize)
        terms = math.prod(self.values[left].shape[dim] for dim in lc) * math.prod(self.values[out].shape)
        share = self._size(axis for axes in dims for axis in axes) * self._size(partial)
        wide = 4 if self.values[out].dtype.startswith("complex") else 1
        self.work.flops[self.values[left].dtype] += 2.0 * wide * terms / share

    def _one_place(self, axis: str, *sides: Any) -> None:
        """Of the dims of a product that an axis would split, all but one are whole."""
        (lhs, ldims, lc, lb, lfree), (rhs, rdims, rc, _, rfree) = sides
        free = [
            (side, dim)
            for side, dims, places in ((0, ldims, lfree), (1, rdims, rfree))
            for dim in places
            if axis in dims[dim]
        ]
        summed = [dim for dim in range(len(lc)) if axis in ldims[lc[dim]]]
        joint = [dim for dim in range(len(lb)) if axis in ldims[lb[dim]]]
        if len(free) + len(summed) + len(joint) < 2:
            return

        def drop(entries: list[tuple[str, ...]], dim: int) -> None:
            entries[dim] = tuple(one for one in entries[dim] if one != axis)

        def drop_free(one: tuple[int, int]) -> None:
            drop((ldims, rdims)[one[0]], one[1])

        if joint:
            for one in free:
                drop_free(one)
            for place in summed:
                drop(ldims, lc[place])
                drop(rdims, rc[place])
            return
        weights = (lhs.weight, rhs.weight)
        heavy = [one for one in free if weights[one[0]]]
        if summed and free and not heavy:
            # A weight that is summed over its split dim stays as it lies.
            (place,) = summed[:1]
            holder = lhs if lhs.weight and axis in lhs.dims[lc[place]] else rhs
            if holder.weight and axis in holder.dims[(lc if holder is lhs else rc)[place]]:
                for one in free:
                    drop_free(one)
                return
        keep = heavy[0] if heavy else free[-1] if free else None
        if keep is None:
            return
        for one in free:
            if one != keep:
                drop_free(one)
        for place in summed:
            drop(ldims, lc[place])
            drop(rdims, rc[place])

    def _reduce(self, op: Op) -> None:
        numbers = [number for number in op.ins if number >= 0]
        axes = op.params["axes"]
        for number in numbers:
            self.summed(number)
        now = self.at[numbers[0]]
        partial = tuple(axis for dim in axes for axis in now.dims[dim])
        dims = tuple(entry for dim, entry in enumerate(now.dims) if dim not in axes)
        size = self.values[op.outs[0]].itemsize
        for out in op.outs:
            self.at[out] = Laid(dims, partial, size)
            if partial and op.name != "reduce_sum":
                self.summed(out)

    def _transpose(self, op: Op) -> None:
        now = self.at[op.ins[0]]
        dims = tuple(now.dims[dim] for dim in op.params["permutation"])
        self._set(op, dims, partial=now.partial, itemsize=now.itemsize, weight=now.weight)

    def _broadcast(self, op: Op) -> None:
        number = op.ins[0]
        shape = self.values[op.outs[0]].shape
        dims: list[tuple[str, ...]] = [()] * len(shape)
        if number >= 0:
            now = self.summed(number)
            for dim, to in enumerate(op.params["broadcast_dimensions"]):
                if self.values[number].shape[dim] == shape[to]:
                    dims[to] = now.dims[dim]
        self._set(op, tuple(dims), weight=number >= 0 and self.at[number].weight)

    def _reshape(self, op: Op) -> None:
        number = op.ins[0]
        now = self.at[number]
        given, made = self.values[number].shape, self.values[op.outs[0]].shape
        dims: list[tuple[str, ...]] = [()] * len(made)
        keep = [()] * len(given)  # type: list[tuple[str, ...]]
        for ins, outs in _groups(given, made):
            first_in = next((dim for dim in ins if given[dim] > 1), None)
            first_out = next((dim for dim in outs if made[dim] > 1), None)
            if first_in is None or first_out is None:
                continue
            axes = now.dims[first_in]
            while axes and made[first_out] % self._size(axes):
                axes = axes[:-1]
            keep[first_in], dims[first_out] = axes, axes
            # A dim behind whole ones of the same sizes keeps its own.
            for a, b in zip(ins[1:], outs[1:], strict=False):
                if [given[dim] for dim in ins[: ins.index(a) + 1]] == [made[dim] for dim in outs[: outs.index(b) + 1]]:
                    keep[a], dims[b] = now.dims[a], now.dims[a]
        if tuple(keep) != now.dims:
            self.gathered(number, tuple(keep))
            now = Laid(tuple(keep), weight=now.weight)
        self._set(op, tuple(dims), partial=now.partial, itemsize=now.itemsize, weight=now.weight)

    def _squeeze(self, op: Op) -> None:
        now = self.at[op.ins[0]]
        gone = op.params["dimensions"]
        dims = tuple(axes for dim, axes in enumerate(now.dims) if dim not in gone)
        self._set(op, dims, partial=now.partial, itemsize=now.itemsize, weight=now.weight)

    def _expand(self, op: Op) -> None:
        now, new = self.at[op.ins[0]], op.params["dimensions"]
        old = iter(now.dims)
        dims = tuple(() if dim in new else next(old) for dim in range(len(self.values[op.outs[0]].shape)))
        self._set(op, dims, partial=now.partial, itemsize=now.itemsize, weight=now.weight)

    def _along(self, op: Op) -> None:
        """Operations that keep dims in place and need those whole whose size they change, or along which they go."""
        numbers = [number for number in op.ins if number >= 0 and self.values[number].shape]
        out = self.values[op.outs[0]].shape
        along = {op.params[key] for key in ("axis", "dimension") if isinstance(op.params.get(key), int)}
        same = [number for number in numbers if len(self.values[number].shape) == len(out)]
        if not same:
            self._unknown(op, numbers)
            return
        for number in same:
            self.summed(number)
        dims = list(self._merged(same))
        for dim in range(len(out)):
            if dim in along or any(self.values[number].shape[dim] != out[dim] for number in same):
                dims[dim] = ()
        for number in same:
            self.gathered(number, tuple(dims))
        for made in op.outs:
            self.at[made] = Laid(tuple(dims), weight=all(self.at[number].weight for number in same))

    def _gather(self, op: Op) -> None:
        operand, indices = op.ins[:2]
        numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
        table, places = self.summed(operand), self.summed(indices)
        shape = self.values[operand].shape
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        sliced = [dim for dim in range(len(shape)) if dim not in gone]
        dims: list[tuple[str, ...]] = [()] * len(self.values[op.outs[0]].shape)
        keep: list[tuple[str, ...]] = [()] * len(shape)
        for dim, to in zip(sliced, numbers.offset_dims, strict=True):
            if sizes[dim] == shape[dim]:
                dims[to] = keep[dim] = table.dims[dim]
        used = {axis for axes in dims for axis in axes}
        batch = [dim for dim in range(len(dims)) if dim not in numbers.offset_dims]
        for dim, to in zip(range(len(places.dims) - 1), batch, strict=False):
            dims[to] = tuple(axis for axis in places.dims[dim] if axis not in used)
        # Rows that lie elsewhere count as zeros, and are summed.
        picked = [dim for dim in numbers.collapsed_slice_dims if dim in numbers.start_index_map]
        partial = tuple(axis for dim in picked for axis in table.dims[dim])
        for dim in picked:
            keep[dim] = table.dims[dim]
        self.gathered(operand, tuple(keep))
        self._set(op, tuple(dims), partial=partial, itemsize=self.values[op.outs[0]].itemsize)
        self.work.moved += 2 * self._bytes(op.outs[0])

    def _scatter(self, op: Op) -> None:
        operand, indices, updates = op.ins[:3]
        numbers = op.params["dimension_numbers"]
        now = self.summed(updates)
        if operand >= 0:
            self.summed(operand)
        if indices >= 0:
            self.summed(indices)
        shape, mine = self.values[op.outs[0]].shape, self.values[updates].shape
        gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
        windows = [dim for dim in range(len(shape)) if dim not in gone]
        dims: list[tuple[str, ...]] = [()] * len(shape)
        for dim, source in zip(windows, numbers.update_window_dims, strict=True):
            if mine[source] == shape[dim]:
                dims[dim] = now.dims[source]
        partial = tuple(
            axis for dim, axes in enumerate(now.dims) if dim not in numbers.update_window_dims for axis in axes
        )
        self._set(op, tuple(dims), partial=partial, itemsize=self.values[op.outs[0]].itemsize)
        self.work.moved += 3 * self._bytes(updates)

    def _convolution(self, op: Op) -> None:
        left, right = op.ins
        lhs, rhs = self.summed(left), self.summed(right)
        given, kernel, out = op.params["dimension_numbers"]
        batch, summed, made = lhs.dims[given[0]], lhs.dims[given[1]], rhs.dims[kernel[0]]
        made = tuple(axis for axis in made if axis not in batch)
        inner = rhs.dims[kernel[1]] or summed
        inner = tuple(axis for axis in inner if axis not in (*batch, *made))
        ldims: list[tuple[str, ...]] = [()] * len(lhs.dims)
        rdims: list[tuple[str, ...]] = [()] * len(rhs.dims)
        ldims[given[0]], ldims[given[1]], rdims[kernel[0]], rdims[kernel[1]] = batch, inner, made, inner
        self.gathered(left, tuple(ldims))
        self.gathered(right, tuple(rdims))
        dims: list[tuple[str, ...]] = [()] * len(self.values[op.outs[0]].shape)
        dims[out[0]], dims[out[1]] = batch, made
        self._set(op, tuple(dims), partial=inner, itemsize=self.values[op.outs[0]].itemsize)
        terms = math.prod(self.values[right].shape) // self.values[right].shape[kernel[0]]
        share = self._size((*batch, *made, *inner))
        self.work.flops[self.values[left].dtype] += 2.0 * terms * math.prod(self.values[op.outs[0]].shape) / share

    # Programs inside.

    def _scan(self, op: Op) -> float:
        constants, carried = op.params["counts"]
        (body,) = op.bodies[:1]
        inside = []
        for place, number in enumerate(op.ins):
            dims = self.summed(number).dims if number >= 0 else ()
            sliced = place >= constants + carried
            if sliced and dims and dims[0]:
                dims = self.gathered(number, ((), *dims[1:])).dims
            weight = number >= 0 and self.at[number].weight
            inside.append(Laid(dims[1:] if sliced else dims, weight=weight))
        work = propagate(body, inside, self.sizes, compiler=self.compiler)
        # What is carried goes on as it comes out; one more pass settles it.
        carry = [self._settled(lay) for lay in work.outs[:carried]]
        if any(a.dims != b.dims for a, b in zip(carry, inside[constants : constants + carried], strict=True)):
            inside[constants : constants + carried] = carry
            work = propagate(body, inside, self.sizes, compiler=self.compiler)
        outs = list(work.outs)
        length = op.params["length"]
        self.work.add(work, length)
        for place, (out, lay) in enumerate(zip(op.outs, outs, strict=True)):
            if lay.partial:
                self._sum_inside(body, place, lay, length)
            settled = self._settled(lay)
            dims = settled.dims if settled.dims or not self.values[out].shape else ((),) * len(self.values[out].shape)
            if place >= carried:
                dims = ((), *settled.dims)
            self.at[out] = Laid(dims[: len(self.values[out].shape)])
        return work.live

    def _settled(self, lay: Laid) -> Laid:
        return Laid(lay.dims, weight=lay.weight)

    def _sum_inside(self, body: Program, place: int, lay: Laid, length: float) -> None:
        """A loop hands on whole sums."""
        number = body.outs[place]
        payload = local_bytes(body.values[number], lay.dims, self.sizes) * length
        for axis in lay.partial:
            self.work.send("all-reduce", (axis,), payload, length)

    def _branches(self, op: Op) -> float:
        """Of branches the costliest; a while loop runs once, since nothing says how often.

        A kernel for the platform states no products, and takes those of the plain operations; what it moves is its own.
        """
        held, least = 0.0, math.inf
        for number in op.ins:
            if number >= 0:
                self.summed(number)
        best: Work | None = None
        for body in op.bodies:
            count = body.num_ins
            given = [self.at[number] if number >= 0 else Laid(()) for number in op.ins[-count:]] if count else []
            if len(given) != count or any(len(lay.dims) != len(body.values[k].shape) for k, lay in enumerate(given)):
                given = [Laid(((),) * len(value.shape)) for value in body.values[:count]]
            work = propagate(body, given, self.sizes, compiler=self.compiler)
            held, least = max(held, work.live), min(least, work.moved)
            if best is None or sum(work.flops.values()) >= sum(best.flops.values()):
                best = work
        if best is not None:
            if self.compiler.kernels and self._by_platform(op):
                best.moved = least
            self.work.add(best, 1)
        for place, out in enumerate(op.outs):
            shape = self.values[out].shape
            dims: Dims = ((),) * len(shape)
            if best is not None and len(best.outs) == len(op.outs) and len(best.outs[place].dims) == len(shape):
                dims = best.outs[place].dims
            self.at[out] = Laid(dims)
        return held

    def _by_platform(self, op: Op) -> bool:
        return any(one.name == "platform_index" and set(one.outs) & set(op.ins[:1]) for one in self.program.ops)

    # What is held at once.

    def _live(self, inner: Mapping[int, float]) -> float:
        ops, end = self.program.ops, len(self.program.ops)
        roots: dict[int, frozenset[int]] = {}
        given = set(range(self.program.num_ins))
        readers: dict[int, int] = defaultdict(int)  # of a value made by fused operations, products that read it
        for op in ops:
            if op.name in ("dot_general", "conv_general_dilated", "scan"):
                for number in set(op.ins):
                    readers[number] += 1
        last: dict[int, int] = {}
        made_at: dict[int, int] = {}
        for place, op in enumerate(ops):
            used = frozenset().union(*(roots.get(number, frozenset({number})) for number in op.ins if number >= 0))
            for number in used:
                last[number] = place
            fused = op.name in _FUSED
            for out in op.outs:
                stored = not fused or readers[out] > 1
                roots[out] = frozenset({out}) if stored else used
                if stored:
                    made_at[out] = place
                    last[out] = max(last.get(out, place), place)
        for out in self.program.outs:
            for number in roots.get(out, ()):
                last[number] = end
        events = [0.0] * (end + 3)
        for number, place in made_at.items():
            if number not in given:
                size = self._bytes(number)
                events[place] += size
                # What is fused writes where it reads.
                until = last[number]
                in_place = (
                    until < end
                    and ops[until].name in _FUSED
                    and any(made_at.get(out) == until for out in ops[until].outs)
                )
                events[until + (0 if in_place and until > place else 1)] -= size
        for place, size in self.extra.items():
            events[place] += size
        most = now = 0.0
        for place in range(end):
            now += events[place]
            most = max(most, now + inner.get(place, 0.0))
        return most


def _groups(given: Sequence[int], made: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Dims of two shapes of one size that stand for each other, in runs as short as can be.

    >>> _groups((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    groups = []
    i = j = 0
    while i < len(given) or j < len(made):
        ins, outs, left, right = [], [], 1, 1
        if i < len(given):
            ins, left, i = [i], given[i], i + 1
        if j < len(made):
            outs, right, j = [j], made[j], j + 1
        while left != right:
            if left < right and i < len(given):
                ins, left, i = [*ins, i], left * given[i], i + 1
            elif j < len(made):
                outs, right, j = [*outs, j], right * made[j], j + 1
            else:
                break
        groups.append((ins, outs))
    return groups


_RULES: dict[str, Any] = {
    "sharding_constraint": _Walk._constraint,
    "dot_general": _Walk._dot,
    "conv_general_dilated": _Walk._convolution,
    "transpose": _Walk._transpose,
    "broadcast_in_dim": _Walk._broadcast,
    "reshape": _Walk._reshape,
    "squeeze": _Walk._squeeze,
    "expand_dims": _Walk._expand,
    "gather": _Walk._gather,
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add"), _Walk._scatter),
    **dict.fromkeys(
        ("concatenate", "pad", "slice", "dynamic_slice", "dynamic_update_slice", "split", "rev", "sort"), _Walk._along
    ),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k"), _Walk._along),
}
