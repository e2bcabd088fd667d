"""The verb `schedule`: a schedule drawn and costed, or all of them compared. Starts nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlab.cli.options import Common, option, read, show
from shardlab.mesh.faults import DeclarationError

if TYPE_CHECKING:
    from shardlab.pipeline.cost import Costs
    from shardlab.pipeline.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class _Schedule(Common):
    name: str = field(metadata={"help": "of the schedule, or automatic; a wrong one lists them", "metavar": "NAME"})
    stages: int = option(4, "devices on the stage axis")
    microbatches: int = option(8, "microbatches a step")
    virtual: int = option(0, "stages that a device holds; 0 leaves it to the schedule")
    costs: str = option("1,1,1", "times of a stage's forward, gradient of the input, gradient of the weights", "F,I,W")
    send: float = option(0.0, "time of a send between devices")
    delayed: bool = option(False, "send during the next tick, beside what that computes; with --compare, both ways")
    limit: float = option(0.0, "for automatic: microbatches' activations that a device may hold; 0 is any number")
    compare: bool = option(False, "every schedule side by side, and automatic; the costs are of a whole device")
    csv: str = option("", "read the table from a CSV file, a row a device, as PyTorch's compute_only", "FILE")
    in_order: bool = option(False, "read the table's rows as orders: each device waits for its data, as PyTorch's do")
    to_csv: str = option("", "write the table to a CSV file", "FILE")
    draw: str = option("", "write a picture over time: PNG, SVG or PDF by its suffix", "FILE")
    trace: str = option("", "write a trace that https://ui.perfetto.dev opens", "FILE")


def schedule(arguments: list[str], *, restart: bool) -> int:
    """The verb `schedule`: a schedule drawn and costed, or all of them compared. Starts nothing."""
    from shardlab.pipeline.cost import Costs, schedule_facts
    from shardlab.pipeline.draw import draw

    given = {text.partition("=")[0] for text in arguments}
    if given & {"--csv", "--compare"} and (not arguments or arguments[0].startswith("-")):
        arguments = ["", *arguments]  # these need no name
    options = read(_Schedule, arguments, prog="shardlab schedule", about="A pipeline schedule, drawn and costed.")
    try:
        forward, inputs, weights = (float(part) for part in options.costs.split(","))
    except ValueError:
        raise DeclarationError(f"costs {options.costs!r}: is not three times F,I,W; write them as 1,1,1") from None
    costs = Costs(F=forward, I=inputs, W=weights, send=options.send)
    if options.compare:
        return _compare(options, costs)
    made, costs, remarks = _schedule(options, costs)
    facts: dict[str, Any] = schedule_facts(made, costs)
    lines = [draw(made)]
    for clock, text in (("lockstep", "in lockstep"), ("async", "asynchronous")):
        at = facts[clock]
        lines.append(f"{text:<13} makespan {at['makespan']:g}, bubble {at['bubble_fraction']:.1%}")
    lines.append(f"microbatches in flight at most, by device: {', '.join(map(str, facts['peak_in_flight']))}")
    return show(options, facts, "\n".join([*lines, *remarks, *_schedule_files(options, made, costs)]))


def _schedule(options: Any, costs: Costs) -> tuple[Schedule, Costs, list[str]]:
    """The schedule that is asked for, the costs of its virtual stages, and what is to be said of it."""
    from shardlab.pipeline.automatic import automatic
    from shardlab.pipeline.schedules import make_schedule
    from shardlab.pipeline.table_csv import read_csv

    if options.csv:
        return read_csv(options.csv, in_order=options.in_order, delayed=options.delayed), costs, []
    if options.in_order:
        raise DeclarationError("--in-order: says how the rows of a table are read; give one with --csv FILE")
    sizes = {"stages": options.stages, "microbatches": options.microbatches}
    if options.name != "automatic":
        virtual = options.virtual or None
        return make_schedule(options.name, **sizes, virtual=virtual, delayed=options.delayed), costs, []
    limit, virtual = options.limit or None, options.virtual or 2
    found = automatic(**sizes, costs=costs, limit=limit, virtual=virtual, delayed=options.delayed)
    late = ", sends delayed" if found.schedule.delayed else ""
    remarks = [f"the best found: {found.schedule.name}{late}; a stage's costs are its share of a device's"]
    remarks += [f"takes as long: {', '.join(found.equals)}"] if found.equals else []
    slower = ", ".join(f"{name} {makespan:g}" for name, makespan in found.beats)
    remarks += [f"takes longer: {slower}"] if slower else []
    large = ", ".join(f"{name} {held:g}" for name, held in found.too_large)
    remarks += [f"holds more than {found.limit:g} microbatches: {large}"] if large else []
    return found.schedule, costs.shared(found.schedule), remarks


def _schedule_files(options: Any, made: Schedule, costs: Costs) -> list[str]:
    """Writes what is asked for; a line for each file."""
    from shardlab.pipeline.table_csv import to_csv

    lines = []
    try:
        if options.to_csv:
            Path(options.to_csv).write_text(to_csv(made))
            lines.append(f"table written to {options.to_csv}")
        if options.trace or options.draw:
            from shardlab.report.timeline import draw_timeline, write_trace

            if options.trace:
                write_trace(Path(options.trace), made, costs)
                lines.append(f"trace written to {options.trace}")
            if options.draw:
                draw_timeline(Path(options.draw), [made], costs)
                lines.append(f"picture written to {options.draw}")
    except (OSError, ValueError) as error:  # a suffix that is no picture's is a ValueError
        raise DeclarationError(f"{error}; give a file that can be written, a picture as .png, .svg or .pdf") from error
    return lines


def _compare(options: Any, costs: Costs) -> int:
    """Every schedule side by side."""
    from shardlab.report.comparison import comparison_rows, comparison_table

    sizes = {"stages": options.stages, "microbatches": options.microbatches}
    rows = comparison_rows(**sizes, costs=costs, limit=options.limit or None, delayed=options.delayed)
    if options.draw:
        from shardlab.pipeline.schedules import make_schedule
        from shardlab.report.timeline import draw_timeline

        named = [row for row in rows if row["name"] != "automatic"]
        made = [make_schedule(row["name"], **sizes, delayed=row["delayed"]) for row in named]
        draw_timeline(Path(options.draw), made, [costs.shared(one) for one in made])
    facts = {"stages": options.stages, "microbatches": options.microbatches, "schedules": rows}
    return show(options, facts, comparison_table(rows))
