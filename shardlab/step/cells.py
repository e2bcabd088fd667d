"""What a device does in one tick of a pipeline: the F, B, I and W cells, the head, and what passes between them.

In a uniform phase every device runs every cell; where the table has nothing for it the result is masked, never
branched on, so any collective is legal inside a block. In a divergent phase every device takes the branch of its own
cell, and what concerns all of them (before, head, sends) stands outside. Garbage is masked with `where`, not
multiplied: it may be NaN.

Legend: M microbatches, P devices of the stage axis, V virtual stages of each, R repeats of a run of blocks, Q kinds in
its pattern, K slots of a stage for blocks of one kind, b examples of a microbatch on a shard.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from shardlab.hlo.loops import taken_name
from shardlab.module.model import computed
from shardlab.module.residuals import BlockVjp, differentiable
from shardlab.module.split import Split
from shardlab.pipeline.buffers import Phase, Program, When, step_of
from shardlab.plan.layout import policy_within_stage
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls
from shardlab.step.region import Region, check_rows, rows_of, tree_where
from shardlab.step.stage_arrays import StageArrays, leaves_out
from shardlab.step.state import storage_specs

Arrays = dict[str, Any]


class Slot(NamedTuple):
    """Where a stage is among its blocks."""

    place: jax.Array
    """Among the stage's slots for blocks of that kind."""
    stored: jax.Array
    """The same, among those of all virtual stages of the device."""
    block: jax.Array
    """The number of the block in the model."""
    used: jax.Array
    """Whether this stage holds a block there."""
    always: bool
    """Whether every stage does."""


