"""State that outlives a run: its canonical tree, digests of its arrays, checkpoints on disk, and weights of others."""

from shardlab.checkpoint.canonical import Canonical
from shardlab.checkpoint.names import LLAMA, MIXTRAL, QWEN, Name, Names
from shardlab.checkpoint.store import CheckpointError, Checkpoints

__all__ = ["LLAMA", "MIXTRAL", "QWEN", "Canonical", "CheckpointError", "Checkpoints", "Name", "Names"]
