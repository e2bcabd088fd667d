"""The plans that are searched: every way to lay a config on a target, within reason.

    mesh          factorisations of the devices over the declared axes
    storage       ZeRO 0 to 3; at 3 weights gathered once a step or by layer, from 2 on gradients whole or in pieces
    pipeline      schedules with their virtual stages, microbatches
    remat         everything kept, every block's input, products, or a stage's input

and, of the best of these alone, since they change little:

    x             as the config says, and whole
    parameters    the rules as they are, and with an axis left out for one kind of parameter outside blocks

What no plan can be is left out here: batches and layers that do not divide, ZeRO without batch axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from jax.sharding import PartitionSpec

from shardlab.pipeline.schedules import SCHEDULES
from shardlab.plan.layout import axes_in
from shardlab.run.config import Config
from shardlab.search.choice import Choice
from shardlab.search.subject import Subject
from shardlab.sharding.rules import Rules

VIRTUAL = (2, 4)
MOST_MICROBATCHES = 16


def candidates(subject: Subject) -> Iterator[Choice]:
    """All plans but the variations of the best."""
    for mesh in meshes(subject):
        yield from _of_mesh(subject, mesh)


def variations(subject: Subject, choice: Choice) -> Iterator[Choice]:
    """A plan with x and single kinds of parameters laid otherwise; not the plan itself."""
    automatic = [axis for axis in subject.automatic if choice.sizes[axis] > 1]
    for activation, saved in _flows(subject.config, automatic):
        for whole in _whole(subject.config, automatic):
            other = replace(choice, activation=activation, saved_activation=saved, whole=whole)
            if other != choice:
                yield other


def meshes(subject: Subject) -> Iterator[tuple[tuple[str, int], ...]]:
    """Sizes of the axes in the mesh's order, whose product is the number of devices."""
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
        yield tuple(by_name.items())


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


def _of_mesh(subject: Subject, mesh: tuple[tuple[str, int], ...]) -> Iterator[Choice]:
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


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to a number."""
    found, count = [], 1
    while count <= most:
        found.append(count)
        count *= 2
    return found
