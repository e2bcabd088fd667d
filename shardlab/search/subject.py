"""What is searched for: a config and a target, and what of it is the same for every plan, read once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardlab.mesh.chips import Chip, chip_of
from shardlab.mesh.faults import raise_faults
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.targets import parse_target
from shardlab.module.model import Model, abstract, computed, read_model
from shardlab.pipeline.stages import LayerCosts
from shardlab.plan.layout import policy_within_stage
from shardlab.plan.microbatch import Microbatch
from shardlab.plan.optimizer import state_specs
from shardlab.run.config import Config
from shardlab.search.choice import kept_whole
from shardlab.search.costs import Costs, Split
from shardlab.search.pace import ridge
from shardlab.search.parts import ROWS, Parts
from shardlab.search.work import Compiler
from shardlab.sharding.resolve import resolve
from shardlab.sharding.rules import Rules


@dataclass(frozen=True)
class Array:
    """A parameter, or those of one name in all blocks of a kind.

    Attributes:
      path: of the first.
      shape: of one.
      pad: whether its rule pads it.
      kind: of the blocks that hold one; -1 outside blocks.
      read_by: outside blocks, the parts that read it.
      computed, stored: bytes of a number as a step computes with it, and as it is stored and updated.
      states: of the optimizer's arrays that follow it: bytes of a number, and which of its dims they have.
    """

    path: str
    shape: tuple[int, ...]
    pad: bool
    kind: int
    read_by: tuple[str, ...]
    computed: int
    stored: int
    states: tuple[tuple[int, tuple[int, ...]], ...]


class Subject:
    """A config on a target.

    Raises:
      DeclarationError: what is wrong with the declaration, whatever the sizes of the mesh.
    """

    def __init__(self, config: Config, target: str) -> None:
        self.config, self.target = config, parse_target(target)
        self.batch = abstract(config.abstract_batch())
        self.model: Model = read_model(config.model, self.batch, config.pipeline)
        # Sizes come later; a mesh of one device serves what depends on none.
        self.one = MeshSpec(
            dict.fromkeys(config.mesh.names, 1), batch=config.mesh.batch, stage=config.mesh.stage, target="cpu:1"
        )
        self.parts = Parts(self.model, config.loss, self.batch, self.one, config.dtype)
        self.costs = Costs(self.parts, self.compiler)
        self.rows = jax.tree.leaves(self.batch)[0].shape[0]
        self._specs: dict[tuple[tuple[str, str], ...], dict[str, PartitionSpec]] = {}
        self._balances: dict[str, LayerCosts] = {}

    @cached_property
    def chip(self) -> Chip | None:
        """Of the target; None for emulated devices, of which nothing is published."""
        return None if self.target.platform == "cpu" else chip_of(self.target)

    @property
    def compiler(self) -> Compiler:
        """Of the target."""
        platform = self.target.platform
        return Compiler(platform != "cpu", platform == "tpu", ridge(self.chip, self.config.dtype))

    @property
    def room(self) -> float:
        """Bytes of memory that a program may have on a device."""
        return math.inf if self.chip is None else self.chip.usable_hbm_bytes

    @property
    def kinds(self) -> tuple[int, ...]:
        """Of each block its kind; empty for a model taken whole."""
        return self.model.parts.kinds if self.model.parts is not None else ()

    @property
    def automatic(self) -> tuple[str, ...]:
        """The axes that are neither a batch axis nor the stage axis."""
        mesh = self.config.mesh
        return tuple(axis for axis in mesh.names if axis not in mesh.batch and axis != mesh.stage)

    def specs(self, whole: tuple[tuple[str, str], ...] = ()) -> dict[str, PartitionSpec]:
        """The declared spec of every array, by path."""
        if whole not in self._specs:
            assert isinstance(self.config.rules, Rules)
            rules = kept_whole(self.config.rules, whole) if whole else self.config.rules
            found = resolve(
                {path: leaf.shape for path, leaf in self.model.parameters.items()},
                mesh=self.one,
                rules=rules,
                annotations=self.model.annotations,
                specs=self.config.specs,
                blocks=self.model.parts.block_paths if self.model.parts is not None else (),
            )
            raise_faults(found.faults)
            self._specs[whole] = {array.path: found.placements[array.path].spec for array in self.arrays}
        return self._specs[whole]

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The parameters, those of one name in blocks of one kind once."""
        parts, parameters = self.model.parts, self.model.parameters
        rules = self.config.rules
        assert isinstance(rules, Rules)
        kind_of: dict[str, int] = {}
        inside: frozenset[str] = frozenset()
        if parts is not None:
            inside = parts.block_paths
            for kind in range(len(parts.blocks)):
                kind_of |= dict.fromkeys(parts.layers[parts.kinds.index(kind)].values(), kind)
        read_by = self._read_by if parts is not None else {}
        states = self._states
        found = []
        for path, leaf in parameters.items():
            if path in inside and path not in kind_of:
                continue
            kind = kind_of.get(path, -1)
            rule = rules.first(path)
            dtype = self.config.dtype
            master = (
                computed(leaf.dtype, "float64") if dtype == "float64" else jnp.promote_types(leaf.dtype, jnp.float32)
            )
            found.append(
                Array(
                    path=path,
                    shape=leaf.shape,
                    pad=rule is not None and rule.pad,
                    kind=kind,
                    read_by=() if kind >= 0 else read_by.get(path, ()),
                    computed=jnp.dtype(computed(leaf.dtype, dtype)).itemsize,
                    stored=jnp.dtype(master).itemsize,
                    states=states.get(path, ()),
                )
            )
        return tuple(found)

    def balance(self, remat: str) -> LayerCosts:
        """What ``stages="balanced"`` goes by, under a policy of remat."""
        policy = "full" if policy_within_stage(remat) else remat
        if policy not in self._balances:
            self._balances[policy] = self._microbatch.costs(policy)
        return self._balances[policy]

    @cached_property
    def batch_bytes(self) -> float:
        """Of one example."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.batch)) / self.rows

    @cached_property
    def model_flops(self) -> float:
        """What a step of the whole batch needs: three times the products of its forward, nothing computed twice."""
        split = Split((), (), PartitionSpec(), PartitionSpec())
        if self.model.parts is None:
            ends = [self.costs.ends("whole", split)]
            forward = [ends[0][0]]
        else:
            forward = [self.costs.ends("before", split)[0], self.costs.ends("after", split)[0]]
            forward += [self.costs.block(kind, "none", split).forward for kind in self.kinds]
        return 3 * sum(cost.at(self.rows) for one in forward for cost in one.flops.values())

    @cached_property
    def _read_by(self) -> dict[str, tuple[str, ...]]:
        return self._microbatch.read_by

    @cached_property
    def _microbatch(self) -> Microbatch:
        return Microbatch(self.model, self.batch, self.one, ROWS, self.config.dtype)

    @cached_property
    def _states(self) -> dict[str, tuple[tuple[int, tuple[int, ...]], ...]]:
        """By path, the optimizer's arrays that follow a parameter: specs of dims, handed through it, say which do."""
        paths = list(self.model.parameters)
        shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
            for path, leaf in self.model.parameters.items()
        }
        marks = {
            path: PartitionSpec(*(f"{place}:{dim}" for dim in range(len(leaf.shape))))
            for place, (path, leaf) in enumerate(shapes.items())
        }
        tree = self.model.tree(shapes)
        state = jax.eval_shape(self.config.make_optimizer().init, tree)
        specs = jax.tree.leaves(
            state_specs(state, tree, self.model.tree(marks)), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )
        found: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        for leaf, spec in zip(jax.tree.leaves(state), specs, strict=True):
            names = [entry for entry in spec if entry is not None]
            if not names:
                continue
            path = paths[int(names[0].partition(":")[0])]
            dims = tuple(int(name.partition(":")[2]) for name in names)
            found.setdefault(path, []).append((leaf.dtype.itemsize, dims))
        return {path: tuple(each) for path, each in found.items()}
