"""Resolve: who gives a parameter its spec, and the full message of every fault of a declaration."""

from collections.abc import Mapping
from typing import Any

import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError, raise_faults
from shardlab.mesh.spec import MeshSpec
from shardlab.sharding.annotations import Annotation
from shardlab.sharding.resolve import Placement, flatten, resolve
from shardlab.sharding.rules import Rule, Rules

MESH = MeshSpec({"data": 2, "stage": 2, "tensor": 16}, batch="data", stage="stage", target="cpu:64")
KERNEL = "blocks/0/mlp/up/kernel"
WANTED = (("**/up/kernel", P(None, "tensor")), ("**", None))


def layers(count: int, shape: tuple[int, ...] = (512, 1024)) -> dict[str, tuple[int, ...]]:
    return {f"blocks/{layer}/mlp/up/kernel": shape for layer in range(count)}


def placed(shapes: Mapping[str, tuple[int, ...]], **declared: Any) -> dict[str, Placement]:
    """The placements of a declaration that has no fault."""
    declared = {"rules": Rules(), **declared}
    found = resolve(shapes, mesh=MESH, **declared)
    raise_faults(found.faults)
    return found.placements


def test_the_first_matching_rule_gives_the_spec() -> None:
    found = placed({KERNEL: (8, 32), "norm/scale": (8,)}, rules=Rules(WANTED))
    assert found == {
        KERNEL: Placement(P(None, "tensor"), 'rule 1, "**/up/kernel"'),
        "norm/scale": Placement(P(), 'rule 2, "**"'),
    }


def test_annotations_of_both_kinds() -> None:
    notes = {"a": Annotation(("embed", "mlp"), "logical"), "b": Annotation((None, "tensor"), "mesh")}
    rules = Rules(logical=(("embed", None), ("mlp", "tensor")))
    found = placed({"a": (8, 32), "b": (8, 32)}, rules=rules, annotations=notes)
    assert found == {
        "a": Placement(P(None, "tensor"), "annotation ('embed', 'mlp')"),
        "b": Placement(P(None, "tensor"), "annotation (None, 'tensor')"),
    }


def test_specs_come_before_rules_and_leave_the_rest_to_them() -> None:
    given = {"blocks": {0: {"mlp": {"up": {"kernel": P("tensor", None)}}}}}
    shapes = {KERNEL: (32, 8), "blocks/1/mlp/up/kernel": (8, 32)}
    found = placed(shapes, rules=Rules(WANTED[:1]), specs=given)
    assert found[KERNEL] == Placement(P("tensor"), "specs")
    assert found["blocks/1/mlp/up/kernel"].source == 'rule 1, "**/up/kernel"'


def test_an_annotation_and_a_rule_may_say_the_same() -> None:
    notes = {KERNEL: Annotation(("tensor",), "mesh")}
    found = placed({KERNEL: (32, 8)}, rules=Rules((("**", P(("tensor",), None)),)), annotations=notes)
    assert found[KERNEL].spec == P("tensor")


def test_specs_are_stored_in_one_form() -> None:
    found = placed({"a": (4, 4, 4)}, rules=Rules((("a", P(("data",), None, ())),)))
    assert found["a"].spec == P("data")


def test_a_padded_rule_says_the_shape_to_store() -> None:
    shapes = {"a": (7, 1000), "b": (7, 1024)}
    found = placed(shapes, rules=Rules((Rule("**", P(None, ("data", "tensor")), pad=True),)))
    assert (found["a"].padded, found["b"].padded) == ((7, 1024), None)


def test_a_scalar_and_an_empty_dim_divide() -> None:
    found = placed({"a": (), "b": (0,)}, rules=Rules((("a", None), ("b", P("tensor")))))
    assert (found["a"].spec, found["b"].spec) == (P(), P("tensor"))


def test_flatten_takes_paths_and_nested_mappings() -> None:
    assert flatten({"a/b": None, "c": {1: {"d": P("x", None)}}}) == {"a/b": None, "c/1/d": P("x", None)}


