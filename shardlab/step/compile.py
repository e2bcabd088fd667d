"""`compile_train_step`: one program for the whole mesh, compiled before it runs and checked against the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.hlo.hang import could_hang
from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import Fault, raise_faults
from shardlab.module.functions import path_of
from shardlab.module.model import Model, abstract, computed, read_model
from shardlab.plan.check import random_faults, traced_in
from shardlab.plan.layout import axes_in, optimizer_shapes, optimizer_tree
from shardlab.plan.optimizer import why_per_layer
from shardlab.plan.plan import Plan
from shardlab.step.calls import Calls, Loss
from shardlab.step.finite import finite_layers, unless_finite
from shardlab.step.pipelined import pipelined_gradients
from shardlab.step.placed import placed
from shardlab.step.refusals import refusals
from shardlab.step.region import Region, make_region
from shardlab.step.scatter import Scatter
from shardlab.step.spmd import whole_gradients
from shardlab.step.stage_arrays import diverges, leaves_out
from shardlab.step.state import (
    TrainState,
    abstract_state_of,
    abstract_stored,
    initial_values,
    shardings,
    state_spec_tree,
    storage_specs,
    unstacked,
)
from shardlab.step.update import make_update

if TYPE_CHECKING:
    from shardlab.step.verify import Verification

Arrays = dict[str, Any]


@dataclass(frozen=True)
class CompiledStep:
    """One train step, compiled for a mesh.

    Call it: ``(state, batch) -> (state, metrics)``; the given state is donated. Metrics are float32 scalars
    (float64 under float64): ``loss``, ``grad_norm``, ``weight``; ``auxiliary``, the mean of the blocks' auxiliary
    losses, where they have one.

    Attributes:
      jitted, lowered, compiled: the step as `jax.jit`, its lowering and its executable give it.
      trace_seconds, compile_seconds: what JAX took to trace and lower the step, and XLA to compile it.
    """

    plan: Plan
    mesh: Mesh
    model: Model
    loss: Loss
    optimizer: optax.GradientTransformation
    state_shardings: TrainState
    batch_shardings: Any
    jitted: Any
    lowered: Any
    compiled: Any
    trace_seconds: float
    compile_seconds: float

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        leaves, treedef = jax.tree.flatten(batch)
        planned, structure, shardings = self._planned
        if treedef != structure or [_kind(leaf) for leaf in leaves] != planned:
            check_batch(batch, self.plan.batch, "give every batch the shapes that were planned, or make the plan anew")
        return self.compiled(state, jax.tree.unflatten(treedef, map(placed, leaves, shardings)))

    @cached_property
    def text(self) -> str:
        """The optimized HLO of the executable."""
        return self.compiled.as_text()

    @property
    def batch_shapes(self) -> Any:
        """Shapes and dtypes of a global batch."""
        structure = jax.tree.structure(self.batch_shardings)
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in self.plan.batch]
        return jax.tree.unflatten(structure, shapes)

    @cached_property
    def _planned(self) -> tuple[list[tuple[tuple[int, ...], Any]], Any, list[NamedSharding]]:
        """Shape and dtype of every array of a batch, their tree, and where they lie; compared in every call."""
        shardings, structure = jax.tree.flatten(self.batch_shardings)
        return [(shape, jnp.dtype(dtype)) for _, shape, dtype in self.plan.batch], structure, shardings

    @property
    def scatters(self) -> tuple[Scatter, ...]:
        """How gradients are scattered over each batch axis of these devices, and why so."""
        return make_region(self.plan, self.mesh).scatters

    def init(self, seed: int, parameters: Arrays | None = None) -> TrainState:
        """The state before the first step, every array created in its own sharding.

        Parameters are those Flax's own initialisation, under `jax.jit`, gives for ``seed``; or those given, placed as
        the plan stores them, as `shardlab.load_safetensors` reads them. The first step takes their memory.

        Raises:
          DeclarationError: those given are not the plan's, by name, shape and dtype.
        """
        if parameters is not None:
            _same_parameters(parameters, abstract_stored(self.model, self.plan)[0])
            parameters = jax.device_put(parameters, self.state_shardings.parameters)
        with jax.set_mesh(self.mesh):
            names = storage_specs(self.plan)
            values = initial_values(self.model, self.plan, self.mesh, seed, without=parameters or ())
            parameters = parameters or {name: values[name] for name in names}
            one = NamedSharding(self.mesh, PartitionSpec())
            return TrainState(
                step=placed(np.int32(0), one),
                key=placed(jax.random.key_data(jax.random.key(seed)), one),
                parameters=parameters,
                buffers={name: value for name, value in values.items() if name not in names},
                optimizer=self._init_optimizer(parameters),
            )

    def verify(self, batches: Sequence[Any], *, seed: int = 0) -> Verification:
        """This step's plan against the reference step on one device: see `shardlab.step.verify.verify`."""
        from shardlab.step.verify import verify

        return verify(self.model, self.loss, self.optimizer, self.plan, batches, seed=seed)

    @cached_property
    def _init_optimizer(self) -> Callable[[Arrays], Any]:
        plan, model = self.plan, self.model

        def start(parameters: Arrays) -> Any:
            values = unstacked(plan, parameters) if plan.update == "per-layer" else parameters
            state = self.optimizer.init(optimizer_tree(model, values, plan.stacks, plan.update))
            # As for parameters: XLA:GPU may drop the sharding of an output that is a constant.
            return jax.lax.with_sharding_constraint(state, self.state_shardings.optimizer)

        return jax.jit(start, out_shardings=self.state_shardings.optimizer)


