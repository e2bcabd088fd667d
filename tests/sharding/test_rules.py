"""Rules: what patterns match, JSON, and the full message of a rule that cannot be read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.sharding.rules import Rule, Rules, canonical, spec_from_json, spec_text, spec_to_json


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("blocks/*/mlp/up/kernel", "blocks/3/mlp/up/kernel", True),
        ("blocks/*/kernel", "blocks/3/mlp/kernel", False),
        ("blocks/*", "blocks/3/kernel", False),
        ("*/kernel", "kernel", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "blocks/3/mlp/kernel", True),
        ("**/kernel", "blocks/3/mlp_kernel", False),
        ("blocks/**/kernel", "blocks/kernel", True),
        ("blocks/**/kernel", "blocks/0/1/2/kernel", True),
        ("blocks/**", "blocks/0/kernel", True),
        ("blocks/**", "blocks", True),
        ("blocks/**", "blocks_2/kernel", False),
        ("**", "anything/at/all", True),
        ("**/mlp/**", "blocks/3/mlp/up/kernel", True),
        ("**/mlp/**", "blocks/3/my_mlp/up/kernel", False),
        ("Dense_*/kernel", "Dense_12/kernel", True),
        ("*_proj/kernel", "q_proj/kernel", True),
        ("a.b/[k]?", "a.b/[k]?", True),
        ("a.b", "axb", False),
        ("a[bc]", "ab", False),
    ],
)
def test_patterns(pattern: str, path: str, matches: bool) -> None:
    assert Rule(pattern, None).matches(path) is matches


def test_the_first_match_wins() -> None:
    rules = Rules((("a/*", P("x")), Rule("**", P("y"), pad=True)))
    first, second = rules.first("a/b"), rules.first("b")
    assert first is not None
    assert first.spec == P("x")
    assert not first.pad
    assert second is not None
    assert second.spec == P("y")
    assert second.pad
    assert Rules((("a", None),)).first("b") is None


def test_none_is_replicated_and_a_mapping_is_ordered_rules() -> None:
    rules = Rules({"a": None, "**": ("x", None)}, logical={"embed": ["x"], "mlp": None})
    assert rules == Rules((("a", P()), ("**", P("x", None))), logical=(("embed", "x"), ("mlp", None)))


def test_json_round_trip() -> None:
    rules = Rules(
        (Rule("**/kernel", P("data", ("stage", "tensor"), None), pad=True), ("**", None)),
        logical=(("embed", ("a", "b")), ("embed", "a"), ("mlp", None)),
    )
    assert Rules.from_json(json.loads(json.dumps(rules.to_json()))) == rules


@given(st.lists(st.none() | st.sampled_from("abc") | st.just(("d", "e")), max_size=4))
def test_spec_json_round_trip(entries: list[Any]) -> None:
    spec = P(*entries)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec
    assert canonical([*entries, None]) == canonical(entries)


def test_a_spec_is_shown_the_same_under_every_jax() -> None:
    assert [spec_text(P()), spec_text(P("a")), spec_text(P(None, ("a", "b")))] == [
        "P()",
        "P('a')",
        "P(None, ('a', 'b'))",
    ]


BAD: dict[str, tuple[Any, Any, str]] = {
    "no pattern": ("", None, "rule '': has no pattern; write a path like blocks/*/mlp/up/kernel"),
    "not a pattern": (3, None, "rule 3: has no pattern; write a path like blocks/*/mlp/up/kernel"),
    "leading slash": (
        "/a/b",
        None,
        'rule "/a/b": has an empty segment; write it without a leading, trailing or double slash',
    ),
    "** in a segment": (
        "blocks/**kernel",
        None,
        "rule \"blocks/**kernel\": segment '**kernel' holds ** beside other text; write ** as a segment of "
        "its "
        "own, or *",
    ),
    "spec is text": (
        "**",
        "tensor",
        "rule \"**\": 'tensor' is not a PartitionSpec; write P(...) with one entry per dim, or None to replicate",
    ),
    "entry is a number": (
        "**",
        (1,),
        'rule "**": entry 1 is no axis name; write axis names, tuples of them, or None',
    ),
    "unconstrained": (
        "**",
        P(P.UNCONSTRAINED),
        'rule "**": leaves a dim UNCONSTRAINED; name its axes, or None: nothing is left to chance',
    ),
    "unreduced": (
        "**",
        P("a", unreduced={"b"}),
        'rule "**": is unreduced or reduced over an axis; parameters are neither: leave it out',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed(name: str) -> None:
    pattern, spec, message = BAD[name]
    for make in (lambda: Rule(pattern, spec), lambda: Rules(((pattern, spec),))):
        with pytest.raises(DeclarationError) as error:
            make()
        assert str(error.value) == message


def test_every_pair_that_cannot_be_read_is_told_at_once() -> None:
    with pytest.raises(DeclarationError) as error:
        Rules((("a//b", None), ("**", 3)), logical=(("embed", 4),))
    assert str(error.value) == (
        "3 faults in the declaration:\n"
        '  1. rule "a//b": has an empty segment; write it without a leading, trailing or double slash\n'
        '  2. rule "**": 3 is not a PartitionSpec; write P(...) with one entry per dim, or None to '
        "replicate\n"
        "  3. logical rule 'embed': entry 4 is no axis name; write axis names, tuples of them, or None"
    )
