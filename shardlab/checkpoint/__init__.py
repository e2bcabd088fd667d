"""State that outlives a run: its canonical tree, digests of its arrays, and the checkpoints of a run on disk."""

from shardlab.checkpoint.canonical import Canonical
from shardlab.checkpoint.store import CheckpointError, Checkpoints

__all__ = ["Canonical", "CheckpointError", "Checkpoints"]
