"""The notebooks, run as a user would, each in a kernel of its own."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def texts(cell: Any) -> str:
    """What a cell shows."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(shown)


def run(name: str, *, seconds: int = 300) -> Callable[[str], str]:
    """What the cell that holds a text shows, of a notebook that has been run; no cell may take over `seconds`."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=seconds, resources={"metadata": {"path": str(NOTEBOOKS.parent)}}).execute()
    shown = {cell.source: texts(cell) for cell in notebook.cells if cell.cell_type == "code"}

    def shown_by(part: str) -> str:
        (found,) = [text for source, text in shown.items() if part in source]
        return found

    return shown_by


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_it_is_kept_without_outputs(file: Path) -> None:
    for cell in nbformat.read(file, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_declares_and_trains() -> None:
    shown_by = run("01_declare_and_train.ipynb")
    assert "tenser" in shown_by("except shardlab.DeclarationError")
    assert "device 1" in shown_by("draw(plan.table())")
    # Two stages of two layers, and two halves of the columns: each of the four pieces on both data-parallel devices.
    picture = shown_by("visualize_sharding")
    assert re.search(r"\(4, 64, 192\) .*\('stage', None, 'tensor'\) -> on each device \(2, 64, 96\)", picture)
    assert re.findall(r"CPU ([\d,]+)", picture) == ["0,4", "1,5", "2,6", "3,7"]
    assert "all-reduce" in shown_by("collectives_table(")
    losses = [float(loss) for loss in re.findall(r"([\d.]+) nats a byte", shown_by("losses.append"))]
    assert len(losses) == 4
    assert losses[-1] < 4.0 < losses[0]
    assert "passed" in shown_by("shardlab.verify(")


def test_it_draws_compares_and_runs_schedules() -> None:
    shown_by = run("02_pipeline_schedules.ipynb")
    assert shown_by("print(draw(").count("device 3") == 3
    bubbles = dict(re.findall(r"^(\S+) +\d+ +([\d.]+)%", shown_by("bubble_fraction:>9"), re.MULTILINE))
    # (P-1)/(M+P-1) of 4 devices and 8 microbatches; with two stages a device half of that bubble beside the same work.
    assert (bubbles["gpipe"], bubbles["1f1b"], bubbles["interleaved_1f1b"]) == ("27.3", "27.3", "15.8")
    assert "Image" in shown_by("draw_timeline(path")
    assert "beats" in shown_by("automatic(")
    ran = re.findall(
        r"^(\w+) +losses ([\d. ]+?)   temporaries +([\d.]+) MiB", shown_by("metrics['loss']"), re.MULTILINE
    )
    assert [name for name, *_ in ran] == ["gpipe", "1f1b", "zb_v"]
    losses = [[float(loss) for loss in text.split()] for _, text, _ in ran]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[2] == pytest.approx(losses[0], abs=2e-5)
    assert float(ran[1][2]) < float(ran[0][2])


@pytest.mark.tpu
def test_it_fits_a_70b_model_to_a_pod() -> None:
    shown_by = run("03_fit_the_pod.ipynb", seconds=1200)

    # It does not fit, and the parts are those of the whole.
    refused = shown_by('small = lab("compile"')
    needs, room = sizes(refused.partition("\n")[0])
    assert refused.startswith("does not fit: needs ")
    assert 1.5 * room < needs
    parts = dict(re.findall(r"^(\S.*?\S) {2,}([\d.]+ \w+)$", refused, re.MULTILINE))
    assert sum(map(in_gib, parts.values())) == pytest.approx(needs, rel=0.01)
    # Parameters and Adam's two moments of 70.6 B parameters in float32, on 64 chips.
    assert in_gib(parts["parameters"]) == pytest.approx(70.6e9 * 4 / 64 / 2**30, rel=0.02)
    assert in_gib(parts["optimizer state"]) == pytest.approx(70.6e9 * 8 / 64 / 2**30, rel=0.02)
    remedies = re.findall(r"^--.*?([\d.]+ GiB)  does not fit$", refused, re.MULTILINE)
    assert remedies
    assert all(room < in_gib(left) < needs for left in remedies)

    # No plan does, of thousands; on chips with more memory one does, and is compiled.
    nothing = shown_by("nothing = lab(")
    assert re.match(r"[\d,]{5,} plans, 0 fit\n", nothing)
    lacks, least, *_ = sizes(nothing)
    assert least - lacks == pytest.approx(room, abs=0.16)  # each is rounded to a tenth
    ranked = re.findall(r"^(\S.*?) +([\d.]+) s  MFU \d+% +([\d.]+ GiB)$", shown_by("found = lab("), re.MULTILINE)
    seconds = [float(second) for _, second, _ in ranked]
    assert len(ranked) == 5
    assert seconds == sorted(seconds)
    table = shown_by("fits = lab(")
    searched, confirmed = sizes(line_of(table, "HBM"))
    assert searched == in_gib(ranked[0][2])
    assert confirmed == pytest.approx(searched, rel=0.2)
    assert numbers(line_of(table, "step"))[0] == seconds[0]
    assert numbers(line_of(table, "step"))[1] == pytest.approx(seconds[0], rel=0.15)

    # The report says of the compiled plan what the cells around it say.
    report = shown_by("print(audit_text(fits))")
    assert report.startswith("llama3_70b on tpu:v5p:4x4x4: FITS\n")
    assert f"{confirmed} GiB of 95.7 GiB on a device" in report
    assert "blocks/*/mlp/gate/kernel (weights)" in report
    sums = shown_by("sent, waited = {}, {}")
    *kinds, whole = (numbers(line) for line in sums.splitlines())
    assert sum(kind[0] for kind in kinds) == pytest.approx(whole[0], abs=0.3)
    assert f"({whole[0]:,} GB) sent by a device a step" in report
    assert whole[1] < whole[2] == numbers(line_of(table, "step"))[1]

    # Four times the chips: less memory on each, and about a quarter of the time.
    on = {line.split()[0]: line for line in shown_by("large = lab(").splitlines()}
    assert list(on) == ["tpu:v5e:8x8", "tpu:v5p:4x4x4", "tpu:v5p:4x8x8"]
    assert ["does not fit" in line for line in on.values()] == [True, False, False]
    assert sizes(on["tpu:v5p:4x8x8"])[0] < sizes(on["tpu:v5p:4x4x4"])[0] == confirmed
    slow, fast = (numbers(line.partition("GiB of")[2])[1] for line in list(on.values())[1:])
    assert slow == numbers(line_of(table, "step"))[1]
    assert 3 < slow / fast < 4.5

    # By how much a pipeline loses or wins is the ratio of the two times that stand beside it.
    for line in shown_by("slow = lab(").splitlines()[:2]:
        found = re.search(r"pipelining (loses|wins) by ([\d.]+)%: .*? ([\d.]+) s, .*? ([\d.]+) s$", line)
        assert found is not None, line
        piped, flat = float(found[3]), float(found[4])
        assert (found[1] == "loses") == (piped > flat)
        assert max(piped, flat) / min(piped, flat) - 1 == pytest.approx(float(found[2]) / 100, abs=0.02)


def in_gib(text: str) -> float:
    """A size as it is printed."""
    number, unit = text.split()
    return float(number) * {"B": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1, "TiB": 2**10}[unit]


def sizes(text: str) -> list[float]:
    """All sizes in a text, in GiB."""
    return [in_gib(size) for size in re.findall(r"[\d.]+ (?:[KMGT]i)?B\b", text)]


def numbers(line: str) -> list[float]:
    """All numbers with a decimal point in a line."""
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def line_of(text: str, name: str) -> str:
    """The one line that begins with a name."""
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
    return line
