"""Where each array lives: rules, annotations, and the spec of every parameter."""

from shardlab.sharding.annotations import Annotation, from_linen, from_nnx
from shardlab.sharding.resolve import Placement, Resolution, resolve
from shardlab.sharding.rules import Rule, Rules, spec_from_json, spec_to_json
from shardlab.sharding.zero import add_axes, without

__all__ = [
    "Annotation",
    "Placement",
    "Resolution",
    "Rule",
    "Rules",
    "add_axes",
    "from_linen",
    "from_nnx",
    "resolve",
    "spec_from_json",
    "spec_to_json",
    "without",
]
