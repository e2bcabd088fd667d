"""Example models, written as a user would write them, each with its loss and its sharding rules beside it."""
