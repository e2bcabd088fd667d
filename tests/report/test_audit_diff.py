"""Two audits compared: what is said, and what of it matters."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from shardlab.report.audit_diff import diff_text, differences
from tests.report import audits

MIB = 2**20
EVERY = {made.__name__: made for made in (audits.fsdp, audits.pipeline, audits.too_large, audits.unread, audits.cpu)}


def changed(change: Callable[[dict[str, Any]], None]) -> list[tuple[str, str, bool]]:
    """What differs after a change of the first audit: part, text and whether it matters."""
    a = audits.fsdp()
    b = copy.deepcopy(a)
    change(b)
    return [(one.part, str(one), one.matters) for one in differences(a, b)]


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_equal_audits_do_not_differ(made: Callable[[], dict[str, Any]]) -> None:
    assert differences(made(), made()) == []
    assert diff_text(made(), json.loads(json.dumps(made()))).endswith(": nothing changed")


@pytest.mark.parametrize("a", EVERY)
@pytest.mark.parametrize("b", EVERY)
def test_any_two_compare_both_ways(a: str, b: str) -> None:
    there, back = differences(EVERY[a](), EVERY[b]()), differences(EVERY[b](), EVERY[a]())
    assert {(one.part, one.what) for one in there} == {(one.part, one.what) for one in back}
    assert bool(there) == (a != b)
    assert "None" not in diff_text(EVERY[a](), EVERY[b]())
    json.dumps([one.before for one in there])


def test_seconds_of_compiling_are_not_compared() -> None:
    assert (
        changed(lambda b: b.update(compile_seconds=1.0, plan_seconds=2.0, trace_seconds=3.0, audit_seconds=4.0)) == []
    )


def test_versions_are_said_and_do_not_matter() -> None:
    assert changed(lambda b: b["versions"].update(jax="0.12.0")) == [("versions", "jax: 0.10.2 -> 0.12.0", False)]


def test_what_was_declared() -> None:
    def change(b: dict[str, Any]) -> None:
        b["target"] = "tpu:v5e:16x16"
        b["mesh"] = {"data": 128, "tensor": 2}
        b["overrides"]["zero"] = 1
        b["plan"] |= {"zero": 1, "bubble_fraction": 0.125}
        b["plan"]["bytes_per_device"]["parameters"] = 2**30

    assert changed(change) == [
        ("declared", "target: tpu:v5p:4x8x8 -> tpu:v5e:16x16", False),
        ("declared", "mesh.data: 256 -> 128", False),
        ("declared", "mesh.tensor: none -> 2", False),
        ("declared", "given --zero: 3 -> 1", False),
        ("declared", "plan.zero: 3 -> 1", False),
        ("declared", "plan.bubble_fraction: 0.0% -> 12.5%", False),
        ("declared", "plan.bytes_per_device.parameters: 1.1 GiB -> 1.0 GiB", False),
    ]


def test_parameters() -> None:
    def change(b: dict[str, Any]) -> None:
        b["parameters"][0]["spec"] = "P('tensor')"
        b["parameters"][1]["path"] = "logits/kernel"

    assert changed(change) == [
        ("parameters", "embed/table spec: P() -> P('tensor')", False),
        ("parameters", "head/kernel: gone", False),
        ("parameters", "logits/kernel: new", False),
    ]


def test_memory_matters_beyond_one_percent_of_the_whole() -> None:
    # The first holds 18,710 MiB, of which 187.1 are one percent.
    def grow(size: int) -> Callable[[dict[str, Any]], None]:
        def change(b: dict[str, Any]) -> None:
            b["hbm_bytes"] += size
            b["categories"]["code"] += size

        return change

    assert changed(grow(187 * MIB)) == [
        ("memory", "total: 18.3 GiB -> 18.5 GiB (+1.0%)", False),
        ("memory", "code: 41.0 MiB -> 228.0 MiB (+456.1%)", False),
    ]
    assert [matters for *_, matters in changed(grow(188 * MIB))] == [True, True]
    assert [matters for *_, matters in changed(grow(-188 * MIB))] == [True, True]
    assert changed(grow(1))[0] == ("memory", "total: 18.3 GiB -> 18.3 GiB (+1 B)", False)


def test_a_category_that_grows_while_another_shrinks_matters() -> None:
    def change(b: dict[str, Any]) -> None:
        b["categories"]["activations"] -= 2**30
        b["categories"]["gathered weights"] += 2**30

    assert [(what, matters) for _, what, matters in changed(change)] == [
        ("activations: 9.9 GiB -> 8.9 GiB (-10.1%)", True),
        ("gathered weights: 2.5 GiB -> 3.5 GiB (+40.6%)", True),
    ]


def test_whether_it_fits_matters() -> None:
    assert changed(lambda b: b.update(fits=False)) == [("memory", "fits: yes -> no", True)]


def test_a_collective_with_other_counts_bytes_and_waiting() -> None:
    def change(b: dict[str, Any]) -> None:
        row = next(row for row in b["collectives"] if row["cause"] == "weights of head/kernel")
        row |= {"count": 3, "wire_bytes": 63 * 10**8, "payload_bytes": 63 * 10**8, "async": True}

    what = "all-gather over data, weights of head/kernel: "
    text = "count 2 -> 3, wire 3.9 GiB -> 5.9 GiB (+50.0%), waited for -> beside compute"
    assert changed(change) == [("collectives", what + text, True)]


def test_collectives_that_appear_and_disappear() -> None:
    def change(b: dict[str, Any]) -> None:
        row = next(row for row in b["collectives"] if row["cause"] == "the gradients' norm")
        row |= {"kind": "all-gather"}

    assert changed(change) == [
        ("collectives", "all-reduce over data, the gradients' norm: gone: 1, 64.0 KiB", True),
        ("collectives", "all-gather over data, the gradients' norm: new: 1, 64.0 KiB", True),
    ]


def test_rows_of_one_cause_in_other_pieces_are_the_same() -> None:
    def change(b: dict[str, Any]) -> None:
        row = b["collectives"][0]
        half = {name: row[name] // 2 for name in ("count", "wire_bytes", "payload_bytes")}
        b["collectives"][:1] = [row | half, row | half]

    assert changed(change) == []


def test_some_of_them_beside_compute() -> None:
    def change(b: dict[str, Any]) -> None:
        row = b["collectives"][0]
        half = {name: row[name] // 2 for name in ("count", "wire_bytes", "payload_bytes")}
        b["collectives"][:1] = [row | half, row | half | {"async": False}]

    assert [text.rpartition(": ")[2] for _, text, _ in changed(change)] == ["beside compute -> 80 beside compute"]


def test_a_bound_is_another_count() -> None:
    texts = [text for _, text, matters in changed(lambda b: b["collectives"][0].update(exact=False)) if matters]
    assert texts == ["all-gather over data, weights of blocks/*/mlp/gate/kernel: count 160 -> >= 160"]


def test_bytes_by_axis_and_the_links() -> None:
    def change(b: dict[str, Any]) -> None:
        b["wire_bytes_by_axis"]["tensor"] = 512
        b["wire_bytes"] += 512
        b["layout"]["axes"][0]["bandwidth"] = 360e9

    assert changed(change) == [
        ("links", "sent over all axes: 424.1 GiB -> 424.1 GiB (+512 B)", True),
        ("links", "sent over tensor: 0 B -> 512 B", True),
        ("links", "data bandwidth: 540 GB/s -> 360 GB/s", False),
    ]


def test_time_differs_by_three_digits_and_does_not_matter() -> None:
    assert changed(lambda b: b.update(estimate_seconds=6.0201)) == []

    def change(b: dict[str, Any]) -> None:
        b |= {"estimate_seconds": 6.2, "mfu": 0.633, "bound_by": "ICI over data"}
        b["estimate"]["parts"][2]["seconds"] = 0.32

    assert changed(change) == [
        ("time", "a step: 6.02 s -> 6.20 s", False),
        ("time", "MFU: 65.2% -> 63.3%", False),
        ("time", "bound by: compute -> ICI over data", False),
        ("time", "all-gather over data, exposed: 140 ms -> 320 ms", False),
    ]


def test_findings_that_are_new_gone_and_other() -> None:
    def change(b: dict[str, Any]) -> None:
        b["lints"][0] |= {"message": "weights gathered 4 times a step"}
        b["lints"].append(b["lints"][0] | {"code": "SL001", "path": "", "message": "a reduce-scatter would do"})

    before = "weights gathered 3 times a step, which has 2 passes over them"
    assert changed(change) == [
        ("findings", f"SL002 head/kernel: {before} -> weights gathered 4 times a step", True),
        ("findings", "SL001: new: a reduce-scatter would do", True),
    ]
    assert changed(lambda b: b.update(lints=[])) == [("findings", f"SL002 head/kernel: gone: {before}", True)]


def test_a_program_that_was_not_left_is_not_one_that_sends_nothing() -> None:
    a = audits.fsdp()
    b = a | {"wire_bytes": None, "collectives": [], "wire_bytes_by_axis": {}, "lints": [], "categories": {}}
    assert [(one.part, str(one), one.matters) for one in differences(a, b)] == [
        ("memory", "by category: known -> not known", True),
        ("collectives", "all of them: known -> not known", True),
        ("findings", "all of them: known -> not known", True),
    ]


def test_the_text_marks_what_matters() -> None:
    a, b = audits.fsdp(), audits.fsdp()
    b["versions"]["jax"] = "0.12.0"
    b["lints"] = []
    assert (
        diff_text(a, b)
        == """\
llama3_70b on tpu:v5p:4x8x8: 2 differences, 1 in communication, findings, or memory by more than 1%

versions
  jax: 0.10.2 -> 0.12.0

findings
! SL002 head/kernel: gone: weights gathered 3 times a step, which has 2 passes over them"""
    )
    b["lints"] = a["lints"]
    assert (
        diff_text(a, b)
        .splitlines()[0]
        .endswith(": 1 difference, none in communication, findings, or memory by more than 1%")
    )
