"""Eight emulated devices for every test, asked for before anything starts JAX."""

import os

from shardlab.mesh.emulate import emulate

# The tests compile hundreds of small programs and run each for microseconds: LLVM's optimisations would be most of
# the time. Kept if the caller has set it.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

emulate(8)
