"""`cross_entropy`: the loss of a classifier or a language model, over a vocabulary that may be cut over the stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardlab.mesh.faults import DeclarationError

SUM, MAX, CLASSES = "shardlab_vocabulary_sum", "shardlab_vocabulary_max", "shardlab_vocabulary_classes"


def cross_entropy(logits: Any, labels: Any) -> jax.Array:
    """The cross-entropy in nats of every label: ``logsumexp(logits) - logits[label]``, [...].

    Like `optax.softmax_cross_entropy_with_integer_labels`, computed in float32 or wider whatever the dtype of the
    logits. With ``head="vocab"`` every stage calls it with the logits of its part of the vocabulary, and three sums of
    the size of the labels join them (Megatron-LM, arXiv 1909.08053); everywhere else it is plain JAX.

    Args:
      logits: [..., V], floating point.
      labels: [...], integers from 0 to V-1. Any other label picks no logit and gives ``logsumexp(logits)``: the
        caller's to leave out, or to use.

    Raises:
      DeclarationError: labels that are no integers, or not of the shape of the logits without their last dim.

    >>> losses = cross_entropy(jnp.zeros((2, 4)), jnp.array([3, -1]))
    >>> f"{jnp.where(jnp.array([True, False]), losses, 0).sum():.4f}"
    '1.3863'
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(logits.dtype, jnp.floating) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise DeclarationError(
            f"cross_entropy: logits are {logits.dtype} and labels {labels.dtype}; give floating-point logits and a "
            "class number for each label"
        )
    if logits.shape[:-1] != labels.shape or not logits.ndim:
        raise DeclarationError(
            f"cross_entropy: labels of shape {list(labels.shape)} for logits {list(logits.shape)}; give one label for "
            "every row of logits, classes in the last dim"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    classes = _classes(jax.lax.iota(jnp.int32, logits.shape[-1]))
    # Numbers below zero are those of padding.
    known = classes >= 0
    # Not take_along_axis: gathering from logits that a second axis splits too aborts XLA's partitioner.
    picked = jnp.where(known & (classes == labels[..., None]), logits, 0)
    logits = jnp.where(known, logits, -jnp.inf)
    most = _max(jax.lax.stop_gradient(logits))
    found = jnp.stack([jnp.exp(logits - most[..., None]).sum(-1), picked.sum(-1)])
    exponentials, label = _sum(found)
    return jnp.log(exponentials) + most - label


def mark_of(equation: Any) -> str | None:
    """Which of the vocabulary's marks an equation of a jaxpr is, or None."""
    name = equation.params["name"] if equation.primitive.name in ("jit", "pjit") else None
    return name if name in (SUM, MAX, CLASSES) else None


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that is cut over the stages.

    Attributes:
      stage: the manual axis that cuts it.
      stages: into how many parts.
      sizes: the number of classes by that number with padding, of each such number.
    """

    stage: str
    stages: int
    sizes: tuple[tuple[int, int], ...]

    def joined(self, mark: str, x: jax.Array) -> jax.Array:
        """What the result `x` of a mark on this stage's part becomes; called where `stage` is manual.

        A sum and a maximum are of all parts. Class numbers, [V / stages] from 0, are those of this part, and -1 for
        padding.
        """
        if mark == SUM:
            return jax.lax.psum(x, self.stage)
        if mark == MAX:
            return jax.lax.pmax(x, self.stage)
        numbers = x + jax.lax.axis_index(self.stage).astype(x.dtype) * x.shape[0]
        held = self.stages * x.shape[0]
        size = dict(self.sizes).get(held, held)
        return numbers if size == held else jnp.where(numbers < size, numbers, -1)


def _marked(name: str, function: Any) -> Any:
    """`function`, found again by its name in a trace, where `step.constraints` puts `Vocabulary.joined` behind it."""
    function.__name__ = function.__qualname__ = name
    return jax.jit(function)


_sum = _marked(SUM, lambda x: x)
_max = _marked(MAX, lambda x: jnp.max(x, axis=-1))
_classes = _marked(CLASSES, lambda x: x)
