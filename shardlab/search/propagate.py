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

Here is the walk, with loops and branches; how single operations lie is in `operation_rules` and `product_rules`, what
is sent in `walk`, what is held in `liveness`.

Source of the rules: GSPMD (Xu et al. 2021, arXiv 2105.04663), Megatron-LM (arXiv 1909.08053, 2205.05198).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardlab.search.laid import Dims, Laid, local_bytes
from shardlab.search.liveness import live
from shardlab.search.operation_kinds import COUNTED, FUSED, LINEAR, PRODUCTS
from shardlab.search.operation_rules import RULES, elementwise
from shardlab.search.program import Op, Program
from shardlab.search.walk import Walk
from shardlab.search.work import Compiler, Work


def propagate(
    program: Program,
    ins: Sequence[Laid],
    sizes: Mapping[str, int],
    wanted: Sequence[Any] | None = None,
    *,
    compiler: Compiler | None = None,
    gradients: Sequence[int] = (),
    looped: bool = False,
) -> Work:
    """What one device does of `program`.

    Args:
      program: traced with whole shapes.
      ins: how its inputs lie.
      sizes: of the automatic axes.
      compiler: what is known of it.
      gradients: which of its results are gradients of weights, by place.
      looped: whether it is the body of a loop.
      wanted: for each result a function from its number of dims to how it is to lie; None: as it comes.

    >>> import jax, jax.numpy as jnp
    >>> from shardlab.search.laid import laid
    >>> from shardlab.search.program import flat
    >>> program = flat(jax.make_jaxpr(lambda w, v, x: jnp.tanh(x @ w) @ v)(
    ...     jnp.ones((8, 32)), jnp.ones((32, 8)), jnp.ones((4, 8))))
    >>> ins = [laid(2, {1: ("tensor",)}), laid(2, {0: ("tensor",)}), laid(2, {})]
    >>> work = propagate(program, ins, {"tensor": 4})
    >>> dict(work.flops), work.outs[0].partial
    ({'float32': 1024.0}, ('tensor',))
    """
    walk = Walk(program, ins, sizes, compiler or Compiler())
    inner: dict[int, float] = {}
    for place, op in enumerate(program.ops):
        walk.place = place
        inner[place] = _operation(walk, op)
    walk.place = len(program.ops)
    for out, lay in zip(program.outs, wanted or (), strict=False):
        if lay is not None and out >= 0:
            walk.at[out] = walk.gathered(out, lay(len(walk.values[out].shape)))
    walk.work.outs = tuple(walk.at[out] if out >= 0 else Laid(()) for out in program.outs)
    found = live(walk, inner, gradients=gradients, looped=looped)
    walk.work.live, walk.work.bare, walk.work.gathered = found.all, found.bare, found.gathered
    return walk.work


def _operation(walk: Walk, op: Op) -> float:
    """Lays what it makes; the bytes that it holds while it runs, of a loop those of an iteration."""
    if op.name == "scan":
        return _scan(walk, op)
    if op.bodies and op.name in ("while", "cond"):
        return _branches(walk, op)
    before = sum(walk.work.flops.values())
    RULES.get(op.name, elementwise)(walk, op)
    _move(walk, op, sum(walk.work.flops.values()) - before)
    return 0.0


def _move(walk: Walk, op: Op, flops: float) -> None:
    """Counts what an operation that does so many products reads and writes."""
    if op.name in FUSED:
        if op.name not in LINEAR or not walk.unstored.isdisjoint(op.ins):
            walk.unstored.update(op.outs)
    elif op.name not in COUNTED:
        size = sum(walk.bytes(number) for number in (*op.ins, *op.outs) if number >= 0)
        if op.name in PRODUCTS:
            # They are read while it computes; what takes longer is waited for.
            size = max(0.0, size - flops / walk.compiler.ridge) if walk.compiler.ridge else 0.0
            written = walk.unstored.intersection(op.ins)
            size += sum(walk.bytes(number) for number in written)
            walk.unstored -= written
        walk.work.moved += size


