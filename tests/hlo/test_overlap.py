"""What compute hides of a collective, worked out by hand: each instruction of compute takes what its bytes say."""

import pytest

from shardlab.hlo import Overlap, Rates, collectives, overlaps, parse, times
from shardlab.hlo.overlap import Overlaps

AXES = {"data": 2, "tensor": 2}
# `%work.N = f32[K]` reads and writes 4 K bytes: at 8 a second it takes K seconds.
RATES = Rates({"float32": 1.0}, 8.0, memory_efficiency=1.0)
OVER = {"data": "{{0,2},{1,3}}", "tensor": "{{0,1},{2,3}}"}


def start(name: str, axis: str = "data", extra: str = "") -> str:
    return (
        f"%{name} = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%x), channel_id=1, replica_groups={OVER[axis]}, "
        f"dimensions={{0}}{extra}"
    )


def done(name: str) -> str:
    return f"%{name}.done = f32[8]{{0}} all-gather-done(%{name})"


def blocking(name: str, axis: str = "data") -> str:
    return f"%{name} = f32[8]{{0}} all-gather(%x), channel_id=1, replica_groups={OVER[axis]}, dimensions={{0}}"


def work(name: str, seconds: int) -> str:
    return f"%{name} = f32[{seconds}]{{0}} negate(%v{seconds})"


def schedule(*lines: str) -> str:
    vectors = "\n".join(f"  %v{k} = f32[{k}]{{0}} parameter({k + 1})" for k in range(1, 10))
    body = "\n".join(f"  {line}" for line in lines)
    return (
        "HloModule step, is_scheduled=true, num_partitions=4\n"
        "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
        f"{vectors}\n  %i = s32[] parameter(11)\n{body}\n  ROOT %end = (f32[4]{{0}}) tuple(%x)\n}}"
    )


def of(text: str, seconds: dict[str, float], axes: dict[str, int] = AXES) -> Overlaps:
    module = parse(text)
    found = collectives(module, axes)
    return overlaps(module, found, lambda one: seconds[one.name] * one.count, times(module, RATES))


