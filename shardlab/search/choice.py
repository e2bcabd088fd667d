"""A plan of the search, as what it changes of a config: small enough to make thousands of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from shardlab.mesh.faults import Fault, raise_faults, suggestion
from shardlab.run.config import Config
from shardlab.sharding.rules import Rule, Rules, spec_from_json, spec_to_json
from shardlab.sharding.zero import without

Placed = tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...], tuple[tuple[str, tuple[str, ...]], ...]]
"""Axes with sizes, axes with the slices they run over, axes with the physical dims that they are to lie on."""


@dataclass(frozen=True)
class Choice:
    """What a plan has that the config leaves open.

    Attributes:
      mesh: size of every axis, in the mesh's order.
      dcn, links: as `MeshSpec` has them: over how many slices axes run, and the physical dims that axes lie on where
        they do not lie as `lay_out` would have them.
      zero, schedule, virtual, stages, microbatches, remat, gather, accumulate, head: as `Config` has them.
      activation, saved_activation: specs of what flows between blocks, and of what is kept of it; None: none.
      whole: pairs (pattern, axis): parameters that the rules cut over the axis and this plan does not.
    """

    mesh: tuple[tuple[str, int], ...]
    dcn: tuple[tuple[str, int], ...] = ()
    links: tuple[tuple[str, tuple[str, ...]], ...] = ()
    zero: int = 0
    schedule: str = "1f1b"
    virtual: int = 0
    stages: str = ""
    microbatches: int = 1
    remat: str = "none"
    gather: str = "step"
    accumulate: str = "full"
    head: str = "auto"
    activation: PartitionSpec | None = None
    saved_activation: PartitionSpec | None = None
    whole: tuple[tuple[str, str], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis."""
        return dict(self.mesh)

    @property
    def placed(self) -> Placed:
        """The mesh and where it lies on the links."""
        return self.mesh, self.dcn, self.links

    def overrides(self, target: str) -> dict[str, Any]:
        """As plain data; `changed` applies it."""
        found: dict[str, Any] = {"mesh": self.sizes, "target": target, "dcn": dict(self.dcn)}
        found["links"] = {axis: list(dims) for axis, dims in self.links}
        found |= {name: getattr(self, name) for name in _SCALARS}
        for name in _SPECS:
            spec = getattr(self, name)
            found[name] = None if spec is None else spec_to_json(spec)
        found["whole"] = [list(pair) for pair in self.whole]
        return found


_SCALARS = ("zero", "schedule", "virtual", "stages", "microbatches", "remat", "gather", "accumulate", "head")
_SPECS = ("activation", "saved_activation")
_PLACES = ("dcn", "links")


def changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The config with the overrides of a plan.

    Raises:
      DeclarationError: a name that is none of them, or what `Config` refuses.
    """
    known = ("mesh", "target", *_PLACES, *_SCALARS, *_SPECS, "whole")
    raise_faults(
        Fault(f"overrides {name!r}", "is none of a plan's", f"{suggestion(name, known)}there are {', '.join(known)}")
        for name in overrides
        if name not in known
    )
    fields: dict[str, Any] = {name: overrides[name] for name in _SCALARS if name in overrides}
    for name in _SPECS:
        if name in overrides:
            fields[name] = None if overrides[name] is None else spec_from_json(overrides[name])
    if any(name in overrides for name in ("mesh", "target", *_PLACES)):
        places = {name: overrides.get(name) for name in ("target", *_PLACES)}
        fields["mesh"] = config.mesh.override(overrides.get("mesh", config.mesh.sizes), **places)
    if overrides.get("whole"):
        assert isinstance(config.rules, Rules)
        fields["rules"] = kept_whole(config.rules, [tuple(pair) for pair in overrides["whole"]])
    return dataclasses.replace(config, **fields)


def kept_whole(rules: Rules, pairs: Any) -> Rules:
    """The rules, those with the patterns no longer naming the axes beside them.

    >>> kept_whole(Rules((("head/kernel", PartitionSpec(None, "tensor")),)), [("head/kernel", "tensor")]).rules[0].spec
    P(None, None)
    """
    dropped: dict[str, tuple[str, ...]] = {}
    for pattern, axis in pairs:
        dropped[pattern] = (*dropped.get(pattern, ()), axis)
    given = {rule.pattern for rule in rules.rules}
    raise_faults(
        Fault(
            f"whole {pattern!r}", "is the pattern of no rule of this config", f"{suggestion(pattern, given)}write one"
        )
        for pattern in dropped
        if pattern not in given
    )
    return Rules(
        tuple(
            Rule(rule.pattern, without(rule.spec, dropped[rule.pattern]), rule.pad) if rule.pattern in dropped else rule
            for rule in rules.rules
        ),
        rules.logical,
    )


def choice_of(config: Config) -> Choice:
    """The plan that the config declares."""
    scalars = {name: getattr(config, name) for name in _SCALARS}
    scalars["stages"] = config.stages if isinstance(config.stages, str) else ""
    return Choice(
        mesh=config.mesh.axes,
        dcn=config.mesh.dcn,
        links=config.mesh.links,
        activation=config.activation,
        saved_activation=config.saved_activation,
        **scalars,
    )


def sizes_in_words(choice: Choice) -> dict[str, str]:
    """By axis, its size as the command line has it.

    >>> sizes_in_words(Choice(mesh=(("data", 32), ("tensor", 4)), dcn=(("data", 2),)))
    {'data': 'data=2*16', 'tensor': 'tensor=4'}
    """
    slow = dict(choice.dcn)
    return {
        axis: f"{axis}={slow[axis]}*{size // slow[axis]}" if axis in slow else f"{axis}={size}"
        for axis, size in choice.mesh
    }


def command(config_path: str, choice: Choice, config: Config, target: str) -> str | None:
    """The command line that plans the same; None where it has no spelling for it, and a plan file has."""
    base = choice_of(config)
    if choice.whole or any(getattr(choice, name) != getattr(base, name) for name in (*_SPECS, "links")):
        return None
    if base.dcn and not choice.dcn:
        return None
    words = [f"shardlab compile {config_path} --target {target} --mesh {','.join(sizes_in_words(choice).values())}"]
    for name in _SCALARS:
        value = getattr(choice, name)
        if value != getattr(base, name):
            shown = f"'{value}'" if value == "" or " " in str(value) else value
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)
