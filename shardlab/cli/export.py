"""The verb `export`: a run's parameters in files that other programs read. No device is needed."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.cli.configured import Configured, configured
from shardlab.cli.options import option, show
from shardlab.mesh.faults import Fault, raise_faults


@dataclass(frozen=True, kw_only=True)
class _Export(Configured):
    run: str = option("", "the run whose last checkpoint, or else last parameters, to write", "DIR")
    out: str = option("", "the folder to make", "FOLDER")
    weights_dtype: str = option("", "what to write numbers in, as bfloat16; if not given, as they are", "DTYPE")
    max_bytes: int = option(5_000_000_000, "of a file; a larger tensor has one of its own")


def export(arguments: list[str], *, restart: bool) -> int:
    """The verb `export`."""
    about = (
        "A run's parameters as safetensors, by the names of --names. Put a config.json beside them for transformers."
    )
    call = configured(_Export, arguments, "export", about)
    options = call.options
    raise_faults(
        Fault(f"--{name}", "is missing", f"give {what}")
        for name, what in (("run", "the --out directory of a run"), ("out", "the folder to make"))
        if not getattr(options, name)
    )
    from shardlab.run.export import export as write

    dtype = options.weights_dtype or None
    files = write(call.config, options.run, options.out, dtype=dtype, max_bytes=options.max_bytes, view=call.view())
    return show(options, {"files": [str(file) for file in files]}, "\n".join(map(str, files)))
