"""Names of weights elsewhere: which tensors of a file a parameter is, and how its dims lie in them.

A table is for a model's own paths. Those here are for `shardlab.models.decoder`; one for a model of yours is as short:

>>> table = Names((
...     Name("embed", "model.embed_tokens.weight"),
...     Name("layers/*/q", "model.layers.*.self_attn.q_proj.weight", dims=((1, 2), 0)),  # [D, H, K] from [H K, D]
...     Name("layers/*/up", "model.layers.*.experts.{0}.w3.weight", dims=(2, 1)),  # [E, D, F] from E times [F, D]
... ))
>>> held = table.held("layers/3/up", (2, 4, 6))
>>> held.shape, [name for _, name in held.tensors()]
((6, 4), ['model.layers.3.experts.0.w3.weight', 'model.layers.3.experts.1.w3.weight'])
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults

Dims = tuple[int | tuple[int, ...], ...]

_NUMBER = re.compile(r"\{(\d+)\}")


@dataclass(frozen=True)
class Name:
    """A line of a table.

    Attributes:
      ours: path of a parameter; ``*`` stands for any text within one segment.
      theirs: name of the tensor, with the same texts for its ``*``; ``{0}`` counts along our dim 0, so that a parameter
        is several tensors.
      dims: of each of their dims which of ours it is, or which, slowest first, where it is several in one; None: those
        that are not counted, in order.

    Raises:
      DeclarationError: it names other ``*`` there than here, or a dim twice.
    """

    ours: str
    theirs: str
    dims: Dims | None = None

    def __post_init__(self) -> None:
        stars = self.ours.count("*"), self.theirs.count("*")
        dims = [*self._counted, *itertools.chain.from_iterable(_group(dim) for dim in self.dims or ())]
        raise_faults(
            Fault(f"name {self.ours!r}", problem, way_out)
            for problem, way_out, wrong in (
                (
                    f"has {stars[0]} times *, and {self.theirs!r} has {stars[1]}",
                    "make them as many",
                    len(set(stars)) > 1,
                ),
                (f"names dims {dims}, one of them twice", "name each of ours once", len(set(dims)) < len(dims)),
            )
            if wrong
        )

    @property
    def _counted(self) -> tuple[int, ...]:
        return tuple(int(number) for number in _NUMBER.findall(self.theirs))

    def held(self, path: str, shape: tuple[int, ...]) -> Held | None:
        """How the parameter at `path` is held elsewhere; None where the line is not its.

        Raises:
          DeclarationError: the line is for another number of dims.
        """
        pattern = "([^/]*)".join(re.escape(part) for part in self.ours.split("*"))
        found = re.fullmatch(pattern, path)
        if found is None:
            return None
        texts = iter(found.groups())
        name = re.sub(r"\*", lambda _: next(texts), self.theirs)
        dims = tuple(dim for dim in range(len(shape)) if dim not in self._counted) if self.dims is None else self.dims
        held = Held(name, self._counted, tuple(_group(dim) for dim in dims), shape)
        known = sorted((*held.counted, *itertools.chain.from_iterable(held.dims)))
        if known != list(range(len(shape))):
            raise DeclarationError(
                f"{path}: has shape {shape}, and the name {self.theirs!r} is for dims {known}; name each of its dims"
            )
        return held


@dataclass(frozen=True)
class Names:
    """A table of names; of the lines that match a path the first counts.

    Attributes:
      lines: for every parameter that the model may have.
      ignored: tensors that are no parameter of the model and may be there; ``*`` stands for any text.
    """

    lines: tuple[Name, ...]
    ignored: tuple[str, ...] = ()

    def held(self, path: str, shape: tuple[int, ...]) -> Held | None:
        """How the parameter at `path` is held elsewhere; None where no line is its."""
        return next(filter(None, (line.held(path, shape) for line in self.lines)), None)

    def ignores(self, name: str) -> bool:
        """Whether a tensor may be there for nothing."""
        patterns = (".*".join(map(re.escape, pattern.split("*"))) for pattern in self.ignored)
        return any(re.fullmatch(pattern, name, re.DOTALL) for pattern in patterns)


@dataclass(frozen=True)
class Held:
    """A parameter as tensors of other names.

    Attributes:
      name: of the tensor, with ``{0}`` where it counts.
      counted: dims of ours that number tensors.
      dims: of each of their dims, which of ours it is.
      ours: shape of the parameter.
    """

    name: str
    counted: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    ours: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        return tuple(math.prod(self.ours[dim] for dim in group) for group in self.dims)

    def tensors(self, bounds: tuple[range, ...] | None = None) -> Iterator[tuple[dict[int, int], str]]:
        """Names of the tensors within `bounds` of our dims, and of each where it is along the dims that count."""
        within = bounds or tuple(map(range, self.ours))
        for numbers in itertools.product(*(within[dim] for dim in self.counted)):
            at = dict(zip(self.counted, numbers, strict=True))
            yield at, _NUMBER.sub(lambda found, at=at: str(at[int(found[1])]), self.name)  # type: ignore[misc]

    def as_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor with our dims but those that count; a view, so that nothing is read."""
        order = list(itertools.chain.from_iterable(self.dims))
        return tensor.reshape([self.ours[dim] for dim in order]).transpose(np.argsort(order))

    def as_theirs(self, array: np.ndarray) -> np.ndarray:
        """What `as_ours` takes, from an array with our dims but those that count."""
        order = list(itertools.chain.from_iterable(self.dims))
        return array.transpose(np.argsort(np.argsort(order))).reshape(self.shape)