def compile_train_step(
    model: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    plan: Plan,
    batch: Any,
    *,
    devices: Sequence[jax.Device] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    skip_nonfinite: bool = False,
    prove: bool = False,
) -> CompiledStep:
    """The train step of `plan`, compiled.

    Args:
      model: as given to `make_plan`.
      loss: ``(y, batch) -> (sum, weight)``; the step's loss is the sum of sums over the sum of weights. The sums of
        the blocks' auxiliary losses are added to it: a block scales its own.
      optimizer: as given to `make_plan`.
      plan: what to compile.
      batch: a global batch, or its shapes.
      devices: to compile for, in place of those JAX sees here; compile-only devices of a topology do.
      compiler_options: of XLA, for this executable alone.
      skip_nonfinite: leave parameters, buffers and optimizer state as they are where the loss or a gradient is not
        finite; metrics hold ``finite``, by stored name, of a stack for each slot.
      prove: for tests: metrics hold the ``gradients`` too, by stored name, and unused activation buffers are filled
        with NaN, so that a bubble that reaches a result is seen.

    Raises:
      DeclarationError: model, batch or optimizer are not those of the plan, or XLA changed a declared sharding.
      OutOfMemory: the compiler has found that the step does not fit in a device's memory; a DeclarationError too.
    """
    raise_faults(random_faults())
    shapes = abstract(batch)
    model = read_model(model, shapes, plan.pipeline)
    _same_as_planned(model, plan, shapes)
    _may_be_stacked(model, plan, optimizer)
    abstract_state = abstract_state_of(model, plan, optimizer)
    _same_optimizer(plan, abstract_state.optimizer)
    mesh = build_mesh(plan.mesh, devices)
    specs = state_spec_tree(model, plan, optimizer)
    state_shardings = shardings(mesh, specs)
    rows = NamedSharding(mesh, PartitionSpec(plan.mesh.batch or None))
    batch_shardings = jax.tree.map(lambda _: rows, shapes)
    region = make_region(plan, mesh)
    with traced_in(plan.dtype):
        calls = Calls(model, loss, plan, region, shapes, train=True)
    gradients = make_gradients(model, plan, region, calls, float("nan") if prove else 0.0)
    update = make_update(model, plan, mesh, optimizer)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        gradient, metrics, buffers = gradients(state.parameters, state.buffers, batch, state.key, state.step)
        parameters, optimizer_state = update(gradient, state.optimizer, state.parameters, metrics["loss"])
        metrics |= {"grad_norm": optax.tree.norm(gradient)} | ({"gradients": gradient} if prove else {})
        if skip_nonfinite:
            metrics["finite"] = finite_layers(gradient, plan)
            finite = jnp.isfinite(metrics["loss"])
            for one in metrics["finite"].values():
                finite &= one.all()
            parameters, buffers, optimizer_state = unless_finite(
                finite, (parameters, buffers, optimizer_state), (state.parameters, state.buffers, state.optimizer)
            )
        return TrainState(state.step + 1, state.key, parameters, buffers, optimizer_state), metrics

    one = NamedSharding(mesh, PartitionSpec())
    names = ("loss", "grad_norm", "weight", *(("auxiliary",) if calls.has_auxiliary else ()))
    metric_shardings: dict[str, Any] = dict.fromkeys(names, one)
    metric_shardings |= {"finite": dict.fromkeys(storage_specs(plan), one)} if skip_nonfinite else {}
    metric_shardings |= {"gradients": shardings(mesh, storage_specs(plan, "state"))} if prove else {}
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, batch_shardings),
        out_shardings=(state_shardings, metric_shardings),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh), traced_in(plan.dtype):
        start = time.perf_counter()
        lowered = jitted.lower(abstract_state, shapes)
        traced = time.perf_counter()
        with refusals(plan):
            compiled = lowered.compile(compiler_options=options_for(plan, mesh, compiler_options))
        done = time.perf_counter()
    _same_as_declared(compiled, (state_shardings, batch_shardings))
    if diverges(plan) or leaves_out(plan, region):
        cannot_hang(compiled, plan)
    return CompiledStep(
        plan=plan,
        mesh=mesh,
        model=model,
        loss=loss,
        optimizer=optimizer,
        state_shardings=state_shardings,
        batch_shardings=batch_shardings,
        jitted=jitted,
        lowered=lowered,
        compiled=compiled,
        trace_seconds=traced - start,
        compile_seconds=done - traced,
    )


