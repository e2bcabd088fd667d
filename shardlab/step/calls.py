"""The user's functions as the engine calls them: on some rows, with that site's key, constraints made legal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardlab.mesh.faults import DeclarationError
from shardlab.module.model import Model, Parts, computed, flowing, split_auxiliary
from shardlab.plan.lookups import for_lookup, looked_up
from shardlab.plan.microbatch import block_names
from shardlab.plan.plan import Parameter, Plan
from shardlab.plan.vocabulary import part_of, shared_by_example, with_size
from shardlab.step.constraints import made_legal, uses_batch_sum
from shardlab.step.cross_entropy import Vocabulary
from shardlab.step.examples import ROWS, Value, check_rows_to_rows, check_sums
from shardlab.step.random import Drawn, batched_draws, rows_key, site_key
from shardlab.step.region import Region
from shardlab.step.state import cut
from shardlab.step.vocabulary import check_classes, check_same_program, on_a_part

Loss = Callable[[Any, Any], tuple[Any, Any]]
"""``(y, batch) -> (sum, weight)``."""

BEFORE, AFTER, CONTEXT = 0, -1, -2  # sites of `site_key`; block i is site 1 + i


class Calls:
    """`before`, `context`, `block`, `after` and the loss on `rows` examples.

    Keys are passed as ``(key data, first row)``: arrays, so that they may be residuals.

    Args:
      batch: shapes of the global batch.
      train: whether the model is called as in training, with dropout.

    Attributes:
      shared: whether the stages share the examples of a microbatch before the blocks, and, but for ``head="vocab"``,
        after them.

    Raises:
      DeclarationError: a function computes across examples, and not all of them are in one place.
    """

    def __init__(self, model: Model, loss: Loss | None, plan: Plan, region: Region, batch: Any, *, train: bool) -> None:
        self._model, self._plan, self._region, self._batch, self._train = model, plan, region, batch, train
        self._functions = _functions(model, loss, plan, train=train)
        self._draws: dict[tuple[str, int], frozenset[Drawn]] = {}
        # The dim of the vocabulary of those parameters of which `after` is given this stage's part.
        self._vocabulary = plan.vocabulary
        padded = {p.path: p for p in plan.parameters if p.shape != p.stored_shape}
        self._padded = {path: p.shape for path, p in padded.items()}
        # What pads a vocabulary is left to `cross_entropy`: some stages have more of it than others.
        cut_into = [(padded[path], dim) for path, dim in self._vocabulary.items() if path in padded]
        self._padded |= {p.path: part_of(_whole(p, dim), dim, region.num_stages).shape for p, dim in cut_into}
        sizes = tuple(sorted({(p.stored_shape[dim], p.shape[dim]) for p, dim in cut_into}))
        self._parts = None if region.stage is None else Vocabulary(region.stage, region.num_stages, sizes)
        self._block_names = () if model.parts is None else block_names(model.parts)
        self._padded_in_block = {
            name: {inner: self._padded[path] for inner, path in layer.items() if path in self._padded}
            for name, layer in self._first_layers()
        }
        # Not left to XLA: it would carry x as the embedding left it, split over its features, and gather it in every
        # layer that normalises.
        self.flow_spec = region.automatic_part(plan.activation_spec or PartitionSpec())
        saved = plan.saved_activation_spec
        self.saved_spec = self.flow_spec if saved is None else region.automatic_part(saved)
        self.shared = region.stage is not None and (plan.head == "examples" or self._may_share())
        self._auxiliary = self._with_auxiliary()
        self._lookups = self._looked_up() if region.manual and len(region.inner) > 1 else {}
        if self._vocabulary:
            self._check_vocabulary()
        if region.manual or plan.num_microbatches > 1:
            for rows in {plan.microbatch_rows, plan.microbatch_rows // (plan.num_stage_devices if self.shared else 1)}:
                self._check(rows)

    @property
    def has_auxiliary(self) -> bool:
        """Whether some blocks return an auxiliary loss."""
        return bool(self._auxiliary)

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss to compute."""
        return "loss" in self._functions

    def before(self, values: Any, batch: Any, key: Any, rows: int) -> Any:
        """x of the examples of `batch`."""
        return self.as_flow(self._call("before", (values, batch), key, BEFORE, rows))

    def context(self, values: Any, batch: Any, key: Any, rows: int) -> Any:
        """c of the examples of `batch`; None where the model has no context."""
        if "context" not in self._functions:
            return None
        return self._call("context", (values, batch), key, CONTEXT, rows)

    def block(self, kind: int, layer: Any, x: Any, c: Any, extra: Any, rows: int) -> tuple[Any, Any]:
        """x after one block of the model's `kind`, and its auxiliary loss as (sum, weight), or None.

        ``extra`` is (frozen arrays of the layer, index of the block, key data, first row).
        """
        frozen, index, data, first = extra
        key = None if data is None else (data, first)
        x, auxiliary = self._call(self._block_names[kind], ({**layer, **frozen}, x, c), key, 1 + index, rows)
        return self.as_flow(x), auxiliary

    def after(self, values: Any, x: Any, batch: Any, key: Any, rows: int) -> Any:
        """y of the examples of `batch`."""
        return self._call("after", (values, x, batch), key, AFTER, rows)

    def whole(self, values: Any, batch: Any, key: Any, rows: int) -> tuple[Any, dict[str, Any]]:
        """y and the buffers afterwards, for a model taken whole."""
        return self._call("the model", (values, batch), key, BEFORE, rows)

    def loss(self, y: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Sum and weight of the loss; the weight is a constant of the derivative."""
        return self._legal("loss")(y, batch)

    def _call(self, name: str, args: tuple[Any, ...], key: Any, site: Any, rows: int) -> Any:
        legal = self._legal(name)
        arrays, *others = args
        shapes = self._padded_in_block.get(name, self._padded)
        sizes = {axis: self._region.mesh.shape[axis] for axis in self._region.inner}
        for path, (spec, dims) in self._lookups.get(name, {}).items():
            laid = for_lookup(spec, arrays[path].shape, dims, sizes)
            if laid != spec:
                arrays = {**arrays, path: jax.lax.with_sharding_constraint(arrays[path], laid)}
        args = ({path: cut(value, shapes.get(path, value.shape)) for path, value in arrays.items()}, *others)
        if key is None:
            return legal(*args, None)
        data, first = key
        plain = site_key(jax.random.wrap_key_data(data, impl="threefry2x32"), site)
        return legal(*args, rows_key(plain, first, rows, self._draws.get((name, rows), frozenset())))

    def _legal(self, name: str) -> Callable[..., Any]:
        region = self._region
        # Each stage has its own share of the examples before and after the blocks, if they are shared.
        apart = ("before",) if self._vocabulary else ("before", "after", "loss")
        spread = region.manual if self.shared and name in apart else region.batch
        platform = region.mesh.devices.flat[0].platform
        vocabulary = self._parts if self._vocabulary and name in ("after", "loss") else None
        return made_legal(
            self._functions[name],
            region.manual,
            spread,
            region.automatic_mesh,
            platform=platform,
            vocabulary=vocabulary,
            inner=len(region.inner),
        )

    def _may_share(self) -> bool:
        """With ``head="vocab"``: whether the stages may share the examples of `before`."""
        rows, stages = self._plan.microbatch_rows, self._plan.num_stage_devices
        if not self._vocabulary or rows % stages:
            return False
        with jax.sharding.use_abstract_mesh(self._region.automatic_mesh):
            share, every = (self._arguments(count)[self._block_names[0]][1] for count in (rows // stages, rows))
        return shared_by_example(share, every, rows // stages, rows) is None

    def _first_layers(self) -> list[tuple[str, Mapping[str, str]]]:
        """Of every kind of block: its name, and the arrays of the first one."""
        parts = self._model.parts
        if parts is None:
            return []
        return [(name, parts.layers[parts.kinds.index(kind)]) for kind, name in enumerate(self._block_names)]

    def _with_auxiliary(self) -> frozenset[str]:
        """The names of the blocks that return an auxiliary loss."""
        if self._model.parts is None:
            return frozenset()
        with jax.sharding.use_abstract_mesh(self._region.automatic_mesh):
            given = self._arguments(self._plan.microbatch_rows)
            out = {name: jax.eval_shape(self._functions[name], *given[name]) for name in self._block_names}
            return frozenset(name for name, (_, auxiliary) in out.items() if auxiliary is not None)

    def _looked_up(self) -> dict[str, dict[str, tuple[PartitionSpec, frozenset[int]]]]:
        """By function, the arrays that it looks up in: their specs, and along which dims."""
        specs = {p.path: p.compute for p in self._plan.parameters} | {b.path: b.spec for b in self._plan.buffers}
        paths, found = dict(self._first_layers()), {}
        with jax.sharding.use_abstract_mesh(self._region.automatic_mesh):
            for name, arguments in self._arguments(self._plan.microbatch_rows).items():
                if name in self._functions and name != "loss":
                    dims = looked_up(self._functions[name], *arguments)
                    own = paths.get(name, {})
                    found[name] = {
                        path: (self._region.automatic_part(specs[own.get(path, path)]), along)
                        for path, along in dims.items()
                    }
        return found

    def _arguments(self, rows: int, parts: int = 1) -> dict[str, tuple[Any, ...]]:
        """Shapes of the arguments of every function with `rows` examples and `parts` stages' parts of a vocabulary."""
        model, functions = self._model, self._functions
        kinds = {path: computed(leaf.dtype, self._plan.dtype) for path, leaf in model.parameters.items()}
        values: Any = {path: jax.ShapeDtypeStruct(leaf.shape, kinds[path]) for path, leaf in model.parameters.items()}
        values |= model.buffers
        for path, dim in self._vocabulary.items():
            whole = _whole(next(p for p in self._plan.parameters if p.path == path), dim, kinds[path])
            values[path] = part_of(whole, dim, self._plan.num_stage_devices, parts)
        examples = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), self._batch)
        key = jax.eval_shape(lambda: jax.random.key(0)) if self._train else None
        outer = (values, examples, key)
        if model.parts is None:
            y, _ = jax.eval_shape(functions["the model"], *outer)
            return {"the model": outer, "loss": (y, examples)}
        x = jax.eval_shape(functions["before"], *outer)
        c = jax.eval_shape(functions["context"], *outer) if "context" in functions else None
        blocks = {
            name: ({inner: values[path] for inner, path in layer.items()}, x, c, key)
            for name, layer in self._first_layers()
        }
        after = (values, x, examples, key)
        y = jax.eval_shape(functions["after"], *after)
        return {"before": outer, "context": outer, **blocks, "after": after, "loss": (y, examples)}

    def as_flow(self, x: Any) -> Any:
        """x laid out as it flows between blocks."""
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.flow_spec), x)

    def _check(self, rows: int) -> None:
        """That the functions mean the same on `rows` examples as on all; notes which of their draws follow the batch.

        Each is traced with these rows and with twice as many. One row is traced as two: JAX writes a program otherwise
        where a dim has size 1, though it means the same.
        """
        several = max(rows, 2)
        known: dict[str, list[Value]] = {}
        with jax.sharding.use_abstract_mesh(self._region.automatic_mesh):
            some, twice = self._arguments(several), self._arguments(2 * several)
            for name, function in self._functions.items():
                here, there = jax.make_jaxpr(function)(*some[name]), jax.make_jaxpr(function)(*twice[name])
                if self._plan.num_microbatches > 1 and uses_batch_sum(here.jaxpr):
                    raise DeclarationError(
                        f"{name}: calls shardlab.batch_sum, and each of {self._plan.num_microbatches} microbatches is "
                        "only a part of the batch; use microbatches=1"
                    )
                given = _given(name, some[name], known)
                if name == "loss":
                    check_sums(here, there, name, several, given=given)
                    continue
                auxiliary = name in self._auxiliary
                known[name], folds = check_rows_to_rows(here, there, name, several, auxiliary=auxiliary, given=given)
                if self._train:
                    draws = (here, there) if rows == several else (self._traced(name, rows), here)
                    drawn = batched_draws(draws[0].jaxpr, draws[1].jaxpr, rows, name)
                    self._draws[name, rows] = drawn | {(kind, (n * rows // several,)) for kind, (n,) in folds}

    def _check_vocabulary(self) -> None:
        """That `after` and the loss do with a part of the vocabulary what they would with all of it.

        Each is traced with one stage's part and with that of two.
        """
        rows, stages, known = self._plan.microbatch_rows, self._plan.num_stage_devices, list[Value]()
        with jax.sharding.use_abstract_mesh(self._region.automatic_mesh):
            # One class is traced as two: JAX writes a program otherwise where a dim has size 1.
            few = 2 if 1 in self._held(self._arguments(rows)) else 1
            some, twice, every = (self._arguments(rows, parts) for parts in (few, 2 * few, stages))
            held = f"{self._held(self._arguments(rows))[0]} of {self._held(every)[0]} classes"
            for name in ("after", "loss") if self.has_loss else ("after",):
                function = self._functions[name]
                whole = jax.make_jaxpr(function)(*every[name])
                with on_a_part(name, held):
                    here, there = jax.make_jaxpr(function)(*some[name]), jax.make_jaxpr(function)(*twice[name])
                check_same_program(here, whole, name, held)
                given = _given(name, some[name], {"after": known}) if name == "loss" else ()
                known = check_classes(here, there, name, self._held(some), held, whole=name == "loss", given=given)

    def _held(self, arguments: dict[str, tuple[Any, ...]]) -> list[int]:
        """How many of its classes each parameter of a vocabulary has."""
        return [arguments["after"][0][path].shape[dim] for path, dim in self._vocabulary.items()]

    def _traced(self, name: str, rows: int) -> Any:
        return jax.make_jaxpr(self._functions[name])(*self._arguments(rows)[name])


def _whole(parameter: Parameter, dim: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    """Its shape, the dim of the vocabulary with padding."""
    return with_size(jax.ShapeDtypeStruct(parameter.shape, dtype), dim, parameter.stored_shape[dim])


# Where the arguments of a function come from: by name and position, which function returned them.
_FROM = {("block", 1): "before", ("block", 2): "context", ("after", 1): "before", ("loss", 0): "after"}


def _given(name: str, args: tuple[Any, ...], known: dict[str, list[Value]]) -> list[Value | None]:
    """What is known of arguments, leaf by leaf: in which order examples lie, if not one after another."""
    given: list[Value | None] = []
    for position, arg in enumerate(args):
        count = len(jax.tree.leaves(arg))
        role = name.split(" ")[0]
        source = known.get(_FROM.get((role, position), ""), known.get("the model", []) if position == 0 else [])
        found = source[:count] if role in ("block", "after", "loss") and len(source) >= count else [ROWS] * count
        given += [value if value.blocks else None for value in found]
    return given


def scalars(pair: Any, where: str = "loss") -> tuple[jax.Array, jax.Array]:
    """A sum and its weight in at least float32; the weight is a constant of the derivative.

    Raises:
      DeclarationError: `pair` is not two numbers.
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(_is_number(one) for one in pair):
        shown = jax.tree.map(lambda leaf: _Shown(f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"), pair)
        what = "the sum of the losses" if where == "loss" else "the sum of its auxiliary loss"
        raise DeclarationError(
            f"{where}: returned {shown}; return (sum, weight), {what} over the examples and how many (or how much "
            "weight) it is over: two numbers, which add up over microbatches and devices"
        )
    total, weight = pair
    wide = jnp.promote_types(jnp.result_type(total), jnp.float32)
    return jnp.asarray(total, wide), jax.lax.stop_gradient(jnp.asarray(weight, wide))


def _is_number(value: Any) -> bool:
    return len(jax.tree.leaves(value)) == 1 and jax.tree.leaves(value)[0] is value and jnp.shape(value) == ()


class _Shown(str):
    """A text that is printed as it is inside a tuple."""

    __repr__ = str.__str__


def block_function(parts: Parts, kind: int, dtype: str, train: bool) -> Callable[..., tuple[Any, Any]]:
    """``(layer, x, c, key) -> (x, auxiliary)``: x as it flows on, and the auxiliary loss as (sum, weight) or None."""

    def block(layer: Any, x: Any, c: Any, key: Any) -> tuple[Any, Any]:
        y, auxiliary = split_auxiliary(x, parts.blocks[kind](layer, x, c, key, train))
        return flowing(y, dtype), None if auxiliary is None else scalars(auxiliary, "block")

    return block


def _functions(model: Model, loss: Loss | None, plan: Plan, *, train: bool) -> dict[str, Callable[..., Any]]:
    """What the model consists of, by the names that users gave; arrays by path -> the model's own -> arrays."""
    parts, functions = model.parts, dict[str, Callable[..., Any]]()
    if parts is None:
        functions["the model"] = lambda v, b, k: model.forward(v, b, k, train)
    else:
        before, context, after = parts.before, parts.context, parts.after
        functions["before"] = lambda v, b, k: flowing(before(v, b, k, train), plan.dtype)
        if context is not None:
            functions["context"] = lambda v, b, k: context(v, b, k, train)
        for kind, name in enumerate(block_names(parts)):
            functions[name] = block_function(parts, kind, plan.dtype, train)
        functions["after"] = lambda v, x, b, k: after(v, x, b, k, train)
    if loss is not None:
        functions["loss"] = lambda y, b: scalars(loss(y, b))
    return functions
