"""Eight emulated devices for every test, asked for before anything starts JAX."""

from shardlab.mesh.emulate import emulate

emulate(8)
