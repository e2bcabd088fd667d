"""Rules: specs by path pattern, first match wins; and the logical-axis rules that annotations are read with.

A path is where a parameter sits in the user's own model, ``blocks/3/mlp/up/kernel``. In a pattern ``*``
stands for any text within one segment, ``**`` for any number of segments, none included; everything else is
literal.

>>> rules = Rules((
...     ("**/up/kernel", P(None, "tensor")),
...     ("**/down/kernel", P("tensor", None)),
...     ("**", None),
... ))
>>> rules.first("blocks/3/mlp/up/kernel").spec
P(None, 'tensor')
>>> rules.first("norm/scale").spec
P()
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import Fault, raise_faults

Entry = str | tuple[str, ...] | None
Logical = tuple[tuple[str, Entry], ...]


@dataclasses.dataclass(frozen=True, init=False)
class Rule:
    """Parameters whose path matches `pattern` get `spec`.

    Attributes:
      pattern: a path with ``*`` and ``**``.
      spec: mesh axes by dim; given as None it is ``P()``, replicated on purpose.
      pad: a dim that does not divide is padded up to the next multiple instead of refused.

    Raises:
      DeclarationError: the pattern or the spec cannot be read.
    """

    pattern: str
    spec: P
    pad: bool = False

    def __init__(self, pattern: str, spec: P | tuple[Entry, ...] | None, pad: bool = False) -> None:
        raise_faults([*_pattern_faults(pattern), *spec_faults(f'rule "{pattern}"', spec)])
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "spec", P() if spec is None else P(*spec))
        object.__setattr__(self, "pad", pad)

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the whole path.

        >>> Rule("blocks/*/up/kernel", None).matches("blocks/3/up/kernel")
        True
        >>> Rule("**/kernel", None).matches("kernel")
        True
        """
        return _regex(self.pattern).fullmatch(path) is not None


