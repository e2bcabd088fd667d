"""What devices: declare a mesh, emulate it, build it."""

from shardlab.mesh.build import abstract_mesh, build_mesh
from shardlab.mesh.emulate import emulate, environment
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.targets import Target, parse_target

__all__ = [
    "DeclarationError",
    "Fault",
    "MeshSpec",
    "Target",
    "abstract_mesh",
    "build_mesh",
    "emulate",
    "environment",
    "parse_target",
    "raise_faults",
]
