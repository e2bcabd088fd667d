"""Resolve: the spec of every parameter, and everything that is wrong with the declaration, found at once.

For each parameter, in this order: the spec given for its path; its annotation and the first rule that
matches, which must agree where both speak. Nothing is replicated because nobody spoke: that is a fault.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import Fault, nearest, suggestion
from shardlab.mesh.spec import MeshSpec
from shardlab.sharding.annotations import Annotation, to_spec
from shardlab.sharding.rules import Rule, Rules, axes_of, canonical, spec_faults, spec_text

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one parameter lives.

    Attributes:
      spec: mesh axes by dim, without trailing None.
      source: who said so: ``rule 3, "**/up/kernel"``, ``annotation ('embed', 'mlp')`` or ``specs``.
      padded: the shape to store it in, where its rule has pad=True and a dim does not divide; else None.
    """

    spec: P
    source: str
    padded: Shape | None = None


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Placements by path, of every parameter whose spec could be told, and all faults."""

    placements: dict[str, Placement]
    faults: tuple[Fault, ...]


def resolve(
    shapes: Mapping[str, Sequence[int]],
    *,
    mesh: MeshSpec,
    rules: Rules,
    annotations: Mapping[str, Annotation] | None = None,
    specs: Mapping[str, Any] | None = None,
    blocks: Collection[str] = (),
) -> Resolution:
    """The spec of every parameter, by path, and every fault of the declaration.

    A fault that is the same on sibling layers (paths that differ in a number only: ``blocks/3``, ``Dense_3``)
    comes once, with a count.

    Args:
      shapes: global shapes of the parameters by path.
      mesh: the declared mesh.
      rules: specs by pattern, and logical rules for the annotations.
      annotations: what the module says, by path.
      specs: specs by path, flat or nested; a path in it needs neither rule nor annotation.
      blocks: paths of the parameters in the pipeline's blocks, whose specs must leave the stage axis out.

    >>> mesh = MeshSpec({"data": 4, "tensor": 2}, batch="data")
    >>> found = resolve({"up/kernel": (8, 9)}, mesh=mesh, rules=Rules((("**/kernel", P(None, "tensor")),)))
    >>> print(found.faults[0])  # doctest: +NORMALIZE_WHITESPACE
    up/kernel: dim 1 has size 9, not divisible by axis 'tensor' of size 2 (rule 1, "**/kernel");
    shard another dim, pad it to 10 with Rule(..., pad=True), or replicate it on purpose with None
    """
    annotations = annotations or {}
    given = flatten(specs or {})
    faults = [
        *_axis_faults(mesh, rules),
        *_unused(list(shapes), rules, given),
        *merged([_no_path("specs", path, shapes) for path in given if path not in shapes]),
        *merged([_no_path("annotation", path, shapes) for path in annotations if path not in shapes]),
    ]
    placements: dict[str, Placement] = {}
    found: list[Fault] = []
    for path, given_shape in shapes.items():
        shape = tuple(given_shape)
        number, rule = (0, None) if path in given else _first(rules, path)
        choices: list[tuple[str, P, list[Fault]]] = []
        if path in given:
            spec, wrong = _given(path, given[path], mesh)
            choices.append(("specs", spec, wrong))
        if path in annotations:
            note = annotations[path]
            spec, wrong = _annotated(path, note, rules, mesh)
            choices.append((str(note), spec, wrong))
        if rule is not None:
            choices.append((_source(rule, number), rule.spec, []))
        if not choices:
            found.append(_unmatched(path, given))
            continue
        found += [fault for _, _, wrong in choices for fault in wrong]
        usable = [(source, spec) for source, spec, wrong in choices if not wrong]
        if not usable:
            continue
        found += _conflict(path, usable, mesh)
        source, spec = usable[0]
        pad = rule is not None and rule.pad
        wrong = _fit(path, spec, shape, source, mesh, pad=pad)
        found += wrong
        if path in blocks and mesh.stage and mesh.stage in _names(spec):
            found.append(
                Fault(
                    path,
                    f"its spec names the stage axis {mesh.stage!r} ({source})",
                    "leave it out: the pipeline lays the blocks on the stages",
                )
            )
        placements[path] = Placement(canonical(spec), source, _padded(spec, shape, mesh) if pad and not wrong else None)
    return Resolution(placements, (*faults, *merged(found)))


def flatten(specs: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Specs by path, from a nested or a flat mapping.

    >>> flatten({"blocks": {0: {"kernel": P(None, "tensor")}}, "norm/scale": None})
    {'blocks/0/kernel': P(None, 'tensor'), 'norm/scale': None}
    """
    flat: dict[str, Any] = {}
    for key, value in specs.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _first(rules: Rules, path: str) -> tuple[int, Rule | None]:
    """The rule that matches `path`, and its number from 1."""
    found = ((number, rule) for number, rule in enumerate(rules.rules, start=1) if rule.matches(path))
    return next(found, (0, None))


