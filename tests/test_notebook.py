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


def run(name: str) -> Callable[[str], str]:
    """What the cell that holds a text shows, of a notebook that has been run."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS.parent)}}).execute()
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
