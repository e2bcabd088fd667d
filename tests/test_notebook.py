"""The notebook, run as a user would, in a kernel of its own."""

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks/01_declare_and_train.ipynb"


def texts(cell: Any) -> str:
    """What a cell shows."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(shown)


def test_it_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_declares_and_trains() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent.parent)}}).execute()
    shown = {cell.source: texts(cell) for cell in notebook.cells if cell.cell_type == "code"}

    def shown_by(part: str) -> str:
        (found,) = [text for source, text in shown.items() if part in source]
        return found

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
