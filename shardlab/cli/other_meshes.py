"""Another mesh for a step that does not fit: the same axes in other sizes, of those that fit the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from shardlab.mesh.faults import DeclarationError
from shardlab.run.config import Config
from shardlab.run.remedies import Remedy, left
from shardlab.search.candidates import meshes
from shardlab.search.choice import Choice, choice_of, sizes_in_words
from shardlab.search.estimate import Estimate, Estimator
from shardlab.search.search import refusal, refused_by_make_plan
from shardlab.search.subject import Subject

_MADE = 3
"""Of how many of the fastest the plan is made, which may refuse one, until one is made."""


def other_mesh(config: Config, needed: int, capacity: int) -> Remedy | None:
    """The mesh of the fastest step that fits, alone or with ZeRO 3 or full rematerialisation; None where none fits.

    Nothing is compiled: a step needs what the compiler says of this one, more or less by what the search's model says.

    Args:
      needed: bytes of a device that the config's step needs, by the compiler.
      capacity: bytes that there are.
    """
    try:
        subject = Subject(config, config.mesh.machine.text)
        estimator = Estimator(subject)
        now = estimator.estimate(choice_of(config))
    except DeclarationError:  # of this machine no speeds are known
        return None

    def held(one: Estimate) -> int:
        return left(needed, round(now.needed_bytes), round(one.needed_bytes))

    fitting = (one for one in _estimates(estimator, config) if held(one) <= capacity)
    for one in sorted(fitting, key=lambda one: one.total_seconds)[:_MADE]:
        if not refused_by_make_plan(subject, one.choice):
            return Remedy(_change(config, one.choice), needed - held(one), held(one), True, one.total_seconds)
    return None


def _estimates(estimator: Estimator, config: Config) -> Iterator[Estimate]:
    declared = choice_of(config)
    more: tuple[dict[str, Any], ...] = ({}, {"zero": 3}, {"remat": "full"}, {"zero": 3, "remat": "full"})
    variants = dict.fromkeys(dataclasses.replace(declared, **one) for one in more)
    for mesh, dcn in meshes(estimator.subject):
        if (mesh, dcn) == (declared.mesh, declared.dcn):
            continue
        for variant in variants:
            choice = dataclasses.replace(variant, mesh=mesh, dcn=dcn)
            # A mesh that the target or the schedule has no place for is none.
            with contextlib.suppress(DeclarationError):
                if not refusal(estimator, choice):
                    yield estimator.estimate(choice)


def _change(config: Config, choice: Choice) -> str:
    """As on the command line, the axes of one device left out unless the config names more."""
    words = sizes_in_words(choice)
    sizes = [words[axis] for axis, size in choice.mesh if size > 1 or config.mesh.sizes[axis] > 1]
    scalars = [
        f"--{name} {value}"
        for name, value in (("zero", choice.zero), ("remat", choice.remat))
        if value != getattr(config, name)
    ]
    return " ".join([f"--mesh {','.join(sizes)}", *scalars])
