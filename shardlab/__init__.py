"""shardlab: declare a mesh and a PartitionSpec per parameter; get one compiled, proven, sharded train step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlab import report
    from shardlab.checkpoint.weights import load_safetensors, save_safetensors
    from shardlab.mesh.build import abstract_mesh, build_mesh
    from shardlab.mesh.emulate import emulate
    from shardlab.mesh.faults import DeclarationError
    from shardlab.mesh.offline import compile_devices
    from shardlab.mesh.spec import MeshSpec
    from shardlab.module.functions import Functions
    from shardlab.module.pipeline import Pipeline
    from shardlab.pipeline.schedules import Schedule, make_schedule
    from shardlab.plan.make import make_plan
    from shardlab.plan.plan import Plan
    from shardlab.report.audit import Audit
    from shardlab.sharding.rules import Rule, Rules
    from shardlab.step.batch_sum import batch_sum
    from shardlab.step.compile import CompiledStep, compile_train_step
    from shardlab.step.cross_entropy import cross_entropy
    from shardlab.step.forward import CompiledForward, compile_forward
    from shardlab.step.state import TrainState
    from shardlab.step.verify import Verification, verify

__all__ = [
    "Audit",
    "CompiledForward",
    "CompiledStep",
    "DeclarationError",
    "Functions",
    "MeshSpec",
    "Pipeline",
    "Plan",
    "Rule",
    "Rules",
    "Schedule",
    "TrainState",
    "Verification",
    "abstract_mesh",
    "batch_sum",
    "build_mesh",
    "compile_devices",
    "compile_forward",
    "compile_train_step",
    "cross_entropy",
    "emulate",
    "load_safetensors",
    "make_plan",
    "make_schedule",
    "report",
    "save_safetensors",
    "verify",
]

_MODULES = {
    "Audit": "shardlab.report.audit",
    "CompiledForward": "shardlab.step.forward",
    "CompiledStep": "shardlab.step.compile",
    "DeclarationError": "shardlab.mesh.faults",
    "Functions": "shardlab.module.functions",
    "MeshSpec": "shardlab.mesh.spec",
    "Pipeline": "shardlab.module.pipeline",
    "Plan": "shardlab.plan.plan",
    "Rule": "shardlab.sharding.rules",
    "Rules": "shardlab.sharding.rules",
    "Schedule": "shardlab.pipeline.schedules",
    "TrainState": "shardlab.step.state",
    "Verification": "shardlab.step.verify",
    "abstract_mesh": "shardlab.mesh.build",
    "batch_sum": "shardlab.step.batch_sum",
    "build_mesh": "shardlab.mesh.build",
    "compile_devices": "shardlab.mesh.offline",
    "compile_forward": "shardlab.step.forward",
    "compile_train_step": "shardlab.step.compile",
    "cross_entropy": "shardlab.step.cross_entropy",
    "emulate": "shardlab.mesh.emulate",
    "load_safetensors": "shardlab.checkpoint.weights",
    "make_plan": "shardlab.plan.make",
    "make_schedule": "shardlab.pipeline.schedules",
    "save_safetensors": "shardlab.checkpoint.weights",
    "verify": "shardlab.step.verify",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `shardlab.pipeline` and `shardlab.hlo` need no JAX."""
    if name == "report":  # a package that may be called
        return import_module("shardlab.report")
    if name not in _MODULES:
        raise AttributeError(f"module 'shardlab' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
