"""The plans that are searched: every way to lay a config on a target, within reason.

    mesh          factorisations of the devices over the declared axes; of several slices, which axes run over them
    storage       ZeRO 0 to 3; at 3 weights gathered once a step or by layer, from 2 on gradients whole or in pieces
    pipeline      schedules with their virtual stages, microbatches
    remat         everything kept, every block's input, products, or a stage's input

and, of the best of these alone, since they change little (`variations`):

    x             as the config says, and whole
    parameters    the rules as they are, and with an axis left out for one kind of parameter outside blocks

and of few, one at a time, and again of what comes of it:

    links         of the best plan of each mesh, the physical dims that each axis lies on (`elsewhere`)
    stages        of the same, even and balanced by what blocks cost
    parameters    of the very best, an axis left out for one kind of parameter in blocks (`simplified`)

What no plan can be is left out here: batches and layers that do not divide, ZeRO without batch axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from jax.sharding import PartitionSpec

from shardlab.mesh.spec import MeshSpec, Pairs
from shardlab.pipeline.schedules import SCHEDULES
from shardlab.plan.layout import axes_in
from shardlab.run.config import Config
from shardlab.search.choice import Choice
from shardlab.search.places import other_links, slices_over
from shardlab.search.subject import Subject
from shardlab.sharding.rules import Rules

VIRTUAL = (2, 4)
MOST_MICROBATCHES = 16
MOST_KINDS = 16


def candidates(subject: Subject) -> Iterator[Choice]:
    """All plans but the variations of the best."""
    for mesh, dcn in meshes(subject):
        yield from _of_mesh(subject, mesh, dcn)


def variations(subject: Subject, choice: Choice) -> Iterator[Choice]:
    """A plan with x and single kinds of parameters laid otherwise; not the plan itself."""
    automatic = [axis for axis in subject.automatic if choice.sizes[axis] > 1]
    for activation, saved in _flows(subject.config, automatic):
        for whole in _whole(subject.config, automatic):
            other = replace(choice, activation=activation, saved_activation=saved, whole=whole)
            if other != choice:
                yield other


def elsewhere(choice: Choice, mesh: MeshSpec, layers: Layers) -> Iterator[Choice]:
    """A plan with its axes on other links, or with its stages balanced where that changes them.

    Args:
      choice: the plan.
      mesh: its mesh.
      layers: how many blocks each stage of a plan holds.
    """
    if not choice.links:
        yield from (replace(choice, links=links) for links in other_links(mesh))
    if mesh.stage and choice.sizes[mesh.stage] > 1 and not choice.stages:
        balanced = replace(choice, stages="balanced")
        if layers(balanced) != layers(choice):
            yield balanced


def simplified(subject: Subject, choice: Choice) -> Iterator[Choice]:
    """A plan with one more kind of parameter of its blocks whole over an axis."""
    for axis in subject.automatic:
        if choice.sizes[axis] > 1:
            for patterns in _kinds(subject, axis):
                whole = tuple(sorted({*choice.whole, *((pattern, axis) for pattern in patterns)}))
                if whole != choice.whole:
                    yield replace(choice, whole=whole)


Layers = Callable[[Choice], tuple[int, ...]]


def meshes(subject: Subject) -> Iterator[tuple[Pairs, Pairs]]:
    """Sizes of the axes in the mesh's order, whose product is the number of devices; of several slices, what of them.

    Slices are joined by slow links: batch axes run over them, or stages, which send the least; others do in no plan
    that is worth a look.
    """
    config = subject.config
    count, names = subject.target.num_devices, config.mesh.names
    for sizes in factorisations(count, len(names)):
        by_name = dict(zip(names, sizes, strict=True))
        shards = math.prod(by_name[axis] for axis in config.mesh.batch)
        if subject.rows % shards:
            continue
        stages = by_name[config.mesh.stage] if config.mesh.stage else 1
        if stages > max(len(subject.kinds), 1):
            continue
        mesh = tuple(by_name.items())
        over = (*config.mesh.batch, *([config.mesh.stage] if config.mesh.stage else []))
        yield from ((mesh, dcn) for dcn in slices_over(by_name, over, subject.target.slices))


def factorisations(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write a number as a product.

    >>> list(factorisations(4, 2))
    [(1, 4), (2, 2), (4, 1)]
    """
    if parts == 1:
        yield (count,)
        return
    for first in (size for size in range(1, count + 1) if count % size == 0):
        for rest in factorisations(count // first, parts - 1):
            yield (first, *rest)


def _of_mesh(subject: Subject, mesh: Pairs, dcn: Pairs) -> Iterator[Choice]:
    config, sizes = subject.config, dict(mesh)
    shards = math.prod(sizes[axis] for axis in config.mesh.batch)
    stages = sizes[config.mesh.stage] if config.mesh.stage else 1
    parted = subject.model.parts is not None
    per_shard = subject.rows // shards
    # More than four times as many microbatches as stages shorten the bubble by little, and leave each few examples.
    least, most = (stages, 4 * stages) if stages > 1 else (1, MOST_MICROBATCHES)
    counts = [count for count in _powers(per_shard) if least <= count <= most and per_shard % count == 0]
    for zero, gather, accumulate in _stores(shards, parted):
        for schedule, virtual in _schedules(stages, len(subject.kinds)):
            for microbatches in counts:
                for remat in _remats(config, stages):
                    yield Choice(
                        mesh=mesh,
                        dcn=dcn,
                        zero=zero,
                        schedule=schedule,
                        virtual=virtual,
                        microbatches=microbatches,
                        remat=remat,
                        gather=gather,
                        accumulate=accumulate,
                        head=config.head,
                        activation=config.activation,
                        saved_activation=config.saved_activation,
                    )


def _stores(shards: int, parted: bool) -> Iterator[tuple[int, str, str]]:
    yield 0, "step", "full"
    if shards == 1:
        return
    yield 1, "step", "full"
    if not parted:
        yield 3, "step", "full"
        return
    yield 2, "step", "sharded"
    yield from itertools.product((3,), ("step", "layer"), ("full", "sharded"))


def _schedules(stages: int, blocks: int) -> Iterator[tuple[str, int]]:
    if stages == 1:
        yield "1f1b", 0
        return
    for name, made in SCHEDULES.items():
        if made.any_virtual and made.virtual > 1:
            yield from ((name, virtual) for virtual in VIRTUAL if stages * virtual <= blocks)
        elif stages * made.virtual <= blocks:
            yield name, made.virtual


def _remats(config: Config, stages: int) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys((config.remat, "none", "full", "dots_saveable", *(("stage/full",) if stages > 1 else ())))
    )