@dataclasses.dataclass(frozen=True, init=False)
class Rules:
    """Ordered rules and logical-axis rules.

    Attributes:
      rules: the first that matches a path gives its spec; pairs (pattern, spec) are made rules.
      logical: pairs (logical name, mesh axis, several axes, or None: replicated); `annotations` says how they
        are read.

    Raises:
      DeclarationError: with every rule that cannot be read.
    """

    rules: tuple[Rule, ...]
    logical: Logical

    def __init__(
        self,
        rules: Iterable[Rule | tuple[str, Any]] | Mapping[str, Any] = (),
        logical: Iterable[tuple[str, Any]] | Mapping[str, Any] = (),
    ) -> None:
        given = list(rules.items() if isinstance(rules, Mapping) else rules)
        names = list(logical.items() if isinstance(logical, Mapping) else logical)
        faults = []
        for rule in given:
            if not isinstance(rule, Rule):
                faults += [*_pattern_faults(rule[0]), *spec_faults(f'rule "{rule[0]}"', rule[1])]
        for name, axes in names:
            faults += spec_faults(f"logical rule {name!r}", (tuple(axes) if isinstance(axes, list) else axes,))
        raise_faults(faults)
        made = tuple(rule if isinstance(rule, Rule) else Rule(*rule) for rule in given)
        object.__setattr__(self, "rules", made)
        object.__setattr__(self, "logical", tuple((name, entry(axes)) for name, axes in names))

    def first(self, path: str) -> Rule | None:
        """The rule that gives `path` its spec, or None."""
        return next((rule for rule in self.rules if rule.matches(path)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; `from_json` gives the rules back."""
        rules = [{"pattern": rule.pattern, "spec": spec_to_json(rule.spec), "pad": rule.pad} for rule in self.rules]
        return {"rules": rules, "logical": [[name, _plain(axes)] for name, axes in self.logical]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rules:
        """The rules that `to_json` wrote.

        >>> rules = Rules((("**/kernel", P("data", ("stage", "tensor"))),), logical=(("embed", None),))
        >>> Rules.from_json(rules.to_json()) == rules
        True
        """
        rules = [Rule(row["pattern"], spec_from_json(row["spec"]), row["pad"]) for row in data["rules"]]
        return cls(rules, [(name, axes) for name, axes in data["logical"]])


def read_rules(rules: Any) -> Rules:
    """The rules themselves, or rules made of pairs (pattern, spec).

    Raises:
      DeclarationError: it is neither.

    >>> read_rules([("**", None)])
    Rules(rules=(Rule(pattern='**', spec=P(), pad=False),), logical=())
    """
    if isinstance(rules, Rules):
        return rules
    way_out = "give Rules, or pairs as [('**/kernel', P(None, 'tensor')), ('**', None)]"
    if not isinstance(rules, Iterable) or isinstance(rules, str):
        raise_faults([Fault("rules", f"is {rules!r}", way_out)])
    given = list(rules.items() if isinstance(rules, Mapping) else rules)
    raise_faults(
        Fault(f"rules, number {number}", f"is {rule!r}, neither a Rule nor a pair", way_out)
        for number, rule in enumerate(given, start=1)
        if not isinstance(rule, Rule) and not (isinstance(rule, tuple | list) and len(rule) in (2, 3))
    )
    return Rules(given)


def spec_to_json(spec: P) -> list[Any]:
    """The spec as a list of axis names, lists of them, and None.

    >>> spec_to_json(P("data", ("stage", "tensor"), None))
    ['data', ['stage', 'tensor'], None]
    """
    return [_plain(axes) for axes in spec]


def spec_from_json(data: Iterable[Any]) -> P:
    """The spec that `spec_to_json` wrote.

    >>> spec_from_json(["data", ["stage", "tensor"], None])
    P('data', ('stage', 'tensor'), None)
    """
    return P(*(tuple(axes) if isinstance(axes, list) else axes for axes in data))


def entry(axes: Any) -> Entry:
    """A dim's axes in one form: None, one name, or a tuple of two or more.

    >>> entry(()), entry(("a",)), entry(["a", "b"])
    (None, 'a', ('a', 'b'))
    """
    if axes is None or isinstance(axes, str):
        return axes
    names = tuple(axes)
    return None if not names else names[0] if len(names) == 1 else names


def axes_of(axes: Any) -> tuple[str, ...]:
    """The axis names of one dim of a spec.

    >>> axes_of(None), axes_of("a"), axes_of(("a", "b"))
    ((), ('a',), ('a', 'b'))
    """
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def canonical(spec: Iterable[Any]) -> P:
    """The spec in one form: no trailing None, no tuple of fewer than two; equal specs compare equal.

    >>> canonical(P(("a",), None, ())) == P("a")
    True
    """
    entries = [entry(axes) for axes in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def spec_text(spec: Iterable[Any]) -> str:
    """The spec as one writes it, the same under every JAX version.

    >>> spec_text(P(None, ("a", "b")))
    "P(None, ('a', 'b'))"
    """
    return f"P({', '.join(repr(axes) for axes in spec)})"


def _plain(axes: Any) -> Any:
    return list(axes) if isinstance(axes, tuple) else axes


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """`pattern` as a regular expression over a path that has a slash put before it."""
    text = ""
    segments = pattern.split("/")
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        if segment == "**":
            text += ".*" if last else "(?:[^/]+/)*"
        else:
            text += "[^/]*".join(re.escape(part) for part in segment.split("*")) + ("" if last else "/")
    if text.endswith("/.*"):  # "a/**" matches "a" too.
        text = text.removesuffix("/.*") + "(?:/.*)?"
    return re.compile(text)


def _pattern_faults(pattern: Any) -> list[Fault]:
    where = f'rule "{pattern}"'
    if not isinstance(pattern, str) or not pattern:
        return [Fault(f"rule {pattern!r}", "has no pattern", "write a path like blocks/*/mlp/up/kernel")]
    segments = pattern.split("/")
    if "" in segments:
        return [Fault(where, "has an empty segment", "write it without a leading, trailing or double slash")]
    return [
        Fault(where, f"segment {segment!r} holds ** beside other text", "write ** as a segment of its own, or *")
        for segment in segments
        if "**" in segment and segment != "**"
    ]


def spec_faults(where: str, spec: Any) -> list[Fault]:
    """What makes `spec` no list of axis names, tuples of them and None."""
    if spec is None:
        return []
    if not isinstance(spec, P | tuple | list):
        shown = f"{spec!r} is not a PartitionSpec"
        return [Fault(where, shown, "write P(...) with one entry per dim, or None to replicate")]
    if isinstance(spec, P) and (spec.unreduced or spec.reduced):
        return [Fault(where, "is unreduced or reduced over an axis", "parameters are neither: leave it out")]
    faults = []
    for axes in spec:
        names = axes if isinstance(axes, tuple) else (axes,)
        if axes is P.UNCONSTRAINED:
            faults.append(
                Fault(where, "leaves a dim UNCONSTRAINED", "name its axes, or None: nothing is left to chance")
            )
        elif axes is not None and not all(isinstance(name, str) for name in names):
            faults.append(Fault(where, f"entry {axes!r} is no axis name", "write axis names, tuples of them, or None"))
    return faults
