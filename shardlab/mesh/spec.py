"""MeshSpec: the declared mesh. Axes and sizes, the roles of the axes, and the machine; no device is needed.

>>> mesh = MeshSpec({"data": -1, "stage": 2, "tensor": 2}, batch=("data",), stage="stage", target="cpu:8")
>>> mesh.sizes
{'data': 2, 'stage': 2, 'tensor': 2}
>>> mesh.override("data=4,stage=2").sizes
{'data': 4, 'stage': 2, 'tensor': 1}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardlab.mesh.faults import Fault, raise_faults, suggestion
from shardlab.mesh.physical import dims_of
from shardlab.mesh.targets import Target, parse_target, read_target

Pairs = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, init=False)
class MeshSpec:
    """A declared mesh: frozen, hashable, checked when made.

    The axes are in one order: batch axes, then the stage axis, then the rest. A step is manual over the batch
    axes and the stage axis, and jax 0.12 ends the process when manual axes are not in the mesh's order.

    Attributes:
      axes: pairs of name and size, in mesh order; a size given as -1 is inferred from the target.
      batch: the axes that split the examples, in mesh order.
      stage: the axis whose positions are the pipeline's stages, or None.
      target: the machine, as `parse_target` reads it.
      dcn: pairs of axis and over how many slices (TPU) or islands (GPU, often its hosts) it runs: that share of its
        links is slow.
      links: pairs of axis and the names of the physical dims it is to lie on (`shardlab.mesh.physical`), for axes that
        `shardlab.mesh.topology` is not to choose for; not looked at on CPU, which has none.

    Raises:
      DeclarationError: with every fault of the declaration.
    """

    axes: Pairs
    batch: tuple[str, ...]
    stage: str | None
    target: str
    dcn: Pairs
    links: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(
        self,
        axes: Mapping[str, int] | Iterable[tuple[str, int]],
        *,
        batch: str | Sequence[str] = (),
        stage: str | None = None,
        target: str = "cpu:8",
        dcn: Mapping[str, int] | Iterable[tuple[str, int]] = (),
        links: Mapping[str, str | Sequence[str]] | Iterable[tuple[str, str | Sequence[str]]] = (),
    ) -> None:
        pairs = _pairs(axes)
        batch = (batch,) if isinstance(batch, str) else tuple(batch)
        slow = tuple(pair for pair in _pairs(dcn) if pair[1] != 1)
        machine, faults = read_target(target)
        faults = [*_axis_faults(pairs), *faults, *_role_faults(pairs, batch, stage)]
        if not faults:
            assert machine is not None
            pairs, faults = _sized(pairs, machine)
        faults += _dcn_faults(dict(pairs), slow)
        wanted = _dims_by_axis(links)
        if machine is not None:
            faults += [*_slice_faults(pairs, slow, machine), *_link_faults(dict(pairs), wanted, machine)]
        raise_faults(faults)
        for name, value in (
            ("axes", pairs),
            ("batch", batch),
            ("stage", stage),
            ("target", target),
            ("dcn", slow),
            ("links", wanted),
        ):
            object.__setattr__(self, name, value)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis by name, in mesh order."""
        return dict(self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes, in mesh order."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes, in mesh order."""
        return tuple(size for _, size in self.axes)

    @property
    def num_devices(self) -> int:
        """Product of the sizes."""
        return math.prod(self.shape)

    @property
    def batch_size_divisor(self) -> int:
        """Product of the batch axes' sizes: what a batch must divide by."""
        return math.prod(self.sizes[axis] for axis in self.batch)

    @property
    def machine(self) -> Target:
        """The target, parsed."""
        return parse_target(self.target)

    @property
    def slices(self) -> dict[str, int]:
        """Of a target of several TPU slices, over how many of them an axis runs; else empty.

        XLA compiles one program for each slice, and what crosses them goes through the hosts.
        """
        return dict(self.dcn) if self.machine.slices > 1 else {}

    def size(self, axis: str) -> int:
        """Size of one axis.

        Raises:
          DeclarationError: no such axis, with the nearest name.
        """
        if axis not in self.names:
            raise_faults([_undeclared(f"mesh axis {axis!r}", self.names, axis)])
        return self.sizes[axis]

    def override(
        self,
        sizes: Mapping[str, int] | str,
        *,
        target: str | None = None,
        dcn: Mapping[str, int] | Iterable[tuple[str, int]] | None = None,
        links: Mapping[str, str | Sequence[str]] | Iterable[tuple[str, str | Sequence[str]]] | None = None,
    ) -> MeshSpec:
        """The same declaration with other sizes; a declared axis that is not named gets size 1.

        Args:
          sizes: by axis, or as text: ``"data=2,stage=2,tensor=2"``; one may be -1. An axis written ``data=2*16`` has
            size 32 and runs over 2 slices: with one so written the text is all that is said of `dcn`.
          target: another machine, or None to keep it.
          dcn: another, or None to keep it; see `sizes`.
          links: others, or None to keep them.

        Raises:
          DeclarationError: an axis that is not declared (nearest name given), or sizes that do not fit the
            target.
        """
        pairs, slow = _read_sizes(sizes) if isinstance(sizes, str) else (_pairs(sizes), ())
        faults = [
            _undeclared(f"mesh axis {axis!r}", self.names, axis, advice="only declared axes can be given a size")
            for axis, _ in pairs
            if axis not in self.names
        ]
        raise_faults(faults)
        wanted = dict(pairs)
        axes = tuple((axis, wanted.get(axis, 1)) for axis in self.names)
        target = self.target if target is None else target
        slow = slow or (self.dcn if dcn is None else _pairs(dcn))
        lies = self.links if links is None else _dims_by_axis(links)
        return dataclasses.replace(self, axes=axes, target=target, dcn=slow, links=lies)

    @classmethod
    def from_text(cls, sizes: str, *, target: str) -> MeshSpec:
        """The mesh of axes and sizes written as for `override`, without roles.

        >>> MeshSpec.from_text("data=2*16,tensor=16", target="2*tpu:v5e:16x16").dcn
        (('data', 2),)
        """
        axes, slow = _read_sizes(sizes)
        return cls(axes, target=target, dcn=slow)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; `from_json` gives the spec back."""
        links = {"links": {axis: list(dims) for axis, dims in self.links}} if self.links else {}
        return {
            "axes": dict(self.axes),
            "batch": list(self.batch),
            "stage": self.stage,
            "target": self.target,
            "dcn": dict(self.dcn),
            **links,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MeshSpec:
        """The spec that `to_json` wrote.

        >>> spec = MeshSpec({"data": 8}, batch="data")
        >>> MeshSpec.from_json(spec.to_json()) == spec
        True
        """
        options = {name: data[name] for name in ("batch", "stage", "target", "dcn", "links") if name in data}
        return cls(data["axes"], **options)

    def __str__(self) -> str:
        """One line: axes with sizes and roles, devices, target.

        >>> print(MeshSpec({"data": 4, "tensor": 2}, batch="data"))
        data=4 (batch) x tensor=2 on cpu:8
        """
        roles = dict.fromkeys(self.batch, " (batch)") | ({self.stage: " (stage)"} if self.stage else {})
        return " x ".join(f"{axis}={size}{roles.get(axis, '')}" for axis, size in self.axes) + f" on {self.target}"


def _pairs(axes: Mapping[str, int] | Iterable[tuple[str, int]]) -> Pairs:
    items = axes.items() if isinstance(axes, Mapping) else axes
    return tuple((name, size) for name, size in items)


def _dims_by_axis(
    links: Mapping[str, str | Sequence[str]] | Iterable[tuple[str, str | Sequence[str]]],
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    given = links.items() if isinstance(links, Mapping) else links
    return tuple((axis, (dims,) if isinstance(dims, str) else tuple(dims)) for axis, dims in given)


def _read_sizes(text: str) -> tuple[Pairs, Pairs]:
    """Pairs of ``"data=2*16,tensor=4"``: axes and sizes, and axes and the slices they run over.

    >>> _read_sizes("data=2*16,tensor=4")
    ((('data', 32), ('tensor', 4)), (('data', 2),))
    """
    pairs: list[tuple[str, int]] = []
    slow: list[tuple[str, int]] = []
    faults = []
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        parts, star, each = size.rpartition("*")
        try:
            pairs.append((name, int(each) * (int(parts) if star and int(each) > 0 else 1)))
            slow += [(name, int(parts))] if star else []
        except ValueError:
            faults.append(
                Fault(f"mesh {text!r}", f"{part.strip()!r} is not axis=size", "write it like data=2,tensor=4")
            )
    for name in _repeated([name for name, _ in pairs]):
        faults.append(Fault(f"mesh {text!r}", f"axis {name!r} is given twice", "give it one size"))
    raise_faults(faults)
    return tuple(pairs), tuple(slow)


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for place, name in enumerate(names) if names.index(name) == place and names.count(name) > 1]


def _declared(names: Sequence[str]) -> str:
    return ", ".join(names)


def _undeclared(where: str, names: Sequence[str], axis: str, *, advice: str = "") -> Fault:
    way_out = suggestion(str(axis), names) + (advice or "name a declared axis, or declare this one")
    return Fault(where, f"is not an axis of the mesh ({_declared(names)})", way_out)


def _axis_faults(pairs: Pairs) -> list[Fault]:
    if not pairs:
        return [Fault("mesh", "has no axes", "declare at least one, like {'data': 8}")]
    faults = []
    for name, size in pairs:
        where = f"mesh axis {name!r}"
        if not isinstance(name, str) or not name.isidentifier():
            faults.append(Fault(where, "is not an identifier", "use letters, digits and _, starting with a letter"))
        if not isinstance(size, int) or isinstance(size, bool):
            faults.append(Fault(where, f"has size {size!r}, not a whole number", "give it a positive size, or -1"))
        elif size < 1 and size != -1:
            faults.append(Fault(where, f"has size {size}", "give it a positive size, or -1 to infer it"))
    names = [name for name, _ in pairs]
    faults += [
        Fault(f"mesh axis {name!r}", "is declared twice", "give each axis its own name") for name in _repeated(names)
    ]
    inferred = [name for name, size in pairs if size == -1]
    if len(inferred) > 1:
        axes = ", ".join(repr(name) for name in inferred[:-1]) + f" and {inferred[-1]!r}"
        all_are = "are both -1" if len(inferred) == 2 else "are all -1"
        faults.append(Fault("mesh", f"axes {axes} {all_are}", "only one size can be inferred; give the others"))
    return faults


def _role_faults(pairs: Pairs, batch: tuple[str, ...], stage: str | None) -> list[Fault]:
    names = [name for name, _ in pairs]
    faults = [_undeclared(f"batch axis {axis!r}", names, axis) for axis in dict.fromkeys(batch) if axis not in names]
    faults += [Fault(f"batch axis {axis!r}", "is given twice", "name it once") for axis in _repeated(batch)]
    if stage is not None and stage not in names:
        faults.append(_undeclared(f"stage axis {stage!r}", names, stage))
    if stage is not None and stage in batch:
        faults.append(
            Fault(
                f"stage axis {stage!r}",
                "is a batch axis too",
                "an axis splits examples or holds stages: drop one role",
            )
        )
    if faults:
        return faults
    first = [*batch, *([stage] if stage else [])]
    order = [*first, *(name for name in names if name not in first)]
    if order != names and not _repeated(names):
        sizes = dict(pairs)
        faults.append(
            Fault(
                "mesh",
                f"axes are in the order {_declared(names)}; batch axes come first, then the stage axis, then the rest",
                f"write {{{', '.join(f'{name!r}: {sizes[name]}' for name in order)}}}",
            )
        )
    return faults


def _sized(pairs: Pairs, machine: Target) -> tuple[Pairs, list[Fault]]:
    """The pairs with -1 inferred from the target's device count, and what does not fit."""
    count = machine.num_devices
    known = math.prod(size for _, size in pairs if size != -1)
    product = " x ".join(f"{name}={size}" for name, size in pairs if size != -1)
    inferred = next((name for name, size in pairs if size == -1), None)
    if inferred is not None:
        if count % known:
            devices = f"the {count} devices of target {machine}"
            problem = f"cannot be inferred: {devices} do not divide by {known} ({product})"
            way_out = f"choose other sizes so that they divide {count}"
            return pairs, [Fault(f"mesh axis {inferred!r}", problem, way_out)]
        return tuple((name, count // known if size == -1 else size) for name, size in pairs), []
    if known != count:
        names = "devices" if known != 1 else "device"
        problem = f"{product} is {known} {names}, target {machine} has {count}"
        retarget = (
            f", or declare target='cpu:{known}' (--target cpu:{known})"
            if machine.platform == "cpu"
            else ", or declare another target"
        )
        return pairs, [Fault("mesh", problem, f"make the sizes multiply to {count}{retarget}")]
    return pairs, []


def _dcn_faults(sizes: Mapping[str, int], slow: Pairs) -> list[Fault]:
    faults = []
    for axis, parts in slow:
        where = f"dcn axis {axis!r}"
        if axis not in sizes:
            faults.append(_undeclared(where, list(sizes), axis))
        elif not isinstance(parts, int) or parts < 1:
            faults.append(Fault(where, f"runs over {parts!r} parts", "give a whole number, 1 or more"))
        elif isinstance(sizes[axis], int) and sizes[axis] > 0 and sizes[axis] % parts:
            problem = f"size {sizes[axis]} does not divide by its {parts} parts joined by slow links"
            faults.append(Fault(where, problem, f"give {axis!r} a multiple of {parts}, or another split"))
    return faults


def _slice_faults(pairs: Pairs, slow: Pairs, machine: Target) -> list[Fault]:
    """A target of several slices needs axes that run over them."""
    parts = math.prod(count for _, count in slow if isinstance(count, int))
    if machine.slices == 1 or parts == machine.slices or not pairs:
        return []
    declared = ", ".join(f"{axis}={count}" for axis, count in slow)
    problem = f"target {machine} is {machine.slices} slices joined by slow links, "
    problem += f"dcn ({declared}) splits the mesh in {parts}" if slow else "and dcn names no axis for them"
    axis, size = pairs[0]
    written = f"--mesh {axis}={machine.slices}*{max(1, size // machine.slices)}"
    return [Fault("mesh", problem, f"declare dcn={{{axis!r}: {machine.slices}}} ({written}), or another axis")]


def _link_faults(
    sizes: Mapping[str, int], wanted: Iterable[tuple[str, tuple[str, ...]]], machine: Target
) -> list[Fault]:
    faults = []
    names: list[str] = []
    if wanted and machine.platform != "cpu" and machine.text != "local":
        names = [dim.name for dim in dims_of(machine)]
    for axis, dims in wanted:
        where = f"links of axis {axis!r}"
        if axis not in sizes:
            faults.append(_undeclared(where, list(sizes), axis))
        if not dims:
            faults.append(Fault(where, "names no dim", f"name some of {', '.join(names)}, or leave the axis out"))
        faults += [
            Fault(
                where,
                f"{dim!r} is not a dim of target {machine} ({', '.join(names)})",
                suggestion(dim, names) + "name dims that it has, or leave the axis out",
            )
            for dim in dims
            if names and dim not in names
        ]
    return faults