def _source(rule: Rule, number: int) -> str:
    return f'rule {number}, "{rule.pattern}"'


def _by(source: str) -> str:
    return f" ({source})" if source else ""


def _names(spec: P) -> list[str]:
    return [axis for axes in spec for axis in axes_of(axes)]


def _axis_faults(mesh: MeshSpec, rules: Rules) -> list[Fault]:
    """Axes the mesh lacks, told once with a count of the rules, and axes that a rule names twice."""
    faults = []
    strangers: dict[str, list[Fault]] = {}
    for number, rule in enumerate(rules.rules, start=1):
        for fault in _strangers(_source(rule, number), rule.spec, mesh):
            strangers.setdefault(fault.problem, []).append(fault)
        faults += _twice(_source(rule, number), rule.spec)
    faults[:0] = [_counted(same, "rule") for same in strangers.values()]
    for name, axes in rules.logical:
        faults += _strangers(f"logical rule {name!r}", P(axes), mesh)
    return faults


def _strangers(where: str, spec: P, mesh: MeshSpec, source: str = "") -> list[Fault]:
    return [
        Fault(
            where,
            f"axis {axis!r} is not in the mesh ({', '.join(mesh.names)}){_by(source)}",
            f"{suggestion(axis, mesh.names)}name a mesh axis, or None",
        )
        for axis in dict.fromkeys(_names(spec))
        if axis not in mesh.names
    ]


def _twice(where: str, spec: P, source: str = "") -> list[Fault]:
    """Axes that the spec names more than once."""
    faults = []
    for axis in dict.fromkeys(_names(spec)):
        dims = [dim for dim, axes in enumerate(spec) for name in axes_of(axes) if name == axis]
        if len(dims) > 1:
            places = f"dims {', '.join(map(str, dims[:-1]))} and {dims[-1]}" if len(set(dims)) > 1 else f"dim {dims[0]}"
            problem = f"axis {axis!r} is used twice, by {places}{_by(source)}"
            faults.append(Fault(where, problem, "an axis splits one dim: keep one"))
    return faults


def _given(path: str, value: Any, mesh: MeshSpec) -> tuple[P, list[Fault]]:
    """The spec given for a path, and what is wrong with it whatever the parameter's shape."""
    wrong = spec_faults(f'specs "{path}"', value)
    if wrong:
        return P(), wrong
    spec = P() if value is None else P(*value)
    return spec, _strangers(path, spec, mesh, "specs") + _twice(path, spec, "specs")


def _annotated(path: str, note: Annotation, rules: Rules, mesh: MeshSpec) -> tuple[P, list[Fault]]:
    """The spec an annotation means, and what is wrong with it; strangers in declared rules are told there."""
    spec, problems = to_spec(note, logical=rules.logical, axes=mesh.names)
    if problems:
        return spec, [Fault(path, f"{each.problem} ({note})", each.way_out) for each in problems]
    told = {axis for _, axes in rules.logical for axis in axes_of(axes)}
    strange = P(*(axis for axis in dict.fromkeys(_names(spec)) if axis not in told))
    return spec, _strangers(path, strange, mesh, str(note)) + _twice(path, spec, str(note))


def _unused(paths: Sequence[str], rules: Rules, given: Collection[str]) -> list[Fault]:
    """Rules that match nothing, and rules whose every path an earlier one took."""
    faults = []
    taken: dict[str, str] = {path: "specs" for path in paths if path in given}
    for number, rule in enumerate(rules.rules, start=1):
        source = _source(rule, number)
        matched = [path for path in paths if rule.matches(path)]
        takers = [taken[path] for path in matched if path in taken]
        if not matched:
            near = _nearest_path(rule.pattern, paths)
            hint = f"did you mean {near!r}? " if near else ""
            faults.append(Fault(source, "matches no parameter", f"{hint}mend the pattern, or remove the rule"))
        elif len(takers) == len(matched):
            by = " and ".join(dict.fromkeys(takers))
            count = "the only path" if len(matched) == 1 else f"every one of the {len(matched)} paths"
            way_out = "remove it" if set(takers) == {"specs"} else "move it up, or remove it"
            faults.append(Fault(source, f"is shadowed: {count} it matches is taken by {by}", way_out))
        taken |= {path: source for path in matched if path not in taken}
    return faults


def _nearest_path(pattern: str, paths: Sequence[str]) -> str | None:
    """The path most like a pattern; of one that starts or ends with ``**`` only the rest is compared."""
    wanted = [segment for segment in pattern.split("/") if segment != "**"]
    ends: dict[str, str] = {}
    for path in paths:
        segments = path.split("/")
        if pattern.startswith("**/"):
            segments = segments[-len(wanted) :]
        elif pattern.endswith("/**"):
            segments = segments[: len(wanted)]
        ends.setdefault(_siblings("/".join(segments)), path)
    near = nearest("/".join(wanted), ends)
    return None if near is None else ends[near]


