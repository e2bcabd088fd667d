"""What a device does in one tick of a pipeline: the F cell, the head, the B cell, and what passes between them.

Every device runs every cell; where the table has nothing for it the result is masked, never branched on, so any
collective is legal inside a block. Garbage is masked with `where`, not multiplied: it may be NaN.

Legend: M microbatches, P stages, K blocks of the longest stage, b examples of a microbatch on a shard.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from shardlab.module.model import Model
from shardlab.module.residuals import BlockVjp
from shardlab.pipeline.buffers import Phase, Program
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls
from shardlab.step.region import Region, check_rows, rows_of, tree_where
from shardlab.step.state import storage_specs

Arrays = dict[str, Any]


class StageArrays:
    """Which stored arrays belong to blocks, how a block names them, and which block each slot of a stage holds."""

    def __init__(self, model: Model, plan: Plan) -> None:
        assert model.parts is not None
        first = {path: inner for inner, path in model.parts.layers[0].items()}
        self.inner = {stack.name: first[next(p for p in stack.members if p)] for stack in plan.stacks}
        longest = max(plan.layers)
        starts = np.cumsum((0, *plan.layers[:-1]))
        slots = np.arange(longest)
        # [P, K]: the block in each slot, and whether there is one
        self.block_of_slot = (starts[:, None] + slots).astype(np.int32)
        self.used = slots < np.asarray(plan.layers)[:, None]


class Cells:
    """One trace of the region: the constants of the step, and the cells as functions of a carry.

    Args:
      values: trained arrays as they are computed with, this device's stage of those in blocks.
      buffers: the others.
      batch: this shard's examples.
      key_data: of the step's key; None to evaluate, without dropout.
      where: this device's place: ``shard`` [1], ``stage`` [1], ``block`` and ``used`` [1, K].
      fill: what buffers hold at first.
    """

    def __init__(
        self,
        plan: Plan,
        region: Region,
        calls: Calls,
        arrays: StageArrays,
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
        self.layer = {arrays.inner[name]: value for name, value in values.items() if name in arrays.inner}
        self.frozen = {arrays.inner[name]: value for name, value in buffers.items() if name in arrays.inner}
        self.rest = {name: value for name, value in values.items() if name not in arrays.inner}
        self.fixed = {name: value for name, value in buffers.items() if name not in arrays.inner}
        self.rows = plan.microbatch_rows
        self.first_row = where["shard"][0] * (plan.batch_size // region.shards)
        self.stage_index = where["stage"][0]
        self.is_first, self.is_last = self.stage_index == 0, self.stage_index == region.num_stages - 1
        self.slots = (jnp.arange(arrays.used.shape[1], dtype=jnp.int32), where["block"][0], where["used"][0])
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
        closed = jax.make_jaxpr(lambda rest: self.context(rest, jnp.int32(0)))(self.rest)
        used: set[Any] = {var for var in closed.jaxpr.outvars if not isinstance(var, Literal)}
        for equation in reversed(closed.jaxpr.eqns):
            if used & set(equation.outvars):
                used |= {var for var in equation.invars if not isinstance(var, Literal)}
        return bool(used & set(closed.jaxpr.invars))

    def layer_of(self, slot: jax.Array) -> tuple[Arrays, Arrays]:
        take = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False)  # noqa: E731
        return jax.tree.map(take, self.layer), jax.tree.map(take, self.frozen)

    # Buffers.

    def allocate(self, table: Program) -> dict[str, Any]:
        """The carry at first: buffers of the table's slots, accumulators, sums. To evaluate: no residuals."""
        zero = jnp.int32(0)
        x = jax.eval_shape(lambda: self._before(self.rest, zero, share=False))

        def empty(leaf: Any, *leading: int) -> jax.Array:
            return jnp.full((*leading, *leaf.shape), self.fill, leaf.dtype)

        def laid(value: jax.Array, spec: PartitionSpec) -> jax.Array:
            # What a scan carries keeps the layout it starts with.
            return jax.lax.with_sharding_constraint(value, spec)

        def buffer(slots: int) -> Any:
            spec = PartitionSpec(None, *self.calls.flow_spec)
            return jax.tree.map(lambda leaf: laid(empty(leaf, slots), spec), x)

        carry: dict[str, Any] = {
            "inputs": buffer(table.num_input_slots),
            "residuals": (),
            "sum": jnp.zeros((), self.wide),
            "weight": jnp.zeros((), self.wide),
            "auxiliary": (jnp.zeros((), self.wide), jnp.zeros((), self.wide)),
        }
        if self.key_data is None:
            return carry

        def stored() -> Any:
            layer, frozen = self.layer_of(zero)
            c = self.context(self.rest, zero)
            return self.block.forward(layer, jax.tree.map(jnp.zeros_like, x), c, (frozen, zero, self.key_data, zero))[1]

        per_stage = self.slots[0].shape[0]
        residuals = jax.eval_shape(stored)
        return carry | {
            "residuals": tuple(
                empty(leaf, table.num_residual_slots, per_stage)
                if jnp.issubdtype(leaf.dtype, jnp.inexact)
                else jnp.zeros((table.num_residual_slots, per_stage, *leaf.shape), leaf.dtype)
                for leaf in residuals
            ),
            "cotangents": buffer(table.num_cotangent_slots),
            "layer": {
                self.inner[name]: laid(jnp.zeros(self.layer[self.inner[name]].shape, self.wide), spec)
                for name, spec in self.specs.items()
                if name in self.inner
            },
            "rest": {
                name: laid(jnp.zeros(self.rest[name].shape, self.wide), spec)
                for name, spec in self.specs.items()
                if name not in self.inner
            },
        }

    # Phases.

    def train(self, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]) -> dict[str, Any]:
        """One scan over the iterations of a phase."""

        def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], None]:
            mine = {name: value[0] if value.ndim else value for name, value in row.items()}
            if "F" in phase.cell:
                carry, y = self.forward(carry, mine)
                if phase.head:
                    carry = self.head(carry, mine, y)
                carry = carry | {"inputs": self.arrive(carry["inputs"], y, mine["f_arrival_slot"], step=1)}
            if "B" in phase.cell:
                carry, dx = self.backward(carry, mine)
                carry = carry | {"cotangents": self.arrive(carry["cotangents"], dx, mine["b_arrival_slot"], step=-1)}
            return carry, None

        return jax.lax.scan(body, carry, rows, length=phase.length)[0]

    def evaluate(self, carry: dict[str, Any], phase: Phase, rows: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
        """The forwards of a phase; of a phase with a head, y of every microbatch [length, r, ...] or its loss."""

        def body(carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
            mine = {name: value[0] if value.ndim else value for name, value in row.items()}
            carry, y = self.forward(carry, mine)
            out = None
            if phase.head:
                examples, _, count = self.microbatch(mine["head_microbatch"], share=True)
                dealt = self.deal(y, self.region.num_stages - 1)
                out = self.calls.after({**self.rest, **self.fixed}, dealt, examples, None, count)
                if self.calls.has_loss:
                    carry, out = self.count(carry, *self.calls.loss(out, examples)), None
                else:
                    check_rows(out, count)
            return carry | {"inputs": self.arrive(carry["inputs"], y, mine["f_arrival_slot"], step=1)}, out

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

    def forward(self, carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
        """The F cell: y of this stage's blocks, residuals put into their slot."""
        x = self._before(self.rest, row["before_microbatch"], share=True)
        if self.shared:
            x = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.region.stage, axis=0, tiled=True), x)
        if self.region.stage is not None:
            x = tree_where(self.is_first, x, self.take(carry["inputs"], row["f_input_slot"]))
        c = self.context(self.rest, row["f_microbatch"])
        _, key, _ = self.microbatch(row["f_microbatch"], share=False)
        valid, slot = row["f_microbatch"] >= 0, jnp.maximum(row["f_residual_slot"], 0)

        def body(state: Any, at: Any) -> tuple[Any, None]:
            x, held, auxiliary = state
            place, index, used = at
            layer, frozen = self.layer_of(place)
            (y, pair), stored = self._block(layer, x, c, (frozen, index, *(key or (None, None))))
            if pair is not None:
                more = (jnp.where(valid & used, new, 0).astype(self.wide) for new in pair)
                auxiliary = tuple(total + new for total, new in zip(auxiliary, more, strict=True))
            if not self.even:
                y = tree_where(used, y, x)
            held = tuple(_write(buffer, leaf, (slot, place), valid) for buffer, leaf in zip(held, stored, strict=True))
            return (y, held, auxiliary), None

        start = x, carry["residuals"], carry["auxiliary"]
        (y, held, auxiliary), _ = jax.lax.scan(body, start, self.slots)
        return carry | {"residuals": held, "auxiliary": auxiliary}, y

    def _block(self, layer: Arrays, x: Any, c: Any, extra: Any) -> tuple[tuple[Any, Any], tuple[jax.Array, ...]]:
        if self.key_data is None:
            return self.calls.block(layer, x, c, extra, self.rows), ()
        return self.block.forward(layer, x, c, extra)

    def backward(self, carry: dict[str, Any], row: dict[str, jax.Array]) -> tuple[dict[str, Any], Any]:
        """The B cell: dx of this stage's blocks, their gradients added to the accumulators."""
        c = self.context(self.rest, row["b_microbatch"])
        _, key, _ = self.microbatch(row["b_microbatch"], share=False)
        valid, slot = row["b_microbatch"] >= 0, jnp.maximum(row["b_residual_slot"], 0)
        dy = self.take(carry["cotangents"], row["b_cotangent_slot"])
        dc = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), c) if self.has_context_gradient else None

        def body(state: Any, at: Any) -> tuple[Any, None]:
            dy, dc, total = state
            place, index, used = at
            layer, frozen = self.layer_of(place)
            stored = tuple(_read(buffer, (slot, place)) for buffer in carry["residuals"])
            dlayer, dx, more = self.block.backward(stored, layer, c, (frozen, index, *key), dy)
            keep = valid if self.even else valid & used
            if not self.even:
                dx = tree_where(used, dx, dy)
            if dc is not None:
                dc = jax.tree.map(lambda held, new: jnp.where(keep, held + new, held), dc, more)
            total = {name: _add(held, dlayer[name], place, keep) for name, held in total.items()}
            return (dx, dc, total), None

        (dx, dc, layer), _ = jax.lax.scan(body, (dy, dc, carry["layer"]), self.slots, reverse=True)
        rest = carry["rest"]
        if dc is not None:
            _, pull = jax.vjp(lambda rest: self.context(rest, row["b_microbatch"]), self.rest)
            rest = self.add(rest, pull(dc)[0], valid)
        dealt = self.deal(dx, source=0)
        _, pull = jax.vjp(lambda rest: self._before(rest, row["finish_microbatch"], share=True), self.rest)
        used = row["finish_microbatch"] >= 0
        rest = self.add(rest, pull(dealt)[0], used if self.shared else used & self.is_first)
        return carry | {"layer": layer, "rest": rest}, dx

    def head(self, carry: dict[str, Any], row: dict[str, jax.Array], y: Any) -> dict[str, Any]:
        """after, loss and their vjp; the cotangent of the last stage's y put into its slot."""
        examples, key, rows = self.microbatch(row["head_microbatch"], share=True)

        def loss(rest: Arrays, y: Any) -> tuple[jax.Array, jax.Array]:
            return self.calls.loss(self.calls.after({**rest, **self.fixed}, y, examples, key, rows), examples)

        total, pull, weight = jax.vjp(loss, self.rest, self.deal(y, self.region.num_stages - 1), has_aux=True)
        drest, dy = pull(jnp.ones_like(total))
        keep = jnp.bool_(True) if self.shared else self.is_last
        if self.shared:
            dy = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.region.stage, axis=0, tiled=True), dy)
        return self.count(carry, total, weight) | {
            "rest": self.add(carry["rest"], drest, keep),
            "cotangents": self.put(carry["cotangents"], dy, row["head_slot"], self.is_last),
        }

    def count(self, carry: dict[str, Any], total: jax.Array, weight: jax.Array) -> dict[str, Any]:
        """`carry` with a microbatch's loss, from the stages that computed it on true examples."""
        keep = jnp.bool_(True) if self.shared else self.is_last
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
        axes = dict.fromkeys(layer, region.batch) | dict.fromkeys(carry["rest"], region.manual)
        out = region.reduced({**layer, **carry["rest"]}, axes, self.specs, specs)
        return out, self.sums(carry)


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
