"""Which collectives in branches could wait for ever."""

import pytest

from shardlab.hlo.hang import could_hang

MESH = {"data": 2, "stage": 2, "tensor": 2}
GROUPS = {
    "tensor": "{{0,1},{2,3},{4,5},{6,7}}",
    "stage": "{{0,2},{1,3},{4,6},{5,7}}",
    "data": "{{0,4},{1,5},{2,6},{3,7}}",
    "data x tensor": "{{0,1,4,5},{2,3,6,7}}",
    "some": "{{0,3},{1,2},{4,7},{5,6}}",
}


def program(collective: str, *, nested: bool = False, left: str = "false") -> str:
    """A loop of one trip at most that runs a collective, directly or in a loop of its own."""
    inner = f"""
%inner (x: f32[6]) -> f32[6] {{
  %x = f32[6]{{0}} parameter(0)
  ROOT %made = f32[6]{{0}} {collective}
}}
%more (x.1: f32[6]) -> pred[] {{
  %x.1 = f32[6]{{0}} parameter(0)
  ROOT %true = pred[] constant(true)
}}
"""
    runs = "while(%x), condition=%more, body=%inner" if nested else collective
    return f"""
HloModule step, num_partitions=8
{inner if nested else ""}
%due (s: (pred[], f32[6])) -> pred[] {{
  %s = (pred[], f32[6]{{0}}) parameter(0)
  ROOT %yes = pred[] get-tuple-element(%s), index=0
}}
%work (s.1: (pred[], f32[6])) -> (pred[], f32[6]) {{
  %s.1 = (pred[], f32[6]{{0}}) parameter(0)
  %constant = pred[] constant({left})
  %no = pred[] copy(%constant)
  %x = f32[6]{{0}} get-tuple-element(%s.1), index=1
  %{"loop" if nested else "made"} = f32[6]{{0}} {runs}
  ROOT %after = (pred[], f32[6]{{0}}) tuple(%no, %{"loop" if nested else "made"})
}}
ENTRY %main (i: pred[], x.2: f32[6]) -> (pred[], f32[6]) {{
  %i = pred[] parameter(0)
  %x.2 = f32[6]{{0}} parameter(1)
  %before = (pred[], f32[6]{{0}}) tuple(%i, %x.2)
  ROOT %y = (pred[], f32[6]{{0}}) while(%before), condition=%due, body=%work
}}
"""


def all_reduce(over: str) -> str:
    return f"all-reduce(%x), channel_id=1, replica_groups={GROUPS[over]}, to_apply=%add"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("over", "hangs"), [("tensor", False), ("data", False), ("data x tensor", False), ("stage", True), ("some", True)]
)
def test_groups_of_one_stage_are_safe(over: str, hangs: bool, nested: bool) -> None:
    found = could_hang(program(all_reduce(over), nested=nested), MESH, "stage")
    assert [one.name for one in found] == (["made"] if hangs else [])


def test_a_permute_is_never_safe() -> None:
    permute = "collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}"
    (one,) = could_hang(program(permute), MESH, "stage")
    assert (one.kind, one.axes) == ("collective-permute", ("tensor",))


CONDITIONAL = """
%idle (x.3: f32[6]) -> f32[6] {
  ROOT %x.3 = f32[6]{0} parameter(0)
}
%all (x.4: f32[6]) -> f32[6] {
  %x.4 = f32[6]{0} parameter(0)
  ROOT %sum = f32[6]{0} all-reduce(%x.4), channel_id=2, replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
}
ENTRY"""


def test_a_conditional_is_the_same_on_all_devices() -> None:
    either = "  %z = f32[6]{0} conditional(%i, %x.2, %x.2), branch_computations={%idle, %all}\n  ROOT %y"
    both = program(all_reduce("tensor")).replace("ENTRY", CONDITIONAL).replace("  ROOT %y", either)
    assert could_hang(both, MESH, "stage") == ()


def test_a_program_without_what_diverges_was_not_looked_at() -> None:
    with pytest.raises(
        ValueError, match=r"^the compiled program has no loop of one trip at most; what it runs instead"
    ):
        could_hang(program(all_reduce("stage"), left="true"), MESH, "stage")
