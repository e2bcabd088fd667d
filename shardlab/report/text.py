"""The report of a run as text, from the plain data that `report.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardlab.pipeline.draw import draw
from shardlab.pipeline.schedules import Schedule, make_schedule
from shardlab.pipeline.table_csv import from_csv
from shardlab.plan.text import NOT_ESTIMATED, bytes_label, human_bytes
from shardlab.report.collectives import collectives_table


def report_text(report: Mapping[str, Any]) -> str:
    """The report: what a device holds, what the step communicates, the schedule, and what was learnt."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    parts = [
        f"{report['num_parameters']:,} parameters on mesh {mesh} ({report['target']}), computed in {report['dtype']}, "
        f"ZeRO {report['zero']}",
        _section("per device", bytes_table(report)),
        _section(
            "collectives per device and step, from the compiled program", collectives_table(report["collectives"])
        ),
        _section("schedule", schedule_text(report)),
        _section("result", result_text(report)),
    ]
    return "\n\n".join(parts)


def bytes_table(report: Mapping[str, Any]) -> str:
    """Bytes on the fullest device, as planned and as the compiler says; what takes none is left out.

    >>> print(bytes_table({"bytes_per_device": {"parameters": 2048, "padding": 0}, "memory": {"temp_bytes": 512}}))
    planned   parameters   2.0 KiB
    compiled  temporaries    512 B
    """
    names = {
        "argument_bytes": "arguments: state and batch",
        "temp_bytes": "temporaries",
        "code_bytes": "code",
        "total_bytes": "total",
    }
    rows = [("planned", bytes_label(name), size) for name, size in report["bytes_per_device"].items()]
    memory = report.get("memory", {})
    rows += [("compiled", text, memory[name]) for name, text in names.items() if name in memory]
    unknown = [f"planned   {NOT_ESTIMATED}"] if any(size is None for *_, size in rows) else []
    rows = [row for row in rows if row[2]]
    width = max(len(name) for _, name, _ in rows)
    sizes = [human_bytes(size) for *_, size in rows]
    right = max(map(len, sizes))
    lines = [f"{who:<8}  {name:<{width}}  {size:>{right}}" for (who, name, _), size in zip(rows, sizes, strict=True)]
    planned = sum(who == "planned" for who, *_ in rows)
    return "\n".join([*lines[:planned], *unknown, *lines[planned:]])


def schedule_text(report: Mapping[str, Any]) -> str:
    """The schedule drawn, its bubble and what each device holds; one line where there is one stage."""
    microbatches = report["microbatches"]
    if report["stages"] == 1:
        if microbatches == 1:
            return "one stage, one microbatch: no bubble"
        return f"one stage: {microbatches} microbatches accumulate their gradients, no bubble"
    table = draw(plan_schedule(report))
    held = ", ".join(map(str, report["peak_in_flight"]))
    return f"{table}\nbubble {report['bubble_fraction']:.1%}; microbatches in flight at most, by device: {held}"


def plan_schedule(report: Mapping[str, Any]) -> Schedule:
    """The schedule of a plan of several stages, from the plan's facts."""
    delayed = report.get("sends") == "delayed"  # earlier runs do not say
    if report["table_csv"] is not None:
        return from_csv(report["table_csv"], report["schedule"], delayed=delayed)
    sizes = {"stages": report["stages"], "microbatches": report["microbatches"], "virtual": report["virtual"]}
    return make_schedule(report["schedule"], **sizes, delayed=delayed)


def result_text(report: Mapping[str, Any]) -> str:
    """Steps, losses and times of the run.

    >>> print(result_text({"steps_done": 2, "steps": 2, "interrupted": False, "unit": "nats", "final_loss": 2.0,
    ...     "initial_eval_loss": 5.5, "eval_loss": 2.25, "seconds_per_step": 0.5, "tokens_per_second": 8192.0}))
    2 of 2 steps, 0.500 s a step (median), 8,192 tokens/s
    training loss 2.000 nats at the last step
    held-out loss 5.500 -> 2.250 nats
    """
    unit = report["unit"]
    a_step = report["tokens_per_second"] * report["seconds_per_step"]
    name = "examples" if round(a_step) == report.get("batch_size") else "tokens"
    steps = f"{report['steps_done']} of {report['steps']} step{'s' if report['steps'] > 1 else ''}"
    stopped = ", stopped by Ctrl-C" if report["interrupted"] else ""
    lines = [
        f"{steps}{stopped}, {report['seconds_per_step']:.3f} s a step (median), "
        f"{report['tokens_per_second']:,.0f} {name}/s"
    ]
    if report["final_loss"] is not None:
        lines.append(f"training loss {report['final_loss']:.3f} {unit} at the last step")
    if report["eval_loss"] is not None and report["initial_eval_loss"] is not None:
        lines.append(f"held-out loss {report['initial_eval_loss']:.3f} -> {report['eval_loss']:.3f} {unit}")
    return "\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"{title}\n" + "\n".join(f"  {line}".rstrip() for line in body.splitlines())
