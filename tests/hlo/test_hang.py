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


def program(collective: str, *, branches: int = 3, nested: bool = False) -> str:
    """A conditional whose last branch runs a collective, directly or in a loop of its own."""
    idle = "\n".join(
        f"%idle{index} (x: f32[6]) -> f32[6] {{\n  ROOT %x{index} = f32[6]{{0}} parameter(0)\n}}"
        for index in range(branches - 1)
    )
    body = f"""
%work (x: f32[6]) -> f32[6] {{
  %x = f32[6]{{0}} parameter(0)
  ROOT %made = f32[6]{{0}} {collective}
}}
"""
    if nested:
        body = (
            body.replace("%work", "%inner")
            + """
%more (x: f32[6]) -> pred[] {
  %x.1 = f32[6]{0} parameter(0)
  ROOT %true = pred[] constant(true)
}
%work (x: f32[6]) -> f32[6] {
  %x.2 = f32[6]{0} parameter(0)
  ROOT %loop = f32[6]{0} while(%x.2), condition=%more, body=%inner
}
"""
        )
    names = ", ".join([*(f"%idle{index}" for index in range(branches - 1)), "%work"])
    operands = ", ".join(["%x.0"] * branches)
    return f"""
HloModule step, num_partitions=8
{idle}
{body}
ENTRY %main (i: s32[], x: f32[6]) -> f32[6] {{
  %i = s32[] parameter(0)
  %x.0 = f32[6]{{0}} parameter(1)
  ROOT %y = f32[6]{{0}} conditional(%i, {operands}), branch_computations={{{names}}}
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


def test_a_conditional_of_two_branches_is_the_same_on_all_devices() -> None:
    text = program(all_reduce("stage"), branches=2)
    with pytest.raises(ValueError, match=r"^the compiled program has no conditional of three branches; what it runs"):
        could_hang(text, MESH, "stage")
    # Beside one that diverges it is left out.
    both = text.replace("step, ", "step, ").replace(
        "  ROOT %y",
        "  %z = f32[6]{0} conditional(%i, %x.0, %x.0, %x.0), branch_computations={%idle0, %idle0, %idle0}\n  ROOT %y",
    )
    assert could_hang(both, MESH, "stage") == ()
