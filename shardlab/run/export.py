"""A run's parameters as safetensors, on one host and without a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from shardlab.checkpoint.names import read_names
from shardlab.checkpoint.store import Checkpoints
from shardlab.checkpoint.weights import MAX_BYTES, write_weights
from shardlab.run.config import Config
from shardlab.run.evaluate import same_arrays
from shardlab.run.record import read_arrays
from shardlab.run.view import Silent, View


def export(
    config: Config,
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_bytes: int = MAX_BYTES,
    view: View | None = None,
) -> list[Path]:
    """Writes the parameters of a run's last checkpoint, or of a run without any those at its end.

    Of a checkpoint one array is read at a time.

    Args:
      config: with the run's model, and `names`.
      run: its directory.
      out, dtype, max_bytes: as of `save_safetensors`.
      view: what is told of what happens.

    Returns:
      The files.

    Raises:
      DeclarationError: the run is of another model or has no parameters yet, or they cannot be written by these names.
    """
    view, names, plan = view or Silent(), read_names(config.names), config.plan()
    store = Checkpoints(run)
    steps = store.steps()
    if steps:
        kinds = ("parameters/", "buffers/")
        tree = {name: leaf for name, leaf in store.seal(steps[-1]).tree.items() if name.startswith(kinds)}
        found = {
            name.partition("/")[2]: jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
            for name, leaf in tree.items()
        }
        source = f"the checkpoint of step {steps[-1]}"
    else:
        arrays = read_arrays(run)
        found = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()}
        source = "the parameters at its end"
    same_arrays(plan, found, str(run))
    shapes = {parameter.path: found[parameter.path] for parameter in plan.parameters}

    def values() -> Iterator[np.ndarray]:
        for path in shapes:
            yield store.array(steps[-1], f"parameters/{path}") if steps else arrays[path]

    with view.phase(f"writing {source} to {out}"):
        return write_weights(out, shapes, values(), names, dtype=dtype, max_bytes=max_bytes)
