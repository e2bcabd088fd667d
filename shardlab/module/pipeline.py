"""Which parts of the user's own module come before the repeated blocks, are them, and come after."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pipeline:
    """Names of the attributes and methods that make a module pipelinable.

    * ``before(batch) -> x``            what happens to a batch before the first block
    * ``blocks``                        the list of blocks, each called ``block(x)`` or ``block(x, c)``; those of one
                                        class, attributes and shapes are one kind and one program
    * ``after(x, batch) -> y``          (or ``after(x)``) what the last block's output becomes
    * ``context(batch) -> c``           optional: positions, masks, conditioning; there for every block

    ``x`` is a pytree of floating point arrays whose shapes no block changes and whose leading dim is the batch; between
    blocks it is in the dtype that the step computes in.
    A method that takes ``train`` or ``deterministic`` is given it; `after` is given the batch if it has a parameter
    ``batch``, or one more than x that needs a value. In a block what comes with x is an auxiliary loss alone:
    ``(x, (sum, weight))``.

    Skip connections, as a U-Net has, travel inside x: ``{"h": h, "skips": [...]}``, the skips zero at first. For blocks
    of one kind, one program, an array of each that is not trained, as ``nnx.Variable(jnp.int32(place))``, says which
    skip it fills or reads, with ``jnp.where(place == at, h, skip)``.

    >>> Pipeline(before="embed", blocks="blocks", after="head")
    Pipeline(before='embed', blocks='blocks', after='head', context=None)
    """

    before: str
    blocks: str
    after: str
    context: str | None = None