class Cells:
    """One trace of the region: the constants of the step, and the cells as functions of a carry.

    Args:
      values: trained arrays as they are computed with, this device's stage of those in blocks.
      buffers: the others.
      batch: this shard's examples.
      key_data: of the step's key; None to evaluate, without dropout.
      where: this device's place: ``shard`` [1], ``stage`` [1], ``blocks`` and ``used`` by run [1, V, R, Q].
      fill: what buffers hold at first.
    """

    def __init__(
        self,
        plan: Plan,
        region: Region,
        calls: Calls,
        arrays: StageArrays,
        program: Program,
        values: Arrays,
        buffers: Arrays,
        batch: Any,
        key_data: jax.Array | None,
        where: dict[str, jax.Array],
        fill: float,
    ) -> None:
        self.region, self.calls, self.batch, self.key_data, self.fill = region, calls, batch, key_data, fill
        self.arrays, self.inner, kinds = arrays, arrays.inner, range(len(arrays.kinds))
        compute = storage_specs(plan, "compute")
        self.specs = {name: region.automatic_part(compute[name]) for name in values}
        self.gather, self.sharded = plan.gather == "layer", plan.accumulate == "sharded"
        # Outside blocks: which parts read what adds up in pieces, by its name.
        self.pieces = {p.path: p.read_by for p in plan.parameters if p.path in values and plan.in_pieces(p)}
        self.state_specs = storage_specs(plan, "state")

        def by_kind(stored: Arrays) -> list[Arrays]:
            """By kind of block, arrays of blocks by what a block calls them."""
            mine = {arrays.inner[name]: value for name, value in stored.items() if name in arrays.inner}
            return [{inner: value for (of, inner), value in mine.items() if of == kind} for kind in kinds]

        # Of one layer.
        self.layer_specs = {
            which: by_kind({name: PartitionSpec(*spec[1:]) for name, spec in storage_specs(plan, which).items()})
            for which in ("storage", "compute", "state")
        }
        self.stack_specs, self.layers, self.frozen = by_kind(self.specs), by_kind(values), by_kind(buffers)
        self.rest = {name: value for name, value in values.items() if name not in arrays.inner}
        self.fixed = {name: value for name, value in buffers.items() if name not in arrays.inner}
        self.rows = plan.microbatch_rows
        self.first_row = where["shard"][0] * (plan.batch_size // region.shards)
        self.stage_index = where["stage"][0]
        schedule = program.schedule
        self.program, self.virtual = program, schedule.num_virtual
        self.last_device = schedule.device_of(schedule.num_stages - 1)
        self.is_first, self.is_last = self.stage_index == 0, self.stage_index == self.last_device
        self.blocks, self.used = ([run[0] for run in where[name]] for name in ("blocks", "used"))
        self.shared, self.vocabulary = calls.shared, frozenset(plan.vocabulary)
        # Whether the stages share the examples after the blocks too; otherwise all of them have all, and each a part of
        # the vocabulary, or one of them the head.
        self.dealt = self.shared and not self.vocabulary
        self.share_rows = self.rows // region.num_stages if self.shared else self.rows
        self.wide = jnp.float64 if plan.dtype == "float64" else jnp.float32
        self.has_context_gradient = self._context_depends()
        self.recomputes = policy_within_stage(plan.remat) is not None
        self.skips = leaves_out(plan, region)
        self.vjps = [
            BlockVjp(self._block_of(kind), policy, context=self.has_context_gradient)
            for kind, (_, policy) in enumerate(arrays.kinds)
        ]

    # What a microbatch is on this device.

    def microbatch(self, index: jax.Array, share: bool) -> tuple[Any, Any, int]:
        """Its examples, its key (or None) and their number; this stage's share of them if `share`."""
        start = jnp.maximum(index, 0) * self.rows
        rows = self.rows
        if share and self.shared:
            rows, start = self.share_rows, start + self.stage_index * self.share_rows
        key = None if self.key_data is None else (self.key_data, self.first_row + start)
        return rows_of(self.batch, start, rows), key, rows

    def context(self, rest: Arrays, index: jax.Array) -> Any:
        examples, key, rows = self.microbatch(index, share=False)
        return self.calls.context({**rest, **self.fixed}, examples, key, rows)

    def _context_depends(self) -> bool:
        """Whether the context is a function of parameters, so that it has a gradient."""
        closed = jax.make_jaxpr(lambda rest: differentiable(self.context(rest, jnp.int32(0))))(self.rest)
        used: set[Any] = {var for var in closed.jaxpr.outvars if not isinstance(var, Literal)}
        for equation in reversed(closed.jaxpr.eqns):
            if used & set(equation.outvars):
                used |= {var for var in equation.invars if not isinstance(var, Literal)}
        return bool(used & set(closed.jaxpr.invars))

    def _block_of(self, kind: int) -> Callable[..., tuple[Any, Any]]:
        """A block of that kind: ``(layer, x, c, extra) -> (x, auxiliary)``."""
        own, _ = self.arrays.kinds[kind]
        return lambda layer, x, c, extra: self.calls.block(own, layer, x, c, extra, self.rows)

    def through(
        self, do: Callable[[int, Any, Slot], Any], state: Any, virtual: jax.Array, *, back: bool = False
    ) -> Any:
        """`state` after `do` of (kind, state, slot) for every slot of a stage, one after another; or from the last."""
        runs = list(enumerate(self.arrays.runs))
        for index, run in reversed(runs) if back else runs:
            places, everywhere = self.arrays.places[index], self.arrays.used[index].all(axis=(0, 1, 2))
            blocks, used = (
                rows[0] if self.virtual == 1 else self.take(rows, virtual)
                for rows in (self.blocks[index], self.used[index])
            )
            room = jnp.asarray([self.arrays.room(kind) for kind in run.kinds], jnp.int32)
            stored = places if self.virtual == 1 else jnp.maximum(virtual, 0) * room + places

            def body(state: Any, at: Any, run: Any = run, everywhere: Any = everywhere) -> tuple[Any, None]:
                order = list(enumerate(run.kinds))
                for place, kind in reversed(order) if back else order:
                    mine, stored, block, used = (column[place] for column in at)
                    state = do(kind, state, Slot(mine, stored, block, used, always=bool(everywhere[place])))
                return state, None

            state, _ = jax.lax.scan(body, state, (places, stored, blocks, used), reverse=back)
        return state

    def where_used(self, slot: Slot, do: Callable[[], Any]) -> Any:
        """What `do` gives; in a slot without a block zeros or garbage of these shapes."""
        if slot.always or not self.skips:
            return do()
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(do))
        return _where_taken(slot.used, lambda _: do(), nothing)

    def layer_of(self, kind: int, slot: jax.Array) -> tuple[Arrays, Arrays]:
        """The arrays of a block, whole over the batch axes: trained, and the others."""
        take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False)  # noqa: E731
        layer = jax.tree.map(take, self.layers[kind])
        if self.gather:
            layer = self.region.gathered(layer, self.layer_specs["storage"][kind])
        return layer, jax.tree.map(take, self.frozen[kind])

    def accumulated(self, kind: int, dlayer: Arrays) -> Arrays:
        """A block's gradients as they are added up: this shard's sum, or of all shards this shard's piece."""
        wide = {name: value.astype(self._wide_of(value)) for name, value in dlayer.items()}
        if not self.sharded:
            return wide
        axes = dict.fromkeys(wide, self.region.batch)
        return self.region.reduced(wide, axes, self.layer_specs["compute"][kind], self.layer_specs["state"][kind])

    # Buffers.

    def allocate(self) -> dict[str, Any]:
        """The carry at first: buffers of the program's slots, accumulators, sums. To evaluate: mail and sums only."""
        table, zero = self.program, jnp.int32(0)
        self.x = jax.eval_shape(lambda: self._before(self.rest, zero, share=False))

        def laid(value: jax.Array, spec: PartitionSpec) -> jax.Array:
            # What a scan carries keeps the layout it starts with.
            return jax.lax.with_sharding_constraint(value, spec)

        flow = PartitionSpec(None, *self.calls.flow_spec)
        carry: dict[str, Any] = {
            "mail": jax.tree.map(lambda leaf: laid(self._empty(leaf, table.num_mail_slots), flow), self.x),
            "sum": jnp.zeros((), self.wide),
            "weight": jnp.zeros((), self.wide),
            "auxiliary": (jnp.zeros((), self.wide), jnp.zeros((), self.wide)),
            "residuals": (),
        }
        if table.delayed:
            one = PartitionSpec(*self.calls.flow_spec)
            carry["outbox"] = jax.tree.map(lambda leaf: laid(self._empty(leaf), one), self.x)
        if self.key_data is None:
            return carry

        c = jax.eval_shape(lambda: self.context(self.rest, zero))
        self.residuals: list[Any] = []
        self.splits: list[Split] = []
        cuts: list[Any] = []
        pieces: list[Arrays] = []
        for kind, vjp in enumerate(self.vjps):
            layer, frozen = jax.eval_shape(lambda kind=kind: self.layer_of(kind, zero))
            extra = frozen, zero, self.key_data, zero
            kept = jax.eval_shape(lambda *args, vjp=vjp: vjp.forward(*args)[1], layer, self.x, c, extra)
            self.residuals.append(kept)
            if table.split:
                split = Split(functools.partial(self._block_backward, kind), (kept, layer, c, extra), self.x)
                self.splits.append(split)
                cut = jax.eval_shape(lambda *args, split=split: split.first(*args)[1], (kept, layer, c, extra), self.x)
                # What was computed again for I is kept for W.
                cuts.append((cut, kept if self.recomputes else ()))
            pieces.append(jax.eval_shape(functools.partial(self.accumulated, kind), layer))
        whole = {name: self.rest[name] for name in self.pieces}
        rest_pieces = jax.eval_shape(lambda: self.reduced_now(whole, jnp.bool_(True)))
        if self.recomputes:
            entered = jax.tree.map(lambda leaf: laid(self._empty(leaf, table.num_residual_slots), flow), self.x)
        return carry | {
            "residuals": entered if self.recomputes else self._of_blocks(self.residuals, table.num_residual_slots),
            "cuts": self._of_blocks(cuts, table.num_cut_slots),
            "layer": [
                {
                    inner: laid(self._accumulator(piece, self.virtual * self.arrays.room(kind)), specs[inner])
                    for inner, piece in mine.items()
                }
                for kind, (mine, specs) in enumerate(zip(pieces, self.stack_specs, strict=True))
            ],
            "rest": {
                name: laid(self._accumulator(rest_pieces.get(name, self.rest[name])), spec)
                for name, spec in self.specs.items()
                if name not in self.inner
            },
        }

    def _of_blocks(self, leaves: list[Any], slots: int) -> list[Any]:
        """By kind, buffers for what is kept of every block in a slot."""

        def of(kind: int, mine: Any) -> Any:
            return jax.tree.map(lambda leaf: self._empty(leaf, slots, self.arrays.room(kind)), mine)

        return [of(kind, mine) for kind, mine in enumerate(leaves)]

    def _accumulator(self, value: Any, *leading: int) -> jax.Array:
        return jnp.zeros((*leading, *value.shape), self._wide_of(value))

    def _wide_of(self, value: Any) -> str:
        return computed(value.dtype, jnp.dtype(self.wide).name)

    def _empty(self, leaf: Any, *leading: int) -> jax.Array:
        fill = self.fill if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return jnp.full((*leading, *leaf.shape), fill, leaf.dtype)

    def _block_backward(self, kind: int, kept: Any, dy: Any) -> tuple[Any, Any]:
        """What the stage before waits for, then the gradients of the weights."""
        stored, layer, c, extra = kept
        dlayer, dx, dc = self.vjps[kind].backward(stored, layer, c, extra, dy)
        return (dx, dc), dlayer

    # Phases.

    def train(self, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]) -> dict[str, Any]:
        """One scan over the iterations of a phase."""
        if phase.first_step:
            slot = jnp.asarray(phase.first_slot, jnp.int32)[self.stage_index]
            sent = self.sent(carry["outbox"], phase.first_step)
            carry = carry | {"mail": self.put(carry["mail"], sent, slot, slot >= 0)}

        def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], None]:
            return self._iteration(phase, carry, _own(row)), None

        return jax.lax.scan(body, carry, rows, length=phase.length)[0]

    def _iteration(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
        if phase.divergent:
            return self._divergent(phase, carry, row)
        if self.program.delayed:
            return self._travelling(phase, carry, row)
        if "F" in phase.cell:
            carry, y = self.forward(carry, row, self.entering(phase, row))
            carry = self.head(phase, carry, row, y)
            carry = carry | {"mail": self.arrive(carry["mail"], y, row["onward_slot"], step=1)}
        if "B" in phase.cell or "I" in phase.cell:
            carry, dx = self.backward(carry, row, split="I" in phase.cell)
            carry = self.finish(phase, carry, row, dx)
            carry = carry | {"mail": self.arrive(carry["mail"], dx, row["back_slot"], step=-1)}
        return self.weights(carry, row) if "W" in phase.cell else carry

    def _travelling(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
        """An iteration in which what a part has made travels during the next one; the last one's stays in the outbox.

        What travels is put into its slot after the part beside it, which reads nothing of it, so that XLA may compute
        between the start and the end of the send.
        """
        made, step = carry["outbox"], step_of(phase.parts[-1])
        for part in phase.parts:
            sent, slot = self.sent(made, step) if step else None, row["onward_slot" if step > 0 else "back_slot"]
            if part == "F":
                carry, made = self.forward(carry, row, self.entering(phase, row))
                carry = self.head(phase, carry, row, made)
            elif part == "W":
                carry = self.weights(carry, row)
            elif part is not None:
                carry, made = self.backward(carry, row, split=part == "I")
                carry = self.finish(phase, carry, row, made)
            if sent is not None:
                sent, made, carry = self.after(sent, made, carry)
                carry = carry | {"mail": self.put(carry["mail"], sent, slot, slot >= 0)}
            step = step_of(part)
        return carry | {"outbox": made} if step else carry

    def _divergent(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
        """Each device its own cell, in a branch; what spans devices before and after it."""
        sent = [self.sent(carry["outbox"], step) for step in (1, -1)] if self.program.delayed else None
        x = self.entering(phase, row)
        out = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.x)
        cells: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]]] = {
            "F": (("residuals", "auxiliary"), lambda carry: self.forward(carry, row, x)),
            "B": (("layer", "rest"), lambda carry: self.backward(carry, row, split=False)),
            "I": (("cuts", "rest"), lambda carry: self.backward(carry, row, split=True)),
            "W": (("layer",), lambda carry: (self.weights(carry, row), out)),
        }
        for index, kind in enumerate(phase.cell):
            written, cell = cells[kind]

            state = {name: carry[name] for name in written}, out
            with _named_cell(kind, [column.count(index) for column in zip(*phase.kind, strict=True)], phase.length):
                state = _where_taken(row["kind"] == index, _chosen(cell, written, carry), state)
            carry, out = carry | state[0], state[1]
        carry = self.head(phase, carry, row, out)
        carry = self.finish(phase, carry, row, out)
        if sent is None:
            mail = self.arrive(carry["mail"], out, row["onward_slot"], step=1)
            mail = self.arrive(mail, out, row["back_slot"], step=-1)
        else:
            sent, out, carry = self.after(sent, out, carry)
            mail, carry = carry["mail"], carry | {"outbox": out}
            for arrived, slot in zip(sent, (row["onward_slot"], row["back_slot"]), strict=True):
                mail = self.put(mail, arrived, slot, slot >= 0)
        return carry | {"mail": self.put(mail, out, row["local_slot"], row["local_slot"] >= 0)}

    def where_due(
        self, phase: Phase, when: When, due: jax.Array, do: Callable[[], Any], skip: Callable[[], Any], name: str
    ) -> Any:
        """What `do` gives in the iterations that it is due in, `skip` in the others: the same ones on all devices.

        A device of one stage has it due in nearly every iteration; then it is done in all, and masked.
        """
        if when == "never":
            return skip()
        if when == "always" or not (self.virtual > 1 or phase.divergent):
            return do()
        times = sum(microbatch >= 0 for microbatch in getattr(phase, f"{name}_microbatch"))
        with jax.named_scope(taken_name(name, times, phase.length)):
            return jax.lax.cond(due, do, skip)

    def evaluate(self, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
        """The forwards of a phase; of a phase with a head, y of every iteration [length, r, ...] or its loss."""

        def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
            mine = _own(row)
            carry, y = self.forward(carry, mine, self.entering(phase, mine))
            out = None
            if phase.head != "never":
                examples, _, count = self.microbatch(mine["head_microbatch"], share=self.dealt)
                out = self.calls.after({**self.rest, **self.fixed}, self.handed(y), examples, None, count)
                if self.calls.has_loss:
                    total, weight = self.calls.loss(out, examples)
                    carry, out = self.count(carry, total, weight, mine["head_microbatch"] >= 0), None
                else:
                    check_rows(out, count)
            mail = self.arrive(carry["mail"], y, mine["onward_slot"], step=1)
            if phase.divergent:
                mail = self.arrive(mail, y, mine["back_slot"], step=-1)
                mail = self.put(mail, y, mine["local_slot"], mine["local_slot"] >= 0)
            return carry | {"mail": mail}, out

        return jax.lax.scan(body, carry, rows, length=phase.length)

    # Between devices.

    def arrive(self, buffer: Any, value: Any, slot: jax.Array, step: int) -> Any:
        """Send `value` one stage on (or back), round the ring, and put what arrives into `slot`."""
        if self.region.stage is None:
            return buffer
        return self.put(buffer, self.sent(value, step), slot, slot >= 0)

    def sent(self, value: Any, step: int) -> Any:
        """What the device `step` before this one on the ring holds as `value`."""
        count = self.region.num_stages
        ring = [(i, (i + step) % count) for i in range(count)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.region.stage, ring), value)

    def after(self, sent: Any, made: Any, carry: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """The same, where what was sent is not used before what a part has made is there.

        Else XLA may fuse its put into a slot with reads of other slots, on which the next part waits.
        """
        sent, made, mail = jax.lax.optimization_barrier((sent, made, carry["mail"]))
        return sent, made, carry | {"mail": mail}

    def put(self, buffer: Any, value: Any, slot: jax.Array, valid: jax.Array) -> Any:
        """`buffer` with `value` in `slot`, where `valid`."""
        index = jnp.maximum(slot, 0)

        def one(held: jax.Array, new: jax.Array) -> jax.Array:
            old = jax.lax.dynamic_index_in_dim(held, index, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(held, jnp.where(valid, new, old), index, 0)

        return jax.tree.map(one, buffer, value)

    def take(self, buffer: Any, slot: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(slot, 0), keepdims=False), buffer)

    # Cells.

    def _before(self, rest: Arrays, index: jax.Array, share: bool) -> Any:
        examples, key, rows = self.microbatch(index, share)
        return self.calls.before({**rest, **self.fixed}, examples, key, rows)

    def entering(self, phase: Phase, row: dict[str, jax.Array]) -> Any:
        """x of the microbatch that stage 0 runs, which every stage has computed its share of."""

        def do() -> Any:
            x = self._before(self.rest, row["before_microbatch"], share=True)
            if not self.shared:
                return x
            return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.region.stage, axis=0, tiled=True), x)

        def skip() -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.x)

        return self.where_due(phase, phase.before, row["before_microbatch"] >= 0, do, skip, "before")

    def forward(self, carry: dict[str, Any], row: dict[str, jax.Array], x: Any) -> tuple[dict[str, Any], Any]:
        """The F cell: y of a stage's blocks, residuals put into their slot; x is what enters stage 0."""
        if self.region.stage is not None:
            x = tree_where(row["f_mail_slot"] < 0, x, self.take(carry["mail"], row["f_mail_slot"]))
        c = self.context(self.rest, row["f_microbatch"])
        _, key, _ = self.microbatch(row["f_microbatch"], share=False)
        valid, slot = row["f_microbatch"] >= 0, jnp.maximum(row["f_residual_slot"], 0)
        held = carry["residuals"]
        if self.key_data is None or self.recomputes:
            held = held if self.key_data is None else self.put(held, x, slot, valid)
            y, _, auxiliary = self.stage(x, c, key, row["f_virtual"], (), slot, valid, carry["auxiliary"])
        else:
            y, held, auxiliary = self.stage(x, c, key, row["f_virtual"], held, slot, valid, carry["auxiliary"])
        return carry | {"residuals": held, "auxiliary": auxiliary}, y

    def stage(
        self, x: Any, c: Any, key: Any, virtual: jax.Array, held: Any, slot: Any, valid: jax.Array, auxiliary: Any
    ) -> tuple[Any, Any, Any]:
        """y of a stage's blocks; `held` with their residuals in `slot`, unless it is empty; auxiliary losses added."""

        def block(kind: int, state: Any, at: Slot) -> Any:
            x, held, auxiliary = state

            def do() -> tuple[tuple[Any, Any], tuple[jax.Array, ...]]:
                layer, frozen = self.layer_of(kind, at.stored)
                extra = frozen, at.block, *(key or (None, None))
                if not held:
                    return self._block_of(kind)(layer, x, c, extra), ()
                return self.vjps[kind].forward(layer, x, c, extra)

            (y, pair), stored = self.where_used(at, do)
            if pair is not None:
                more = (jnp.where(valid & at.used, new, 0).astype(self.wide) for new in pair)
                auxiliary = tuple(total + new for total, new in zip(auxiliary, more, strict=True))
            if not at.always:
                y = tree_where(at.used, y, x)
            if held:
                written = (_write(b, new, (slot, at.place), valid) for b, new in zip(held[kind], stored, strict=True))
                held = [*held[:kind], tuple(written), *held[kind + 1 :]]
            return y, held, auxiliary

        return self.through(block, (x, held, auxiliary), virtual)

    def backward(self, carry: dict[str, Any], row: dict[str, jax.Array], *, split: bool) -> tuple[dict[str, Any], Any]:
        """The B cell: dx of a stage's blocks, their gradients added to the accumulators.

        The I cell, if `split`: what the gradients need beside the residuals is put into its slot instead.
        """
        c = self.context(self.rest, row["b_microbatch"])
        _, key, _ = self.microbatch(row["b_microbatch"], share=False)
        valid, slot = row["b_microbatch"] >= 0, jnp.maximum(row["b_residual_slot"], 0)
        cut_slot = jnp.maximum(row["b_cut_slot"], 0)
        dy = self.take(carry["mail"], row["b_mail_slot"])
        dc = [jnp.zeros_like(leaf) for leaf in differentiable(c)] if self.has_context_gradient else None
        residuals = carry["residuals"]
        if self.recomputes:
            x, slot = self.take(residuals, slot), jnp.int32(0)
            once = self._of_blocks(self.residuals, 1)
            _, residuals, _ = self.stage(x, c, key, row["b_virtual"], once, slot, valid, carry["auxiliary"])

        def block(kind: int, state: Any, at: Slot) -> Any:
            dy, dc, total, cuts = state
            stored = tuple(_read(buffer, (slot, at.place)) for buffer in residuals[kind])
            keep = valid if at.always else valid & at.used

            def do() -> tuple[Any, Any]:
                layer, frozen = self.layer_of(kind, at.stored)
                kept = stored, layer, c, (frozen, at.block, *key)
                if split:
                    return self.splits[kind].first(kept, dy)
                back, dlayer = self._block_backward(kind, kept, dy)
                return back, self.accumulated(kind, dlayer)

            (dx, more), new = self.where_used(at, do)
            if split:
                cut = new, stored if self.recomputes else ()
                held = jax.tree.map(lambda b, leaf: _write(b, leaf, (cut_slot, at.place), valid), cuts[kind], cut)
                cuts = [*cuts[:kind], held, *cuts[kind + 1 :]]
            else:
                added = {name: _add(held, new[name], at.stored, keep) for name, held in total[kind].items()}
                total = [*total[:kind], added, *total[kind + 1 :]]
            if not at.always:
                dx = tree_where(at.used, dx, dy)
            if dc is not None:
                dc = jax.tree.map(lambda held, new: jnp.where(keep, held + new, held), dc, more)
            return dx, dc, total, cuts

        start = dy, dc, carry["layer"], carry["cuts"]
        dx, dc, layer, cuts = self.through(block, start, row["b_virtual"], back=True)
        rest = carry["rest"]
        if dc is not None:
            _, pull = jax.vjp(
                lambda mine: differentiable(self.context({**self.rest, **mine}, row["b_microbatch"])),
                self.read_in("context"),
            )
            rest = self.add(rest, pull(dc)[0], valid)
        return carry | {"layer": layer, "rest": rest, "cuts": cuts}, dx

    def weights(self, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
        """The W cell: the gradients of a stage's blocks, from residuals and cuts."""
        c = self.context(self.rest, row["w_microbatch"])
        _, key, _ = self.microbatch(row["w_microbatch"], share=False)
        valid, slot = row["w_microbatch"] >= 0, jnp.maximum(row["w_residual_slot"], 0)
        cut_slot = jnp.maximum(row["w_cut_slot"], 0)

        def block(kind: int, total: Any, at: Slot) -> Any:
            cut, stored = jax.tree.map(lambda buffer: _read(buffer, (cut_slot, at.place)), carry["cuts"][kind])
            if not self.recomputes:
                stored = tuple(_read(buffer, (slot, at.place)) for buffer in carry["residuals"][kind])
            keep = valid if at.always else valid & at.used

            def do() -> Arrays:
                layer, frozen = self.layer_of(kind, at.stored)
                dlayer = self.splits[kind].second((stored, layer, c, (frozen, at.block, *key)), cut)
                return self.accumulated(kind, dlayer)

            new = self.where_used(at, do)
            added = {name: _add(held, new[name], at.stored, keep) for name, held in total[kind].items()}
            return [*total[:kind], added, *total[kind + 1 :]]

        return carry | {"layer": self.through(block, carry["layer"], row["w_virtual"], back=True)}

    def finish(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array], dx: Any) -> dict[str, Any]:
        """The gradients of `before`, of the microbatch whose dx stage 0 has just computed."""

        def do() -> Arrays:
            _, pull = jax.vjp(
                lambda mine: self._before({**self.rest, **mine}, row["finish_microbatch"], share=True),
                self.read_in("before"),
            )
            # Masked here and not in the gradients, which are larger: the examples are true ones, so that a cotangent of
            # zeros gives zeros.
            keep = due if self.shared else due & self.is_first
            masked = jax.tree.map(lambda leaf: jnp.where(keep, leaf, 0), self.deal(dx, source=0))
            return self.add(carry["rest"], pull(masked)[0], jnp.bool_(True))

        due = row["finish_microbatch"] >= 0
        return carry | {"rest": self.where_due(phase, phase.finish, due, do, lambda: carry["rest"], "finish")}

    def head(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array], y: Any) -> dict[str, Any]:
        """after, loss and their vjp; the cotangent of the last stage's y put into its slot."""
        due = row["head_microbatch"] >= 0

        def do() -> tuple[dict[str, Any], Any]:
            examples, key, rows = self.microbatch(row["head_microbatch"], share=self.dealt)

            def loss(mine: Arrays, y: Any) -> tuple[jax.Array, jax.Array]:
                values = {**self.rest, **mine, **self.fixed}
                return self.calls.loss(self.calls.after(values, y, examples, key, rows), examples)

            total, pull, weight = jax.vjp(loss, self.read_in("after"), self.handed(y), has_aux=True)
            if self.vocabulary:
                # The loss is the same on all stages, and counts once. Each finds what its own logits give, and since
                # the transpose of a psum is a psum, what all of them find adds up to the derivative.
                drest, dy = pull(jnp.where(self.is_last, jnp.ones_like(total), 0))
                dy = self.region.over_stages(dy)
            else:
                drest, dy = pull(jnp.ones_like(total))
            if self.dealt:
                dy = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.region.stage, axis=0, tiled=True), dy)
            keep = due if self.dealt or self.vocabulary else due & self.is_last
            new = self.count({name: carry[name] for name in ("sum", "weight")}, total, weight, due)
            return new | {"rest": self.add(carry["rest"], drest, keep)}, dy

        def skip() -> tuple[dict[str, Any], Any]:
            return {name: carry[name] for name in ("sum", "weight", "rest")}, jax.tree.map(jnp.zeros_like, y)

        if phase.head == "never":
            return carry
        new, dy = self.where_due(phase, phase.head, due, do, skip, "head")
        return carry | new | {"mail": self.put(carry["mail"], dy, row["head_slot"], due & self.is_last)}

    def count(self, carry: dict[str, Any], total: jax.Array, weight: jax.Array, due: jax.Array) -> dict[str, Any]:
        """`carry` with a microbatch's loss, from the stages that computed it on true examples."""
        keep = due if self.dealt else due & self.is_last
        return carry | {
            "sum": carry["sum"] + jnp.where(keep, total, 0).astype(self.wide),
            "weight": carry["weight"] + jnp.where(keep, weight, 0).astype(self.wide),
        }

    def handed(self, y: Any) -> Any:
        """What the head of this stage computes with, of the last stage's y: its share of the examples, or all."""
        if self.vocabulary:
            return self.region.over_stages(tree_where(self.is_last, y, jax.tree.map(jnp.zeros_like, y)))
        return self.deal(y, self.last_device) if self.dealt else y

    def deal(self, x: Any, source: int) -> Any:
        """This stage's share of the examples that stage `source` holds."""
        if not self.shared:
            return x

        def one(leaf: jax.Array) -> jax.Array:
            # Every stage's shares change places; those of other stages than `source` are garbage, and are left.
            all_of = jax.lax.all_to_all(leaf, self.region.stage, split_axis=0, concat_axis=0, tiled=True)
            return jax.lax.slice_in_dim(all_of, source * self.share_rows, (source + 1) * self.share_rows, axis=0)

        return jax.tree.map(one, x)

    def read_in(self, part: str) -> Arrays:
        """The parameters outside blocks that a part is differentiated in: of those in pieces, the ones that it reads.

        The others' gradients are zero, and would be summed over the devices for nothing.
        """
        return {name: value for name, value in self.rest.items() if part in self.pieces.get(name, (part,))}

    def add(self, total: Arrays, new: Arrays, keep: jax.Array) -> Arrays:
        """Gradients outside blocks, with `new` ones where `keep`; those in pieces are summed over the devices first."""
        pieces = {name: value for name, value in new.items() if name in self.pieces}
        mine = {name: total[name] + value for name, value in self.reduced_now(pieces, keep).items()}
        whole = {name: value for name, value in new.items() if name not in mine}
        return {
            **total,
            **mine,
            **{
                name: jnp.where(keep, total[name] + v.astype(total[name].dtype), total[name])
                for name, v in whole.items()
            },
        }

    def reduced_now(self, new: Arrays, keep: jax.Array) -> Arrays:
        """Of the sums over all devices where `keep`, this device's piece."""
        if not new:
            return {}
        kept = {name: jnp.where(keep, value, 0).astype(self._wide_of(value)) for name, value in new.items()}
        axes = {name: self.summed_over(name) for name in kept}
        return self.region.reduced(kept, axes, self.specs, self.state_specs)

    def summed_over(self, name: str) -> tuple[str, ...]:
        """The axes to sum a gradient outside blocks over; of a vocabulary each stage has a part to itself."""
        return self.region.batch if name in self.vocabulary else self.region.manual

    # The end of the step.

    def sums(self, carry: dict[str, Any]) -> jax.Array:
        """Of the whole batch: loss sum, weight, and sum and weight of the auxiliary losses."""
        found = jnp.stack([carry["sum"], carry["weight"], *carry["auxiliary"]])
        return jax.lax.psum(found, self.region.manual) if self.region.manual else found

    def reduced(self, carry: dict[str, Any], specs: dict[str, PartitionSpec]) -> tuple[Arrays, jax.Array]:
        """Gradients summed over batch (and, outside blocks, stages), each reduced once; what `sums` gives.

        Each stage keeps those of its part of the vocabulary.
        """
        region = self.region
        layer = {name: carry["layer"][kind][inner] for name, (kind, inner) in self.inner.items() if name in specs}
        # Those in pieces have been summed already.
        axes = dict.fromkeys(layer, () if self.sharded else region.batch)
        axes |= {name: () if name in self.pieces else self.summed_over(name) for name in carry["rest"]}
        out = region.reduced({**layer, **carry["rest"]}, axes, self.specs, specs)
        return out, self.sums(carry)


