"""The compiled step: the reference that defines it, the sharded program, and the proof that they agree."""
