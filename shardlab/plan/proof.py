"""Whether an optimizer is the same with some parameters in another form: stacked, or padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardlab.mesh.faults import DeclarationError
from shardlab.plan.terms import ZERO, Pieces, Terms, Value

Shape = tuple[int, ...]
Name = Any
"""Of a parameter its path, of a leaf of the state (where in the state, path of its parameter or None)."""


@dataclass(frozen=True)
class Form:
    """A parameter in another form: the path of each of its pieces (None: zeros that fill it up), its shape, theirs."""

    members: tuple[str | None, ...]
    shape: Shape
    shapes: tuple[Shape, ...]


def place_of(keys: Any) -> tuple[str, ...]:
    """The names on the way to a leaf of a tree."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


class Traced:
    """An optimizer's two functions, traced on a tree of parameters.

    Args:
      names: the tree with a path as each leaf.
      tree: of shapes.

    Attributes:
      init, update: closed jaxprs, of parameters, and of gradients, state, parameters and the loss.
      parameters, state: the names of their leaves, in order.
      shapes: by name.
    """

    def __init__(self, optimizer: optax.GradientTransformationExtraArgs, names: Any, tree: Any) -> None:
        self.init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(tree)

        def update(gradients: Any, state: Any, parameters: Any, loss: Any) -> Any:
            return optimizer.update(gradients, state, parameters, value=loss, grad=gradients)

        loss = jax.ShapeDtypeStruct((), jnp.float32)
        self.update, (_, after) = jax.make_jaxpr(update, return_shape=True)(tree, state, tree, loss)
        if jax.tree.map(jnp.shape, after) != jax.tree.map(jnp.shape, state):
            raise DeclarationError(
                "optimizer: its update returns a state of another structure or other shapes than init does; return one "
                "of the same"
            )
        owners = {place_of(keys): path for keys, path in jax.tree_util.tree_flatten_with_path(names)[0]}
        self.parameters: list[Name] = list(owners.values())
        self.state: list[Name] = []
        for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
            place = place_of(keys)
            start = next((at for at in range(len(place) + 1) if place[at:] in owners), None)
            self.state.append((place, None) if start is None else (place[:start], owners[place[start:]]))
        names = (*self.parameters, *self.state)
        self.shapes: dict[Name, Shape] = {
            name: leaf.shape for name, leaf in zip(names, jax.tree.leaves((tree, state)), strict=True)
        }


def differing(plain: Traced, other: Traced, forms: Mapping[str, Form]) -> str | None:
    """What is not proved to be the same in the other form, in words; None if all is.

    State at first, updates, and state after them are compared. By induction they are then the same at every step.

    Args:
      forms: by the paths of `other`, the parameters that are not as in `plain`.
    """
    leaves = {name: _leaf(plain, other, forms, name) for name in (*other.parameters, *other.state)}
    used = {name for leaf in leaves.values() if leaf is not None for name in leaf.names}
    for name in (*other.state, *plain.state):
        if leaves.get(name) is None and name not in used:
            return _words(name)
    laid = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    terms = Terms()

    parameters = {path: terms.symbol(("parameter", path)) for path in plain.parameters}
    start = dict(zip(plain.state, terms.walk(plain.init, list(parameters.values())), strict=True))
    holds = [laid[path].value(parameters) for path in other.parameters]
    fills = {path: [ZERO] * len(laid[path].names) for path in other.parameters}
    for name, found in zip(other.state, terms.walk(other.init, holds), strict=True):
        mine = laid[name].terms(terms, found)
        # What fills an array up and does not start as zeros is not known later, and may be anything.
        fills[name] = [ZERO if term == ZERO else terms.unknown() for term in mine or ()]
        if mine is None or not laid[name].equal(mine, start, fills[name]):
            return _words(name)

    gradients = {path: terms.symbol(("gradient", path)) for path in plain.parameters}
    state = {name: terms.symbol(("state", name)) for name in plain.state}
    loss = terms.symbol("loss")
    after = terms.walk(plain.update, [*gradients.values(), *state.values(), *parameters.values(), loss])
    expected = dict(zip((*plain.parameters, *plain.state), after, strict=True))
    pushes = [laid[path].value(gradients) for path in other.parameters]
    while True:
        held = [laid[name].value(state, fills[name]) for name in other.state]
        found_after = terms.walk(other.update, [*pushes, *held, *holds, loss])
        grown = False
        for name, found in zip(other.state, found_after[len(pushes) :], strict=True):
            for at, term in enumerate(laid[name].terms(terms, found) or ()):
                if laid[name].names[at] is None and fills[name][at] == ZERO != term:
                    fills[name][at], grown = terms.unknown(), True
        if not grown:
            break
    for name, found in zip((*other.parameters, *other.state), found_after, strict=True):
        mine = laid[name].terms(terms, found)
        if mine is None or not laid[name].equal(mine, expected, fills[name]):
            return f"update of {name}" if isinstance(name, str) else _words(name)
    return None


@dataclass(frozen=True)
class _Leaf:
    """A leaf in the other form: the plain names of its pieces (None: it is filled up there), and their shapes; no
    shapes where it is whole."""

    names: tuple[Name | None, ...]
    shapes: tuple[Shape, ...] | None

    def value(self, given: Mapping[Name, int], fill: Sequence[int] | None = None) -> Value:
        """It, from the terms of the plain leaves and of what fills it up."""
        if self.shapes is None:
            return given[self.names[0]]
        fill = fill or [ZERO] * len(self.names)
        each = zip(self.names, fill, strict=True)
        return Pieces(tuple(term if name is None else given[name] for name, term in each), self.shapes)

    def terms(self, terms: Terms, found: Value) -> tuple[int, ...] | None:
        """A term for each of its pieces; None where `found` does not have these."""
        if self.shapes is None:
            return (found,) if isinstance(found, int) else None
        pieces = terms.in_pieces(found, Pieces((ZERO,) * len(self.names), self.shapes))
        return None if pieces is None else pieces.terms

    def equal(self, found: Sequence[int], expected: Mapping[Name, Value], fill: Sequence[int]) -> bool:
        """Whether its pieces are as expected, and zeros where zeros fill it up."""
        return all(
            (term == ZERO or zero != ZERO) if name is None else term == expected[name]
            for name, term, zero in zip(self.names, found, fill, strict=True)
        )


def _leaf(plain: Traced, other: Traced, forms: Mapping[str, Form], name: Name) -> _Leaf | None:
    """How a leaf of `other` is made of leaves of `plain`; None if none fit."""
    path, shape = name if isinstance(name, str) else name[1], other.shapes[name]
    form = forms.get(path) if path is not None else None

    def of(member: str) -> Name:
        return member if name == path else (name[0], member)

    if form is None or shape != form.shape:
        names = [name] if form is None else [of(member) for member in form.members if member]
        return _Leaf((names[0],), None) if len(names) == 1 and plain.shapes.get(names[0]) == shape else None
    names = [None if member is None else of(member) for member in form.members]
    fit = all(one is None or plain.shapes.get(one) == its for one, its in zip(names, form.shapes, strict=True))
    return _Leaf(tuple(names), form.shapes) if fit else None


def _words(name: Name) -> str:
    return f"state of {name[1]}" if name[1] else f"state {'/'.join(name[0])}"
