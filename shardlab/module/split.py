"""A function cut in two: what its first results need, and the rest from the values that cross the cut.

The backward of a block gives the cotangent of its input, which the stage before waits for, and the gradients of its
weights, which nobody waits for. Its program is traced, and its equations are dealt out:

    first     those that the first results are computed from
    second    those that only the others need
    cut       what first computes and second reads: it is stored from one to the other, nothing is computed twice

Calls (jit, remat) are opened before. A scan that computes some of both is two scans: the first hands out, step by
step, what its body's second half reads. Other programs inside (a branch, a while loop, a manual region) are not
opened: where one computes some of both, all of it is in the first.

Source of the idea: zero-bubble pipelines (Qi et al., 2023, arXiv 2401.10241) split each layer by hand; slicing the
traced program needs no change to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Literal

from shardlab.module.initialise import apply_equation
from shardlab.module.inner import CALLS, program_of, scan_counts


class Split:
    """`function` of ``(kept, passing) -> (first results, second results)`` as two functions.

    Args:
      function: of two pytrees of arrays.
      kept: arrays, or their shapes, that the second function is given again.
      passing: arrays, or their shapes, that only the first is given.

    >>> def both(w, x):
    ...     return 2 * x, x * w
    >>> split = Split(both, jax.numpy.ones(3), jax.numpy.ones(3))
    >>> first, cut = split.first(jax.numpy.ones(3), jax.numpy.arange(3.0))
    >>> first.tolist(), split.second(jax.numpy.full(3, 5.0), cut).tolist()
    ([0.0, 2.0, 4.0], [0.0, 5.0, 10.0])
    """

    def __init__(self, function: Callable[[Any, Any], tuple[Any, Any]], kept: Any, passing: Any) -> None:
        flat, treedef = jax.tree.flatten((kept, passing))

        def opened(*leaves: Any) -> list[Any]:
            return _open(closed.jaxpr, closed.consts, leaves)

        closed, out = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(treedef, leaves)), return_shape=True)(
            *flat
        )
        program = jax.make_jaxpr(opened)(*(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat))
        self._jaxpr, self._consts = program.jaxpr, program.consts
        self._outs = [jax.tree.structure(part) for part in out]
        self._num_first = len(jax.tree.leaves(out[0]))
        needed = [index < self._num_first for index in range(len(self._jaxpr.outvars))]
        wanted = [not yes for yes in needed]
        self._halves = _halves(self._jaxpr, needed, wanted, set(self._jaxpr.invars[len(jax.tree.leaves(kept)) :]))

    def first(self, kept: Any, passing: Any) -> tuple[Any, Any]:
        """The first results, and the cut."""
        values = self._values([*jax.tree.leaves(kept), *jax.tree.leaves(passing)])
        cut = self._halves.run_first(values)
        outs = self._jaxpr.outvars[: self._num_first]
        return jax.tree.unflatten(self._outs[0], [_read(values, var) for var in outs]), cut

    def second(self, kept: Any, cut: Any) -> Any:
        """The second results."""
        values = self._values(jax.tree.leaves(kept))
        self._halves.run_second(values, cut)
        outs = self._jaxpr.outvars[self._num_first :]
        return jax.tree.unflatten(self._outs[1], [_read(values, var) for var in outs])

    def _values(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        values = dict(zip(self._jaxpr.constvars, self._consts, strict=True))
        return values | dict(zip(self._jaxpr.invars, leaves, strict=False))


def _open(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """What a program gives, its calls opened."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for equation in jaxpr.eqns:
        inputs = [_read(values, var) for var in equation.invars]
        name = equation.primitive.name
        outputs: Sequence[Any]
        if name in CALLS:
            inner = equation.params[CALLS[name]]
            # A remat's program is not closed over constants.
            outputs = _open(program_of(inner), getattr(inner, "consts", ()), inputs)
        elif name == "scan":
            outputs = _open_scan(equation, inputs)
        else:
            with equation.ctx.manager:
                outputs = apply_equation(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [_read(values, var) for var in jaxpr.outvars]


def _open_scan(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """What a scan gives, the calls in its body opened."""
    params = equation.params
    body, (consts, carried) = params["jaxpr"], scan_counts(equation)

    def step(carry: Any, sliced: Any) -> tuple[list[Any], list[Any]]:
        outputs = _open(body.jaxpr, body.consts, (*inputs[:consts], *carry, *sliced))
        return outputs[:carried], outputs[carried:]

    start, slices = list(inputs[consts : consts + carried]), list(inputs[consts + carried :])
    last, made = jax.lax.scan(
        step, start, slices, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*last, *made]


def _read(values: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, Literal) else values[var]


def _variables(variables: Iterable[Any]) -> list[Any]:
    return [var for var in variables if not isinstance(var, Literal)]


@dataclass(frozen=True)
class _Halves:
    """The equations of each half, in order; those of a divided scan are in both.

    Attributes:
      reads: of the program's inputs, those that the second half reads.
      needs: of the program's inputs, those that the first half reads.
    """

    first: tuple[Any, ...]
    second: tuple[Any, ...]
    scans: dict[int, _Scan]
    cut: tuple[Any, ...]
    reads: frozenset[Any]
    needs: frozenset[Any]

    def run_first(self, values: dict[Any, Any]) -> Any:
        """Adds to `values` what the first half computes; the cut."""
        inner = []
        for equation in self.first:
            scan = self.scans.get(id(equation))
            if scan is None:
                _compute(equation, values)
            else:
                inner.append(scan.run_first(values))
        return tuple(values[var] for var in self.cut), tuple(inner)

    def run_second(self, values: dict[Any, Any], cut: Any) -> None:
        """Adds to `values` what the second half computes."""
        own, inner = cut
        values.update(zip(self.cut, own, strict=True))
        of_scan = dict(zip((id(equation) for equation in self.first if id(equation) in self.scans), inner, strict=True))
        for equation in self.second:
            scan = self.scans.get(id(equation))
            if scan is None:
                _compute(equation, values)
            else:
                scan.run_second(values, of_scan[id(equation)])


def _compute(equation: Any, values: dict[Any, Any]) -> None:
    with equation.ctx.manager:
        outputs = apply_equation(equation, [_read(values, var) for var in equation.invars])
    values.update(zip(equation.outvars, outputs, strict=True))


def _halves(jaxpr: Any, needed: Sequence[bool], wanted: Sequence[bool], passing: set[Any]) -> _Halves:
    """A program's halves.

    Args:
      needed: which results are first ones.
      wanted: which are second ones.
      passing: the inputs that the second half is not given again.
    """
    live = set(_variables(var for var, yes in zip(jaxpr.outvars, needed, strict=True) if yes))
    chosen: dict[int, list[bool]] = {}  # of an equation of the first half, which outputs it is there for
    for equation in reversed(jaxpr.eqns):
        outputs = [var in live for var in equation.outvars]
        if any(outputs):
            chosen[id(equation)] = outputs
            scan = equation.primitive.name == "scan"
            live.update(_scan_needs(equation, outputs) if scan else _variables(equation.invars))
    needs = frozenset(live & set(jaxpr.invars))

    read = set(_variables(var for var, yes in zip(jaxpr.outvars, wanted, strict=True) if yes))
    second: list[Any] = []
    scans: dict[int, _Scan] = {}
    for equation in reversed(jaxpr.eqns):
        outputs = [var in read for var in equation.outvars]
        if not any(outputs):
            continue
        if id(equation) not in chosen:
            second.append(equation)
            read.update(_variables(equation.invars))
        elif equation.primitive.name == "scan":
            scan = _scan(equation, chosen[id(equation)], outputs)
            if scan is not None:
                scans[id(equation)] = scan
                second.append(equation)
                read.update(scan.outer_reads)
    made = {var for equation in jaxpr.eqns if id(equation) in chosen for var in equation.outvars}
    made -= {var for scan in scans.values() for var in scan.second_outputs}
    order = [*jaxpr.invars, *(var for equation in jaxpr.eqns for var in equation.outvars)]
    return _Halves(
        first=tuple(equation for equation in jaxpr.eqns if id(equation) in chosen),
        second=tuple(reversed(second)),
        scans=scans,
        cut=tuple(var for var in order if var in read and (var in made or var in passing)),
        reads=frozenset(read & set(jaxpr.invars)),
        needs=needs,
    )


def _scan_carries(equation: Any, outputs: Sequence[bool]) -> tuple[list[bool], frozenset[Any]]:
    """Which results of the body the first half needs, and which of its inputs it reads, for some of the scan's."""
    body, (consts, carried) = equation.params["jaxpr"].jaxpr, scan_counts(equation)
    needed = list(outputs)
    while True:
        needs = _halves(body, needed, [False] * len(needed), set()).needs
        grown = [yes or body.invars[consts + i] in needs for i, yes in enumerate(needed[:carried])] + needed[carried:]
        if grown == needed:
            return needed, needs
        needed = grown


def _scan_needs(equation: Any, outputs: Sequence[bool]) -> list[Any]:
    """What a scan's first half reads."""
    needed, needs = _scan_carries(equation, outputs)
    body, (consts, carried) = equation.params["jaxpr"], scan_counts(equation)
    kept = [var in needs for var in body.jaxpr.invars]
    kept[consts : consts + carried] = needed[:carried]
    return _variables(var for var, yes in zip(equation.invars, kept, strict=True) if yes)


def _scan(equation: Any, outputs: Sequence[bool], wanted: Sequence[bool]) -> _Scan | None:
    """A scan as two, or None where the first half computes all that is wanted of it."""
    params = equation.params
    body, (consts, carried) = params["jaxpr"].jaxpr, scan_counts(equation)
    needed, _ = _scan_carries(equation, outputs)
    if all(yes for yes, want in zip(needed, wanted, strict=True) if want):
        return None
    carries = body.invars[consts : consts + carried]
    others = [want and not yes for want, yes in zip(wanted, needed, strict=True)]
    while True:  # what the second half carries it may need for itself alone
        halves = _halves(body, needed, others, {var for var, yes in zip(carries, needed, strict=False) if yes})
        grown = [
            other or (not needed[i] and carries[i] in halves.reads) if i < carried else other
            for i, other in enumerate(others)
        ]
        if grown == others:
            return _Scan(equation, tuple(needed), tuple(others), halves)
        others = grown


@dataclass(frozen=True)
class _Scan:
    """A scan as two over the same steps.

    Attributes:
      needed: by result of the body, whether the first scan computes it.
      others: by result of the body, whether the second does.
      halves: of the body.
    """

    equation: Any
    needed: tuple[bool, ...]
    others: tuple[bool, ...]
    halves: _Halves

    @property
    def second_outputs(self) -> list[Any]:
        """The scan's results that the second computes."""
        return [var for var, yes in zip(self.equation.outvars, self.others, strict=True) if yes]

    @property
    def outer_reads(self) -> list[Any]:
        """What the second scan reads outside its body: constants, slices, and where its carries start."""
        consts, carried = scan_counts(self.equation)

        def read(place: int, inner: Any) -> bool:
            if consts <= place < consts + carried:
                return self.others[place - consts]
            return inner in self.halves.reads

        pairs = zip(self.equation.invars, self._body.invars, strict=True)
        return _variables(var for place, (var, inner) in enumerate(pairs) if read(place, inner))

    @property
    def _body(self) -> Any:
        return self.equation.params["jaxpr"].jaxpr

    def run_first(self, values: dict[Any, Any]) -> Any:
        return self._run(values, self.needed, self.halves.needs, None)

    def run_second(self, values: dict[Any, Any], cut: Any) -> None:
        self._run(values, self.others, self.halves.reads, cut)

    def _run(self, values: dict[Any, Any], results: Sequence[bool], reads: frozenset[Any], cut: Any) -> Any:
        """One of the two scans; the first gives the cut, step by step."""
        params, body = self.equation.params, self._body
        (consts, carried), first = scan_counts(self.equation), cut is None
        inner, outer = body.invars, self.equation.invars
        carries = [i for i in range(carried) if results[i]]
        slices = [i for i in range(consts + carried, len(inner)) if inner[i] in reads]
        fixed = {inner[i]: _read(values, outer[i]) for i in range(consts) if inner[i] in reads}
        fixed |= dict(zip(body.constvars, params["jaxpr"].consts, strict=True))

        def step(carry: Any, at: Any) -> Any:
            sliced, crossing = at
            now = {**fixed, **dict(zip((inner[consts + i] for i in carries), carry, strict=True))}
            now |= dict(zip((inner[i] for i in slices), sliced, strict=True))
            handed = None
            if first:
                handed = self.halves.run_first(now)
            else:
                self.halves.run_second(now, crossing)
            new = [_read(now, body.outvars[i]) for i in carries]
            made = [_read(now, body.outvars[i]) for i in range(carried, len(results)) if results[i]]
            return new, (made, handed)

        start = [_read(values, outer[consts + i]) for i in carries]
        xs = [_read(values, outer[i]) for i in slices], cut
        last, (made, handed) = jax.lax.scan(
            step, start, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        values.update(zip((self.equation.outvars[i] for i in carries), last, strict=True))
        stacked = [self.equation.outvars[i] for i in range(carried, len(results)) if results[i]]
        values.update(zip(stacked, made, strict=True))
        return handed
