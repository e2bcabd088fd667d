"""What XLA made: optimized HLO text parsed; its loops, collectives, time, buffers and causes.  Pure Python."""

from shardlab.hlo.buffers import Buffer, Live, live
from shardlab.hlo.collectives import Collective, Total, collectives, totals
from shardlab.hlo.loops import Visit, trip_count, visits
from shardlab.hlo.origin import Cause, cause
from shardlab.hlo.overlap import Overlap, Overlaps, overlaps
from shardlab.hlo.parse import Computation, HloModule, Instruction, Shape, parse
from shardlab.hlo.time import Piece, Rates, Times, seconds_once, times

__all__ = [
    "Buffer",
    "Cause",
    "Collective",
    "Computation",
    "HloModule",
    "Instruction",
    "Live",
    "Overlap",
    "Overlaps",
    "Piece",
    "Rates",
    "Shape",
    "Times",
    "Total",
    "Visit",
    "cause",
    "collectives",
    "live",
    "overlaps",
    "parse",
    "seconds_once",
    "times",
    "totals",
    "trip_count",
    "visits",
]