def _flows(config: Config, automatic: list[str]) -> Iterator[tuple[PartitionSpec | None, PartitionSpec | None]]:
    """Of x as it flows and as it is kept: as declared, and whole."""
    yield config.activation, config.saved_activation
    for spec in (config.activation, config.saved_activation):
        if spec is not None and axes_in(spec) & {*automatic}:
            yield None, None
            return


def _whole(config: Config, automatic: list[str]) -> Iterator[tuple[tuple[str, str], ...]]:
    """No rule changed, or those of one pattern outside blocks without an axis."""
    yield ()
    assert isinstance(config.rules, Rules)
    for rule in config.rules.rules:
        blocks = config.pipeline.blocks if config.pipeline is not None else ""
        if blocks and rule.pattern.startswith(f"{blocks}/"):
            continue
        for axis in sorted(axes_in(rule.spec) & {*automatic}):
            yield ((rule.pattern, axis),)


def _kinds(subject: Subject, axis: str) -> list[tuple[str, ...]]:
    """Patterns of rules that belong together and cut parameters of blocks over an axis.

    Those of one part of a block, as its attention; and of these, those of one shape and one spec, as keys and values.
    """
    config = subject.config
    assert isinstance(config.rules, Rules)
    found: dict[tuple[object, ...], dict[str, None]] = {}
    for array in subject.arrays:
        rule = config.rules.first(array.path)
        if array.kind < 0 or rule is None or axis not in axes_in(rule.spec):
            continue
        part = array.path.rpartition("/")[0].rpartition("/")[0]
        for key in ((array.kind, part), (array.kind, part, array.shape, rule.spec)):
            found.setdefault(key, {})[rule.pattern] = None
    return list(dict.fromkeys(map(tuple, found.values())))[:MOST_KINDS]


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to a number."""
    found, count = [], 1
    while count <= most:
        found.append(count)
        count *= 2
    return found
