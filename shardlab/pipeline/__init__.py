"""When each stage works: schedules as tables, checked, costed, drawn, turned into programs: pure Python."""

from shardlab.pipeline.actions import Action, ScheduleError, parse_action
from shardlab.pipeline.buffers import Phase, Program, program
from shardlab.pipeline.cost import Cost, Costs, schedule_facts
from shardlab.pipeline.schedules import SCHEDULES, Schedule, from_table, make_schedule
from shardlab.pipeline.simulate import simulate
from shardlab.pipeline.stages import LayerCosts, assign_layers, stage_layers

__all__ = [
    "SCHEDULES",
    "Action",
    "Cost",
    "Costs",
    "LayerCosts",
    "Phase",
    "Program",
    "Schedule",
    "ScheduleError",
    "assign_layers",
    "from_table",
    "make_schedule",
    "parse_action",
    "program",
    "schedule_facts",
    "simulate",
    "stage_layers",
]
