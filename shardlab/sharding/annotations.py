"""Annotations: what a Flax module itself says of its parameters' shardings, in one form and with one meaning.

========================================================  ===================================================
NNX  ``out_sharding=("embed", "mlp")`` in the metadata     names: by the logical rules, then as mesh axes
NNX  ``sharding_rules=...`` beside it                      the variable's own logical rules
NNX  ``out_sharding=NamedSharding(...)``                   mesh axes
Linen  ``nn.with_partitioning(init, ("data", None))``      mesh axes
Linen  ``nn.with_logical_partitioning(init, ("embed",))``  names, as for NNX; its ``rules=`` are its own
========================================================  ===================================================

Flax reads logical rules in two ways. On ``("mlp", "embed")`` the rules ``(("embed", "model"), ("mlp",
"model"), ("embed", "data"))`` give ``P(None, "model")`` in Linen, which goes through the rules and gives each
name the first axis that is still free, and ``("model", "data")`` in NNX, where the last rule of a name wins.
A name without a rule is replicated by Linen and becomes a mesh axis in NNX. Here there is one reading, for
both libraries:

1. The rules are taken in order. A rule gives its name its axes if the name has none yet and no other dim of
   this array has taken one of them; so a later rule of the same name is a fallback. None: replicated, on
   purpose.
2. A name without a rule is a mesh axis if the mesh has it; otherwise it is a fault.
3. A name whose every rule lost its axis to another dim is a fault, where Linen would replicate the dim
   silently and NNX name an axis twice. A last rule ``(name, None)`` says that replicating it is meant.
4. Rules of the variable's own come before the declared ones; of a name in both, the two must say the same.

Source: flax/linen/spmd.py (`logical_to_mesh_axes`) and flax/core/spmd.py (`from_sharding_rules`), 0.12.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from flax.core import meta
from flax.linen.spmd import LogicallyPartitioned
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import suggestion
from shardlab.sharding.rules import Entry, Logical, axes_of, canonical, entry


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What a module says of one parameter.

    Attributes:
      names: by dim: a name, several, or None.
      kind: ``"mesh"`` where the names are mesh axes, ``"logical"`` where logical rules are to read them.
      rules: logical rules that came with the parameter.
    """

    names: tuple[Entry, ...]
    kind: Literal["mesh", "logical"]
    rules: Logical = ()

    def __str__(self) -> str:
        """As in a fault.

        >>> print(Annotation(("embed", None), "logical"))
        annotation ('embed', None)
        """
        return f"annotation {self.names}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A fault of an annotation, before the parameter's path is known: what is wrong, and the way out."""

    problem: str
    way_out: str


def from_nnx(variable: Any) -> Annotation | None:
    """The annotation in an `nnx.Variable`'s metadata, or None.

    >>> from flax import nnx
    >>> import jax
    >>> shape = jax.ShapeDtypeStruct((4, 8), "float32")
    >>> from_nnx(nnx.Param(shape, out_sharding=("embed", "mlp"), eager_sharding=False))
    Annotation(names=('embed', 'mlp'), kind='logical', rules=())
    """
    metadata = variable.get_metadata()
    sharding = metadata.get("out_sharding")
    sharding = getattr(sharding, "sharding", sharding)  # A jax.experimental.layout.Format holds one.
    if sharding is None:
        return None
    if isinstance(sharding, NamedSharding):
        return Annotation(_names(sharding.spec), "mesh")
    return Annotation(_names(sharding), "logical", _rules(metadata.get("sharding_rules")))


def from_linen(boxed: Any) -> Annotation | None:
    """The annotation of a boxed Linen parameter (`nn.Partitioned`, `nn.LogicallyPartitioned`), or None.

    >>> import flax.linen as nn
    >>> from_linen(nn.Partitioned(None, names=(None, "tensor")))
    Annotation(names=(None, 'tensor'), kind='mesh', rules=())
    """
    if isinstance(boxed, LogicallyPartitioned):
        return Annotation(_names(boxed.names), "logical", _rules(boxed.rules))
    if isinstance(boxed, meta.Partitioned):
        return Annotation(_names(boxed.names), "mesh")
    return None


