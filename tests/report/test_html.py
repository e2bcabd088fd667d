"""The page of an audit: it stands alone, is well formed, and says what the facts say."""

import copy
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from shardlab.report.audit_words import verdict
from shardlab.report.html import page
from tests.report import audits

EVERY = {made.__name__: made for made in (audits.fsdp, audits.pipeline, audits.too_large, audits.unread, audits.cpu)}
HOSTILE = """<script>alert("1")</script>'&amp;</style></title>"""
VOID = ("meta",)


class Page(HTMLParser):
    """Reads a page: every tag closed in order, its text without markup and style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "tags that nothing closes"
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th", "li", "p", "div", "h1", "h2", "h3"):
            self.words.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def hostile(value: Any) -> Any:
    """The facts with markup in every text that is not a word of the format."""
    kept = ("ici", "dcn", "nvlink", "network", "host", "1f1b", "direct")
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and value not in kept else value


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_a_page_is_well_formed_and_stands_alone(made: Callable[[], dict[str, Any]]) -> None:
    text = page(made())
    read = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert read.tags.count("html") == read.tags.count("h1") == read.tags.count("style") == 1
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in read.attributes}
    for needs_a_network in ("http", "url(", "@import", "//"):
        assert needs_a_network not in text


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_nothing_is_blank_or_python(made: Callable[[], dict[str, Any]]) -> None:
    text = page(made())
    words = set(re.findall(r"\w+", Page(text).text.replace("None: nothing was found", "")))
    assert not words & {"None", "nan", "inf", "True", "False"}
    for blank in ("<p></p>", "<li></li>", '<p class="soft"></p>', "<h2></h2>"):
        assert blank not in text


@pytest.mark.parametrize("made", EVERY.values(), ids=EVERY)
def test_every_name_is_escaped(made: Callable[[], dict[str, Any]]) -> None:
    text = page(hostile(made()))
    read = Page(text)
    assert "script" not in read.tags
    assert read.tags.count("style") == 1
    assert HOSTILE in read.text
    assert HOSTILE not in text


def test_keys_are_escaped_too() -> None:
    facts = audits.fsdp()
    facts["mesh"] = {HOSTILE: 256}
    facts["wire_bytes_by_axis"] = {HOSTILE: 5, "data": 6}
    facts["categories"] = {HOSTILE: facts["hbm_bytes"]}
    facts["versions"] = {HOSTILE: HOSTILE}
    facts["overrides"] = {HOSTILE: HOSTILE}
    text = page(facts)
    assert "script" not in Page(text).tags
    assert HOSTILE not in text


def test_lengths_are_finite_and_within_their_whole() -> None:
    for made in EVERY.values():
        widths = re.findall(r"(?:width|left|right):([^;\"]+)%", page(made()))
        assert all(0 <= float(width) <= 100 for width in widths)
        drawn = re.findall(r' (?:x|y|width|height)="([^"]+)"', page(made()))
        assert all(0 <= float(number) <= 1001 for number in drawn)


def test_the_headline_of_one_that_fits() -> None:
    text = Page(page(audits.fsdp())).text
    assert "llama3_70b on tpu:v5p:4x8x8 fits" in text
    assert "Memory of a device 18.3 GiB of 95.7 GiB (19.1%), 77.5 GiB left" in text
    assert "A step takes, estimated 6.02 s MFU 65.2%, bound by compute" in text
    # In 1e8 bytes, as listed: 3 x 896 + 3 x 376 + 2 x 214 + 2 x 107 + 2 x 27 + 42 = 4,554.
    assert "Sent by a device a step 455.4 GB 424.1 GiB in 1,523 collectives, 99.1% of the bytes beside compute" in text
    assert "Pipeline none one stage: no bubble" in text
    assert "What would make room" not in text


def test_one_that_the_compiler_takes_although_more_is_reported() -> None:
    facts = audits.fsdp()
    facts |= {"hbm_bytes": 100 * 2**30, "hbm_peak_bytes": 90 * 2**30}
    assert facts["hbm_bytes"] > facts["hbm_capacity_bytes"]
    text = Page(page(facts)).text
    words = "90.0 GiB at once (XLA reports 100.0 GiB, its gaps twice) of 95.7 GiB"
    assert f"Memory of a device fits {words}" in text
    assert "a device ends here" not in text
    assert verdict(facts) == ("fits", f"{words} on a device; the compiler takes it")


def test_the_parts_of_memory_stand_in_the_bar_and_its_legend() -> None:
    text = page(audits.fsdp())
    read = Page(text).text
    assert "activations9.9 GiB54.0%" in read
    assert "batch1.0 MiB<0.1%" in read
    # Of a capacity of 98,020 MiB: 10,100 MiB of activations and 79,310 MiB that are free.
    assert f'width:{100 * 10100 / 98020:.3f}%;background:var(--c4)" title="activations' in text
    assert f'class="free" style="width:{100 * 79310 / 98020:.3f}%"' in text


def test_one_that_does_not_fit_says_what_would_make_room() -> None:
    text = page(audits.too_large())
    read = Page(text).text
    assert "llama3_70b on tpu:v5e:16x16 does not fit" in read
    assert "24.9 GiB of 15.8 GiB (158.0%), 9.1 GiB too much" in read
    assert "--zero 3 15.4 GiB 9.5 GiB fits" in read
    assert "--mesh data=8,tensor=32 8.2 GiB 16.7 GiB still too much" in read
    assert "a device ends here: 15.8 GiB" in read
    assert read.index("What would make room") < read.index("Memory of one device")
    assert f'<b style="left:{100 * 16128 / 25480:.3f}%">' in text


def test_what_is_not_known_is_said() -> None:
    read = Page(page(audits.unread())).text
    for words in (
        "What holds it is not known: the compiler left no program.",
        "Sent by a device a step not known the compiler left no program",
        "A step takes not estimated the compiler left no program",
        "Not estimated: the compiler left no program.",
        "On which links the axes lie is not known for tpu:v5e:16x16.",
        "Not looked for: the compiler left no program.",
        "No single change was found.",
    ):
        assert words in read
    assert read.count("Not known: the compiler left no program.") == 1
    read = Page(page(audits.cpu())).text
    assert "a train step on cpu:8 memory not limited" in read
    assert "no capacity is known for cpu:8" in read
    assert "Not estimated: no speeds are known for cpu:8." in read
    assert "From a step made in Python, not from a config file." in read


def test_the_pipeline_is_drawn_and_one_stage_is_not() -> None:
    text = page(audits.pipeline())
    assert Page(text).tags.count("svg") == 1
    assert "<svg" not in page(audits.fsdp())
    # 4 devices x 32 microbatches, forward and backward.
    assert text.count('<rect class="F"') == text.count('<rect class="B"') == 128
    assert "Pipeline idles 8.6% of a step: 1f1b, 4 stages, 32 microbatches" in Page(text).text
    assert "In the picture" not in text


def test_the_axes_have_their_links_and_bytes() -> None:
    text = page(audits.pipeline())
    read = Page(text).text
    assert re.search(r"stage 4 ICI 90 GB/s 4\.3 GiB +a line along dim 8", read)
    assert re.search(r"data x stage +128\.0 KiB +over these together", read)
    assert "y=7  0  0  1  1" in text
    facts = audits.pipeline()
    facts["wire_bytes_by_axis"]["?"] = 2048
    assert re.search(r"no product of axes +2\.0 KiB +between devices that no mesh axes name", Page(page(facts)).text)


def test_a_device_nearly_empty_has_a_bar_of_what_is_held() -> None:
    facts = audits.fsdp() | {"hbm_bytes": 4 * 2**30}
    facts["categories"] = {"parameters": 3 * 2**30, "rest of what the compiler needs": 2**30}
    text = page(facts)
    assert "The bar is of what is held." in Page(text).text
    assert 'style="width:75.000%;background:var(--c0)"' in text
    # A category without a colour of its own has one that is not in the bar.
    assert 'style="width:25.000%;background:var(--c2)"' in text
    assert "free</span>" not in text


def test_small_parts_of_the_time_are_together() -> None:
    facts = audits.fsdp()
    facts["estimate"]["parts"] += [{"name": f"all-to-all over x{k}, exposed", "seconds": 0.001} for k in range(20)]
    read = Page(page(facts)).text
    assert "16 smaller parts16.0 ms0.3%" in read
    assert "all-to-all over x3, exposed1.00 ms" in read
    assert "all-to-all over x4" not in read


def test_buffers_that_read_the_same_are_one_line() -> None:
    read = Page(page(audits.too_large())).text
    assert "2 x 140.0 MiB moments of blocks/*/mlp/up/kernel f32[80,512,1792] optimizer state decoder.py:123" in read
    facts = audits.fsdp()
    facts["largest"] += [facts["largest"][0] | {"bytes": k} for k in range(8)]
    assert "And 5 smaller." in Page(page(facts)).text


def test_words_of_an_axis_stand_once() -> None:
    read = Page(page(audits.too_large())).text
    assert "tpu:v5e:16x16: a torus of 16 x 16 chips. Axis" in read
    assert read.count("data (16) lies on dim y.") == 1


def test_sources_are_short_and_whole_in_their_title() -> None:
    facts = audits.fsdp()
    facts["collectives"][0] |= {"source": "/home/me/models/decoder.py:175", "cause": "all-gather of w (weights)"}
    facts["lints"][0]["source"] = "/home/me/models/decoder.py:208"
    text = page(facts)
    assert 'title="/home/me/models/decoder.py:175">models/decoder.py:175</code>' in text
    assert 'title="/home/me/models/decoder.py:208">models/decoder.py:208</code>' in text
    assert "83.4 GiB beside compute w (weights) models/decoder.py:175" in Page(text).text


def test_forty_collectives_and_the_rest() -> None:
    facts = audits.pipeline()
    read = Page(page(facts)).text
    assert len(facts["collectives"]) == 47
    assert "7 more, <0.1% of all bytes" in read
    assert "permute stage 35 2.1 GiB" in read
    assert "waits 1.10 ms" in read
    assert ">= is in a loop of unknown length." in read
    assert ("scale 22 of" in read, "scale 23 of" in read) == (True, False)
    facts["collectives"] = facts["collectives"][:40]
    assert "more, " not in Page(page(facts)).text


def test_collectives_of_one_cause_share_a_line() -> None:
    facts = audits.fsdp()
    twice = copy.deepcopy(facts["collectives"][0])
    facts["collectives"].append(twice)
    assert "all-gather data 320 166.9 GiB" in Page(page(facts)).text


def test_findings_have_code_path_cost_and_fix() -> None:
    read = Page(page(audits.fsdp())).text
    assert "SL002 head/kernel 2.0 GiB, 3.90 ms Weights gathered 3 times a step, which has 2 passes over them." in read
    assert "Fix: keep the gathered head from the forward to the backward: gather='step'" in read


def test_how_it_was_made() -> None:
    read = Page(page(audits.fsdp())).text
    assert "shardlab compile configs/llama3_70b.py --target tpu:v5p:4x8x8 --mesh data=256 --zero 3" in read
    assert "Compiled for 256 devices with jax 0.10.2, compiler libtpu 0.0.42.1." in read
    assert "Took: planning 1.4 s, tracing 3.2 s, compiling 41.8 s, reading 4.6 s." in read
    assert "blocks/*/mlp/up/kernel 80 8192 x 28672 float32 P() P('data') rule 2, \"**/kernel\" 3.5 MiB" in read
