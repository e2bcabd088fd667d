"""Rows of collectives for a report, and their table."""

import json

from shardlab.report.collectives import Row, collective_rows, collectives_table

TEXT = """
HloModule step, num_partitions=4

ENTRY %main (x: f32[256,4]) -> f32[128,4] {
  %x = f32[256,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %gathered = f32[512,4]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %first = f32[256,4]{1,0} all-reduce(%x), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %second = f32[256,4]{1,0} all-reduce(%first), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
  %summed = f32[256,4]{1,0} all-reduce(%second), channel_id=4, replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %mine = f32[128,4]{1,0} dynamic-slice(%summed, %i, %i), dynamic_slice_sizes={128,4}
}
"""
AXES = {"data": 2, "tensor": 2}
# x is 4,096 bytes: gathered it is 8,192 of which half is sent; over four devices a reduction sends 3/2 of it.
BOTH = Row(
    kind="all-reduce",
    axes=["data", "tensor"],
    count=2,
    payload_bytes=8192,
    wire_bytes=12288,
    exact=True,
    in_branch=False,
)
GATHER = Row(
    kind="all-gather", axes=["tensor"], count=1, payload_bytes=8192, wire_bytes=4096, exact=True, in_branch=False
)


def test_rows() -> None:
    data = Row(
        kind="all-reduce", axes=["data"], count=1, payload_bytes=4096, wire_bytes=4096, exact=True, in_branch=False
    )
    found = collective_rows(TEXT, AXES)
    assert found == [BOTH, GATHER, data]
    assert json.loads(json.dumps(found)) == found


def test_rows_with_sliced_all_reduces_as_reduce_scatters() -> None:
    data = Row(
        kind="reduce-scatter", axes=["data"], count=1, payload_bytes=4096, wire_bytes=2048, exact=True, in_branch=False
    )
    assert collective_rows(TEXT, AXES, sliced_as_reduce_scatter=True) == [BOTH, GATHER, data]


def test_table() -> None:
    assert collectives_table([BOTH, GATHER]).splitlines() == [
        "collective  axes           count   payload      wire",
        "all-reduce  data x tensor      2   8.0 KiB  12.0 KiB",
        "all-gather  tensor             1   8.0 KiB   4.0 KiB",
        "total                          3  16.0 KiB  16.0 KiB",
    ]


def test_table_marks_lower_bounds() -> None:
    table = collectives_table([BOTH, {**GATHER, "exact": False}]).splitlines()
    assert [">=" in line for line in table[:-1]] == [False, False, True, True]
    assert table[-1] == ">=: in a loop of unknown length"


def test_table_explains_groups_that_are_no_axes() -> None:
    table = collectives_table([BOTH, {**GATHER, "axes": ["?"]}]).splitlines()
    assert table[2].split() == ["all-gather", "?", "1", "8.0", "KiB", "4.0", "KiB"]
    assert table[3].startswith("total ")
    assert table[4:] == ["?: between devices that no mesh axes name"]


def test_table_of_nothing() -> None:
    assert collectives_table([]) == "no collectives"


def test_what_stands_in_a_branch_is_an_upper_bound_and_said() -> None:
    """The branch that communicates more counts, as if it were always taken."""
    text = """
HloModule step, num_partitions=2
%skip (x: f32[6]) -> f32[6] {
  ROOT %x = f32[6]{0} parameter(0)
}
%do (x: f32[6]) -> f32[6] {
  %x = f32[6]{0} parameter(0)
  ROOT %sum = f32[6]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main (p: pred[], x: f32[6]) -> f32[6] {
  %p = pred[] parameter(0)
  %x = f32[6]{0} parameter(1)
  ROOT %y = f32[6]{0} conditional(%p, %x, %x), true_computation=%do, false_computation=%skip
}
"""
    (row,) = collective_rows(text, {"data": 2})
    assert (row["count"], row["payload_bytes"], row["exact"], row["in_branch"]) == (1, 24, True, True)
    table = collectives_table([row]).splitlines()
    assert table[1].split()[2:4] == ["<=", "1"]
    assert table[-1] == "<=: some in a branch, counted as if it were always taken"
    assert collectives_table([{**row, "exact": False}]).splitlines()[1].split()[2:4] == ["~", "1"]
