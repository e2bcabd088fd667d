"""The user's functions made legal inside a manual region.

`with_sharding_constraint(x, P("data", None, "tensor"))` is right in a model that runs under `jit`. Inside a region
that is manual over ``data`` that axis is already taken, and JAX refuses. The user's function is therefore traced as
if all axes were automatic, the manual axes are removed from its constraints, every `batch_sum` becomes a sum over
the devices that hold the batch, every `cross_entropy` one over the stages that hold the classes, what XLA gets wrong
along cut dims gets them whole (see `shardlab.plan.whole`), and the result is run in its place. So are the rules of
`jax.custom_vjp` and `jax.custom_jvp` inside it, which are Python that JAX calls when it differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from shardlab.module.inner import programs_in
from shardlab.plan.whole import whole_dims
from shardlab.sharding.zero import without
from shardlab.step.backward import as_function, backward_of, has_rule, operands_of
from shardlab.step.batch_sum import is_batch_sum
from shardlab.step.cross_entropy import Vocabulary, mark_of


def made_legal(
    function: Callable[..., Any],
    manual: tuple[str, ...],
    spread: tuple[str, ...],
    automatic: AbstractMesh,
    *,
    platform: str = "",
    vocabulary: Vocabulary | None = None,
    inner: int = 0,
) -> Callable[..., Any]:
    """`function`, with `manual` axes left out of its constraints, and its batch sums taken over `spread`.

    Args:
      function: of pytrees of arrays.
      manual: axes that are manual where the result will be called.
      spread: those of them that the examples at hand are spread over.
      automatic: the mesh with every axis automatic.
      platform: what the result will run on; XLA's CPU backend aborts on a narrow sum over manual axes.
      vocabulary: how the classes of its `cross_entropy` are cut over the stages, if they are.
      inner: how many axes of more than one device are automatic where the result will be called.
    """
    if not manual and not inner:
        return function
    return _Legal(manual, spread, automatic, platform, vocabulary, inner).of(function)


def uses_batch_sum(jaxpr: Any) -> bool:
    """Whether a traced program has a `batch_sum` in it."""
    return any(is_batch_sum(equation) for equation in _equations(jaxpr))


def _names(equation: Any, manual: tuple[str, ...]) -> bool:
    """Whether it is a constraint that names a manual axis."""
    sharding = equation.params["sharding"] if equation.primitive.name == "sharding_constraint" else None
    return isinstance(sharding, NamedSharding) and without(sharding.spec, manual) != sharding.spec


def _equations(jaxpr: Any, *, rules: bool = True) -> Iterator[Any]:
    """The equations of a program, inner programs included, and the rules for its derivative if `rules`."""
    for equation in jaxpr.eqns:
        yield equation
        for program in programs_in(equation):
            yield from _equations(program, rules=rules)
        if rules and (backward := _rule(equation, jaxpr)) is not None:
            # A rule may call the function that it belongs to.
            yield from _equations(backward.program.jaxpr, rules=False)


def _kept_whole(equation: Any, operands: Sequence[Collection[int]], result: Collection[int], here: Any) -> Any:
    """In place of an operation, a call of a function that computes it with these dims whole, and others as they are."""

    def whole(x: jax.Array, dims: Collection[int]) -> jax.Array:
        free = [None if dim in dims else PartitionSpec.UNCONSTRAINED for dim in range(x.ndim)]
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*free)) if dims else x

    def computed(*given: jax.Array) -> jax.Array:
        return whole(equation.primitive.bind(*map(whole, given, operands), **equation.params), result)

    (call,) = jax.make_jaxpr(jax.jit(computed))(*(var.aval for var in equation.invars)).eqns
    return equation.replace(primitive=call.primitive, params=call.params, ctx=here)


def _rule(equation: Any, jaxpr: Any) -> Any:
    return backward_of(equation, jaxpr) if has_rule(equation) else None


@dataclass(frozen=True)
class _Legal:
    """See `made_legal`. ``rules``: whether the derivative of what is made legal will be taken."""

    manual: tuple[str, ...]
    spread: tuple[str, ...]
    automatic: AbstractMesh
    platform: str
    vocabulary: Vocabulary | None
    inner: int
    rules: bool = True

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            leaves, treedef = jax.tree.flatten(args)
            shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            with jax.sharding.use_abstract_mesh(self.automatic):
                closed, out = jax.make_jaxpr(
                    lambda *flat: function(*jax.tree.unflatten(treedef, flat)), return_shape=True
                )(*shapes)
                found = any(self._is_concerned(equation) for equation in _equations(closed.jaxpr, rules=self.rules))
            if not found:
                return function(*args)
            # Every equation remembers the mesh that it was traced under, and is to be run under this one.
            here = jax.make_jaxpr(lambda x: x + 1)(0.0).eqns[0].ctx
            flat = jax.core.eval_jaxpr(self._rewrite(closed.jaxpr, here), closed.consts, *leaves)
            return jax.tree.unflatten(jax.tree.structure(out), flat)

        return wrapped

    def _is_concerned(self, equation: Any) -> bool:
        marked = self.vocabulary is not None and mark_of(equation) is not None
        kept = whole_dims(equation, self.inner) is not None
        return marked or kept or _names(equation, self.manual) or is_batch_sum(equation)

    def _rewrite(self, jaxpr: Any, here: Any) -> Any:
        """The same program made legal, inner programs included."""

        def value_of(value: Any) -> Any:
            # Tuples with names hold no programs: the dims of a convolution, the functions of a kind of key.
            if type(value) in (list, tuple):
                return type(value)(value_of(one) for one in value)
            if hasattr(value, "consts") and hasattr(value, "jaxpr"):
                return value.replace(jaxpr=self._rewrite(value.jaxpr, here))
            return self._rewrite(value, here) if hasattr(value, "eqns") else value

        mesh = jax.sharding.get_abstract_mesh()
        equations = []
        for equation in jaxpr.eqns:
            if is_batch_sum(equation) and self.spread:
                (operand,) = equation.invars
                summed = jax.make_jaxpr(self._sum)(operand.aval)
                equations.append(equation.replace(params={**equation.params, "jaxpr": summed}, ctx=here))
                continue
            if self.vocabulary is not None and (mark := mark_of(equation)) is not None:
                joined = self._joined(mark, equation)
                equations.append(equation.replace(params={**equation.params, "jaxpr": joined}, ctx=here))
                continue
            if self.rules and self._has_concerned_rule(equation, jaxpr):
                equations.append(self._with_its_rule(equation, jaxpr, here))
                continue
            if (dims := whole_dims(equation, self.inner)) is not None:
                equations.append(_kept_whole(equation, *dims, here))
                continue
            params = {name: value_of(value) for name, value in equation.params.items()}
            # Of a constraint; of a derivative's broadcasts, which say the sharding that they were traced with.
            if isinstance(params.get("sharding"), NamedSharding):
                spec: PartitionSpec = without(params["sharding"].spec, self.manual)
                params["sharding"] = NamedSharding(mesh, spec)
                if equation.primitive.name == "sharding_constraint":
                    params["context_mesh"] = mesh
            equations.append(equation.replace(params=params, ctx=here))
        return jaxpr.replace(eqns=equations)

    def _sum(self, x: jax.Array) -> jax.Array:
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 and self.platform == "cpu"
        return jax.lax.psum(x.astype(jnp.float32) if narrow else x, self.spread).astype(x.dtype)

    def _joined(self, mark: str, equation: Any) -> Any:
        """The program of a mark of `cross_entropy`, over all stages."""
        vocabulary, part = self.vocabulary, jaxpr_as_fun(equation.params["jaxpr"])
        assert vocabulary is not None
        (operand,) = equation.invars
        return jax.make_jaxpr(lambda x: vocabulary.joined(mark, part(x)[0]))(operand.aval)

    def _has_concerned_rule(self, equation: Any, jaxpr: Any) -> bool:
        if not has_rule(equation):
            return False
        with jax.sharding.use_abstract_mesh(self.automatic):
            backward = _rule(equation, jaxpr)
            return backward is not None and any(
                self._is_concerned(one) for one in _equations(backward.program.jaxpr, rules=False)
            )

    def _with_its_rule(self, equation: Any, jaxpr: Any, here: Any) -> Any:
        """In place of an operation with a rule, a call of a function with the same rule made legal."""
        function, inside = as_function(equation, jaxpr), replace(self, rules=False)
        operands = [equation.invars[index].aval for index in operands_of(equation)]
        given = [index for index, aval in enumerate(operands) if jnp.issubdtype(aval.dtype, jnp.inexact)]

        def forward(*operands: Any) -> tuple[Any, Any]:
            def of_given(*some: Any) -> list[Any]:
                every = dict(enumerate(operands)) | dict(zip(given, some, strict=True))
                return function(*(every[index] for index in range(len(operands))))

            return jax.vjp(of_given, *(operands[index] for index in given))

        def backward(pull: Any, cotangents: Any) -> tuple[Any, ...]:
            found = dict(zip(given, inside.of(lambda pull, dy: pull(dy))(pull, cotangents), strict=True))
            return tuple(found.get(index) for index in range(len(operands)))

        legal = jax.custom_vjp(inside.of(function))
        legal.defvjp(inside.of(forward), backward)
        (call,) = jax.make_jaxpr(jax.jit(legal))(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands)).eqns
        return equation.replace(
            primitive=call.primitive,
            params=call.params,
            invars=[equation.invars[index] for index in operands_of(equation)],
            ctx=here,
        )
