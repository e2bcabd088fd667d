"""What a plan takes on a target, before anything is compiled: memory, what crosses the links, seconds.

    memory     what the plan stores; working copies, accumulators, and slots of the schedule's buffers; the most that a
               part makes and holds at once
    wire       weights and gradients by where they lie; sums and gathers inside blocks by how the automatic axes split
               them; what stages hand on
    seconds    products at the chip's rate, other traffic at its memory's, collectives over the links that the axes lie
               on; ticks in lock-step, each as long as its longest cell

Gathers of a layer's weights and reductions of its gradients run beside its computation, and count as far as they are
longer; everything else waits for its collectives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from shardlab.mesh.spec import MeshSpec, Pairs
from shardlab.mesh.topology import Layout, collective_seconds, lay_out
from shardlab.pipeline.schedules import SCHEDULES
from shardlab.plan.layout import axes_in, policies_of_blocks, policy_within_stage
from shardlab.search.beyond import beyond_of_tpu
from shardlab.search.choice import Choice, Placed
from shardlab.search.costs import NOTHING, BlockCost, Cost, Split
from shardlab.search.places import slices_over
from shardlab.search.stages import held_blocks
from shardlab.search.storage import Axes, Group, Sent, Storage, gathered, storage, wire
from shardlab.search.subject import Subject
from shardlab.search.ticks import Key, Ticks, ticks
from shardlab.sharding.zero import without

EFFICIENCY = 0.75
"""Of the chip's peak, what large products reach."""
BANDWIDTH = 0.8
"""Of the memory's bandwidth, what other work reaches."""

