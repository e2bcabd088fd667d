"""The report of an audit on a terminal, from the plain data that `shardlab compile --json` prints."""

from collections.abc import Callable
from typing import Any

import pytest

from shardlab.report.audit_text import audit_text, bar
from tests.report import audits

EVERY = {made.__name__: made for made in (audits.fsdp, audits.pipeline, audits.too_large, audits.unread, audits.cpu)}

CPU = """\
a train step on cpu:8: MEMORY NOT LIMITED
  1.23 M parameters, 8 devices, mesh data=8, bfloat16, ZeRO 0, remat none, batch of 64
  6.0 MiB on a device; no capacity is known for cpu:8
  time not estimated for cpu:8
  12.0 KiB sent by a device a step; no pipeline

memory of one device
  parameters       1.0 MiB  16.7%  #######
  optimizer state  2.0 MiB  33.3%  #############
  batch            1.0 MiB  16.7%  #######
  gradients        1.0 MiB  16.7%  #######
  activations      1.0 MiB  16.7%  #######
  total            6.0 MiB

largest buffers at the peak
  not known

mesh
  axis  size  link      of a device      sent
  ----  ----  ----  ---------------  --------
  data     8  host  speed not known  12.0 KiB
  emulated devices of one host

collectives of one device and step, most wire bytes first
  collective  axes  count      wire              exposed  why
  ----------  ----  -----  --------  ----------  -------  -----------------------
  all-reduce  data   >= 3  12.0 KiB  waited for           gradient of head/kernel
  >=: in a loop of unknown length

time of a step, estimated
  not estimated: no speeds are known for cpu:8

findings
  none

jax 0.12.0, compiler jaxlib 0.12.0; plan 1.4 s, trace 3.2 s, compile 41.8 s, audit 4.6 s"""


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section by its title."""
    parts = [part.splitlines() for part in text.replace("\n\n  ", "\n  ").split("\n\n")]
    return {lines[0]: lines[1:] for lines in parts}


def test_a_small_step_whole() -> None:
    assert audit_text(audits.cpu()) == CPU


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_no_line_is_wider_than_a_terminal_or_says_none(made: Callable[[], dict[str, Any]]) -> None:
    lines = audit_text(made()).splitlines()
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if "None" in line or line != line.rstrip()]


def test_long_names_are_cut_in_their_middle() -> None:
    facts = audits.fsdp()
    name = "gradient of " + "decoder/" * 20 + "kernel"
    facts["collectives"][0]["cause"] = facts["largest"][0]["what"] = name
    facts["lints"][0]["message"] = "a message " * 30
    facts["layout"]["drawing"] = "o" * 300 + "\n" + "o\n" * 40
    facts["estimate"]["parts"][0]["name"] = name
    text = audit_text(facts)
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("gradient of decoder/") == 3
    assert text.count("decoder/kernel") == 3
    assert "... 17 more lines of the drawing" in text


def test_the_verdict_stands_first() -> None:
    lines = audit_text(audits.fsdp()).splitlines()
    assert lines[0] == "llama3_70b on tpu:v5p:4x8x8: FITS"
    assert lines[2:5] == [
        "  18.3 GiB of 95.7 GiB on a device (19.1%), 77.5 GiB left",
        "  estimated 6.02 s a step, MFU 65.2%, bound by compute",
        "  424.1 GiB (455.4 GB) sent by a device a step; no pipeline",
    ]


def test_one_that_does_not_fit_says_first_what_would_make_room() -> None:
    text = audit_text(audits.too_large())
    lines = text.splitlines()
    assert lines[0] == "llama3_70b on tpu:v5e:16x16: DOES NOT FIT"
    assert lines[2] == "  needs 24.9 GiB of a device that has 15.8 GiB (158.0%): 9.1 GiB too much"
    found = sections(text)
    assert list(found)[1] == "does not fit; what would make room, of one device"
    assert [line.split() for line in found["does not fit; what would make room, of one device"][2:4]] == [
        ["--zero", "3", "15.4", "GiB", "9.5", "GiB", "fits"],
        ["--mesh", "data=8,tensor=32", "8.2", "GiB", "16.7", "GiB", "still", "too", "much,", "4.56", "s", "a", "step"],
    ]
    assert "does not fit; what would make room, of one device" not in sections(audit_text(audits.fsdp()))


def test_a_step_refused_for_less_than_its_memory_says_by_whom() -> None:
    facts = audits.too_large() | {"hbm_bytes": 2**30, "hbm_capacity_bytes": 2**31}
    assert "needs 1.0 GiB of a device that has 2.0 GiB (50.0%): the compiler refuses it" in audit_text(facts)


def test_what_the_compiler_left_nothing_of_is_said() -> None:
    found = sections(audit_text(audits.unread()))
    assert found["memory of one device"] == ["  by category not known: the compiler left no program"]
    key = "collectives of one device and step, most wire bytes first"
    assert found[key] == ["  not known: the compiler left no program"]
    assert found["findings"] == ["  not looked for: the compiler left no program"]
    assert found["time of a step, estimated"] == ["  not estimated: the compiler left no program"]
    text = audit_text(audits.unread())
    assert "no change of an option alone; use more devices" in text
    assert "\n  shardlab plan --search configs/llama3_70b.py --target " in text


def test_where_no_single_change_is_enough_the_search_is_named() -> None:
    facts = audits.too_large()
    assert "plan --search" not in audit_text(facts)
    facts["remedies"] = [one | {"fits": False} for one in facts["remedies"]]
    other = "  other meshes and plans: shardlab plan --search configs/llama3_70b.py --target tpu:v5e:16x16"
    assert other in audit_text(facts).splitlines()


def test_an_axis_of_one_device_has_no_link() -> None:
    facts = audits.cpu()
    facts["mesh"] = {**facts["mesh"], "stage": 1}
    facts["layout"]["axes"].append({"axis": "stage", "size": 1, "tier": "host", "bandwidth": 0.0, "words": ""})
    rows = {line.split()[0]: line.split() for line in sections(audit_text(facts))["mesh"] if line.strip()}
    assert rows["data"][:3] == ["data", "8", "host"]
    assert rows["stage"] == ["stage", "1", "0", "B"]


def test_links_that_are_not_known_have_no_columns() -> None:
    assert sections(audit_text(audits.unread()))["mesh"] == [
        "  axis    size",
        "  ------  ----",
        "  data      16",
        "  tensor    16",
        "  on which links they lie is not known for tpu:v5e:16x16",
    ]


def test_what_crosses_no_product_of_axes_is_said() -> None:
    facts = audits.fsdp()
    facts["wire_bytes_by_axis"]["?"] = 2048
    line = next(line for line in sections(audit_text(facts))["mesh"] if "2.0 KiB" in line)
    assert line.split() == ["no", "product", "of", "axes", "2.0", "KiB"]


def test_twenty_collectives_and_how_many_more() -> None:
    lines = sections(audit_text(audits.pipeline()))["collectives of one device and step, most wire bytes first"]
    assert len(lines) == 2 + 20 + 2
    assert lines[2].split()[:5] == ["permute", "stage", "35", "2.1", "GiB"]
    assert lines[22] == "  27 more: 2.3 MiB, <0.1% of all wire bytes"
    assert lines[23] == "  >=: in a loop of unknown length"


def test_ten_buffers_and_how_many_more() -> None:
    lines = sections(audit_text(audits.fsdp()))["largest buffers at the peak"]
    assert len(lines) == 11
    assert lines[0].split() == [
        "9.9",
        "GiB",
        "inputs",
        "of",
        "blocks/*",
        "bf16[80,1,4096,8192]",
        "activations",
        "decoder.py:123",
    ]
    assert lines[10] == "  and 3 smaller"


def test_buffers_that_read_the_same_are_one_line() -> None:
    lines = sections(audit_text(audits.too_large()))["largest buffers at the peak"]
    assert [line.split()[:3] for line in lines] == [
        ["2.2", "GiB", "parameters"],
        ["2.2", "GiB", "parameters"],
        ["2", "x", "140.0"],
    ]
    assert lines[2].split()[7:] == ["f32[80,512,1792]", "optimizer", "state", "decoder.py:123"]


def test_small_parts_of_the_time_are_together() -> None:
    facts = audits.fsdp()
    facts["estimate"]["parts"] += [{"name": f"all-to-all over x{k}, exposed", "seconds": 0.001} for k in range(20)]
    lines = sections(audit_text(facts))["time of a step, estimated"]
    assert lines[8].split() == ["16", "smaller", "parts", "16.0", "ms", "0.3%", "#"]
    assert lines[9].split() == ["total", "6.02", "s"]


def test_a_cause_is_told_without_its_kind_and_a_finding_with_its_line() -> None:
    facts = audits.fsdp()
    facts["collectives"][0]["cause"] = "all-gather of w (weights)"
    facts["lints"][0]["source"] = "/home/me/models/decoder.py:208"
    text = audit_text(facts)
    assert "beside compute      0 s  w (weights)\n" in text
    assert "SL002 head/kernel (models/decoder.py:208): weights gathered" in text


def test_where_the_time_goes() -> None:
    lines = sections(audit_text(audits.pipeline()))["time of a step, estimated"]
    assert lines[0].split() == ["matrix", "products", "39.2", "s", "81.0%", "#" * 32]
    assert lines[5:] == [
        "  total                              48.4 s",
        "  beside compute, and not in the total: 400 ms of communication",
        "  from the compiler's cycle estimates",
        "  left out: input data and host work between steps",
    ]


def test_a_finding_has_its_cost_and_its_fix() -> None:
    lines = sections(audit_text(audits.pipeline()))["findings"]
    assert lines[-2:] == [
        "  SL007: a vocabulary of 128256 is padded to 128512 by the layout's tiles",
        "        fix: pad the vocabulary yourself, or leave it",
    ]
    assert "        [286.1 MiB, 1.10 ms]" in lines


def test_a_bar_is_of_the_whole() -> None:
    assert bar(50, 100) == "#" * 20
    assert bar(100, 100) == "#" * 40
    assert bar(0, 0) == ""