def _where_taken(taken: jax.Array, do: Callable[[Any], Any], state: Any) -> Any:
    """``do(state)`` on the devices where `taken`, else the state.

    A loop of one trip or none, whose state XLA:TPU updates in place: through a conditional it would copy every buffer
    and accumulator in each tick, taken or not. It marks what diverges for `shardlab.hlo.hang`.
    """
    return jax.lax.while_loop(lambda now: now[0], lambda now: (jnp.bool_(False), do(now[1])), (taken, state))[1]


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


def _write(buffer: jax.Array, value: jax.Array, at: tuple[jax.Array, jax.Array], valid: jax.Array) -> jax.Array:
    held = _read(buffer, at)
    starts = (*at, *(jnp.int32(0),) * value.ndim)
    return jax.lax.dynamic_update_slice(buffer, jnp.where(valid, value, held)[None, None], starts)


def _read(buffer: jax.Array, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    starts = (*at, *(jnp.int32(0),) * (buffer.ndim - 2))
    return jax.lax.dynamic_slice(buffer, starts, (1, 1, *buffer.shape[2:])).reshape(buffer.shape[2:])


def _add(total: jax.Array, new: jax.Array, place: jax.Array, keep: jax.Array) -> jax.Array:
    held = jax.lax.dynamic_index_in_dim(total, place, keepdims=False)
    added = jnp.where(keep, held + new.astype(total.dtype), held)
    return jax.lax.dynamic_update_index_in_dim(total, added, place, 0)
