"""Findings that a plan and its program show together, each firing on one case and silent on its like."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shardlab.hlo.collectives import Collective
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.topology import lay_out
from shardlab.report.lint_plan import lint_plan
from shardlab.run.config import Config
from tests.run.tiny import tiny

EMPTY = "HloModule step\nENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n"
BRANCH = """
HloModule step, num_partitions=4
%due (s: (pred[], f32[6])) -> pred[] {
  %s = (pred[], f32[6]{0}) parameter(0)
  ROOT %yes = pred[] get-tuple-element(%s), index=0
}
%work (s.1: (pred[], f32[6])) -> (pred[], f32[6]) {
  %s.1 = (pred[], f32[6]{0}) parameter(0)
  %no = pred[] constant(false)
  %x = f32[6]{0} get-tuple-element(%s.1), index=1
  %sum = f32[6]{0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %after = (pred[], f32[6]{0}) tuple(%no, %sum)
}
ENTRY %main (i: pred[], x.1: f32[6]) -> (pred[], f32[6]) {
  %i = pred[] parameter(0)
  %x.1 = f32[6]{0} parameter(1)
  %before = (pred[], f32[6]{0}) tuple(%i, %x.1)
  ROOT %y = (pred[], f32[6]{0}) while(%before), condition=%due, body=%work
}
"""


def on(spec: MeshSpec) -> Config:
    return dataclasses.replace(tiny(), mesh=spec, batch_size=32)


def all_reduce(axes: tuple[str, ...], size: int, wire: int) -> Collective:
    flags: Any = {"in_branch": False, "assumed": False, "as_reduce_scatter": False, "promoted": False}
    names: Any = {"dtype": "f32", "loop": None, "op_name": "", "source": "", "name": "sum"}
    return Collective("all-reduce", axes, size, 1, wire // 2, wire, **names, **flags)


def test_a_parameter_that_no_axis_divides_is_told_where_others_are_cut() -> None:
    """Of the MLP on eight devices the head's ten biases stay whole."""
    (head,) = lint_plan(tiny("data=8", zero=3).plan(), EMPTY, (), None, smallest=1)
    assert (head.code, head.path, head.bytes) == ("SL008", "outputs/bias", 10 * 4)
    assert "P()" in head.message
    assert "name one of data in its rule" in head.fix


@pytest.mark.parametrize("zero", [0, 3])
def test_a_parameter_held_whole_is_no_finding_where_all_are_or_where_it_is_small(zero: int) -> None:
    assert lint_plan(tiny("data=8", zero=zero).plan(), EMPTY, (), None, smallest=1 if zero == 0 else 41) == ()


def test_an_axis_that_sends_most_over_slow_links_is_to_be_laid_on_fast_ones() -> None:
    """Two hosts of eight GPUs: tensor lies inside a host, and it is data that sends."""
    spec = MeshSpec({"data": 2, "tensor": 8}, batch="data", target="gpu:h100:2x8")
    found = lint_plan(on(spec).plan(), EMPTY, [all_reduce(("data",), 2, 10**10)], lay_out(spec))
    (slow,) = [one for one in found if one.code == "SL009"]
    assert slow.path == "mesh axis data"
    assert slow.seconds is not None
    assert slow.seconds > 0.1
    assert "'data': ('gpu',)" in slow.fix
    other = lint_plan(on(spec).plan(), EMPTY, [all_reduce(("tensor",), 8, 10**10)], lay_out(spec))
    assert [one.code for one in other if one.code == "SL009"] == []


def test_the_declared_layout_that_it_advises_is_no_finding() -> None:
    spec = MeshSpec({"data": 2, "tensor": 8}, batch="data", target="gpu:h100:2x8", links={"data": ("gpu",)})
    found = lint_plan(on(spec).plan(), EMPTY, [all_reduce(("data",), 2, 10**10)], lay_out(spec))
    assert [one for one in found if one.code == "SL009"] == []


@pytest.mark.parametrize(("groups", "codes"), [("{{0,2},{1,3}}", ["SL010"]), ("{{0,1},{2,3}}", [])])
def test_a_collective_over_stages_in_a_branch_could_hang(groups: str, codes: list[str]) -> None:
    plan = tiny("stage=2,tensor=2", schedule="zb_h1", microbatches=4).plan()
    found = lint_plan(plan, BRANCH.replace("GROUPS", groups), (), None)
    assert [one.code for one in found] == codes


def test_a_schedule_without_branches_has_none_that_could() -> None:
    plan = tiny("stage=2,tensor=2", microbatches=4).plan()
    assert lint_plan(plan, BRANCH.replace("GROUPS", "{{0,2},{1,3}}"), (), None) == ()
