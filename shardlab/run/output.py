"""Output that outlives its reader."""

from __future__ import annotations

import os
from typing import IO


def write(text: str, file: IO[str], *, end: str = "\n") -> None:
    """Prints at once; where whoever read has left, as ``| head`` does, nothing, and nothing from then on.

    A run goes on without a reader, and what was asked for has its exit status.
    """
    try:
        print(text, end=end, file=file, flush=True)
    except BrokenPipeError:
        # Python flushes the file once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
