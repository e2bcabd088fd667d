"""What a device does in one tick of a pipeline: the F, B, I and W cells, the head, and what passes between them.

In a uniform phase every device runs every cell; where the table has nothing for it the result is masked, never
branched on, so any collective is legal inside a block. In a divergent phase every device takes the branch of its own
cell, and what concerns all of them (before, head, sends) stands outside. Garbage is masked with `where`, not
multiplied: it may be NaN.

Legend: M microbatches, P devices of the stage axis, V virtual stages of each, K blocks of the longest stage, b examples
of a microbatch on a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from shardlab.module.model import Model, computed
from shardlab.module.residuals import BlockVjp, differentiable
from shardlab.pipeline.buffers import Phase, Program, When
from shardlab.plan.layout import slots_of
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls
from shardlab.step.region import Region, check_rows, rows_of, tree_where
from shardlab.step.split import Split
from shardlab.step.state import storage_specs

Arrays = dict[str, Any]


class StageArrays:
    """Which stored arrays belong to blocks, how a block names them, and which block each slot of a stage holds."""

    def __init__(self, model: Model, plan: Plan) -> None:
        assert model.parts is not None
        within = {path: inner for layer in model.parts.layers for inner, path in layer.items()}
        self.inner = {stack.name: within[next(p for p in stack.members if p)] for stack in plan.stacks}
        slots = slots_of(plan.layers, plan.table())
        # [P, V K]: the block in each slot, and whether there is one
        blocks = [[block for stage in device for block in stage] for device in slots]
        self.used = np.asarray([[block is not None for block in device] for device in blocks])
        self.block_of_slot = np.asarray([[block or 0 for block in device] for device in blocks], np.int32)


class Cells:
    """One trace of the region: the constants of the step, and the cells as functions of a carry.

    Args:
      values: trained arrays as they are computed with, this device's stage of those in blocks.
      buffers: the others.
      batch: this shard's examples.
      key_data: of the step's key; None to evaluate, without dropout.
      where: this device's place: ``shard`` [1], ``stage`` [1], ``block`` and ``used`` [1, V K].
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
        self.inner = arrays.inner
        compute = storage_specs(plan, "compute")
        self.specs = {name: region.automatic_part(compute[name]) for name in values}
        self.gather, self.sharded = plan.gather == "layer", plan.accumulate == "sharded"
        # Of one layer, by its name in the block.
        self.layer_specs = {
            which: {
                arrays.inner[name]: PartitionSpec(*spec[1:])
                for name, spec in storage_specs(plan, which).items()
                if name in arrays.inner
            }
            for which in ("storage", "compute", "state")
        }
        self.layer = {arrays.inner[name]: value for name, value in values.items() if name in arrays.inner}
        self.frozen = {arrays.inner[name]: value for name, value in buffers.items() if name in arrays.inner}
        self.rest = {name: value for name, value in values.items() if name not in arrays.inner}
        self.fixed = {name: value for name, value in buffers.items() if name not in arrays.inner}
        self.rows = plan.microbatch_rows
        self.first_row = where["shard"][0] * (plan.batch_size // region.shards)
        self.stage_index = where["stage"][0]
        schedule = program.schedule
        self.program, self.virtual = program, schedule.num_virtual
        self.last_device = schedule.device_of(schedule.num_stages - 1)
        self.is_first, self.is_last = self.stage_index == 0, self.stage_index == self.last_device
        self.blocks, self.used = where["block"][0], where["used"][0]
        self.per_stage = max(plan.layers)
        self.even = bool(arrays.used.all())
        self.shared = calls.shared
        self.share_rows = self.rows // region.num_stages if self.shared else self.rows
        self.wide = jnp.float64 if plan.dtype == "float64" else jnp.float32
        self.has_context_gradient = self._context_depends()
        self.block = BlockVjp(
            lambda layer, x, c, extra: calls.block(layer, x, c, extra, self.rows),
            plan.remat,
            context=self.has_context_gradient,
        )

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

    def slots_of(self, virtual: jax.Array) -> tuple[jax.Array, ...]:
        """Of a stage's K slots: the place in its buffers, that in the stored arrays, the block, and if it is one."""
        places = jnp.arange(self.per_stage, dtype=jnp.int32)
        if self.virtual == 1:
            return places, places, self.blocks, self.used
        first = jnp.maximum(virtual, 0) * self.per_stage
        mine = (jax.lax.dynamic_slice_in_dim(values, first, self.per_stage) for values in (self.blocks, self.used))
        return (places, first + places, *mine)

    def layer_of(self, slot: jax.Array) -> tuple[Arrays, Arrays]:
        """The arrays of a block, whole over the batch axes: trained, and the others."""
        take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False)  # noqa: E731
        layer = jax.tree.map(take, self.layer)
        if self.gather:
            layer = self.region.gathered(layer, self.layer_specs["storage"])
        return layer, jax.tree.map(take, self.frozen)

    def accumulated(self, dlayer: Arrays) -> Arrays:
        """A block's gradients as they are added up: this shard's sum, or of all shards this shard's piece."""
        wide = {name: value.astype(self._wide_of(value)) for name, value in dlayer.items()}
        if not self.sharded:
            return wide
        axes = dict.fromkeys(wide, self.region.batch)
        return self.region.reduced(wide, axes, self.layer_specs["compute"], self.layer_specs["state"])

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
        if self.key_data is None:
            return carry

        layer, frozen = jax.eval_shape(lambda: self.layer_of(zero))
        c = jax.eval_shape(lambda: self.context(self.rest, zero))
        extra = frozen, zero, self.key_data, zero
        residuals = jax.eval_shape(lambda *args: self.block.forward(*args)[1], layer, self.x, c, extra)
        cuts: Any = ()
        if table.split:
            self.split = Split(self._block_backward, (residuals, layer, c, extra), self.x)
            cuts = jax.eval_shape(lambda *args: self.split.first(*args)[1], (residuals, layer, c, extra), self.x)

        pieces = jax.eval_shape(self.accumulated, layer)

        def buffers(leaves: Any, slots: int) -> Any:
            return jax.tree.map(lambda leaf: self._empty(leaf, slots, self.per_stage), leaves)

        return carry | {
            "residuals": buffers(residuals, table.num_residual_slots),
            "cuts": buffers(cuts, table.num_cut_slots),
            "layer": {
                self.inner[name]: laid(self._accumulator(pieces[self.inner[name]], self.blocks.shape[0]), spec)
                for name, spec in self.specs.items()
                if name in self.inner
            },
            "rest": {
                name: laid(self._accumulator(self.rest[name]), spec)
                for name, spec in self.specs.items()
                if name not in self.inner
            },
        }

    def _accumulator(self, value: Any, *leading: int) -> jax.Array:
        return jnp.zeros((*leading, *value.shape), self._wide_of(value))

    def _wide_of(self, value: Any) -> str:
        return computed(value.dtype, jnp.dtype(self.wide).name)

    def _empty(self, leaf: Any, *leading: int) -> jax.Array:
        fill = self.fill if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return jnp.full((*leading, *leaf.shape), fill, leaf.dtype)

    def _block_backward(self, kept: Any, dy: Any) -> tuple[Any, Any]:
        """What the stage before waits for, then the gradients of the weights."""
        stored, layer, c, extra = kept
        dlayer, dx, dc = self.block.backward(stored, layer, c, extra, dy)
        return (dx, dc), dlayer

    # Phases.

    def train(self, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]) -> dict[str, Any]:
        """One scan over the iterations of a phase."""

        def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], None]:
            return self._iteration(phase, carry, _own(row)), None

        return jax.lax.scan(body, carry, rows, length=phase.length)[0]

    def _iteration(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
        if phase.divergent:
            return self._divergent(phase, carry, row)
        if "F" in phase.cell:
            carry, y = self.forward(carry, row, self.entering(phase, row))
            carry = self.head(phase, carry, row, y)
            carry = carry | {"mail": self.arrive(carry["mail"], y, row["onward_slot"], step=1)}
        if "B" in phase.cell or "I" in phase.cell:
            carry, dx = self.backward(carry, row, split="I" in phase.cell)
            carry = self.finish(phase, carry, row, dx)
            carry = carry | {"mail": self.arrive(carry["mail"], dx, row["back_slot"], step=-1)}
        return self.weights(carry, row) if "W" in phase.cell else carry

    def _divergent(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
        """Each device its own cell, in a branch; what spans devices before and after it."""
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

            # Only what a cell writes goes through its branch: XLA would copy the rest.
            state = {name: carry[name] for name in written}, out
            # Three branches mark what diverges: `shardlab.hlo.hang` looks at conditionals of three or more.
            branches = [_skip, _chosen(cell, written, carry), _skip]
            state = jax.lax.switch((row["kind"] == index).astype(jnp.int32), branches, state)
            carry, out = carry | state[0], state[1]
        carry = self.head(phase, carry, row, out)
        carry = self.finish(phase, carry, row, out)
        mail = self.arrive(carry["mail"], out, row["onward_slot"], step=1)
        mail = self.arrive(mail, out, row["back_slot"], step=-1)
        return carry | {"mail": self.put(mail, out, row["local_slot"], row["local_slot"] >= 0)}

    def where_due(
        self, phase: Phase, when: When, due: jax.Array, do: Callable[[], Any], skip: Callable[[], Any]
    ) -> Any:
        """What `do` gives in the iterations that it is due in, `skip` in the others: the same ones on all devices.

        A device of one stage has it due in nearly every iteration; then it is done in all, and masked.
        """
        if when == "never":
            return skip()
        if when == "always" or not (self.virtual > 1 or phase.divergent):
            return do()
        return jax.lax.cond(due, do, skip)

    def evaluate(self, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
        """The forwards of a phase; of a phase with a head, y of every iteration [length, r, ...] or its loss."""

        def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
            mine = _own(row)
            carry, y = self.forward(carry, mine, self.entering(phase, mine))
            out = None
            if phase.head != "never":
                examples, _, count = self.microbatch(mine["head_microbatch"], share=True)
                dealt = self.deal(y, self.last_device)
                out = self.calls.after({**self.rest, **self.fixed}, dealt, examples, None, count)
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
        count = self.region.num_stages
        ring = [(i, (i + step) % count) for i in range(count)]
        arrived = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.region.stage, ring), value)
        return self.put(buffer, arrived, slot, slot >= 0)

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

        return self.where_due(phase, phase.before, row["before_microbatch"] >= 0, do, skip)

    def forward(self, carry: dict[str, Any], row: dict[str, jax.Array], x: Any) -> tuple[dict[str, Any], Any]:
        """The F cell: y of a stage's blocks, residuals put into their slot; x is what enters stage 0."""
        if self.region.stage is not None:
            x = tree_where(row["f_mail_slot"] < 0, x, self.take(carry["mail"], row["f_mail_slot"]))
        c = self.context(self.rest, row["f_microbatch"])
        _, key, _ = self.microbatch(row["f_microbatch"], share=False)
        valid, slot = row["f_microbatch"] >= 0, jnp.maximum(row["f_residual_slot"], 0)

        def body(state: Any, at: Any) -> tuple[Any, None]:
            x, held, auxiliary = state
            place, where, index, used = at
            layer, frozen = self.layer_of(where)
            (y, pair), stored = self._block(layer, x, c, (frozen, index, *(key or (None, None))))
            if pair is not None:
                more = (jnp.where(valid & used, new, 0).astype(self.wide) for new in pair)
                auxiliary = tuple(total + new for total, new in zip(auxiliary, more, strict=True))
            if not self.even:
                y = tree_where(used, y, x)
            held = tuple(_write(buffer, leaf, (slot, place), valid) for buffer, leaf in zip(held, stored, strict=True))
            return (y, held, auxiliary), None

        start = x, carry["residuals"], carry["auxiliary"]
        (y, held, auxiliary), _ = jax.lax.scan(body, start, self.slots_of(row["f_virtual"]))
        return carry | {"residuals": held, "auxiliary": auxiliary}, y

    def _block(self, layer: Arrays, x: Any, c: Any, extra: Any) -> tuple[tuple[Any, Any], tuple[jax.Array, ...]]:
        if self.key_data is None:
            return self.calls.block(layer, x, c, extra, self.rows), ()
        return self.block.forward(layer, x, c, extra)

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

        def body(state: Any, at: Any) -> tuple[Any, None]:
            dy, dc, total, cuts = state
            place, where, index, used = at
            layer, frozen = self.layer_of(where)
            stored = tuple(_read(buffer, (slot, place)) for buffer in carry["residuals"])
            kept = stored, layer, c, (frozen, index, *key)
            keep = valid if self.even else valid & used
            if split:
                (dx, more), cut = self.split.first(kept, dy)
                cuts = jax.tree.map(lambda buffer, leaf: _write(buffer, leaf, (cut_slot, place), valid), cuts, cut)
            else:
                (dx, more), dlayer = self._block_backward(kept, dy)
                new = self.accumulated(dlayer)
                total = {name: _add(held, new[name], where, keep) for name, held in total.items()}
            if not self.even:
                dx = tree_where(used, dx, dy)
            if dc is not None:
                dc = jax.tree.map(lambda held, new: jnp.where(keep, held + new, held), dc, more)
            return (dx, dc, total, cuts), None

        start = dy, dc, carry["layer"], carry["cuts"]
        (dx, dc, layer, cuts), _ = jax.lax.scan(body, start, self.slots_of(row["b_virtual"]), reverse=True)
        rest = carry["rest"]
        if dc is not None:
            _, pull = jax.vjp(lambda rest: differentiable(self.context(rest, row["b_microbatch"])), self.rest)
            rest = self.add(rest, pull(dc)[0], valid)
        return carry | {"layer": layer, "rest": rest, "cuts": cuts}, dx

    def weights(self, carry: dict[str, Any], row: dict[str, jax.Array]) -> dict[str, Any]:
        """The W cell: the gradients of a stage's blocks, from residuals and cuts."""
        c = self.context(self.rest, row["w_microbatch"])
        _, key, _ = self.microbatch(row["w_microbatch"], share=False)
        valid, slot = row["w_microbatch"] >= 0, jnp.maximum(row["w_residual_slot"], 0)
        cut_slot = jnp.maximum(row["w_cut_slot"], 0)

        def body(total: Any, at: Any) -> tuple[Any, None]:
            place, where, index, used = at
            layer, frozen = self.layer_of(where)
            stored = tuple(_read(buffer, (slot, place)) for buffer in carry["residuals"])
            cut = jax.tree.map(lambda buffer: _read(buffer, (cut_slot, place)), carry["cuts"])
            new = self.accumulated(self.split.second((stored, layer, c, (frozen, index, *key)), cut))
            keep = valid if self.even else valid & used
            return {name: _add(held, new[name], where, keep) for name, held in total.items()}, None

        return carry | {"layer": jax.lax.scan(body, carry["layer"], self.slots_of(row["w_virtual"]), reverse=True)[0]}

    def finish(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array], dx: Any) -> dict[str, Any]:
        """The gradients of `before`, of the microbatch whose dx stage 0 has just computed."""

        def do() -> Arrays:
            _, pull = jax.vjp(lambda rest: self._before(rest, row["finish_microbatch"], share=True), self.rest)
            used = row["finish_microbatch"] >= 0
            (new,) = pull(self.deal(dx, source=0))
            return self.add(carry["rest"], new, used if self.shared else used & self.is_first)

        due = row["finish_microbatch"] >= 0
        return carry | {"rest": self.where_due(phase, phase.finish, due, do, lambda: carry["rest"])}

    def head(self, phase: Phase, carry: dict[str, Any], row: dict[str, jax.Array], y: Any) -> dict[str, Any]:
        """after, loss and their vjp; the cotangent of the last stage's y put into its slot."""
        due = row["head_microbatch"] >= 0

        def do() -> tuple[dict[str, Any], Any]:
            examples, key, rows = self.microbatch(row["head_microbatch"], share=True)

            def loss(rest: Arrays, y: Any) -> tuple[jax.Array, jax.Array]:
                return self.calls.loss(self.calls.after({**rest, **self.fixed}, y, examples, key, rows), examples)

            total, pull, weight = jax.vjp(loss, self.rest, self.deal(y, self.last_device), has_aux=True)
            drest, dy = pull(jnp.ones_like(total))
            if self.shared:
                dy = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.region.stage, axis=0, tiled=True), dy)
            keep = due if self.shared else due & self.is_last
            new = self.count({name: carry[name] for name in ("sum", "weight")}, total, weight, due)
            return new | {"rest": self.add(carry["rest"], drest, keep)}, dy

        def skip() -> tuple[dict[str, Any], Any]:
            return {name: carry[name] for name in ("sum", "weight", "rest")}, jax.tree.map(jnp.zeros_like, y)

        if phase.head == "never":
            return carry
        new, dy = self.where_due(phase, phase.head, due, do, skip)
        return carry | new | {"mail": self.put(carry["mail"], dy, row["head_slot"], due & self.is_last)}

    def count(self, carry: dict[str, Any], total: jax.Array, weight: jax.Array, due: jax.Array) -> dict[str, Any]:
        """`carry` with a microbatch's loss, from the stages that computed it on true examples."""
        keep = due if self.shared else due & self.is_last
        return carry | {
            "sum": carry["sum"] + jnp.where(keep, total, 0).astype(self.wide),
            "weight": carry["weight"] + jnp.where(keep, weight, 0).astype(self.wide),
        }

    def deal(self, x: Any, source: int) -> Any:
        """This stage's share of the examples that stage `source` holds."""
        if not self.shared:
            return x

        def one(leaf: jax.Array) -> jax.Array:
            # Every stage's shares change places; those of other stages than `source` are garbage, and are left.
            all_of = jax.lax.all_to_all(leaf, self.region.stage, split_axis=0, concat_axis=0, tiled=True)
            return jax.lax.slice_in_dim(all_of, source * self.share_rows, (source + 1) * self.share_rows, axis=0)

        return jax.tree.map(one, x)

    def add(self, total: Arrays, new: Arrays, keep: jax.Array) -> Arrays:
        return {name: jnp.where(keep, held + new[name].astype(held.dtype), held) for name, held in total.items()}

    # The end of the step.

    def sums(self, carry: dict[str, Any]) -> jax.Array:
        """Of the whole batch: loss sum, weight, and sum and weight of the auxiliary losses."""
        found = jnp.stack([carry["sum"], carry["weight"], *carry["auxiliary"]])
        return jax.lax.psum(found, self.region.manual) if self.region.manual else found

    def reduced(self, carry: dict[str, Any], specs: dict[str, PartitionSpec]) -> tuple[Arrays, jax.Array]:
        """Gradients summed over batch (and, outside blocks, stages), each reduced once; what `sums` gives."""
        region = self.region
        layer = {name: carry["layer"][inner] for name, inner in self.inner.items() if name in specs}
        # Sharded ones have been summed layer by layer.
        axes = dict.fromkeys(layer, () if self.sharded else region.batch) | dict.fromkeys(carry["rest"], region.manual)
        out = region.reduced({**layer, **carry["rest"]}, axes, self.specs, specs)
        return out, self.sums(carry)


def _skip(state: Any) -> Any:
    return state


def _chosen(
    cell: Callable[[dict[str, Any]], tuple[dict[str, Any], Any]], written: tuple[str, ...], carry: dict[str, Any]
) -> Callable[[Any], Any]:
    """The branch that runs a cell: of (what it writes, what it sends)."""

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
