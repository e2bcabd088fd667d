"""The head over the vocabulary: which parameters each stage has a part of, and what can be wrong with that.

A spec that names the stage axis outside the blocks is, with ``head="vocab"``, computation: `after` is called on every
stage with the stage's part of the parameter, and gives the logits of that part.

Legend: V classes of the vocabulary, P stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from shardlab.mesh.faults import Fault
from shardlab.mesh.spec import MeshSpec
from shardlab.module.functions import path_of
from shardlab.module.model import Model
from shardlab.sharding.resolve import Placement
from shardlab.sharding.rules import axes_of, spec_text


def cut_dim(spec: PartitionSpec, stage: str | None) -> int | None:
    """The dim that the stage axis cuts, or None.

    >>> cut_dim(PartitionSpec(None, ("stage", "tensor")), "stage"), cut_dim(PartitionSpec("tensor"), "stage")
    (1, None)
    """
    return next((dim for dim, entry in enumerate(spec) if stage in axes_of(entry)), None)


def part_of(shape: jax.ShapeDtypeStruct, dim: int, stages: int, parts: int = 1) -> jax.ShapeDtypeStruct:
    """The shape of `parts` of the `stages` equal parts of an array along `dim`.

    >>> part_of(jax.ShapeDtypeStruct((8, 12), "float32"), 1, 4).shape
    (8, 3)
    """
    return with_size(shape, dim, shape.shape[dim] // stages * parts)


def with_size(shape: jax.ShapeDtypeStruct, dim: int, size: int) -> jax.ShapeDtypeStruct:
    """The shape with another size of one dim.

    >>> with_size(jax.ShapeDtypeStruct((8, 12), "float32"), 0, 3).shape
    (3, 12)
    """
    return jax.ShapeDtypeStruct((*shape.shape[:dim], size, *shape.shape[dim + 1 :]), shape.dtype)


def shared_by_example(share: Any, every: Any, few: int, rows: int) -> str | None:
    """None if `few` of `rows` examples are a part of x along the leading dim of every array; else what is not.

    Args:
      share, every: shapes of x of `few` and of `rows` examples.
    """
    leaves = jax.tree_util.tree_flatten_with_path(share)[0]
    for (keys, here), there in zip(leaves, jax.tree.leaves(every), strict=True):
        if (few, *there.shape[1:]) != here.shape or there.shape[:1] != (rows,):
            return f"x {path_of(keys)}".rstrip() + f" is {list(there.shape)} for {rows} examples"
    return None


def vocabulary_faults(
    model: Model, entering: tuple[Any, ...], mesh: MeshSpec, placements: Mapping[str, Placement]
) -> list[Fault]:
    """What is wrong with ``head="vocab"`` on more than one stage.

    Args:
      entering: shapes of x of some examples, of all arrays, of the examples and of a key.
    """
    stage = mesh.stage
    assert model.parts is not None
    assert stage is not None
    inside = model.parts.block_paths
    found = {
        path: (placement, dim)
        for path, placement in placements.items()
        if path in model.parameters and path not in inside and (dim := cut_dim(placement.spec, stage)) is not None
    }
    if not found:
        return [
            Fault(
                "head='vocab'",
                f"no parameter outside the blocks names the stage axis {stage!r} in its spec",
                f'name it on the dim of the vocabulary, as in ("head/kernel", P(None, "{stage}")), or use '
                "head='examples'",
            )
        ]
    faults = []
    for path, (placement, dim) in found.items():
        where = f"{path} ({placement.source})"
        axes = axes_of(placement.spec[dim])
        if axes[0] != stage:
            problem = f"its spec {spec_text(placement.spec)} names the stage axis {stage!r} after {axes[0]!r}"
            faults.append(Fault(where, problem, f"name {stage!r} first: a stage's part of the vocabulary is one piece"))
    if faults:
        return faults
    values, cuts = entering[1], dict[str, _Cut]()
    for path, (placement, dim) in found.items():
        stored = with_size(values[path], dim, (placement.padded or values[path].shape)[dim])
        part = part_of(stored, dim, mesh.sizes[stage])
        cuts[path] = _Cut(values[path].shape[dim], stored.shape[dim], part.shape[dim], part)
    return [*_faults_of_sizes(cuts), *_faults_of_use(model, entering, cuts)] or _faults_of_part(
        model.parts.after, entering, cuts
    )


@dataclass(frozen=True)
class _Cut:
    """One parameter: its classes, that number with padding, how many of these a stage has, and the shape of those."""

    classes: int
    stored: int
    held: int
    part: jax.ShapeDtypeStruct


def _faults_of_sizes(cuts: Mapping[str, _Cut]) -> list[Fault]:
    """Numbers of classes that padding makes the same: of the logits alone nothing could tell them apart."""
    faults, first = [], dict[int, str]()
    for path, cut in cuts.items():
        like = first.setdefault(cut.stored, path)
        if cut.classes != cuts[like].classes:
            problem = f"has {cut.classes} classes and {like} {cuts[like].classes}, both padded to {cut.stored}"
            faults.append(Fault(path, problem, "give both the same number of classes"))
    return faults


def _faults_of_use(model: Model, entering: tuple[Any, ...], cuts: Mapping[str, _Cut]) -> list[Fault]:
    """Parameters that are used where no part of them will do."""
    parts = model.parts
    assert parts is not None
    x, values, batch, key = entering
    before, context, after = parts.before, parts.context, parts.after
    uses = {"before": _read(lambda v, b, k: before(v, b, k, True), values, batch, key)}
    if context is not None:
        uses["context"] = _read(lambda v, b, k: context(v, b, k, True), values, batch, key)
    used = _read(lambda v, x, b, k: after(v, x, b, k, True), values, x, batch, key)
    faults = []
    for path, cut in cuts.items():
        share = f"with head='vocab' a stage has {cut.held} of its {cut.stored} classes"
        for name in (name for name, paths in uses.items() if path in paths):
            way_out = "use head='examples'" if path in used else "leave the stage axis out of its spec"
            faults.append(Fault(path, f"`{name}` uses it whole, and {share}", way_out))
        if path not in used | set().union(*uses.values()):
            problem = f"its spec names the stage axis, and `after` does not use it: {share}"
            faults.append(Fault(path, problem, "leave the stage axis out of its spec"))
    return faults


def _faults_of_part(after: Callable[..., Any], entering: tuple[Any, ...], cuts: Mapping[str, _Cut]) -> list[Fault]:
    """That `after` does not take a stage's part of the parameters."""
    x, values, batch, key = entering
    mine = {**values, **{path: cut.part for path, cut in cuts.items()}}
    try:
        jax.eval_shape(lambda v, x, b, k: after(v, x, b, k, True), mine, x, batch, key)
    except Exception as error:  # whatever the user's code raises
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        shown = ", ".join(f"{path} {list(cut.part.shape)} of {list(values[path].shape)}" for path, cut in cuts.items())
        problem = f"`after` does not take a stage's part of its parameters ({shown}): {type(error).__name__}: {text}"
        way_out = (
            "name the stage axis in the spec of every parameter with the vocabulary's dim, and compute with the shapes "
            "that are given (nnx.Linear and x @ kernel do, Linen's Dense does not); or use head='examples'"
        )
        return [Fault("head='vocab'", problem, way_out)]
    return []


def _read(function: Callable[..., Any], values: Mapping[str, Any], *others: Any) -> set[str]:
    """The paths of the arrays that what `function` returns is made of."""
    jaxpr = jax.make_jaxpr(function)(dict(values), *others).jaxpr
    used = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        if used & set(equation.outvars):
            used |= {var for var in equation.invars if not isinstance(var, Literal)}
    # The arguments of a traced function are flattened, a dict's by its sorted keys.
    return {path for path, var in zip(sorted(values), jaxpr.invars, strict=False) if var in used}
