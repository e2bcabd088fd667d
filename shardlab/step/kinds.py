"""What is known of a value that follows the number of examples, or does not.

A value of the traced program is of the kind

  ROWS     its shape follows the number of examples, and each part of it is made of its own example
  ALIKE    its shape follows the number of examples, which are all the same in it
  PLACE    0, 1, 2, ... along the examples, or a multiple: right for picking each example's own, and for nothing else
  SHIFTED  made of their places: wrong, once it is used
  ONE      of one example, inside a loop over them
  SUM      it is a sum over the examples at hand, linear in it
  COUNT    a constant that follows the number of examples: of tokens, say
  ODD      a constant that follows it, but not in proportion
  ZERO     zero, whatever it is added to
  OWN      a random key that the model made itself
  SAME     none of these: parameters, constants
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from shardlab.step.blocks import Blocks, following


class Kind(enum.Enum):
    """See the module's docstring."""

    SHIFTED = enum.auto()
    ROWS = enum.auto()
    SUM = enum.auto()
    ODD = enum.auto()
    COUNT = enum.auto()
    ONE = enum.auto()
    PLACE = enum.auto()
    ALIKE = enum.auto()
    OWN = enum.auto()
    SAME = enum.auto()
    ZERO = enum.auto()


@dataclass(frozen=True)
class Value:
    """What is known of a value.

    Attributes:
      blocks: of ROWS that lie otherwise than one after another: see `shardlab.step.blocks`.
      columns: of indices put together of several arrays: what each column is.
      stride, span: of a PLACE in units of entries, where each example has `stride` of the `span` of all of them.
      within: whether an example's own number below `stride` has been added to its PLACE.
    """

    kind: Kind
    blocks: Blocks = ()
    columns: tuple[Value, ...] = ()
    stride: int = 0
    span: int = 0
    within: bool = False


ROWS, SUM, COUNT, ODD, ZERO, SAME = (
    Value(kind) for kind in (Kind.ROWS, Kind.SUM, Kind.COUNT, Kind.ODD, Kind.ZERO, Kind.SAME)
)
ADDITIVE = frozenset({Kind.SUM, Kind.COUNT, Kind.ZERO})

# Of a sum, still that sum in another form.
FORM = frozenset(
    {
        "neg",
        "convert_element_type",
        "reduce_precision",
        "real",
        "imag",
        "copy",
        "copy_p",
        "name",
        "stop_gradient",
        "device_put",
    }
    | {"reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose", "rev", "slice", "dynamic_slice"}
    | {"reduce_sum", "sharding_constraint", "optimization_barrier", "psum", "psum_invariant", "split", "unstack"}
)
ADDITIONS = frozenset({"add", "sub", "add_any", "concatenate", "stack", "pad", "select_n", "dynamic_update_slice"})
PRODUCTS = frozenset({"mul", "div", "dot_general"})


class Spot(Protocol):
    """Where a walk stands: `where`, the function's name in an error, `rows`, its examples, and `line`, the user's."""

    where: str
    rows: int
    line: str

    def fault(self, equation: Any, what: str, name: str = "") -> NoReturn:
        """Raises a DeclarationError that names the operation, the line, and what is wrong with it."""


def of_constants(mine: Any, other: Any) -> Value:
    """What is known of a constant of both traces, from what it is with some examples and with twice as many.

    >>> of_constants(np.float32(4), np.float32(8)).kind, of_constants(np.arange(3), np.arange(6)).kind
    (<Kind.COUNT: 5>, <Kind.PLACE: 7>)
    """
    if mine is None or other is None:
        return SAME
    if hasattr(mine, "dtype") and jax.dtypes.issubdtype(mine.dtype, jax.dtypes.prng_key):
        return Value(Kind.OWN)
    mine, other = np.asarray(mine), np.asarray(other)
    if mine.ndim != other.ndim:
        return SAME
    dim = following(mine, other)
    if not np.any(mine) and not np.any(other):
        return ZERO
    if dim is None:
        if np.array_equal(mine, other, equal_nan=mine.dtype.kind in "fc"):
            return SAME
        return COUNT if np.array_equal(2 * mine, other) else ODD
    first = other.take([0], dim)
    if np.array_equal(np.broadcast_to(first, other.shape), other):
        return Value(Kind.ALIKE) if np.array_equal(mine.take([0], dim), first) else ODD
    places = np.expand_dims(np.arange(other.shape[dim]), [axis for axis in range(other.ndim) if axis != dim])
    is_place = np.array_equal(np.broadcast_to(places, other.shape), other)
    return place_of(mine.shape[dim]) if is_place else Value(Kind.SHIFTED)


def iota(mine: Any, dim: int) -> Value:
    """Of an iota whose dim `dim` follows the examples: their places, if it counts along that dim."""
    return place_of(mine.params["shape"][dim]) if mine.params["dimension"] == dim else Value(Kind.ALIKE)


def place_of(count: int) -> Value:
    """0, 1, 2, ... along `count` examples."""
    return Value(Kind.PLACE, stride=1, span=count)


def of_counts(name: str, kinds: list[Kind]) -> Kind:
    """Of constants some of which follow the number of examples."""
    counts, rest = kinds.count(Kind.COUNT), [kind for kind in kinds if kind is not Kind.COUNT]
    if Kind.ODD in kinds:
        return Kind.ODD
    if name in FORM:
        return Kind.COUNT
    if name in ADDITIONS and set(rest) <= {Kind.ZERO}:
        return Kind.COUNT
    if name == "div" and counts == 2:
        return Kind.SAME
    if name in PRODUCTS and counts == 1 and (name != "div" or kinds[0] is Kind.COUNT):
        return Kind.COUNT
    return Kind.ODD