def to_spec(annotation: Annotation, *, logical: Logical, axes: Sequence[str]) -> tuple[P, list[Problem]]:
    """The spec that an annotation means on a mesh, and what is wrong with it.

    Args:
      annotation: of one parameter.
      logical: the declared logical rules.
      axes: the mesh's axes.

    >>> embed = Annotation(("mlp", "embed"), "logical")
    >>> to_spec(embed, logical=(("embed", "model"), ("mlp", "data")), axes=("data", "model"))
    (P('data', 'model'), [])
    """
    if annotation.kind == "mesh":
        known = {name for name, _ in logical}
        problems = [_no_axis(name, axes, name in known) for name in _flat(annotation.names) if name not in axes]
        return canonical(annotation.names), problems
    rules, problems = _merged(annotation, logical)
    slots = [(dim, name) for dim, names in enumerate(annotation.names) for name in axes_of(names)]
    given = _assign(slots, rules)
    named = [name for _, name in slots]
    ruled = {name for name, _ in rules}
    for place, (dim, name) in enumerate(slots):
        if name in ruled:
            wanted = [axis for rule, axis in rules if rule == name]
            if named.index(name) < place and any(axis is not None for axis in wanted):
                places = f"dims {slots[named.index(name)][0]} and {dim}"
                problems.append(Problem(f"logical name {name!r} names {places}", "name each dim differently"))
            elif place not in given:
                problems.append(_taken(name, dim, wanted, slots, given))
        elif name in axes:
            given[place] = name
        else:
            problems.append(_no_rule(name, (*sorted(ruled), *axes)))
    entries: list[list[str]] = [[] for _ in annotation.names]
    for place, (dim, _) in enumerate(slots):
        entries[dim] += axes_of(given.get(place))
    return canonical(entries), problems


def _assign(slots: Sequence[tuple[int, str]], rules: Logical) -> dict[int, Entry]:
    """Axes by slot: the rules in order, each given if its name has none yet and its axes are free."""
    given: dict[int, Entry] = {}
    for name, axes in rules:
        for place, (_, wanted) in enumerate(slots):
            used = {axis for taken in given.values() for axis in axes_of(taken)}
            if wanted == name and place not in given and not used & set(axes_of(axes)):
                given[place] = axes
    return given


def _merged(annotation: Annotation, logical: Logical) -> tuple[Logical, list[Problem]]:
    """The rules that read this annotation, its own first, and where the two disagree."""
    problems = []
    for name in dict.fromkeys(_flat(annotation.names)):
        mine = [axes for rule, axes in annotation.rules if rule == name]
        declared = [axes for rule, axes in logical if rule == name]
        if mine and declared and mine != declared:
            problems.append(
                Problem(
                    f"logical name {name!r} is {_or(mine)} in its own rules, {_or(declared)} in the declared",
                    "keep one of them",
                )
            )
    return (*annotation.rules, *logical), problems


def _taken(
    name: str, dim: int, wanted: Sequence[Entry], slots: Sequence[tuple[int, str]], given: dict[int, Entry]
) -> Problem:
    holders = {axis: slots[place] for place, held in given.items() for axis in axes_of(held)}
    lost = dict.fromkeys(axis for axes in wanted for axis in axes_of(axes) if axis in holders)
    taken = " and ".join(f"{axis!r} by {holders[axis][1]!r} (dim {holders[axis][0]})" for axis in lost)
    return Problem(
        f"logical name {name!r} (dim {dim}) may only be {_or(wanted)}; taken: {taken}",
        f"add a later logical rule ({name!r}, another axis), or ({name!r}, None) to replicate it on purpose",
    )


def _no_rule(name: str, known: Sequence[str]) -> Problem:
    return Problem(
        f"logical name {name!r} has no rule and is not a mesh axis",
        f"{suggestion(name, known)}add a logical rule ({name!r}, axis), or ({name!r}, None) to replicate it on purpose",
    )


def _no_axis(name: str, axes: Sequence[str], is_logical: bool) -> Problem:
    if is_logical:
        return Problem(
            f"{name!r} is a logical name, annotated as a mesh axis",
            "annotate it with nn.with_logical_partitioning",
        )
    return Problem(
        f"axis {name!r} is not in the mesh ({', '.join(axes)})",
        f"{suggestion(name, axes)}name a mesh axis, or None",
    )


def _or(choices: Iterable[Entry]) -> str:
    return " or ".join(repr(axes) for axes in choices)


def _flat(names: Iterable[Entry]) -> list[str]:
    return [name for axes in names for name in axes_of(axes)]


def _names(sharding: Any) -> tuple[Entry, ...]:
    """Names by dim, from a tuple, a list or a PartitionSpec."""
    return tuple(entry(axes) for axes in ((sharding,) if isinstance(sharding, str) else sharding))


def _rules(rules: Any) -> Logical:
    return tuple((name, entry(axes)) for name, axes in (rules or ()))