def _scan(walk: Walk, op: Op) -> float:
    constants, carried = op.params["counts"]
    (body,) = op.bodies[:1]
    inside = []
    for place, number in enumerate(op.ins):
        dims = walk.summed(number).dims if number >= 0 else ()
        sliced = place >= constants + carried
        if sliced and dims and dims[0]:
            dims = walk.gathered(number, ((), *dims[1:])).dims
        weight = number >= 0 and walk.at[number].weight
        inside.append(Laid(dims[1:] if sliced else dims, weight=weight))
    work = propagate(body, inside, walk.sizes, compiler=walk.compiler, looped=True)
    # What is carried goes on as it comes out; one more pass settles it.
    carry = [_settled(lay) for lay in work.outs[:carried]]
    if any(a.dims != b.dims for a, b in zip(carry, inside[constants : constants + carried], strict=True)):
        inside[constants : constants + carried] = carry
        work = propagate(body, inside, walk.sizes, compiler=walk.compiler, looped=True)
    outs = list(work.outs)
    length = op.params["length"]
    walk.work.add(work, length)
    for place, (out, lay) in enumerate(zip(op.outs, outs, strict=True)):
        if lay.partial:
            _sum_inside(walk, body, place, lay, length)
        settled = _settled(lay)
        dims = settled.dims if settled.dims or not walk.values[out].shape else ((),) * len(walk.values[out].shape)
        if place >= carried:
            dims = ((), *settled.dims)
        walk.at[out] = Laid(dims[: len(walk.values[out].shape)])
    return work.live


def _settled(lay: Laid) -> Laid:
    return Laid(lay.dims, weight=lay.weight)


def _sum_inside(walk: Walk, body: Program, place: int, lay: Laid, length: float) -> None:
    """A loop hands on whole sums."""
    number = body.outs[place]
    payload = local_bytes(body.values[number], lay.dims, walk.sizes) * length
    for axis in lay.partial:
        walk.work.send("all-reduce", (axis,), payload, length)


def _branches(walk: Walk, op: Op) -> float:
    """Of branches the costliest; a while loop runs once, since nothing says how often.

    A kernel for the platform states no products, and takes those of the plain operations; what it moves is its own.
    """
    held, least, kernel = 0.0, math.inf, walk.compiler.kernels and _by_platform(walk, op)
    for number in op.ins:
        if number >= 0:
            walk.summed(number)
    best: Work | None = None
    works: list[Work] = []
    for body in op.bodies:
        count = body.num_ins
        given = [walk.at[number] if number >= 0 else Laid(()) for number in op.ins[-count:]] if count else []
        if len(given) != count or any(len(lay.dims) != len(body.values[k].shape) for k, lay in enumerate(given)):
            given = [Laid(((),) * len(value.shape)) for value in body.values[:count]]
        work = propagate(body, given, walk.sizes, compiler=walk.compiler)
        works.append(work)
        held, least = (min if kernel else max)(held, work.live), min(least, work.moved)
        if best is None or sum(work.flops.values()) >= sum(best.flops.values()):
            best = work
    if best is not None:
        if kernel:
            best.moved = least
        walk.work.add(best, 1)
    for place, out in enumerate(op.outs):
        # What one branch makes zeros of, for another to keep, lies as that has it.
        whole: Dims = ((),) * len(walk.values[out].shape)
        lays = [work.outs[place].dims for work in works if len(work.outs) == len(op.outs)]
        split = (dims for dims in lays if len(dims) == len(whole))
        walk.at[out] = Laid(
            max(split, key=lambda dims: walk.size(axis for axes in dims for axis in axes), default=whole)
        )
    return held


def _by_platform(walk: Walk, op: Op) -> bool:
    return any(one.name == "platform_index" and set(one.outs) & set(op.ins[:1]) for one in walk.program.ops)
