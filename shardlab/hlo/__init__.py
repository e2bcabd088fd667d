"""What XLA made: parse optimized HLO text, count its loops, list its collectives.  Pure Python."""

from shardlab.hlo.collectives import Collective, Total, collectives, totals
from shardlab.hlo.loops import Visit, trip_count, visits
from shardlab.hlo.parse import Computation, HloModule, Instruction, Shape, parse

__all__ = [
    "Collective",
    "Computation",
    "HloModule",
    "Instruction",
    "Shape",
    "Total",
    "Visit",
    "collectives",
    "parse",
    "totals",
    "trip_count",
    "visits",
]