def working_copy(plan: Plan, mesh: Mesh) -> Callable[[Arrays], Arrays]:
    """Stored parameters -> what a step computes with: cast to its dtype, then gathered over the batch axes once.

    Those of blocks stay in their shards where each layer is gathered when it is used.
    """
    compute = storage_specs(plan, "compute")
    if plan.gather == "layer":
        compute |= {stack.name: spec for stack in plan.stacks if (spec := storage_specs(plan).get(stack.name))}

    def working(parameters: Arrays) -> Arrays:
        # The cast comes first: what is gathered is as narrow as what is computed with.
        return {
            name: jax.lax.with_sharding_constraint(
                value.astype(computed(value.dtype, plan.dtype)), NamedSharding(mesh, compute[name])
            )
            for name, value in parameters.items()
        }

    return working


def make_gradients(
    model: Model, plan: Plan, region: Region, calls: Calls, fill: float
) -> Callable[..., tuple[Arrays, dict[str, Any], Arrays]]:
    """``(parameters, buffers, batch, key data, step) -> (gradients, metrics, buffers)``, all in stored form."""
    working = working_copy(plan, region.mesh)
    specs = storage_specs(plan, "state")
    whole = None if model.parts is not None else whole_gradients(plan, region, calls, specs)
    parts = None if model.parts is None else pipelined_gradients(model, plan, region, calls, specs, fill)

    def gradients(parameters: Arrays, buffers: Arrays, batch: Any, key: jax.Array, step: jax.Array) -> Any:
        values = working(parameters)
        data = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step))
        if whole is not None:
            summed, (total, weight), buffers = whole(values, buffers, batch, data)
            metrics = {"loss": total / weight, "weight": weight}
        else:
            assert parts is not None
            summed, (total, weight, *auxiliary) = parts(values, buffers, batch, data)
            metrics = {"loss": (total + auxiliary[0]) / weight, "weight": weight}
            if calls.has_auxiliary:
                metrics["auxiliary"] = auxiliary[0] / auxiliary[1]
        gradient = {name: (value / weight).astype(parameters[name].dtype) for name, value in summed.items()}
        return gradient, metrics, buffers

    return gradients


def _same_parameters(given: Arrays, stored: Arrays) -> None:
    """Parameters that are given are those of the plan, as it stores them."""
    found, planned = ({name: (leaf.shape, str(leaf.dtype)) for name, leaf in each.items()} for each in (given, stored))
    raise_faults(
        Fault(
            name,
            f"the plan stores {_shown(planned.get(name))}, and given is {_shown(found.get(name))}",
            "give what was read for this plan",
        )
        for name in {**planned, **found}
        if planned.get(name) != found.get(name)
    )


def _kind(leaf: Any) -> Any:
    return getattr(leaf, "shape", None), getattr(leaf, "dtype", None)


def check_batch(batch: Any, planned: Sequence[tuple[str, tuple[int, ...], str]], way_out: str) -> None:
    """That a batch has the arrays that were planned: paths, shapes, dtypes.

    Raises:
      DeclarationError: with every array that differs, and the way out.
    """
    leaves = jax.tree_util.tree_flatten_with_path(abstract(batch))[0]
    found = {path_of(keys): (leaf.shape, str(leaf.dtype)) for keys, leaf in leaves}
    expected = {path: (shape, dtype) for path, shape, dtype in planned}
    raise_faults(
        Fault(
            f"batch {path}".rstrip(),
            f"the plan has {_shown(expected.get(path))}, the batch {_shown(found.get(path))}",
            way_out,
        )
        for path in {**expected, **found}
        if expected.get(path) != found.get(path)
    )


