"""The phases of a schedule's program: scans over iterations, in which every device runs its cells.

What the cells compute is in `shardlab.step.cells`; here is when they run, and what passes between devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardlab.hlo.loops import taken_name
from shardlab.pipeline.buffers import Phase, step_of
from shardlab.step.cells import Cells
from shardlab.step.region import check_rows, where_taken
from shardlab.step.slots import put


def train(cells: Cells, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]) -> dict[str, Any]:
    """One scan over the iterations of a phase."""
    if phase.first_step:
        slot = jnp.asarray(phase.first_slot, jnp.int32)[cells.stage_index]
        sent = _sent(cells, carry["outbox"], phase.first_step)
        carry = carry | {"mail": put(carry["mail"], sent, slot, slot >= 0)}

    def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], None]:
        return _iteration(cells, phase, carry, _own(row)), None

    return jax.lax.scan(body, carry, rows, length=phase.length)[0]


def _iteration(cells: Cells, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
    if phase.divergent:
        return _divergent(cells, phase, carry, row)
    if cells.program.delayed:
        return _travelling(cells, phase, carry, row)
    if "F" in phase.cell:
        carry, y = cells.forward(carry, row, cells.entering(phase, row))
        carry = cells.head(phase, carry, row, y)
        carry = carry | {"mail": _arrive(cells, carry["mail"], y, row["onward_slot"], step=1)}
    if "B" in phase.cell or "I" in phase.cell:
        carry, dx = cells.backward(carry, row, split="I" in phase.cell)
        carry = cells.finish(phase, carry, row, dx)
        carry = carry | {"mail": _arrive(cells, carry["mail"], dx, row["back_slot"], step=-1)}
    return cells.weights(carry, row) if "W" in phase.cell else carry


def _travelling(cells: Cells, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
    """An iteration in which what a part has made travels during the next one; the last one's stays in the outbox.

    What travels is put into its slot after the part beside it, which reads nothing of it, so that XLA may compute
    between the start and the end of the send.
    """
    made, step = carry["outbox"], step_of(phase.parts[-1])
    for part in phase.parts:
        sent, slot = _sent(cells, made, step) if step else None, row["onward_slot" if step > 0 else "back_slot"]
        if part == "F":
            carry, made = cells.forward(carry, row, cells.entering(phase, row))
            carry = cells.head(phase, carry, row, made)
        elif part == "W":
            carry = cells.weights(carry, row)
        elif part is not None:
            carry, made = cells.backward(carry, row, split=part == "I")
            carry = cells.finish(phase, carry, row, made)
        if sent is not None:
            sent, made, carry = _after(sent, made, carry)
            carry = carry | {"mail": put(carry["mail"], sent, slot, slot >= 0)}
        step = step_of(part)
    return carry | {"outbox": made} if step else carry


def _divergent(cells: Cells, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
    """Each device its own cell, in a branch; what spans devices before and after it."""
    sent = [_sent(cells, carry["outbox"], step) for step in (1, -1)] if cells.program.delayed else None
    x = cells.entering(phase, row)
    out = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cells.x)
    by_kind: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]]] = {
        "F": (("residuals", "auxiliary"), lambda carry: cells.forward(carry, row, x)),
        "B": (("layer", "rest"), lambda carry: cells.backward(carry, row, split=False)),
        "I": (("cuts", "rest"), lambda carry: cells.backward(carry, row, split=True)),
        "W": (("layer",), lambda carry: (cells.weights(carry, row), out)),
    }
    for index, kind in enumerate(phase.cell):
        written, cell = by_kind[kind]
        state = {name: carry[name] for name in written}, out
        with _named_cell(kind, [column.count(index) for column in zip(*phase.kind, strict=True)], phase.length):
            state = where_taken(row["kind"] == index, _chosen(cell, written, carry), state)
        carry, out = carry | state[0], state[1]
    carry = cells.head(phase, carry, row, out)
    carry = cells.finish(phase, carry, row, out)
    if sent is None:
        mail = _arrive(cells, carry["mail"], out, row["onward_slot"], step=1)
        mail = _arrive(cells, mail, out, row["back_slot"], step=-1)
    else:
        sent, out, carry = _after(sent, out, carry)
        mail, carry = carry["mail"], carry | {"outbox": out}
        for arrived, slot in zip(sent, (row["onward_slot"], row["back_slot"]), strict=True):
            mail = put(mail, arrived, slot, slot >= 0)
    return carry | {"mail": put(mail, out, row["local_slot"], row["local_slot"] >= 0)}


def evaluate(
    cells: Cells, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]
) -> tuple[dict[str, Any], Any]:
    """The forwards of a phase; of a phase with a head, y of every iteration [length, r, ...] or its loss."""

    def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
        mine = _own(row)
        carry, y = cells.forward(carry, mine, cells.entering(phase, mine))
        out = None
        if phase.head != "never":
            examples, _, count = cells.microbatch(mine["head_microbatch"], share=cells.dealt)
            out = cells.calls.after({**cells.rest, **cells.fixed}, cells.handed(y), examples, None, count)
            if cells.calls.has_loss:
                total, weight = cells.calls.loss(out, examples)
                carry, out = cells.count(carry, total, weight, mine["head_microbatch"] >= 0), None
            else:
                check_rows(out, count)
        mail = _arrive(cells, carry["mail"], y, mine["onward_slot"], step=1)
        if phase.divergent:
            mail = _arrive(cells, mail, y, mine["back_slot"], step=-1)
            mail = put(mail, y, mine["local_slot"], mine["local_slot"] >= 0)
        return carry | {"mail": mail}, out

    return jax.lax.scan(body, carry, rows, length=phase.length)


def _arrive(cells: Cells, buffer: Any, value: Any, slot: jax.Array, step: int) -> Any:
    """Send `value` one stage on (or back), round the ring, and put what arrives into `slot`."""
    if cells.region.stage is None:
        return buffer
    return put(buffer, _sent(cells, value, step), slot, slot >= 0)


def _sent(cells: Cells, value: Any, step: int) -> Any:
    """What the device `step` before this one on the ring holds as `value`."""
    count = cells.region.num_stages
    ring = [(i, (i + step) % count) for i in range(count)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, cells.region.stage, ring), value)


def _after(sent: Any, made: Any, carry: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The same, where what was sent is not used before what a part has made is there.

    Else XLA may fuse its put into a slot with reads of other slots, on which the next part waits.
    """
    sent, made, mail = jax.lax.optimization_barrier((sent, made, carry["mail"]))
    return sent, made, carry | {"mail": mail}


def _named_cell(kind: str, times: list[int], of: int) -> contextlib.AbstractContextManager[None]:
    """Names a branch that each device takes so many times of `of`, as collectives are counted: if all take it alike."""
    same = len(set(times)) == 1
    return jax.named_scope(taken_name(kind, times[0], of)) if same else contextlib.nullcontext()


def _chosen(
    cell: Callable[[dict[str, Any]], tuple[dict[str, Any], Any]], written: tuple[str, ...], carry: dict[str, Any]
) -> Callable[[Any], Any]:
    """What runs a cell: of (what it writes, what it sends)."""

    def do(state: tuple[dict[str, Any], Any]) -> tuple[dict[str, Any], Any]:
        new, made = cell(carry | state[0])
        return {name: new[name] for name in written}, made

    return do


def _own(row: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """This device's part of a row of a phase's tables."""
    return {name: value[0] if value.ndim else value for name, value in row.items()}