def test_a_4096_device_plan_of_32_layers_is_resolved_without_devices() -> None:
    mesh = MeshSpec({"data": -1, "tensor": 16}, batch="data", target="tpu:v5p:16x16x16")
    found = resolve(layers(32, (4096, 16384)), mesh=mesh, rules=Rules(WANTED[:1]))
    assert not found.faults
    assert len(found.placements) == 32


BLOCK = "did you mean 'blocks/0/mlp/up/kernel'? "
CHOICES = "with Rule(..., pad=True), or replicate it on purpose with None"
NOTE = "annotation ('embed', 'mlp')"

# name: (shapes, declaration, message)
BAD: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "does not divide": (
        {KERNEL: (512, 1000), "norm": (4,), "head/kernel": (4, 4)},
        {"rules": [("norm", None), ("head/**", None), ("**/up/kernel", P(None, "tensor"))]},
        f"{KERNEL}: dim 1 has size 1000, not divisible by axis 'tensor' of size 16 (rule 3, "
        '"**/up/kernel"); '
        f"shard another dim, pad it to 1008 {CHOICES}",
    ),
    "does not divide, and no other dim would": (
        {KERNEL: (10, 1000)},
        {"rules": [("**", P(None, "tensor"))]},
        f"{KERNEL}: dim 1 has size 1000, not divisible by axis 'tensor' of size 16 (rule 1, \"**\"); pad "
        "it to "
        f"1008 {CHOICES}",
    ),
    "does not divide, and the other dim is taken": (
        {KERNEL: (512, 1000)},
        {"rules": [("**", P("data", "tensor"))]},
        f"{KERNEL}: dim 1 has size 1000, not divisible by axis 'tensor' of size 16 (rule 1, \"**\"); pad "
        "it to "
        f"1008 {CHOICES}",
    ),
    "does not divide by the product": (
        {KERNEL: (48,)},
        {"rules": [("**", P(("data", "tensor")))]},
        f"{KERNEL}: dim 0 has size 48, not divisible by axes 'data' x 'tensor' of sizes 2 x 16 = 32 (rule 1, "
        f'"**"); pad it to 64 {CHOICES}',
    ),
    "two dims do not divide": (
        {KERNEL: (3, 10)},
        {"rules": [("**", P("data", "tensor"))]},
        "2 faults in the declaration:\n"
        f"  1. {KERNEL}: dim 0 has size 3, not divisible by axis 'data' of size 2 (rule 1, \"**\"); pad it "
        "to 4 "
        f"{CHOICES}\n"
        f"  2. {KERNEL}: dim 1 has size 10, not divisible by axis 'tensor' of size 16 (rule 1, \"**\"); "
        "pad it to "
        f"16 {CHOICES}",
    ),
    "the same on 32 layers": (
        layers(32, (512, 1000)),
        {"rules": [("**", P(None, "tensor"))]},
        f"{KERNEL} and 31 more like it: dim 1 has size 1000, not divisible by axis 'tensor' of size 16 "
        "(rule 1, "
        f'"**"); shard another dim, pad it to 1008 {CHOICES}',
    ),
    "siblings by suffix, one of them different": (
        {"Dense_0/kernel": (3,), "Dense_1/kernel": (3,), "Dense_2/kernel": (5,), "w1": (3,), "w2": (3,)},
        {"rules": [("**", P("data"))]},
        "4 faults in the declaration:\n"
        "  1. Dense_0/kernel and 1 more like it: dim 0 has size 3, not divisible by axis 'data' of size 2 "
        "(rule "
        f'1, "**"); pad it to 4 {CHOICES}\n'
        "  2. Dense_2/kernel: dim 0 has size 5, not divisible by axis 'data' of size 2 (rule 1, \"**\"); "
        "pad it "
        f"to 6 {CHOICES}\n"
        "  3. w1: dim 0 has size 3, not divisible by axis 'data' of size 2 (rule 1, \"**\"); pad it to 4 "
        f"{CHOICES}\n"
        "  4. w2: dim 0 has size 3, not divisible by axis 'data' of size 2 (rule 1, \"**\"); pad it to 4 "
        f"{CHOICES}",
    ),
    "more entries than dims": (
        {"bias": (16,)},
        {"rules": [("bias", P(None, "tensor"))]},
        "bias: P(None, 'tensor') has 2 entries, the parameter 1 dim [16] (rule 1, \"bias\"); leave out 1 entry",
    ),
    "more None than dims": (
        {"a": (4, 4)},
        {"specs": {"a": P(None, None, None, None)}},
        "a: P(None, None, None, None) has 4 entries, the parameter 2 dims [4, 4] (specs); leave out 2 entries",
    ),
    "unmatched": (
        layers(3) | {"embed/table": (8, 8)},
        {"rules": [("embed/*", None)]},
        f"{KERNEL} and 2 more like it: no rule matches it, and it has no annotation; add a rule "
        '("blocks/*/mlp/up/kernel", P(...)), or ("blocks/*/mlp/up/kernel", None) to replicate it on purpose',
    ),
    "unmatched, with specs": (
        {"a": (2,), "b": (2,)},
        {"specs": {"a": None}},
        'b: no rule matches it, and it has no annotation and no entry in specs; add a rule ("b", P(...)), or '
        '("b", None) to replicate it on purpose',
    ),
    "a rule that matches nothing": (
        layers(2),
        {"rules": [("blocks/*/mlp/upp/kernel", P()), *WANTED[:1]]},
        f'rule 1, "blocks/*/mlp/upp/kernel": matches no parameter; {BLOCK}mend the pattern, or remove the rule',
    ),
    "a rule with ** that matches nothing": (
        layers(2),
        {"rules": [("**/upp/kernel", P()), ("block/**", P()), *WANTED[:1]]},
        "2 faults in the declaration:\n"
        f'  1. rule 1, "**/upp/kernel": matches no parameter; {BLOCK}mend the pattern, or remove the rule\n'
        f'  2. rule 2, "block/**": matches no parameter; {BLOCK}mend the pattern, or remove the rule',
    ),
    "a rule that matches nothing at all like it": (
        {"a": (2,)},
        {"rules": [("experts/*/gate", P()), ("a", None)]},
        'rule 1, "experts/*/gate": matches no parameter; mend the pattern, or remove the rule',
    ),
    "shadowed": (
        layers(32),
        {"rules": [("**", P()), ("**/kernel", P("data"))]},
        'rule 2, "**/kernel": is shadowed: every one of the 32 paths it matches is taken by rule 1, "**"; '
        "move it "
        "up, or remove it",
    ),
    "shadowed by two": (
        {"a/x": (2,), "b/x": (2,)},
        {"rules": [("a/*", P()), ("b/*", P()), ("**/x", P())]},
        'rule 3, "**/x": is shadowed: every one of the 2 paths it matches is taken by rule 1, "a/*" and '
        "rule 2, "
        '"b/*"; move it up, or remove it',
    ),
    "the same rule twice": (
        {"a": (2,)},
        {"rules": [Rule("a", None)] * 2},
        'rule 2, "a": is shadowed: the only path it matches is taken by rule 1, "a"; move it up, or remove it',
    ),
    "shadowed by specs": (
        {"a": (2,)},
        {"rules": [("a", P("data"))], "specs": {"a": None}},
        'rule 1, "a": is shadowed: the only path it matches is taken by specs; remove it',
    ),
    "unknown axis in a rule": (
        layers(4),
        {"rules": [("**", P("data", "tensr"))]},
        "rule 1, \"**\": axis 'tensr' is not in the mesh (data, stage, tensor); did you mean 'tensor'? "
        "name a "
        "mesh axis, or None",
    ),
    "unknown axis in several rules": (
        {"a": (2, 2), "b": (2,), "c": (2,)},
        {"rules": [("a", P("tensr", "tensr")), ("b", P("tensr")), ("c", P("dat"))]},
        "3 faults in the declaration:\n"
        "  1. rule 1, \"a\" and 1 more rule: axis 'tensr' is not in the mesh (data, stage, tensor); did you mean "
        "'tensor'? name a mesh axis, or None\n"
        "  2. rule 3, \"c\": axis 'dat' is not in the mesh (data, stage, tensor); did you mean 'data'? name a mesh "
        "axis, or None\n"
        "  3. rule 1, \"a\": axis 'tensr' is used twice, by dims 0 and 1; an axis splits one dim: keep one",
    ),
    "unknown axis in specs": (
        {"a": (2,)},
        {"specs": {"a": P("x")}},
        "a: axis 'x' is not in the mesh (data, stage, tensor) (specs); name a mesh axis, or None",
    ),
    "unknown axis in an annotation": (
        layers(2),
        {"notes": Annotation(("dta",), "mesh")},
        f"{KERNEL} and 1 more like it: axis 'dta' is not in the mesh (data, stage, tensor) (annotation "
        "('dta',)); "
        "did you mean 'data'? name a mesh axis, or None",
    ),
    "unknown axis in a logical rule": (
        layers(2),
        {"logical": [("embed", "fsdp"), ("mlp", "tensor")], "notes": Annotation(("embed", "mlp"), "logical")},
        "logical rule 'embed': axis 'fsdp' is not in the mesh (data, stage, tensor); name a mesh axis, or None",
    ),
    "unknown axis in a variable's own rules": (
        {"a": (2,)},
        {"notes": Annotation(("embed",), "logical", (("embed", "dat"),))},
        "a: axis 'dat' is not in the mesh (data, stage, tensor) (annotation ('embed',)); did you mean "
        "'data'? "
        "name a mesh axis, or None",
    ),
    "axis twice in a rule": (
        {"a": (32, 32)},
        {"rules": [("a", P("tensor", "tensor"))]},
        "rule 1, \"a\": axis 'tensor' is used twice, by dims 0 and 1; an axis splits one dim: keep one",
    ),
    "axis twice in one dim": (
        {"a": (32, 1024)},
        {"specs": {"a": P(None, ("tensor", "tensor"))}},
        "a: axis 'tensor' is used twice, by dim 1 (specs); an axis splits one dim: keep one",
    ),
    "axis twice in an annotation": (
        {"a": (32, 32)},
        {"notes": Annotation(("tensor", "tensor"), "mesh")},
        "a: axis 'tensor' is used twice, by dims 0 and 1 (annotation ('tensor', 'tensor')); an axis splits "
        "one "
        "dim: keep one",
    ),
    "a mesh axis beside a logical name that means it": (
        {"a": (32, 32)},
        {"logical": [("embed", "data")], "notes": Annotation(("embed", "data"), "logical")},
        "a: axis 'data' is used twice, by dims 0 and 1 (annotation ('embed', 'data')); an axis splits one "
        "dim: "
        "keep one",
    ),
    "logical name without a rule": (
        layers(2),
        {"logical": [("embed", "data")], "notes": Annotation(("embd", None), "logical")},
        f"{KERNEL} and 1 more like it: logical name 'embd' has no rule and is not a mesh axis (annotation "
        "('embd', "
        "None)); did you mean 'embed'? add a logical rule ('embd', axis), or ('embd', None) to replicate "
        "it on "
        "purpose",
    ),
    "logical rules give an axis twice": (
        {"a": (32, 32)},
        {
            "logical": [("embed", "tensor"), ("mlp", "tensor")],
            "notes": Annotation(("embed", "mlp"), "logical"),
        },
        f"a: logical name 'mlp' (dim 1) may only be 'tensor'; taken: 'tensor' by 'embed' (dim 0) ({NOTE}); "
        "add a "
        "later logical rule ('mlp', another axis), or ('mlp', None) to replicate it on purpose",
    ),
    "annotation against rule": (
        layers(2),
        {
            "rules": [("**/kernel", P("tensor"))],
            "logical": [("embed", None), ("mlp", "tensor")],
            "notes": Annotation(("embed", "mlp"), "logical"),
        },
        f"{KERNEL} and 1 more like it: {NOTE} says P(None, 'tensor'), rule 1, \"**/kernel\" says "
        "P('tensor'); make "
        "them equal, or remove one",
    ),
    "annotation against specs": (
        {"a": (4,)},
        {"specs": {"a": None}, "notes": Annotation(("data",), "mesh")},
        "a: specs says P(), annotation ('data',) says P('data'); make them equal, or remove one",
    ),
    "specs of a parameter that is not there": (
        {KERNEL: (4, 4)},
        {"specs": {KERNEL: None, "blocks/0/mlp/up/kernal": P("data")}},
        f'specs "blocks/0/mlp/up/kernal": the model has no such parameter; {BLOCK}write a parameter\'s '
        "path, or "
        "remove it",
    ),
    "specs of layers that are not there": (
        {"a": (4,)},
        {"specs": {"a": None, "blocks": {layer: {"kernel": None} for layer in range(4)}}},
        'specs "blocks/0/kernel" and 3 more like it: the model has no such parameter; write a parameter\'s '
        "path, "
        "or remove it",
    ),
    "specs that are no spec": (
        {"a": (4,)},
        {"specs": {"a": "data"}},
        "specs \"a\": 'data' is not a PartitionSpec; write P(...) with one entry per dim, or None to replicate",
    ),
    "the stage axis in a block": (
        layers(8),
        {"rules": [("**", P("stage", "tensor"))], "blocks": True},
        f"{KERNEL} and 7 more like it: its spec names the stage axis 'stage' (rule 1, \"**\"); leave it "
        "out: the "
        "pipeline lays the blocks on the stages",
    ),
    "a padded rule still has a dim for each entry": (
        {"a": (3,)},
        {"rules": [Rule("a", P("data", None), pad=True)]},
        "a: P('data', None) has 2 entries, the parameter 1 dim [3] (rule 1, \"a\"); leave out 1 entry",
    ),
    "all at once": (
        layers(2, (6, 24)) | {"norm": (4,)},
        {"rules": [("**/kernel", P("dat", "tensor")), ("**/bias", None), ("blocks/**", None)]},
        "5 faults in the declaration:\n"
        "  1. rule 1, \"**/kernel\": axis 'dat' is not in the mesh (data, stage, tensor); did you mean "
        "'data'? name "
        "a mesh axis, or None\n"
        '  2. rule 2, "**/bias": matches no parameter; mend the pattern, or remove the rule\n'
        '  3. rule 3, "blocks/**": is shadowed: every one of the 2 paths it matches is taken by rule 1, '
        '"**/kernel"; move it up, or remove it\n'
        f"  4. {KERNEL} and 1 more like it: dim 1 has size 24, not divisible by axis 'tensor' of size 16 "
        "(rule 1, "
        f'"**/kernel"); pad it to 32 {CHOICES}\n'
        '  5. norm: no rule matches it, and it has no annotation; add a rule ("norm", P(...)), or ("norm", '
        "None) "
        "to replicate it on purpose",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed(name: str) -> None:
    shapes, declared, message = BAD[name]
    found = resolve(
        shapes,
        mesh=MESH,
        rules=Rules(declared.get("rules", ()), logical=declared.get("logical", ())),
        annotations=dict.fromkeys(shapes, declared["notes"]) if "notes" in declared else {},
        specs=declared.get("specs"),
        blocks=set(shapes) if "blocks" in declared else (),
    )
    with pytest.raises(DeclarationError) as error:
        raise_faults(found.faults)
    assert str(error.value) == message


def test_an_annotation_of_a_parameter_that_is_not_there() -> None:
    notes = {"embed/tble": Annotation((), "mesh")}
    found = resolve({"embed/table": (4,)}, mesh=MESH, rules=Rules({"**": None}), annotations=notes)
    assert [str(fault) for fault in found.faults] == [
        "annotation \"embed/tble\": the model has no such parameter; did you mean 'embed/table'? write a "
        "parameter's path, or remove it"
    ]
