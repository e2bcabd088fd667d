"""What a plan takes on a target, before anything is compiled: memory, what crosses the links, seconds.

    memory     what the plan stores; working copies, accumulators, and slots of the schedule's buffers; the most that a
               part makes and holds at once
    wire       weights and gradients by where they lie; sums and gathers inside blocks by how the automatic axes split
               them; what stages hand on
    seconds    products at the chip's rate, other traffic at its memory's, collectives over the links that the axes lie
               on; ticks in lock-step, each as long as its longest cell

Every collective is waited for: so XLA schedules them by default, on TPUs and on GPUs (the audits of
`benchmarks/predicted.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from shardlab.pipeline.schedules import SCHEDULES
from shardlab.plan.layout import axes_in, policies_of_blocks, policy_within_stage
from shardlab.search.beyond import CODE, apart, counted_twice, with_gaps
from shardlab.search.choice import Choice
from shardlab.search.costs import NOTHING, BlockCost, Cost, Split
from shardlab.search.link_costs import LinkCosts
from shardlab.search.memory import Memory, Moment
from shardlab.search.pace import bandwidth, keeping_moves, peak
from shardlab.search.stages import held_blocks
from shardlab.search.storage import Axes, Group, Sent, Storage, gathered, storage, wire
from shardlab.search.subject import Subject
from shardlab.search.ticks import Key, Ticks, ticks
from shardlab.sharding.zero import without


def schedule_of(choice: Choice, stage: str | None) -> Key:
    """The schedule that a plan runs; of one stage there is one, whatever it is called."""
    stages = choice.sizes[stage] if stage else 1
    return (
        (choice.schedule, stages, choice.microbatches, choice.virtual)
        if stages > 1
        else ("1f1b", 1, choice.microbatches, 1)
    )


@dataclass(frozen=True)
class Estimate:
    """What a plan is estimated to take.

    Attributes:
      memory: bytes of a device by what they hold.
      wire: bytes by cause and axes, per device and step.
      seconds: of a step, by what it waits for; their sum is the estimate.
      flops: products that a device does.
      mfu: of the chip's peak, the part that the model's own products are.
    """

    choice: Choice
    memory: Mapping[str, float]
    wire: Mapping[tuple[str, Axes], float]
    seconds: Mapping[str, float]
    flops: float
    mfu: float

    @property
    def hbm_bytes(self) -> float:
        """As the compiler reports it."""
        return sum(self.memory.values())

    @property
    def needed_bytes(self) -> float:
        """What has to fit the memory of a device: XLA:TPU reports more (`shardlab.search.beyond`)."""
        return self.hbm_bytes - self.memory["counted_twice"]

    @property
    def wire_bytes(self) -> float:
        return sum(self.wire.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class Estimator:
    """Estimates plans of one subject; what several plans share is found once."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.chip = subject, subject.chip
        self.links = LinkCosts(subject)
        self.storage = functools.cache(self._storage)
        self.split = functools.cache(self._split)
        self.cells = functools.cache(self._cells)
        self.ends = functools.cache(self._ends)
        self.blocks = functools.cache(functools.partial(held_blocks, subject))
        chip = self.chip
        # Of emulated devices nothing is known: their seconds are 0.
        self.memory_pace = 0.0 if chip is None else 1 / bandwidth(chip)

    # What plans share.

    def _storage(self, axes: Any, zero: int, whole: Any, head: str) -> Storage:
        return storage(self.subject, self.links.mesh(axes), zero, whole, head)

    def _split(self, mesh: Any, activation: Any, saved: Any, whole: Any, vocabulary: bool) -> Split:
        subject, spec = self.subject, self.links.mesh(mesh)
        sizes = {axis: spec.sizes[axis] for axis in subject.automatic if spec.sizes[axis] > 1}
        if vocabulary and spec.stage:
            sizes[spec.stage] = spec.sizes[spec.stage]
        keep = lambda one: _only(one or PartitionSpec(), sizes)  # noqa: E731
        compute = tuple((path, keep(one)) for path, one in subject.specs(whole).items())
        flow = _only(activation or PartitionSpec(), {a: n for a, n in sizes.items() if a != spec.stage})
        kept = flow if saved is None else _only(saved, {a: n for a, n in sizes.items() if a != spec.stage})
        return Split(tuple(sizes.items()), compute, flow, kept)

    def layers(self, choice: Choice) -> tuple[int, ...]:
        """How many blocks each stage of a plan holds, virtual stages too."""
        return Planned(self, choice).stages_hold.layers

    def _cells(self, split: Split, remat: str) -> tuple[BlockCost, ...]:
        return tuple(self.subject.costs.block(kind, remat, split) for kind in range(max(self.subject.kinds) + 1))

    def _ends(self, split: Split, name: str) -> tuple[Cost, Cost]:
        return self.subject.costs.ends(name, split)

    # Seconds.

    def busy(self, cost: Cost, rows: float, kept: float = 0.0) -> float:
        """Seconds of computation, of which so many bytes are kept or were."""
        if self.chip is None:
            return 0.0
        paces = {dtype: peak(self.chip, dtype, keeping=kept > 0) for dtype in cost.flops}
        products = sum(flops.at(rows) / paces[dtype] for dtype, flops in cost.flops.items())
        return products + (cost.moved.at(rows) + keeping_moves(self.chip, kept / 2)) * self.memory_pace

    def sent(self, cost: Cost, rows: float, choice: Choice) -> Sent:
        """What is put on the wire."""
        sizes = choice.sizes
        return {
            (kind, axes): (wire(kind, payload.at(rows), axes, sizes), count)
            for (kind, axes), (count, payload) in cost.sends.items()
        }

    # A plan.

    def estimate(self, choice: Choice) -> Estimate:
        """What a plan takes."""
        return Planned(self, choice).estimate()


