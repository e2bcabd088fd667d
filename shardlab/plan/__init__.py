"""The decision, as data: where every array lives, and what the step will do."""