WIDE = 64
"""Devices of a torus of two dims, over all of which XLA:TPU gathers what is small by an all-reduce: of v5e 8x8 and
16x16 and v6e 8x8 it does, of 4x4 it does not (libtpu 0.0.42.1)."""


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
        return sum(self.memory.values())

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
        self.mesh = functools.cache(self._mesh)
        self.storage = functools.cache(self._storage)
        self.layout = functools.cache(self._layout)
        self.doubled = functools.cache(self._doubled)
        self.pace = functools.cache(self._pace)
        self.split = functools.cache(self._split)
        self.cells = functools.cache(self._cells)
        self.ends = functools.cache(self._ends)
        self.blocks = functools.cache(functools.partial(held_blocks, subject))
        chip = self.chip
        # Of emulated devices nothing is known: their seconds are 0.
        self._peak = {} if chip is None else {dtype: flops * EFFICIENCY for dtype, flops in chip.flops.items()}
        self.memory_pace = 0.0 if chip is None else 1 / (chip.hbm_bandwidth * BANDWIDTH)

    # What plans share.

    def _mesh(self, axes: Pairs, dcn: Pairs = (), links: Any = ()) -> MeshSpec:
        """The mesh of a plan; where nothing is said of slices, for sizes alone, over whichever axes they divide."""
        mesh, target = self.subject.config.mesh, self.subject.target
        if target.slices > 1 and not dcn:
            dcn = next(slices_over(dict(axes), mesh.names, target.slices))
        return MeshSpec(axes, batch=mesh.batch, stage=mesh.stage, target=target.text, dcn=dcn, links=links)

    def _storage(self, axes: Any, zero: int, whole: Any, head: str) -> Storage:
        return storage(self.subject, self.mesh(axes), zero, whole, head)

    def _pace(self, placed: Placed, kind: str, axes: Axes) -> tuple[float, float]:
        """Seconds that a byte on the wire takes, and a collective of none."""
        if self.chip is None:
            return 0.0, 0.0
        start = collective_seconds(self.layout(placed), kind, axes, 0.0)
        return (collective_seconds(self.layout(placed), kind, axes, 1e9) - start) / 1e9, start

    def _doubled(self, placed: Placed, axes: Axes) -> bool:
        """Whether XLA:TPU makes an all-reduce of a reduce-scatter over these axes.

        It does over all dims of a torus (libtpu 0.0.42: 4x4, 8x8 and 16x16 of v5e and v6e, every v4 and v5p), but
        for a dim of 2, for a part of two dims (32 of 8x8 of v6e) and for dims of which one alone is a ring; of three
        dims `scatter="auto"` makes two steps.
        """
        if self.subject.target.platform != "tpu":
            return False
        parts = [part for axis in axes for part in self.layout(placed).links(axis).dims if part.dim.torus]
        dims = {part.name for part in parts}
        if len(dims) < len(self.subject.target.shape):
            return False
        if len(dims) > 2:
            return self.subject.config.scatter == "whole"
        if math.prod(part.size for part in parts) < math.prod(self.subject.target.shape):
            return False
        return len({part.wrap for part in parts}) == 1 and min(part.size for part in parts) > 2

    def _layout(self, placed: Placed) -> Layout:
        return lay_out(self.mesh(*placed))

    def _split(self, mesh: Any, activation: Any, saved: Any, whole: Any, vocabulary: bool) -> Split:
        subject, spec = self.subject, self.mesh(mesh)
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

    def busy(self, cost: Cost, rows: float) -> float:
        """Seconds of computation."""
        if self.chip is None:
            return 0.0
        products = sum(flops.at(rows) / self.peak(dtype) for dtype, flops in cost.flops.items())
        return max(products, cost.fed.at(rows) * self.memory_pace) + cost.moved.at(rows) * self.memory_pace

    def peak(self, dtype: str) -> float:
        """Products a second in a dtype; XLA:TPU multiplies float32 in bfloat16 unless it is told not to."""
        return self._peak.get(dtype) or self._peak["bfloat16"]

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
        self.seconds = dict.fromkeys(
            ("compute", "collectives", "weights", "gradients", "bubble", "stages", "optimizer"), 0.0
        )
        self.flops = 0.0
        self.transient = {"none": 0.0}
        # XLA:GPU gathers what is stored, and casts that (five steps of `benchmarks/predicted.py`).
        self.stored_first = subject.target.platform == "gpu"
        self.loops = choice.microbatches > 1 or self.stage is not None
        self.virtual = _virtual(choice) if self.stage else 1
        self.stages_hold = estimator.blocks(self.stages * self.virtual, choice.stages, choice.remat, self.head)
        self.rooms = self.stages_hold.rooms

    def add(self, cause: str, sent: Sent, times: float = 1.0) -> float:
        """Counts what is sent so often; the seconds that it takes once."""
        lasting = 0.0
        for (kind, axes), (size, count) in sent.items():
            made = self.made(kind, axes)
            if made != kind:
                size *= 2
            self.wires[cause, axes] = self.wires.get((cause, axes), 0.0) + size * times
            pace, start = self.of.pace(self.placed, made, axes)
            lasting += pace * size + start * count
        return lasting

    def made(self, kind: str, axes: Axes) -> str:
        """What the compiler makes of a collective."""
        return "all-reduce" if kind == "reduce-scatter" and self.of.doubled(self.placed, axes) else kind

    def estimate(self) -> Estimate:
        subject = self.subject
        self.memory = self.stored()
        if subject.model.parts is None:
            self.whole_model()
        else:
            self.blocks()
            self.around()
        self.outer()
        self.memory["temporaries"] = self.most()
        self.memory["fragments"] = self.beyond()
        total, mfu = sum(self.seconds.values()), 0.0
        if total:
            peak = self.of.peak(subject.config.dtype) / EFFICIENCY
            mfu = subject.model_flops / math.prod(self.sizes.values()) / peak / total
        return Estimate(self.choice, self.memory, self.wires, self.seconds, self.flops, mfu)

    # Blocks and what is around them.

    def blocks(self) -> None:
        of, choice, table, rows = self.of, self.choice, self.table, self.rows
        (policy,) = policies_of_blocks(choice.remat)
        again = policy_within_stage(choice.remat) is not None
        costs = of.cells(self.split, policy)
        flow, saved = (one.at(rows) for one in self.subject.costs.flow_bytes(self.split))
        times: dict[str, list[float]] = {cell: [0.0] * len(self.rooms) for cell in "FBIW"}
        kept = crossing = 0.0
        for kind, room in enumerate(self.rooms):
            cost, group = costs[kind], self.held.blocks[kind]
            gathers = gathered(group, self.wide) if self.by_layer else {}
            reduces = group.reduces if self.pieces else {}
            for cell, half in (("F", cost.forward), ("B", cost.backward), ("I", cost.first), ("W", _rest(cost))):
                runs = table.cells.get(cell, 0)
                if not runs:
                    continue
                count = runs * room
                # A stage that kept its input alone runs its forward again before its backward.
                forwards = 1 if again and cell in ("B", "I") else 0
                busy = of.busy(half, rows) + forwards * of.busy(cost.forward, rows)
                inside = self.add("activations", of.sent(half, rows, choice), count)
                if forwards:
                    inside += self.add("activations", of.sent(cost.forward, rows, choice), count)
                beside = 0.0
                if cell != "W" and gathers:
                    beside += self.add("weights", gathers, count * (1 + forwards)) * (1 + forwards)
                if cell in ("B", "W") and reduces:
                    beside += self.add("gradients", reduces, count)
                late = max(0.0, beside - busy)
                self.seconds["compute"] += busy * count
                self.seconds["collectives"] += inside * count
                self.seconds["weights" if cell in ("F", "I") else "gradients"] += late * count
                times[cell][kind] = busy + inside + late
                self.flops += count * sum(flops.at(rows) for flops in half.flops.values())
                self.flops += count * forwards * sum(flops.at(rows) for flops in cost.forward.flops.values())
                held = half.live.at(rows) + (group.whole if gathers else 0.0)
                if cell in ("B", "W"):
                    # Whole gradients are added where they are made; others are there until they are scattered.
                    held += group.largest if reduces else -group.whole
                self.holds(cell, max(held, 0.0))
            kept += room * (cost.kept.at(rows) + cost.kept_x.at(rows))
            crossing += room * cost.crossing.at(rows)
        self.pipeline(times, flow)
        once = kept if again else 0.0
        if again:
            self.memory["activations"] = saved * table.residuals + once + table.cuts * (once + crossing)
        else:
            self.memory["activations"] = kept * table.residuals + table.cuts * crossing
        self.memory["mail"] = table.mail * flow

    def doubles(self, groups: list[Group]) -> bool:
        """Whether XLA:TPU makes all-reduces of what would scatter the gradients of these."""
        sums = [axes for group in groups for kind, axes in group.reduces if kind == "reduce-scatter"]
        return bool(sums) and all(self.of.doubled(self.placed, axes) for axes in sums)

    def wide(self, axes: Axes) -> bool:
        """Whether XLA:TPU gathers what is small over these axes by an all-reduce."""
        many = math.prod(self.sizes[axis] for axis in axes) >= WIDE and len(self.subject.target.shape) == 2
        return many and self.of.doubled(self.placed, axes)

    def most(self) -> float:
        """Beside what is held throughout, the most that is made and held at once."""
        if self.loops or not self.rooms:
            return max(size for name, size in self.transient.items() if name != "cast")
        # Without a loop accumulators begin where they are first added to, those of blocks after the head, of what
        # `before` reads after the blocks; by then the weights of blocks are no longer needed.
        inside = sum(
            size for group, count, of_block in self.groups() for size in [self.sums(group) * count] if of_block
        )
        last = sum(self.sums(group) for read, group in self.held.outside.items() if "before" in read)
        ends = [self.transient.get(name, 0.0) - inside for name in ("after", "F")]
        finish = self.transient.get("finish", 0.0) - self.memory["working_copy"] - self.memory["activations"]
        cast = self.transient.get("cast", 0.0) - self.memory["gradients"]
        return max(self.transient.get("B", 0.0) - last, finish, cast, *ends)

    def beyond(self) -> float:
        """What the compiler takes beyond what is live."""
        if self.subject.target.platform != "tpu":
            return 0.0
        doubled = functools.partial(self.of.doubled, self.placed)
        return beyond_of_tpu(self.groups(), doubled, once=not self.pieces)

    def sums(self, group: Group) -> float:
        """Bytes of the accumulators of a group."""
        return group.pieces if self.pieces else group.accumulated

    def holds(self, where: str, size: float) -> None:
        """Notes what a part of the step makes and holds at once."""
        self.transient[where] = max(self.transient.get(where, 0.0), size)

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
        of, choice, table, stages = self.of, self.choice, self.table, self.stages
        rows = self.rows / stages if self.shared else self.rows
        flow = self.subject.costs.flow_bytes(self.split)[0].at(self.rows)
        vocabulary = of.split(choice.mesh, choice.activation, choice.saved_activation, choice.whole, True)
        before, back = of.ends(self.split, "before")
        after = of.ends(vocabulary if self.vocabulary else self.split, "after")[1]
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
                self.holds("cast", sum(group.whole * (1 + group.stored / group.shard) for group in made if group.cast))
            held = cost.live.at(each)
            if name == "after" and not self.loops and self.pieces and self.doubles(made):
                # The weights stay until their gradient is summed (v5e 4x4, 8x8, 16x16); else that takes their place.
                held += whole
            if (self.loops and name == "after") or name == "finish":
                # As in blocks; of those to be scattered what is summed replaces what they were made of.
                held = max(held, whole + summed) if self.pieces else held - whole
            self.holds(name, max(held, 0.0))
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
        of, choice, rows = self.of, self.choice, self.rows
        remat = "full" if policy_within_stage(choice.remat) else choice.remat
        _, cost = self.subject.costs.ends("whole", self.split, remat)
        count = choice.microbatches
        self.seconds["compute"] += of.busy(cost, rows) * count
        self.seconds["collectives"] += self.add("activations", of.sent(cost, rows, choice), count) * count
        self.flops += count * sum(flops.at(rows) for flops in cost.flops.values())
        self.holds("model", cost.live.at(rows))

    # Parameters.

    def groups(self) -> Iterator[tuple[Group, int, bool]]:
        """Groups of parameters, how many of each a device holds, and whether they are of blocks."""
        for group, room in zip(self.held.blocks, self.rooms, strict=True):
            yield group, room * self.virtual, True
        for group in self.held.outside.values():
            yield group, 1, False

    def outer(self) -> None:
        """What a step sends of weights and gradients once, and the optimizer."""
        numbers = 0.0
        embeds = [id(group) for read, group in self.held.outside.items() if "before" in read]
        for group, count, inside in self.groups():
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
        # Gradient, parameter and two moments are read, three of them written.
        self.seconds["optimizer"] += numbers * 4 * 7 * self.of.memory_pace

    def stored(self) -> dict[str, float]:
        """What is held throughout the step."""
        found = dict.fromkeys(_HELD, 0.0)
        for group, count, inside in self.groups():
            found["parameters"] += group.stored * count
            found["optimizer_state"] += group.state * count
            if inside and self.by_layer and group.cut:
                found["working_copy"] += group.shard * count if group.cast else 0.0
            elif (group.cast or group.cut) and (inside or self.loops):
                # Without a loop what is outside blocks is made where it is used, and its gradient takes its place.
                found["working_copy"] += group.whole * count
            found["gradients"] += self.sums(group) * count
        found["batch"] = self.subject.batch_bytes * self.subject.rows / self.shards
        return found


_READ = {"before": "", "after": "after", "finish": "before"}
_HELD = (
    *(
        "parameters",
        "optimizer_state",
        "batch",
        "working_copy",
        "gradients",
        "activations",
        "mail",
        "temporaries",
        "fragments",
    ),
)


def _rest(cost: BlockCost) -> Cost:
    """The gradients of a split backward's weights."""
    whole, first = cost.backward, cost.first
    flops = {dtype: one - first.flops.get(dtype, NOTHING.moved) for dtype, one in whole.flops.items()}
    return Cost(flops, whole.moved - first.moved, whole.fed - first.fed, {}, whole.live)


def _virtual(choice: Choice) -> int:
    return choice.virtual or SCHEDULES[choice.schedule].virtual