def _shown(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "no such array" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _same_as_planned(model: Model, plan: Plan, batch: Any) -> None:
    """The plan was made for this model and this batch."""
    planned = {parameter.path: parameter.shape for parameter in plan.parameters}
    found = {path: leaf.shape for path, leaf in model.parameters.items()}
    faults = [
        Fault(
            path,
            f"the plan has {planned.get(path, 'no such parameter')}, the model {found.get(path, 'none')}",
            "make the plan anew",
        )
        for path in {**planned, **found}
        if planned.get(path) != found.get(path)
    ]
    leaves = {path_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]}
    expected = {path: shape for path, shape, _ in plan.batch}
    faults += [
        Fault(
            f"batch {path}",
            f"the plan has {expected.get(path)}, the batch {leaves.get(path)}",
            "make the plan anew",
        )
        for path in {**expected, **leaves}
        if expected.get(path) != leaves.get(path)
    ]
    raise_faults(faults)


def _may_be_stacked(model: Model, plan: Plan, optimizer: optax.GradientTransformation) -> None:
    """The optimizer may see stacked layers where the plan's may: another would update them otherwise, silently."""
    if plan.update != "stacked" or not plan.stacks:
        return
    shapes = optimizer_shapes(plan.parameters, plan.stacks, "per-layer")
    reason = why_per_layer(optimizer, model, shapes, plan.stacks)
    if reason is not None:
        problem = f"the plan's runs on stacked layers, and this one may not: {reason}"
        raise_faults([Fault("optimizer", problem, "make the plan anew with this optimizer")])


def _same_optimizer(plan: Plan, state: Any) -> None:
    """The plan was made for an optimizer that keeps this state; whether it may see stacked layers depends on it."""
    planned = {leaf.path: f"{leaf.dtype}{list(leaf.shape)}" for leaf in plan.optimizer_state}
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    found = {path_of(keys): f"{leaf.dtype}{list(leaf.shape)}" for keys, leaf in leaves}
    raise_faults(
        Fault(
            f"optimizer state {path}",
            f"the plan has {planned.get(path, 'nothing')}, this optimizer {found.get(path, 'nothing')}",
            "make the plan anew",
        )
        for path in {**planned, **found}
        if planned.get(path) != found.get(path)
    )


def _same_as_declared(compiled: Any, declared: Any) -> None:
    """XLA kept every sharding that was declared for what goes in and what comes out."""
    given, _ = compiled.input_shardings
    faults = []
    for got, wanted in [(given, declared), (compiled.output_shardings[0], declared[0])]:
        # An input that the step does not read has None in place of a sharding: it is not passed to the program.
        theirs = jax.tree.leaves(got, is_leaf=lambda leaf: leaf is None)
        for (keys, mine), other in zip(jax.tree_util.tree_flatten_with_path(wanted)[0], theirs, strict=True):
            # Compared by where the pieces lie, since XLA may write a spec otherwise.
            if other is not None and not mine.is_equivalent_to(other, max(len(mine.spec), 1)):
                problem = f"declared {mine.spec}, compiled as {other}"
                faults.append(Fault(path_of(keys), problem, "report it: XLA changed a sharding"))
    raise_faults(faults)


def options_for(plan: Plan, mesh: Mesh, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of XLA, for a step or forward pass of `plan`: what it needs, and what was given."""
    options: dict[str, Any] = {}
    flows_in_parts = plan.activation_spec is not None and axes_in(plan.activation_spec) - {*plan.mesh.batch}
    if mesh.devices.flat[0].platform == "tpu" and (diverges(plan) or flows_in_parts):
        # XLA:TPU overlaps a matmul with its gather or scatter by turning that into permutes. None may stand in a branch
        # that not all devices take; and of what flows in parts each matmul would gather x anew: 19 times a layer of a
        # decoder in place of 11.
        options["xla_jf_spmd_threshold_for_windowed_einsum_mib"] = 1 << 30
    return {**options, **(given or {})} or None


def cannot_hang(compiled: Any, plan: Plan) -> None:
    """Of a program whose stages take branches of their own: no collective in a branch waits for other stages.

    Raises:
      DeclarationError: with every collective that does.
    """
    assert plan.mesh.stage is not None, "a single stage takes no branch of its own"
    raise_faults(
        Fault(
            f"schedule {plan.schedule!r}",
            f"{one.kind} {one.name} over {' x '.join(one.axes)} is in a branch that not all of its devices take "
            f"({one.op_name}{' at ' + one.source if one.source else ''}), and would wait for ever",
            "use a schedule that needs no branch: 1f1b_split, interleaved_1f1b or 1f1b",
        )
        for one in could_hang(compiled.as_text(), plan.mesh.sizes, plan.mesh.stage, slices=plan.mesh.slices)
    )
