"""The manual region: which axes are manual, which rows a shard holds, and how sums leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from shardlab.mesh.faults import DeclarationError
from shardlab.module.functions import path_of
from shardlab.module.model import computed
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import axes_of
from shardlab.sharding.zero import without
from shardlab.step.scatter import Scatter, scattered, scatters

Arrays = dict[str, Any]
Specs = Mapping[str, PartitionSpec]


@dataclass(frozen=True)
class Region:
    """What code inside the manual region knows of the mesh.

    Attributes:
      mesh: the whole mesh.
      batch: the batch axes of more than one device, where they are manual.
      stage: the stage axis, where there is more than one stage.
      num_stages: devices on the stage axis; 1 without one.
      shards: number of shards of the batch.
      reduce_dtype: what gradients are summed over devices in.
      scatters: how they are scattered over each batch axis; one that is not named, at once.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    stage: str | None
    num_stages: int
    shards: int
    reduce_dtype: str
    scatters: tuple[Scatter, ...] = ()

    @property
    def manual(self) -> tuple[str, ...]:
        """The manual axes, in the mesh's order."""
        return (*self.batch, *((self.stage,) if self.stage else ()))

    @property
    def automatic_mesh(self) -> AbstractMesh:
        """The mesh with every axis automatic: what the user's code was written for."""
        names = self.mesh.axis_names
        return AbstractMesh(
            tuple(self.mesh.shape[name] for name in names), names, axis_types=(AxisType.Auto,) * len(names)
        )

    def manual_part(self, spec: PartitionSpec) -> PartitionSpec:
        """The entries of `spec` that name manual axes."""
        return without(spec, tuple(name for name in self.mesh.axis_names if name not in self.manual))

    def automatic_part(self, spec: PartitionSpec) -> PartitionSpec:
        """The entries of `spec` that name automatic axes."""
        return without(spec, self.manual)

    @property
    def inner(self) -> set[str]:
        """The automatic axes of more than one device: what a region inside this one is manual over."""
        return {name for name in self.mesh.axis_names if name not in self.manual and self.mesh.shape[name] > 1}

    def inner_part(self, spec: PartitionSpec) -> PartitionSpec:
        """The entries of `spec` that name axes of `inner`."""
        return without(spec, tuple(name for name in self.mesh.axis_names if name not in self.inner))

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` as a manual region; itself where no axis is manual."""
        if not self.manual:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.manual),
            check_vma=False,
        )

    def reduced(self, values: Arrays, axes: Mapping[str, tuple[str, ...]], compute: Specs, state: Specs) -> Arrays:
        """Sums over manual axes, each device keeping the shard that its state spec gives it; called in the region.

        Axes that the state spec names are summed by a reduce-scatter on their dim, the others by an all-reduce of what
        is left. Sums are taken in `reduce_dtype` and given in the dtype of the values.

        Args:
          values: by name, laid over the automatic axes as `compute`.
          axes: the manual axes to sum each over.
          compute, state: specs by name.
        """
        entered = {name: self.inner_part(compute[name]) for name in values}
        parts = {one.axis: one.parts for one in self.scatters}

        def sums(values: Arrays) -> Arrays:
            return {
                name: _sum(
                    self._narrowed(value), axes[name], self.manual_part(state[name]), entered[name], self.mesh, parts
                ).astype(value.dtype)
                for name, value in values.items()
            }

        if not self.inner or not self.manual:
            return sums(values)
        # Manual over the other axes too: XLA would gather a value over its automatic axes to reduce-scatter it.
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(
            sums, mesh=mesh, in_specs=(entered,), out_specs=entered, axis_names=self.inner, check_vma=False
        )(values)

    def gathered(self, values: Arrays, storage: Specs) -> Arrays:
        """Whole over the batch axes, from shards laid out as `storage`; called in the region."""
        names, automatic = set(self.batch), self.inner
        laid = {name: self.inner_part(storage[name]) for name in values}

        def one(value: jax.Array, spec: PartitionSpec) -> jax.Array:
            for dim, entry in enumerate(spec):
                # The outermost axis of a dim was cut first, so it is joined last.
                for axis in reversed([axis for axis in axes_of(entry) if axis in names]):
                    value = jax.lax.all_gather(value, axis, axis=dim, tiled=True)
            return value

        def both(spec: PartitionSpec) -> bool:
            return any(names & set(axes_of(entry)) and automatic & set(axes_of(entry)) for entry in spec)

        def all_of(values: Arrays) -> Arrays:
            return {name: one(value, storage[name]) for name, value in values.items()}

        if not automatic:
            return all_of(values)
        # Manual over the other axes too, as in `reduced`; not for a dim that both kinds split, whose blocks would be
        # joined in another order.
        mixed = {name: value for name, value in values.items() if both(storage[name])}
        others = {name: value for name, value in values.items() if name not in mixed}
        specs = {name: laid[name] for name in others}
        mesh = jax.sharding.get_abstract_mesh()
        whole = jax.shard_map(
            all_of, mesh=mesh, in_specs=(specs,), out_specs=specs, axis_names=automatic, check_vma=False
        )(others)
        return whole | all_of(mixed)

    def over_stages(self, tree: Any) -> Any:
        """The sum over the stages of what each has, in the dtypes of the leaves; called in the region."""
        assert self.stage is not None
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"

        def one(leaf: jax.Array) -> jax.Array:
            # XLA's CPU backend aborts on a bfloat16 sum over manual axes.
            narrow = on_cpu and leaf.dtype.itemsize < 4
            return jax.lax.psum(leaf.astype(jnp.float32) if narrow else leaf, self.stage).astype(leaf.dtype)

        return jax.tree.map(one, tree)

    def _narrowed(self, value: jax.Array) -> jax.Array:
        kind = jnp.dtype(computed(value.dtype, self.reduce_dtype))
        if kind.itemsize < value.dtype.itemsize and self.mesh.devices.flat[0].platform == "cpu":
            # XLA's CPU backend aborts on a bfloat16 sum over manual axes: the same rounding, the wider wire.
            info = jnp.finfo(kind)
            return jax.lax.reduce_precision(value, info.nexp, info.nmant)
        return value.astype(kind)


def make_region(plan: Plan, mesh: Mesh) -> Region:
    """The region that the plan asks for."""
    # An axis of size 1 is left automatic: XLA refuses collectives over manual axes that are all trivial.
    batch = tuple(axis for axis in plan.mesh.batch if plan.mesh.sizes[axis] > 1) if plan.batch_axes_manual else ()
    stages = plan.num_stage_devices
    return Region(
        mesh=mesh,
        batch=batch,
        stage=plan.mesh.stage if stages > 1 else None,
        num_stages=stages,
        shards=math.prod(plan.mesh.sizes[axis] for axis in batch),
        reduce_dtype=plan.reduce_dtype,
        scatters=scatters(mesh, batch, plan.scatter),
    )


def tree_where(condition: jax.Array, yes: Any, no: Any) -> Any:
    """`jnp.where` over two trees of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def where_taken(taken: jax.Array, do: Callable[[Any], Any], state: Any) -> Any:
    """``do(state)`` on the devices where `taken`, else the state.

    A loop of one trip or none, whose state XLA:TPU updates in place: through a conditional it would copy every buffer
    and accumulator in each tick, taken or not. It marks what diverges for `shardlab.hlo.hang`.
    """
    return jax.lax.while_loop(lambda now: now[0], lambda now: (jnp.bool_(False), do(now[1])), (taken, state))[1]


def rows_of(tree: Any, first: jax.Array | int, rows: int) -> Any:
    """Rows ``[first, first + rows)`` of every array."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, rows, axis=0), tree)


def check_rows(y: Any, rows: int) -> Any:
    """y, if every leaf has `rows` examples as its leading dim."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(y)[0]:
        if not leaf.ndim or leaf.shape[0] != rows:
            raise DeclarationError(
                f"y {path_of(keys)}: shape {list(leaf.shape)} for {rows} examples; give every array of y the examples "
                "as its leading dim, or pass a loss"
            )
    return y


def _sum(
    value: jax.Array,
    axes: tuple[str, ...],
    spec: PartitionSpec,
    split: PartitionSpec,
    mesh: Mesh,
    parts: Mapping[str, tuple[int, ...]],
) -> jax.Array:
    """The sum over `axes` of a shard that `split` gave, scattered as `spec` says, over `parts` of an axis."""
    remaining = list(axes)
    leaves = [[name for name in axes_of(entry) if name in axes] for entry in spec]
    # The largest first: what is left for the others is small then, whatever XLA makes of them.
    for dim, leaving in sorted(enumerate(leaves), key=lambda one: -math.prod(mesh.shape[name] for name in one[1])):
        for name in leaving:
            on_tpu = mesh.devices.flat[0].platform == "tpu"
            value = scattered(value, name, parts.get(name, (mesh.shape[name],)), dim, on_tpu=on_tpu)
            remaining.remove(name)
        others = axes_of(split[dim]) if dim < len(split) else ()
        pieces, blocks = (math.prod(mesh.shape[name] for name in names) for names in (leaving, others))
        if pieces > 1 and blocks > 1:
            # Each block was scattered by itself; the region's axes are the outer ones of the dim that leaves it.
            moves = [
                (part * blocks + block, block * pieces + part) for part in range(pieces) for block in range(blocks)
            ]
            value = jax.lax.ppermute(value, (*leaving, *others), moves)
    return jax.lax.psum(value, tuple(remaining)) if remaining else value
