"""The user's model: parameters by path, and the functions of them that a step needs."""