# Seconds of the collectives; (asynchronous, hidden, exposed) of each.
CASES: dict[str, tuple[tuple[str, ...], dict[str, float], dict[str, tuple[bool, float, float]]]] = {
    "hidden in whole": ((start("a"), work("w", 7), done("a")), {"a": 5}, {"a": (True, 5, 0)}),
    "hidden in part": ((start("a"), work("w", 3), done("a")), {"a": 5}, {"a": (True, 3, 2)}),
    "nothing between": ((work("w", 3), start("a"), done("a"), work("u", 4)), {"a": 5}, {"a": (True, 0, 5)}),
    "synchronous": ((work("w", 3), blocking("a"), work("u", 4)), {"a": 5}, {"a": (False, 0, 5)}),
    "a pair that GPU runs at once": (
        (start("a", extra=', backend_config={"collective_backend_config":{"is_sync":true}}'), work("w", 7), done("a")),
        {"a": 5},
        {"a": (False, 0, 5)},
    ),
    # 7 s of compute for 4 + 4 s over the same links
    "two share links": (
        (start("a"), start("b"), work("w", 7), done("a"), done("b")),
        {"a": 4, "b": 4},
        {"a": (True, 4, 0), "b": (True, 3, 1)},
    ),
    "two over different links": (
        (start("a"), start("b", "tensor"), work("w", 7), done("a"), done("b")),
        {"a": 4, "b": 9},
        {"a": (True, 4, 0), "b": (True, 7, 2)},
    ),
    # b cannot end before a has: they run one after the other
    "done in another order": (
        (start("a"), start("b"), work("w", 3), done("b"), work("u", 9), done("a")),
        {"a": 4, "b": 4},
        {"a": (True, 3, 1), "b": (True, 0, 4)},
    ),
    # waiting 3 s for a hides 3 s of b
    "a wait hides others": (
        (start("b", "tensor"), start("a"), work("w", 2), done("a"), done("b")),
        {"a": 5, "b": 5},
        {"a": (True, 2, 3), "b": (True, 5, 0)},
    ),
    "a synchronous one hides others": (
        (start("b", "tensor"), blocking("a"), done("b")),
        {"a": 5, "b": 6},
        {"a": (False, 0, 5), "b": (True, 5, 1)},
    ),
    "compute in turn": (
        (start("a"), work("w", 2), done("a"), work("u", 9), start("b"), work("t", 1), done("b")),
        {"a": 5, "b": 5},
        {"a": (True, 2, 3), "b": (True, 1, 4)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    lines, seconds, expected = CASES[name]
    found = of(schedule(*lines), seconds)
    assert {one.collective.name: told(one) for one in found.each} == expected
    assert found.hidden_seconds + found.exposed_seconds == found.seconds == sum(seconds.values())
    assert found.step_seconds == found.compute_seconds + sum(exposed for _, _, exposed in expected.values())


def told(one: Overlap) -> tuple[bool, float, float]:
    return one.asynchronous, one.hidden_seconds, one.exposed_seconds


LOOPED = """
HloModule step, is_scheduled=true, num_partitions=4

%body (s: (s32[], f32[4], f32[3])) -> (s32[], f32[4], f32[3]) {
  %s = (s32[], f32[4]{0}, f32[3]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %v = f32[3]{0} get-tuple-element(%s), index=2
  %inner = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %w = f32[3]{0} negate(%v)
  %inner.done = f32[4]{0} collective-permute-done(%inner)
  ROOT %t = (s32[], f32[4]{0}, f32[3]{0}) tuple(%i, %inner.done, %w)
}

%condition (c: (s32[], f32[4], f32[3])) -> pred[] {
  %c = (s32[], f32[4]{0}, f32[3]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (y: f32[4], u: f32[3], n: s32[]) -> f32[8] {
  %y = f32[4]{0} parameter(0)
  %u = f32[3]{0} parameter(1)
  %n = s32[] parameter(2)
  %outer = (f32[4]{0}, f32[8]{0}) all-gather-start(%y), channel_id=2, replica_groups=GROUPS, dimensions={0}
  %state = (s32[], f32[4]{0}, f32[3]{0}) tuple(%n, %y, %u)
  %loop = (s32[], f32[4]{0}, f32[3]{0}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %outer.done = f32[8]{0} all-gather-done(%outer)
}
"""  # noqa: E501


def test_a_loop_counts_with_its_trips_and_hides_what_is_around_it() -> None:
    """Ten trips of 3 s of compute, 2 of them busy with the permute on the same links: 10 s are left for the gather."""
    found = of(LOOPED.replace("GROUPS", OVER["data"]), {"inner": 2, "outer": 25})
    assert {one.collective.name: told(one) for one in found.each} == {"inner": (True, 20, 0), "outer": (True, 10, 15)}
    assert found.compute_seconds == 30
    assert found.step_seconds == 45


def test_a_loop_hides_in_whole_what_goes_over_other_links() -> None:
    """Ten trips of 3 s, in each 1 s waited for: 40 s for the 45 s of the gather."""
    found = of(LOOPED.replace("GROUPS", OVER["tensor"]), {"inner": 4, "outer": 45})
    assert {one.collective.name: told(one) for one in found.each} == {"inner": (True, 30, 10), "outer": (True, 40, 5)}


# Cut down from what XLA:GPU and XLA:TPU print.
WRAPPED = """
HloModule step, is_scheduled=true, num_partitions=2
%scatter (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[4]{0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}, to_apply=%add
}
ENTRY %main (x: f32[8], v: f32[3]) -> f32[4] {
  %x = f32[8]{0} parameter(0)
  %v = f32[3]{0} parameter(1)
  %start = ((f32[8]{0}), f32[4]{0}) async-start(%x), calls=%scatter
  %w = f32[3]{0} negate(%v)
  ROOT %done = f32[4]{0} async-done(%start)
}
"""
SENT = """
HloModule step, is_scheduled=true, num_partitions=2
ENTRY %main (x: f32[8], v: f32[3]) -> f32[3] {
  %x = f32[8]{0} parameter(0)
  %v = f32[3]{0} parameter(1)
  %token = token[] after-all()
  %inside = (f32[8]{0}, u32[], token[]) send(%x, %token), channel_id=1, frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,0}}"}
  %w = f32[3]{0} negate(%v)
  %sent = token[] send-done(%inside), channel_id=1
  ROOT %u = f32[3]{0} copy(%w)
}
"""  # noqa: E501
CHAIN = """
HloModule step, is_scheduled=true, num_partitions=2
%begin (p: bf16[128,128]) -> (bf16[128,128], bf16[256,128]) {
  %p = bf16[128,128]{1,0} parameter(0)
  %inside = bf16[256,128]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="4"}
  ROOT %called = (bf16[128,128]{1,0}, bf16[256,128]{1,0}) custom-call(%inside), custom_call_target="AsyncCollectiveStart"
}
%finish (q.1: bf16[128,128], r.1: bf16[256,128]) -> bf16[256,128] {
  %q.1 = bf16[128,128]{1,0} parameter(0)
  %r.1 = bf16[256,128]{1,0} parameter(1)
  %last = bf16[256,128]{1,0} all-gather(%q.1), channel_id=9, replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="4"}
  ROOT %ended = bf16[256,128]{1,0} custom-call(%q.1, %r.1, %last), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (x: bf16[128,128], v: f32[3]) -> bf16[256,128] {
  %x = bf16[128,128]{1,0} parameter(0)
  %v = f32[3]{0} parameter(1)
  %async-collective-start = (bf16[128,128]{1,0}, bf16[256,128]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %a = bf16[128,128]{1,0} get-tuple-element(%async-collective-start), index=0
  %b = bf16[256,128]{1,0} get-tuple-element(%async-collective-start), index=1
  %w = f32[3]{0} negate(%v)
  ROOT %async-collective-done = bf16[256,128]{1,0} fusion(%a, %b), kind=kCustom, calls=%finish
}
"""  # noqa: E501


@pytest.mark.parametrize("text", [WRAPPED, SENT, CHAIN], ids=["async-start", "send", "TPU chain"])
def test_the_forms_compilers_print(text: str) -> None:
    found = of(text, {"inside": 5}, {"data": 2})
    assert [told(one) for one in found.each] == [(True, 3, 2)]


def test_a_chain_of_one_is_synchronous() -> None:
    text = CHAIN.replace(
        "%async-collective-done = bf16[256,128]{1,0} fusion(%a, %b), kind=kCustom, calls=%finish",
        "%r9 = bf16[256,128]{1,0} copy(%b)",
    )
    found = of(text, {"inside": 5}, {"data": 2})
    assert [one.asynchronous for one in found.each] == [False]