def _group(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return dim if isinstance(dim, tuple) else (dim,)


_DECODER = (
    Name("tokens/embedding", "model.embed_tokens.weight"),
    Name("blocks/*/attention_norm/scale", "model.layers.*.input_layernorm.weight"),
    *(
        Name(f"blocks/*/attention/{name}/kernel", f"model.layers.*.self_attn.{name}_proj.weight", dims=(1, 0))
        for name in "qkvo"
    ),
    Name("blocks/*/mlp_norm/scale", "model.layers.*.post_attention_layernorm.weight"),
    Name("norm/scale", "model.norm.weight"),
    Name("unembed/kernel", "lm_head.weight", dims=(1, 0)),
)
_MLP = tuple(
    Name(f"blocks/*/mlp/{name}/kernel", f"model.layers.*.mlp.{name}_proj.weight", dims=(1, 0))
    for name in ("gate", "up", "down")
)
_IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)  # a constant that old files hold

LLAMA = Names((*_DECODER, *_MLP), _IGNORED)
"""Llama; of Llama 3.1 and later with ``rope_stretch``."""

QWEN = Names(
    (
        *_DECODER,
        *_MLP,
        *(Name(f"blocks/*/attention/{name}/bias", f"model.layers.*.self_attn.{name}_proj.bias") for name in "qkv"),
        *(
            Name(f"blocks/*/attention/{name}/scale", f"model.layers.*.self_attn.{name}.weight")
            for name in ("q_norm", "k_norm")
        ),
    ),
    _IGNORED,
)
"""Qwen 2 and 2.5 (``qkv_bias=True``), Qwen 3 (``qk_norm=True``)."""

MIXTRAL = Names(
    (
        *_DECODER,
        Name("blocks/*/mlp/router/kernel", "model.layers.*.block_sparse_moe.gate.weight", dims=(1, 0)),
        *(
            Name(f"blocks/*/mlp/{ours}", f"model.layers.*.block_sparse_moe.experts.{{0}}.{theirs}.weight", dims=(2, 1))
            for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
        ),
    ),
    _IGNORED,
)
"""Mixtral (``num_experts`` above 0)."""

TABLES = {"llama": LLAMA, "qwen": QWEN, "mixtral": MIXTRAL}
"""The tables that a command line can name."""


def read_names(names: Names | str) -> Names:
    """A table, or the one of a name.

    >>> read_names("llama") is LLAMA
    True

    Raises:
      DeclarationError: there is none of that name.
    """
    if isinstance(names, Names):
        return names
    if not isinstance(names, str) or names not in TABLES:
        raise DeclarationError(
            f"names: is {names!r}; give one of {', '.join(TABLES)}, or in a config a table of your own: "
            "shardlab.checkpoint.Names((Name('blocks/*/up/kernel', 'layers.*.up.weight', dims=(1, 0)), ...))"
        )
    return TABLES[names]