def _only(spec: PartitionSpec, sizes: Mapping[str, int]) -> PartitionSpec:
    return without(spec, tuple(axes_in(spec) - set(sizes)))


class Planned:
    """One plan while it is estimated."""

    def __init__(self, estimator: Estimator, choice: Choice) -> None:
        self.of, self.choice = estimator, choice
        subject = estimator.subject
        self.subject, self.sizes, self.placed = subject, choice.sizes, choice.placed
        mesh = subject.config.mesh
        self.stage = mesh.stage if mesh.stage and self.sizes[mesh.stage] > 1 else None
        self.stages = self.sizes[self.stage] if self.stage else 1
        self.shards = math.prod(self.sizes[axis] for axis in mesh.batch)
        self.rows = subject.rows / self.shards / choice.microbatches
        self.batch = tuple(axis for axis in mesh.batch if self.sizes[axis] > 1)
        self.table: Ticks = ticks(*schedule_of(choice, mesh.stage))
        self.vocabulary = self.stage is not None and choice.head == "vocab"
        self.shared = self.stage is not None and choice.head in ("auto", "examples") and self.rows % self.stages == 0
        self.head = "vocab" if self.vocabulary else "examples" if self.shared else "last_stage"
        self.held = estimator.storage(choice.mesh, choice.zero, choice.whole, self.head)
        self.by_layer = choice.gather == "layer" or (choice.gather == "auto" and self.held.sharded)
        self.pieces = choice.accumulate == "sharded" or (choice.accumulate == "auto" and self.held.reduced)
        self.split = estimator.split(choice.mesh, choice.activation, choice.saved_activation, choice.whole, False)
        self.wires: dict[tuple[str, Axes], float] = {}
        # Seconds of collectives by cause, kind and axes, and by the part of the model that is estimated.
        self.lasting: dict[tuple[str, str, Axes, str], float] = {}
        self.part = ""
        self.seconds = dict.fromkeys(
            ("compute", "collectives", "weights", "gradients", "bubble", "stages", "optimizer"), 0.0
        )
        self.flops = 0.0
        # XLA:GPU gathers what is stored, and casts that (five steps of `benchmarks/predicted.py`).
        self.stored_first = subject.target.platform == "gpu"
        self.loops = choice.microbatches > 1 or self.stage is not None
        self.virtual = _virtual(choice) if self.stage else 1
        self.stages_hold = estimator.blocks(self.stages * self.virtual, choice.stages, choice.remat, self.head)
        self.rooms = self.stages_hold.rooms
        # Of parameters: how many of each a device holds, and whether they are of blocks.
        self.groups = (
            *((group, room * self.virtual, True) for group, room in zip(self.held.blocks, self.rooms, strict=True)),
            *((group, 1, False) for group in self.held.outside.values()),
        )
        self.embeds = [group for read, group in self.held.outside.items() if "before" in read]
        self.memory = Memory(
            self.groups,
            self.embeds,
            by_layer=self.by_layer,
            pieces=self.pieces,
            loops=self.loops,
            ticks=self.stage is not None,
        )

    def devices(self, axes: Axes) -> int:
        """How many the axes are of."""
        return math.prod(self.sizes[axis] for axis in axes)

    def add(self, cause: str, sent: Sent, times: float = 1.0) -> float:
        """Counts what is sent so often; the seconds that it takes once."""
        lasting = 0.0
        for (kind, axes), (size, count) in sent.items():
            made = self.of.links.made(self.placed, kind, axes)
            if made != kind:
                size *= 2
            self.wires[cause, axes] = self.wires.get((cause, axes), 0.0) + size * times
            pace, start = self.of.links.pace(self.placed, made, axes)
            once = pace * size + start * count
            key = cause, made, axes, self.part
            self.lasting[key] = self.lasting.get(key, 0.0) + once * times
            lasting += once
        return lasting

    def estimate(self) -> Estimate:
        subject, memory = self.subject, self.memory.bytes
        memory["batch"] = subject.batch_bytes * subject.rows / self.shards
        if subject.model.parts is None:
            self.whole_model()
        else:
            self.blocks()
            self.around()
        self.outer()
        moments = self.memory.moments()
        memory["temporaries"] = max(moment.held for moment in moments.values()) - self.memory.throughout
        if subject.target.platform == "tpu":
            live = max(moment.held for moment in moments.values())
            moments = self.with_gaps(moments)
            memory["fragments"] = max(moment.held for moment in moments.values()) - live + CODE
            memory["counted_twice"] = counted_twice(moments)
        total, mfu = sum(self.seconds.values()), 0.0
        if total:
            assert subject.chip is not None
            published = subject.chip.flops.get(subject.config.dtype, subject.chip.flops["bfloat16"])
            mfu = subject.model_flops / math.prod(self.sizes.values()) / published / total
        return Estimate(self.choice, memory, self.wires, self.seconds, self.flops, mfu)

    # Blocks and what is around them.

    def blocks(self) -> None:
        self.part = "blocks"
        of, choice, table, rows = self.of, self.choice, self.table, self.rows
        (policy,) = policies_of_blocks(choice.remat)
        again = policy_within_stage(choice.remat) is not None
        costs = of.cells(self.split, policy)
        flow, saved = (one.at(rows) for one in self.subject.costs.flow_bytes(self.split))
        times: dict[str, list[float]] = {cell: [0.0] * len(self.rooms) for cell in "FBIW"}
        kept = crossing = 0.0
        for kind, room in enumerate(self.rooms):
            cost, group = costs[kind], self.held.blocks[kind]
            gathers = gathered(group, functools.partial(of.links.by_reducing, self.placed)) if self.by_layer else {}
            reduces = group.reduces if self.pieces else {}
            in_parts = self.kept_in_parts(cost.forward, policy)
            for cell, half in (("F", cost.forward), ("B", cost.backward), ("I", cost.first), ("W", _rest(cost))):
                runs = table.cells.get(cell, 0)
                if not runs:
                    continue
                count = runs * room
                # A stage that kept its input alone runs its forward again before its backward.
                forwards = 1 if again and cell in ("B", "I") else 0
                keeps = cost.kept.at(rows) if cost.kept.at(rows) > cost.kept_x.at(rows) else 0.0
                busy = of.busy(half, rows, keeps) + forwards * of.busy(cost.forward, rows, keeps)
                busy += self.stacked(group, cell) * of.memory_pace
                inside = self.add("activations", of.sent(half, rows, choice), count)
                for axes, size in in_parts.items():
                    more = count * {"F": 1, "B": 2, "I": 2, "W": 0}[cell]
                    x = {("all-gather", axes): (wire("all-gather", size, axes, self.sizes), 1)}
                    inside += self.add("activations", x, more) * more / count
                if forwards:
                    inside += self.add("activations", of.sent(cost.forward, rows, choice), count)
                gathering = reducing = 0.0
                if cell != "W" and gathers:
                    gathering = self.add("weights", gathers, count * (1 + forwards)) * (1 + forwards)
                if cell in ("B", "W") and reduces:
                    reducing = self.add("gradients", reduces, count)
                self.seconds["compute"] += busy * count
                self.seconds["collectives"] += inside * count
                self.seconds["weights"] += gathering * count
                self.seconds["gradients"] += reducing * count
                times[cell][kind] = busy + inside + gathering + reducing
                self.flops += count * sum(flops.at(rows) for flops in half.flops.values())
                self.flops += count * forwards * sum(flops.at(rows) for flops in cost.forward.flops.values())
                if self.subject.target.platform == "tpu":
                    # Whole gradients are added where they are made; others are there one by one, to be scattered.
                    held = (half.gathered if gathers else half.bare).at(rows) + (group.largest if reduces else 0.0)
                else:
                    # XLA:GPU has all of a block's weights, and gradients to scatter, until its end.
                    held = half.live.at(rows) + (group.whole if gathers else 0.0)
                    if cell in ("B", "W"):
                        held += group.largest if reduces else -group.whole
                self.memory.holds(cell, max(held, 0.0))
            elsewhere = sum(size * (1 - 1 / self.devices(axes)) for axes, size in in_parts.items())
            kept += room * (max(cost.kept.at(rows) - elsewhere, 0.0) + cost.kept_x.at(rows))
            crossing += room * cost.crossing.at(rows)
        self.pipeline(times, flow)
        once = kept if again else 0.0
        if again:
            self.memory.bytes["activations"] = saved * table.residuals + once + table.cuts * (once + crossing)
        else:
            self.memory.bytes["activations"] = kept * table.residuals + table.cuts * crossing
        self.memory.bytes["mail"] = table.mail * flow

    def kept_in_parts(self, forward: Cost, policy: str) -> dict[Axes, float]:
        """Bytes of a product that is kept and that is a sum over axes, by those: XLA:TPU keeps it in shards of them.

        So it does where x is whole between blocks, and has x in shards within a block, which it gathers once more
        forward and twice backward (two steps of v6e and v5p, with `dots_saveable`).
        """
        if self.subject.target.platform != "tpu" or "dots" not in policy or axes_in(self.split.flow):
            return {}
        sums = {axes: sent for (kind, axes), sent in forward.sends.items() if kind == "all-reduce"}
        return {axes: payload.at(self.rows) / count for axes, (count, payload) in sums.items() if count}

    def stacked(self, group: Group, cell: str) -> float:
        """Bytes that XLA:GPU moves to take a block's weights from their stack, and to add its gradients to theirs.

        What is added is read and the accumulator copied out, and then all three moved again. XLA:TPU does both in the
        products' own fusions.
        """
        if self.subject.target.platform != "gpu":
            return 0.0
        taken = 0.0 if cell == "W" or self.by_layer else 2 * group.whole
        return taken + (4.5 * self.memory.sums(group) if cell in ("B", "W") else 0.0)

    def with_gaps(self, moments: dict[str, Moment]) -> dict[str, Moment]:
        """The moments with what XLA:TPU's fragments take."""
        heads = [group for read, group in self.held.outside.items() if "after" in read and group.reduces]
        gradient = max((group.largest for group in heads), default=0.0)
        x = self.memory.bytes["mail"] / math.prod(count for _, count in self.split.sizes)
        over = any(self.of.links.over_slices(self.placed, axes) for group in heads for _, axes in group.reduces)
        gap = 0.0 if self.loops or over else apart(self.subject.target.kind, x, gradient)
        return with_gaps(moments, gradient, gap, ticks=self.stage is not None, over=over)

    def pipeline(self, times: Mapping[str, list[float]], flow: float) -> None:
        """Sends between stages, and the bubble: what cells take that no microbatch is in.

        A tick lasts as long as the stage that takes longest: all slots, where every stage runs also those that it has
        no block for. What the mean stage computes of it is no bubble.

        Args:
          times: by cell and kind of block, what one block takes.
          flow: bytes of x.
        """
        if not self.stage:
            return
        table, stage = self.table, (self.stage,)
        # See `shardlab.step.stage_arrays.leaves_out`.
        skips = len(self.rooms) > 1 and (table.branches or not self.split.sizes)
        blocks = self.stages_hold
        longest = {cell: blocks.longest(each, skips=skips) for cell, each in times.items()}
        lasting = sum(max(longest[kind] for kind in kinds) * count for kinds, count in table.lasts if kinds)
        work = sum(blocks.mean(times[kind]) * count for kind, count in table.work.items())
        run = sum(blocks.longest(times[kind], skips=False) * count for kind, count in table.cells.items())
        # What was counted is every run of a cell, masked or not; a part of them is bubble.
        bubble = lasting - work
        share = work / run if run else 1.0
        for name in ("compute", "collectives", "weights", "gradients"):
            self.seconds[name] *= share
        self.seconds["bubble"] += bubble
        self.seconds["stages"] += (
            self.add("stages", {("collective-permute", stage): (flow, 1)}, table.sends) * table.sends
        )

    def around(self) -> None:
        """What comes before and after the blocks."""
        self.part = "what comes before and after the blocks"
        of, choice, table, stages = self.of, self.choice, self.table, self.stages
        rows = self.rows / stages if self.shared else self.rows
        flow = self.subject.costs.flow_bytes(self.split)[0].at(self.rows)
        vocabulary = of.split(choice.mesh, choice.activation, choice.saved_activation, choice.whole, True)
        before, back = of.ends(self.split, "before")
        _, after = of.ends(vocabulary if self.vocabulary else self.split, "after")
        for name, cost, count, each in (
            ("before", before, table.before, rows),
            ("after", after, table.after, self.rows if self.vocabulary else rows),
            ("finish", back, table.finish, rows),
        ):
            if not count:
                continue
            busy = of.busy(cost, each)
            self.seconds["compute"] += busy * count
            self.flops += count * sum(flops.at(each) for flops in cost.flops.values())
            self.seconds["collectives"] += self.add("activations", of.sent(cost, each, choice), count) * count
            made = [group for read, group in self.held.outside.items() if _READ[name] in read]
            whole, summed = (sum(getattr(group, size) for group in made) for size in ("whole", "summed"))
            if name == "after" and self.stored_first:
                self.memory.holds(
                    "cast", sum(group.whole * (1 + group.stored / group.shard) for group in made if group.cast)
                )
            held = cost.live.at(each)
            if name == "after" and not self.loops and self.pieces and self.subject.target.kind == "v5e":
                # The weights stay until their gradient is made; else that takes their place.
                held += whole
            if name == "after" and not self.loops and self.subject.target.platform == "gpu":
                # XLA:GPU has the accumulators of what is outside blocks from the beginning.
                held += sum(self.memory.sums(group) for group in self.held.outside.values())
            if (self.loops and name == "after") or name == "finish":
                # As in blocks; of those to be scattered what is summed replaces what they were made of.
                held = max(held, whole + summed) if self.pieces else held - whole
            self.memory.holds(name, max(held, 0.0))
        if self.stage:
            stage = (self.stage,)
            moved = flow * (stages - 1) / stages
            if self.shared:
                gathers = table.before + table.after
                self.seconds["stages"] += self.add("stages", {("all-gather", stage): (moved, 1)}, gathers) * gathers
                deals = table.after + table.finish
                self.seconds["stages"] += self.add("stages", {("all-to-all", stage): (moved, 1)}, deals) * deals
            if self.vocabulary:
                sums = 2 * table.after
                self.seconds["stages"] += self.add("stages", {("all-reduce", stage): (2 * moved, 1)}, sums) * sums

    def whole_model(self) -> None:
        self.part = "the model"
        of, choice, rows = self.of, self.choice, self.rows
        remat = "full" if policy_within_stage(choice.remat) else choice.remat
        _, cost = self.subject.costs.ends("whole", self.split, remat)
        count = choice.microbatches
        self.seconds["compute"] += of.busy(cost, rows) * count
        self.seconds["collectives"] += self.add("activations", of.sent(cost, rows, choice), count) * count
        self.flops += count * sum(flops.at(rows) for flops in cost.flops.values())
        self.memory.holds("model", cost.live.at(rows))

    # Parameters.

    def outer(self) -> None:
        """What a step sends of weights and gradients once, and the optimizer."""
        self.part = ""
        numbers = moved = 0.0
        embeds = [id(group) for group in self.embeds]
        for group, count, inside in self.groups:
            if not (inside and self.by_layer):
                gathers = group.gathers
                if self.stored_first and group.cast and id(group) not in embeds:
                    # But for one of the embedding and the head, which have about one size.
                    wide = group.stored / group.shard
                    gathers = {key: (size * wide, times) for key, (size, times) in gathers.items()}
                self.seconds["weights"] += self.add("weights", gathers, count) * count
            if not (inside and self.pieces):
                # Pieces of what is outside blocks are summed whenever a microbatch has passed it.
                times = self.table.after if self.pieces else count
                self.seconds["gradients"] += self.add("gradients", group.reduces, times) * times
            self.seconds["weights"] += self.add("weights", group.updates, count) * count
            numbers += group.numbers * count
            # Parameters are cast, and whole gradients before and after they are sent.
            moved += (1.5 * group.stored if group.cast else 0.0) * count
            moved += 3 * group.accumulated * count if group.reduces and not self.pieces else 0.0
        self.seconds["compute"] += moved * self.of.memory_pace
        # Gradient, parameter and two moments are read, three of them written.
        self.seconds["optimizer"] += numbers * 4 * 7 * self.of.memory_pace


_READ = {"before": "", "after": "after", "finish": "before"}


def _rest(cost: BlockCost) -> Cost:
    """The gradients of a split backward's weights."""
    whole, first = cost.backward, cost.first
    flops = {dtype: one - first.flops.get(dtype, NOTHING.moved) for dtype, one in whole.flops.items()}
    return Cost(flops, whole.moved - first.moved, {}, whole.live, whole.bare, whole.gathered)


def _virtual(choice: Choice) -> int:
    return choice.virtual or SCHEDULES[choice.schedule].virtual
