"""The rows of a run as they come: kept, written to the metrics file and to TensorBoard, and shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardlab.mesh.processes import index
from shardlab.run.instruments import Board
from shardlab.run.record import MetricsFile, Row, plain
from shardlab.run.view import View


@dataclass(frozen=True)
class Rows:
    """What the steps tell.

    Attributes:
      view: what shows them.
      all: every row, those of the steps before the run went on from a checkpoint too.
      file, board: what they are written to; None in all processes but the first, which have the same rows.
    """

    view: View
    all: list[Row]
    file: MetricsFile | None
    board: Board | None

    def add(self, row: Row) -> None:
        """Takes the row of the step that has ended."""
        row = plain(row)
        if row["loss"] is None and all(earlier["loss"] is not None for earlier in self.all):
            self.view.say(f"step {row['step']}: the loss is not finite; a lower learning rate may help")
        self.all.append(row)
        if self.file is not None:
            self.file.write(row)
        if self.board is not None:
            self.board.write(row)
        self.view.step(row)
        if "eval_loss" in row:
            self.view.evaluation(row["step"], row["eval_loss"])


@contextlib.contextmanager
def open_rows(out: Path, view: View, board: Board | None, before: list[Row]) -> Iterator[Rows]:
    """The rows of the run in a directory, after those before."""
    if index():
        yield Rows(view, before, None, None)
        return
    with (
        MetricsFile(out, append=bool(before)) as file,
        contextlib.closing(board) if board else contextlib.nullcontext(),
    ):
        yield Rows(view, before, file, board)