def _no_path(kind: str, path: str, shapes: Collection[str]) -> Fault:
    way_out = f"{suggestion(path, shapes)}write a parameter's path, or remove it"
    return Fault(f'{kind} "{path}"', "the model has no such parameter", way_out)


def _unmatched(path: str, given: Collection[str]) -> Fault:
    pattern = _siblings(path)
    problem = "no rule matches it, and it has no annotation" + (" and no entry in specs" if given else "")
    return Fault(path, problem, f'add a rule ("{pattern}", P(...)), or ("{pattern}", None) to replicate it on purpose')


def _conflict(path: str, usable: Sequence[tuple[str, P]], mesh: MeshSpec) -> list[Fault]:
    """Two that speak of one parameter and differ."""
    if len(usable) < 2 or not all(set(_names(spec)) <= set(mesh.names) for _, spec in usable):
        return []
    (first, one), (second, other) = usable
    if canonical(one) == canonical(other):
        return []
    problem = f"{first} says {spec_text(canonical(one))}, {second} says {spec_text(canonical(other))}"
    return [Fault(path, problem, "make them equal, or remove one")]


def _fit(path: str, spec: P, shape: Shape, source: str, mesh: MeshSpec, *, pad: bool) -> list[Fault]:
    """Entries the parameter has no dims for, and dims that do not divide by the product of their axes."""
    if len(spec) > len(shape):
        dims = f"{len(shape)} dim{'' if len(shape) == 1 else 's'} {list(shape)}"
        extra = len(spec) - len(shape)
        problem = f"{spec_text(spec)} has {len(spec)} entries, the parameter {dims} ({source})"
        return [Fault(path, problem, f"leave out {extra} entr{'y' if extra == 1 else 'ies'}")]
    faults = []
    for dim, axes in enumerate(spec):
        names = axes_of(axes)
        product = _product(names, mesh)
        if pad or shape[dim] % product == 0:
            continue
        held = " x ".join(repr(name) for name in names)
        sizes = " x ".join(str(mesh.sizes[name]) for name in names)
        by = f"axis {held} of size {sizes}" if len(names) == 1 else f"axes {held} of sizes {sizes} = {product}"
        free = [other for other in range(len(shape)) if other >= len(spec) or not axes_of(spec[other])]
        another = "shard another dim, " if any(shape[other] and shape[other] % product == 0 for other in free) else ""
        up = -(-shape[dim] // product) * product
        how = " with Rule(..., pad=True)" if source.startswith("rule ") else ""  # nothing else has it
        faults.append(
            Fault(
                path,
                f"dim {dim} has size {shape[dim]}, not divisible by {by} ({source})",
                f"{another}pad it to {up}{how}, or replicate it on purpose with None",
            )
        )
    return faults


def _product(names: Sequence[str], mesh: MeshSpec) -> int:
    """Over how many devices a dim is split; 1 where an axis is unknown, which is a fault of its own."""
    return math.prod(mesh.sizes[name] for name in names) if set(names) <= set(mesh.names) else 1


def _padded(spec: P, shape: Shape, mesh: MeshSpec) -> Shape | None:
    """The shape with every dim rounded up to what its axes divide; None where it divides as it is."""
    products = [_product(axes_of(axes), mesh) for axes in spec] + [1] * (len(shape) - len(spec))
    padded = tuple(-(-size // product) * product for size, product in zip(shape, products, strict=True))
    return None if padded == shape else padded


def _siblings(path: str) -> str:
    """A path with the numbers of layers as ``*``: what is equal on siblings.

    >>> _siblings("blocks/3/Dense_0/kernel")
    'blocks/*/Dense_*/kernel'
    """
    return re.sub(r"""(^|[/"'])([^/"']*_)?\d+(?=[/"']|$)""", r"\1\2*", path)


def merged(faults: Sequence[Fault]) -> list[Fault]:
    """The faults, those that siblings share once and with a count."""
    groups: dict[tuple[str, str, str], list[Fault]] = {}
    for fault in faults:
        key = (_siblings(fault.where), fault.problem, _siblings(fault.way_out))
        groups.setdefault(key, []).append(fault)
    return [_counted(same, "like it") for same in groups.values()]


def _counted(same: Sequence[Fault], noun: str) -> Fault:
    """The first of some faults that are the same, with how many more there are."""
    more = len(same) - 1
    plural = "s" if more > 1 and noun == "rule" else ""
    return dataclasses.replace(same[0], where=same[0].where + (f" and {more} more {noun}{plural}" if more else ""))
