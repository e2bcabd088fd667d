"""The proof: a plan against the reference step on one device, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardlab.mesh.faults import DeclarationError
from shardlab.module.functions import path_of
from shardlab.module.model import Model, read_model
from shardlab.plan.check import traced_in
from shardlab.plan.make import for_optimizer
from shardlab.plan.plan import Plan
from shardlab.step.calls import Loss
from shardlab.step.compile import compile_train_step
from shardlab.step.reference import ReferenceStep, narrowest
from shardlab.step.rounding import gradient_rounding, sizes_of
from shardlab.step.state import users_own


@dataclass(frozen=True)
class Tolerances:
    """The largest error that passes, relative to the largest entry of what is compared.

    Attributes:
      rounding: of a gradient that the plan's dtypes round to 16 bits, how many times the rounding of one device.
    """

    loss: float
    grad: float
    params: float
    rounding: float = 7.0


# Of a plan in bfloat16 rounding is measured. Errors are about 1 of it, 1.9 in a decoder of ten layers, 3.5 by dropout,
# whose masks are others where it is measured; 8 where one part in eight is left out, 30 of a gradient that is halved.
# `grad` of bfloat16 is for a model that computes in it of its own accord, whatever the plan says: a bound.
TOLERANCES = {
    "float64": Tolerances(loss=1e-12, grad=1e-12, params=1e-8),
    "float32": Tolerances(loss=1e-6, grad=1e-5, params=1e-5),
    "bfloat16": Tolerances(loss=1e-2, grad=5e-2, params=1e-5),
}


# Steps so short that the loss is nearly straight along them, however steep it is.
STEADY = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))


@dataclass(frozen=True)
class Verification:
    """How far a compiled step is from the reference step.

    Errors are relative to the largest entry: ``max|step - reference| / max|reference|`` of each array, the worst
    over the arrays; infinite where something is not a number. A gradient that is zero but for rounding has no scale of
    its own: an array is compared to no less than the share of the largest array's entry in which eight roundings reach
    the tolerance, at least a thousandth of it and at most a tenth.

    Attributes:
      init_identical: whether every initial parameter is equal, bit for bit.
      worst_init, worst_grad, worst_param: the path with the largest error.
      narrowest: the dtype of 16 bits that the model itself computes something in, or None; its tolerances then apply.
      max_grad_rounding, worst_rounding: of a plan that rounds gradients to 16 bits, the largest error of one, in an
        entry or along the gradient, over what `shardlab.step.rounding` measures of it, in any step, and its path; else
        None. `max_rel_err_grad` is then told and held to nothing.
      optimizer: which optimizer the parameters were compared under.
      max_rel_err_composition, composition: of y of the model's parts called one after another, against y of the model
        called whole, without dropout: the error and the path of the worst array; None and why, where the two were not
        compared.
      moved: whether any parameter of the reference changed; where none did, nothing is known of the update.
    """

    dtype: str
    steps: int
    optimizer: str
    init_identical: bool
    worst_init: str
    max_rel_err_loss: float
    max_rel_err_grad: float
    worst_grad: str
    max_rel_err_params: float
    worst_param: str
    max_rel_err_composition: float | None
    composition: str
    tolerances: Tolerances
    narrowest: str | None = None
    moved: bool = True
    max_grad_rounding: float | None = None
    worst_rounding: str = ""

    @property
    def passed(self) -> bool:
        """Whether initial parameters are identical and every error is within its tolerance."""
        return (
            self.init_identical
            and self.max_rel_err_loss <= self.tolerances.loss
            and self._gradients_passed
            and self.max_rel_err_params <= self.tolerances.params
            and (self.max_rel_err_composition is None or self.max_rel_err_composition <= self.tolerances.grad)
        )

    @property
    def _gradients_passed(self) -> bool:
        if self.max_grad_rounding is not None:
            return self.max_grad_rounding <= self.tolerances.rounding
        return self.max_rel_err_grad <= self.tolerances.grad

    def __str__(self) -> str:
        def line(name: str, error: float, allowed: float, where: str) -> str:
            mark = "ok" if error <= allowed else "FAIL"
            return f"  {name:<28}{error:10.1e}  (at most {allowed:.0e})  {mark:<4}  {where}".rstrip()

        same = "identical" if self.init_identical else f"FAIL  not identical at {self.worst_init}"
        allowed = self.tolerances
        name = "parts, against the whole"
        parts = f"  {name:<28}{self.composition}"
        if self.max_rel_err_composition is not None:
            parts = line(name, self.max_rel_err_composition, allowed.grad, self.composition)
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        still = f"  no parameter moved in {steps}: this proves nothing of the update; give more steps"
        gradients = [line("gradients", self.max_rel_err_grad, allowed.grad, self.worst_grad)]
        if self.max_grad_rounding is not None:
            gradients = [
                f"  {'gradients':<28}{self.max_rel_err_grad:10.1e}  {'':<23}{self.worst_grad}".rstrip(),
                line("  over their rounding", self.max_grad_rounding, allowed.rounding, self.worst_rounding),
            ]
        where = self.dtype + (f", the model in part in {self.narrowest}" if self.narrowest else "")
        return "\n".join(
            [
                f"against the reference step on one device, in {where}: {'passed' if self.passed else 'FAILED'}",
                parts,
                f"  {'initial parameters':<28}{same}",
                line("loss", self.max_rel_err_loss, allowed.loss, f"over {steps}"),
                *gradients,
                line(f"parameters, {steps}", self.max_rel_err_params, allowed.params, self.worst_param),
                *([] if self.moved else [still]),
                f"  (largest error over the largest entry; optimizer: {self.optimizer})",
            ]
        )


def relative_error(found: Any, expected: Any, least: float = 0.0) -> float:
    """``max|found - expected| / max(max|expected|, least)``; infinite where a number is not finite.

    >>> relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    0.5
    """
    difference = _largest(_exact(found) - _exact(expected))
    scale = max(_largest(expected), least)
    if not np.isfinite(difference):
        return float("inf")
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def worst(found: Mapping[str, Any], expected: Mapping[str, Any], share: float = 1e-3) -> tuple[float, str]:
    """The largest relative error over the arrays, none compared to less than `share` of the largest, and its path."""
    least = share * max(_largest(value) for value in expected.values())
    return max((relative_error(found[path], expected[path], least), path) for path in expected)


def over_rounding(
    found: Mapping[str, Any], expected: Mapping[str, Any], rounding: Mapping[str, Any]
) -> tuple[float, str]:
    """The largest size of an array's error over that of its `rounding`, and its path.

    None is compared to less than half a unit in the last place of the array in bfloat16, nor to less than what float32
    is allowed.

    Args:
      rounding: [2] by path, as `shardlab.step.rounding.sizes_of` gives it.
    """
    # Sums that cancel, as of a bias before a norm, are made of terms as large as other gradients.
    least = 8 * float(jnp.finfo(jnp.float32).eps) * max(_largest(value) for value in expected.values())
    unit = float(jnp.finfo(jnp.bfloat16).eps) / 2

    def one(path: str) -> float:
        gradient = _exact(expected[path])
        sizes = np.asarray(sizes_of(_exact(found[path]) - gradient, gradient))
        own = unit * np.asarray(sizes_of(gradient, gradient))
        scale = np.maximum(np.maximum(rounding[path], own), least * np.array([1, gradient.size**0.5]))
        if not np.isfinite(sizes).all():
            return float("inf")
        return float(np.max(np.divide(sizes, scale, out=np.where(sizes > 0, np.inf, 0.0), where=scale > 0)))

    return max((one(path), path) for path in expected)


def _largest(values: Any) -> float:
    return float(np.max(np.abs(_exact(values)), initial=0.0))


def _exact(values: Any) -> np.ndarray:
    return np.asarray(values, np.complex128 if np.iscomplexobj(values) else np.float64)


def verify(
    model: Any,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    plan: Plan,
    batches: Sequence[Any],
    *,
    seed: int = 0,
    tolerances: Tolerances | None = None,
) -> Verification:
    """The plan's step against the reference step, from the same seed over the same batches.

    Loss, gradients and parameters are compared at every step; in float64 gradients at the first, and parameters after
    the last. Unused buffers of the pipeline are filled with NaN, so that a bubble that reaches a result is seen.

    In float32 and bfloat16 parameters are compared under SGD in place of `optimizer`: Adam turns rounding in a
    near-zero gradient into a full step. Gradients are cut to norm 1 then: on a steep loss longer steps would make more
    of a rounding from step to step. That `optimizer` is the same on the plan's arrays needs no numbers: it is proved
    when the plan is made, or it runs on the user's own tree (see `shardlab.plan.terms`).

    Of rounding a step makes other parameters, and the next step of these other gradients. So, but in float64, each
    step is compared by itself: the reference is given the parameters that the step began with, and for its update the
    step's own gradient. In bfloat16 it computes in float32, from parameters as the step rounds them (a draw whose
    dtype is that of the activations is another draw in it). There rounding is no small thing: through ten layers it
    can make a fifth of a gradient. Gradients are held to a few times the rounding that one device makes of each in
    the same dtypes: a fault that is smaller than this hides in it, and is seen in float32 or float64.

    Args:
      model, loss, optimizer: as given to `compile_train_step`.
      plan: its `dtype` decides what is compared; float64 hides nothing.
      batches: one global batch a step.
      seed: of the initial parameters and of dropout.
      tolerances: in place of those of the plan's `dtype`, or of its `reduce_dtype` or of a dtype of 16 bits that the
        model itself computes in, where that is narrower.

    Raises:
      DeclarationError: no batches.
    """
    if not batches:
        raise DeclarationError("verify: no batches; pass one global batch for every step to compare")
    model = read_model(model, batches[0], plan.pipeline)
    name = "the declared one"
    with traced_in(plan.dtype):
        narrow = narrowest(model, loss, plan, batches[0])
    if plan.dtype != "float64" or narrow:
        optimizer, name = STEADY, "SGD at 0.1 of gradients cut to norm 1, for rounding's sake"
        plan = for_optimizer(plan, model, optimizer)
    step = compile_train_step(model, loss, optimizer, plan, batches[0], prove=True)
    reference = ReferenceStep(model, loss, optimizer, plan, seed)
    state = step.init(seed)
    initial = _on_host(plan, state.parameters)
    before = dict(reference.parameters)
    different = [path for path, value in reference.parameters.items() if not np.array_equal(initial[path], value)]

    kinds = (plan.dtype, plan.reduce_dtype, narrow or plan.dtype)
    kind = min(kinds, key=lambda kind: jnp.finfo(kind).bits)
    tolerances = tolerances or TOLERANCES["bfloat16" if kind == "float16" else kind]
    share = min(0.1, max(1e-3, 8 * float(jnp.finfo(kind).eps) / tolerances.grad))
    composition_error, composition = _composition(model, reference, batches[0])
    alone = jnp.finfo(kind).bits < 64
    rounding = gradient_rounding(model, loss, plan) if "bfloat16" in (plan.dtype, plan.reduce_dtype) else None
    losses, grads, params, over = [], [(0.0, "")], [(0.0, "")], [(0.0, "")]
    for index, batch in enumerate(batches):
        if alone:
            reference.parameters = {
                path: jnp.asarray(value) for path, value in _on_host(plan, state.parameters).items()
            }
        state, metrics = step(state, batch)
        expected, gradient = reference.gradients(batch)
        found = _on_host(plan, metrics["gradients"])
        losses.append(relative_error(metrics["loss"], expected))
        if alone or index == 0:
            grads.append(worst(found, gradient, share))
        if rounding is not None:
            allowed = rounding(reference.parameters, reference.buffers, batch, reference.key)
            over.append(over_rounding(found, gradient, allowed))
        reference.update(found if alone else gradient, expected)
        if alone or index == len(batches) - 1:
            params.append(worst(_on_host(plan, state.parameters), reference.parameters))
    # Of equals the first: what is no number in a step makes none of the next.
    (grad_error, worst_grad), (params_error, worst_param), (grad_rounding, worst_rounding) = (
        max(found, key=lambda one: one[0]) for found in (grads, params, over)
    )
    return Verification(
        dtype=plan.dtype,
        narrowest=narrow,
        steps=len(batches),
        optimizer=name,
        init_identical=not different,
        worst_init=different[0] if different else "",
        max_rel_err_loss=max(losses),
        max_rel_err_grad=grad_error,
        worst_grad=worst_grad,
        max_rel_err_params=params_error,
        worst_param=worst_param,
        max_rel_err_composition=composition_error,
        composition=composition,
        moved=any(not np.array_equal(reference.parameters[path], value) for path, value in before.items()),
        tolerances=tolerances,
        max_grad_rounding=None if rounding is None else grad_rounding,
        worst_rounding=worst_rounding,
    )


def _composition(model: Model, reference: ReferenceStep, batch: Any) -> tuple[float | None, str]:
    """How far the parts are from the model called whole, and where; or None and why they were not compared."""
    if model.parts is None:
        return None, "not compared: the plan takes the model whole"
    try:
        whole, parts = reference.outputs(batch)
    except Exception as error:  # Whatever the user's code raises: its own call need not take a batch.
        first = str(error).strip().partition("\n")[0]
        return None, f"not compared: {model.name} called with the batch raises {type(error).__name__}: {first}"
    shapes = [str(jax.tree.map(jnp.shape, y)) for y in (whole, parts)]
    if shapes[0] != shapes[1]:
        return None, f"not compared: {model.name} called whole gives {shapes[0]}, its parts {shapes[1]}"
    found = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(parts)[0]}
    expected = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(whole)[0]}
    largest, path = worst(found, expected)
    return largest, f"y {path}".rstrip()


def _on_host(plan: Plan, stored: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    return users_own(plan, {name: np.asarray(value) for name, value in stored.items()})
