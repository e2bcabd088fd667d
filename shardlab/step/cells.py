"""What a device does in one tick of a pipeline: the F, B, I and W cells, the head, and what passes between them.

In a uniform phase every device runs every cell; where the table has nothing for it the result is masked, never
branched on, so any collective is legal inside a block. In a divergent phase every device takes the branch of its own
cell, and what concerns all of them (before, head, sends) stands outside. Garbage is masked with `where`, not
multiplied: it may be NaN.

Legend: M microbatches, P devices of the stage axis, V virtual stages of each, R repeats of a run of blocks, Q kinds in
its pattern, K slots of a stage for blocks of one kind, b examples of a microbatch on a shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardlab.hlo.loops import taken_name
from shardlab.module.model import computed
from shardlab.module.residuals import BlockVjp, differentiable
from shardlab.module.split import Split
from shardlab.pipeline.buffers import Phase, Program, When
from shardlab.plan.layout import policy_within_stage
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls
from shardlab.step.region import Region, rows_of, tree_where, where_taken
from shardlab.step.slots import add, put, read, take, write
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
        self.has_context_gradient = any("context" in p.read_by for p in plan.parameters)
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
                rows[0] if self.virtual == 1 else take(rows, virtual) for rows in (self.blocks[index], self.used[index])
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

    def as_flow(self, kind: int, stored: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """A block's residuals, x among them laid out as it flows and no longer as it was kept."""
        pairs = zip(stored, self.vjps[kind].stores_x, strict=True)
        return tuple(self.calls.as_flow(leaf) if is_x else leaf for leaf, is_x in pairs)

    def where_used(self, slot: Slot, do: Callable[[], Any]) -> Any:
        """What `do` gives; in a slot without a block zeros or garbage of these shapes."""
        if slot.always or not self.skips:
            return do()
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(do))
        return where_taken(slot.used, lambda _: do(), nothing)

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

        # What a scan carries keeps the layout it starts with.
        laid = jax.lax.with_sharding_constraint
        carry: dict[str, Any] = {
            "mail": self._empty_x(self.calls.flow_spec, table.num_mail_slots),
            "sum": jnp.zeros((), self.wide),
            "weight": jnp.zeros((), self.wide),
            "auxiliary": (jnp.zeros((), self.wide), jnp.zeros((), self.wide)),
            "residuals": (),
        }
        if table.delayed:
            carry["outbox"] = self._empty_x(self.calls.flow_spec)
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
                cuts.append(cut)
            pieces.append(jax.eval_shape(functools.partial(self.accumulated, kind), layer))
        whole = {name: self.rest[name] for name in self.pieces}
        rest_pieces = jax.eval_shape(lambda: self.reduced_now(whole, jnp.bool_(True)))
        # What is computed again for I is kept for W.
        again = self._residuals(table.num_cut_slots) if self.recomputes else [()] * len(cuts)
        return carry | {
            "residuals": self._empty_x(self.calls.saved_spec, table.num_residual_slots)
            if self.recomputes
            else self._residuals(table.num_residual_slots),
            "cuts": [(self._of_blocks(kind, cut, table.num_cut_slots), again[kind]) for kind, cut in enumerate(cuts)],
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

    def _residuals(self, slots: int) -> list[tuple[jax.Array, ...]]:
        """By kind, buffers for the residuals of every block in a slot."""

        def of(kind: int, leaf: Any, is_x: bool) -> jax.Array:
            held = self._of_blocks(kind, leaf, slots)
            spec = PartitionSpec(None, None, *self.calls.saved_spec)
            return jax.lax.with_sharding_constraint(held, spec) if is_x else held

        return [
            tuple(of(kind, leaf, is_x) for leaf, is_x in zip(mine, self.vjps[kind].stores_x, strict=True))
            for kind, mine in enumerate(self.residuals)
        ]

    def _of_blocks(self, kind: int, leaves: Any, slots: int) -> Any:
        """Buffers for what every block of a kind keeps in a slot."""
        return jax.tree.map(lambda leaf: self._empty(leaf, slots, self.arrays.room(kind)), leaves)

    def _empty_x(self, spec: PartitionSpec, *slots: int) -> Any:
        """A buffer for x, laid out as `spec`."""
        spec = PartitionSpec(*(None for _ in slots), *spec)
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(self._empty(leaf, *slots), spec), self.x)

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
        return (self.calls.as_flow(dx), dc), dlayer

    # When a microbatch is due.

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
            x = tree_where(row["f_mail_slot"] < 0, x, take(carry["mail"], row["f_mail_slot"]))
        c = self.context(self.rest, row["f_microbatch"])
        _, key, _ = self.microbatch(row["f_microbatch"], share=False)
        valid, slot = row["f_microbatch"] >= 0, jnp.maximum(row["f_residual_slot"], 0)
        held = carry["residuals"]
        if self.key_data is None or self.recomputes:
            held = held if self.key_data is None else put(held, x, slot, valid)
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
                entering, extra = self.calls.as_flow(x), (frozen, at.block, *(key or (None, None)))
                if not held:
                    return self._block_of(kind)(layer, entering, c, extra), ()
                return self.vjps[kind].forward(layer, entering, c, extra)

            (y, pair), stored = self.where_used(at, do)
            if pair is not None:
                more = (jnp.where(valid & at.used, new, 0).astype(self.wide) for new in pair)
                auxiliary = tuple(total + new for total, new in zip(auxiliary, more, strict=True))
            if not at.always:
                y = tree_where(at.used, y, x)
            if held:
                written = (write(b, new, (slot, at.place), valid) for b, new in zip(held[kind], stored, strict=True))
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
        dy = take(carry["mail"], row["b_mail_slot"])
        dc = [jnp.zeros_like(leaf) for leaf in differentiable(c)] if self.has_context_gradient else None
        residuals = carry["residuals"]
        if self.recomputes:
            x, slot = self.calls.as_flow(take(residuals, slot)), jnp.int32(0)
            once = self._residuals(1)
            _, residuals, _ = self.stage(x, c, key, row["b_virtual"], once, slot, valid, carry["auxiliary"])

        def block(kind: int, state: Any, at: Slot) -> Any:
            dy, dc, total, cuts = state
            stored = tuple(read(buffer, (slot, at.place)) for buffer in residuals[kind])
            keep = valid if at.always else valid & at.used

            def do() -> tuple[Any, Any]:
                layer, frozen = self.layer_of(kind, at.stored)
                kept = self.as_flow(kind, stored), layer, c, (frozen, at.block, *key)
                if split:
                    return self.splits[kind].first(kept, dy)
                back, dlayer = self._block_backward(kind, kept, dy)
                return back, self.accumulated(kind, dlayer)

            (dx, more), new = self.where_used(at, do)
            if split:
                cut = new, stored if self.recomputes else ()
                held = jax.tree.map(lambda b, leaf: write(b, leaf, (cut_slot, at.place), valid), cuts[kind], cut)
                cuts = [*cuts[:kind], held, *cuts[kind + 1 :]]
            else:
                added = {name: add(held, new[name], at.stored, keep) for name, held in total[kind].items()}
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
            cut, stored = jax.tree.map(lambda buffer: read(buffer, (cut_slot, at.place)), carry["cuts"][kind])
            if not self.recomputes:
                stored = tuple(read(buffer, (slot, at.place)) for buffer in carry["residuals"][kind])
            keep = valid if at.always else valid & at.used

            def do() -> Arrays:
                layer, frozen = self.layer_of(kind, at.stored)
                kept = self.as_flow(kind, stored), layer, c, (frozen, at.block, *key)
                return self.accumulated(kind, self.splits[kind].second(kept, cut))

            new = self.where_used(at, do)
            added = {name: add(held, new[name], at.stored, keep) for name, held in total[kind].items()}
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
            rest = self.add(carry["rest"], drest, keep)
            if self.pieces:
                # Else XLA:TPU leaves these gradients for after the blocks' backward, and holds the logits through it.
                rest, dy = jax.lax.optimization_barrier((rest, dy))
            return new | {"rest": rest}, dy

        def skip() -> tuple[dict[str, Any], Any]:
            return {name: carry[name] for name in ("sum", "weight", "rest")}, jax.tree.map(jnp.zeros_like, y)

        if phase.head == "never":
            return carry
        new, dy = self.where_due(phase, phase.head, due, do, skip, "head")
        return carry | new | {"mail": put(carry["mail"], dy, row["head_slot"], due & self.is_last)}

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
        # Behind a barrier, or XLA:TPU adds up whole gradients in the loop and reduces their sum after it.
        return jax.lax.optimization_barrier(self.region.reduced(kept, axes, self.specs, self.state_specs))

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
