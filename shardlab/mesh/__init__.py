"""What devices: declare a mesh, emulate it, lay it on a machine's links, build it, and get devices to compile for."""

from shardlab.mesh.build import abstract_mesh, build_mesh
from shardlab.mesh.chips import CHIPS, Chip, chip_of
from shardlab.mesh.emulate import emulate, environment
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults
from shardlab.mesh.offline import compile_devices, compile_environment, compile_options
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.targets import Target, parse_target
from shardlab.mesh.topology import AxisLinks, Layout, collective_seconds, lay_out

__all__ = [
    "CHIPS",
    "AxisLinks",
    "Chip",
    "DeclarationError",
    "Fault",
    "Layout",
    "MeshSpec",
    "Target",
    "abstract_mesh",
    "build_mesh",
    "chip_of",
    "collective_seconds",
    "compile_devices",
    "compile_environment",
    "compile_options",
    "emulate",
    "environment",
    "lay_out",
    "parse_target",
    "raise_faults",
]
