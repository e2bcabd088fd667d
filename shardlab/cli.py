"""`shardlab <verb>`: declare in a file, then plan, verify, train, evaluate, report.

The options of a verb are a dataclass made for the config at hand, so that every scalar of the config is an option
with its value as the default, and tyro reads the command line into it. Only scalars are handed to tyro: what else a
config holds (callables, specs, a mesh) has no spelling on a command line but the few given here.

JAX is imported after the arguments are read: `shardlab --help` and `shardlab schedule` start nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shardlab.mesh.emulate import emulate, environment
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults, suggestion
from shardlab.mesh.targets import parse_target
from shardlab.pipeline.actions import ScheduleError
from shardlab.run.output import write

if TYPE_CHECKING:
    from shardlab.pipeline.cost import Costs
    from shardlab.pipeline.schedules import Schedule
    from shardlab.run.config import Config, Scalar
    from shardlab.run.view import View

HELP = """\
usage: shardlab VERB ... [options]

Declare a mesh and a PartitionSpec for every parameter of your own Flax model in a config file; then

  shardlab plan CONFIG       where every array lives, bytes per device, the schedule; needs no device
  shardlab verify CONFIG     prove it: the plan against the same step on one device, in float64
  shardlab train CONFIG      train; writes metrics.jsonl, report.json, plan.json, parameters.npz, loss.png
  shardlab eval CONFIG       held-out loss, of a run's parameters with --run DIR
  shardlab report RUN        what a run compiled to and came to
  shardlab schedule NAME     a pipeline schedule drawn, its bubble, what is in flight

CONFIG is a Python file with a function config() that returns a shardlab.run.config.Config; configs/ holds some.
Every scalar of it is an option, and so are the sizes of its mesh's axes:

  shardlab train configs/quickstart.py --mesh data=4,tensor=2 --steps 20 --model.num-layers 4

options of every verb:
  --json    the same facts for programs, as one JSON object on standard output
  --debug   the traceback of an error that is otherwise one message
  --help    of a verb: its options; after a CONFIG: with that config's values

  shardlab --version

Ctrl-C ends a training run after the steps under way, with everything written; a second one at once.

Exit status: 0; 1 where verify fails; 2 for a faulty declaration; 130 for what Ctrl-C left unfinished.
"""


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class _Common:
    """Options of every verb."""

    json: bool = _option(False, "print one JSON object on standard output")
    debug: bool = _option(False, "show the traceback of an error")


@dataclass(frozen=True, kw_only=True)
class _Configured(_Common):
    """Options of the verbs that take a CONFIG, before the config's own scalars."""

    mesh: str = _option("", "sizes of the declared axes; one not named becomes 1", "AXIS=N,...")
    target: str = _option("", "another machine, as cpu:4 or tpu:v5p:4x8x8", "MACHINE")


@dataclass(frozen=True, kw_only=True)
class _Train(_Configured):
    out: str = _option("", "directory to write to, instead of runs/ and the config's name", "DIR")
    profile: int = _option(0, "capture a JAX profile of this many steps (3 if no number follows) in DIR/profile")
    tensorboard: bool = _option(False, "write the metrics to DIR/tensorboard too")


@dataclass(frozen=True, kw_only=True)
class _Eval(_Configured):
    run: str = _option("", "the run whose parameters to evaluate, instead of those that the seed gives", "DIR")


@dataclass(frozen=True, kw_only=True)
class _Report(_Common):
    run: str = field(metadata={"help": "the --out directory of a run", "metavar": "RUN"})


@dataclass(frozen=True, kw_only=True)
class _Schedule(_Common):
    name: str = field(metadata={"help": "of the schedule, or automatic; a wrong one lists them", "metavar": "NAME"})
    stages: int = _option(4, "devices on the stage axis")
    microbatches: int = _option(8, "microbatches a step")
    virtual: int = _option(0, "stages that a device holds; 0 leaves it to the schedule")
    costs: str = _option("1,1,1", "times of a stage's forward, gradient of the input, gradient of the weights", "F,I,W")
    send: float = _option(0.0, "time of a send between devices")
    delayed: bool = _option(False, "send during the next tick, beside what that computes; with --compare, both ways")
    limit: float = _option(0.0, "for automatic: microbatches' activations that a device may hold; 0 is any number")
    compare: bool = _option(False, "every schedule side by side, and automatic; the costs are of a whole device")
    csv: str = _option("", "read the table from a CSV file, a row a device, as PyTorch's compute_only", "FILE")
    to_csv: str = _option("", "write the table to a CSV file", "FILE")
    draw: str = _option("", "write a picture over time: PNG, SVG or PDF by its suffix", "FILE")
    trace: str = _option("", "write a trace that https://ui.perfetto.dev opens", "FILE")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        write(HELP, sys.stdout, end="")
        return 0
    if arguments[0] == "--version":
        write(f"shardlab {importlib.metadata.version('shardlab')}", sys.stdout)
        return 0
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in VERBS:
            known = suggestion(verb, VERBS) + f"there are {', '.join(VERBS)}"
            raise DeclarationError(f"{verb!r} is no verb of shardlab; {known}; see shardlab --help")
        return VERBS[verb](rest, restart=argv is None)
    except KeyboardInterrupt:
        if "--debug" in rest:
            traceback.print_exc()
        write("\nshardlab: stopped by Ctrl-C; what was under way is not finished", sys.stderr)
        return 130
    except Exception as error:
        message = str(error) if isinstance(error, DeclarationError | ScheduleError) else _users_line(error)
        if message is None:  # none of the user's code is on the way: the fault is here
            raise
        if "--debug" in rest:
            traceback.print_exc()
        else:
            write(f"shardlab: {message}", sys.stderr)
        return 2


def _users_line(error: Exception) -> str | None:
    """The last line of the user's own code on the way to an error, and the error; None where there is none.

    The user's own is what is in no library; a model of `shardlab.models` stands for the user's.
    """
    here = Path(__file__).resolve().parent
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_code.co_filename
        file = Path(name).resolve()
        inside = file.is_relative_to(here) and not file.is_relative_to(here / "models")
        if name.startswith("<") or inside or any(file.is_relative_to(library) for library in libraries):
            continue
        first = str(error).strip().partition("\n")[0]
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
        return f"{name}:{line}, in {frame.f_code.co_name}: {what}; --debug shows the way there"
    return None


def schedule(arguments: list[str], *, restart: bool) -> int:
    """The verb `schedule`: a schedule drawn and costed, or all of them compared. Starts nothing."""
    from shardlab.pipeline.cost import Costs, schedule_facts
    from shardlab.pipeline.draw import draw

    given = {text.partition("=")[0] for text in arguments}
    if given & {"--csv", "--compare"} and (not arguments or arguments[0].startswith("-")):
        arguments = ["", *arguments]  # these need no name
    options = _read(_Schedule, arguments, prog="shardlab schedule", about="A pipeline schedule, drawn and costed.")
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
    return _show(options, facts, "\n".join([*lines, *remarks, *_schedule_files(options, made, costs)]))


def _schedule(options: Any, costs: Costs) -> tuple[Schedule, Costs, list[str]]:
    """The schedule that is asked for, the costs of its virtual stages, and what is to be said of it."""
    from shardlab.pipeline.automatic import automatic
    from shardlab.pipeline.schedules import make_schedule
    from shardlab.pipeline.table_csv import read_csv

    if options.csv:
        return read_csv(options.csv, delayed=options.delayed), costs, []
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
    return _show(options, facts, comparison_table(rows))


def plan(arguments: list[str], *, restart: bool) -> int:
    """The verb `plan`: no device is needed."""
    about = "Where every array lives, bytes per device, the schedule. No device is needed."
    call = _configured(_Configured, arguments, "plan", about)
    from shardlab.report.summary import plan_facts
    from shardlab.report.text import schedule_text

    made = call.config.plan()
    facts = plan_facts(made)
    text = [str(made), *(f"note: {remark}" for remark in call.remarks), "", schedule_text(facts)]
    facts["notes"] += call.remarks
    return _show(call.options, {**json.loads(made.to_json()), **facts}, "\n".join(text))


def verify(arguments: list[str], *, restart: bool) -> int:
    """The verb `verify`: exit status 1 where a number differs."""
    about = (
        "The plan against the same step on one device: initial parameters, loss, gradients, parameters after the last "
        "step. Over 5 steps in float64, unless --steps and --dtype say otherwise."
    )
    call = _configured(_Configured, arguments, "verify", about, steps=5, dtype="float64", reduce_dtype="auto")
    _start(call.config, restart=restart)
    from itertools import islice

    from shardlab.step.compile import check_batch
    from shardlab.step.verify import verify as prove

    config, view = call.config, call.view()
    with view.phase("planning"):
        made = config.plan()
    for note in (*made.notes, *call.remarks):
        view.say(f"note: {note}")
    with view.phase("reading the data"):
        batches = list(islice(config.data.train(config.batch_size, seed=config.seed), config.steps))
    if len(batches) < config.steps:
        raise DeclarationError(
            f"data: train gives {len(batches)} batches, and verify is to run {config.steps} steps; make it endless, or "
            "give fewer steps"
        )
    for batch in batches:
        check_batch(batch, made.batch, "make data.abstract_batch say what data.train gives")
    steps = f"{config.steps} step{'s' if config.steps > 1 else ''}"
    with view.phase(f"running {steps} on {made.mesh}, and on one device"):
        found = prove(config.model, config.loss, config.make_optimizer(), made, batches, seed=config.seed)
    facts = {**dataclasses.asdict(found), "passed": found.passed, "mesh": made.mesh.sizes}
    _show(call.options, facts, str(found))
    return 0 if found.passed else 1


def train(arguments: list[str], *, restart: bool) -> int:
    """The verb `train`."""
    about = "Trains, and reports what was compiled and what came of it."
    call = _configured(_Train, _with_number(arguments, "--profile", "3"), "train", about)
    _start(call.config, restart=restart)
    from shardlab.run.loop import train as run

    view = call.view()
    for remark in call.remarks:
        view.say(f"note: {remark}")
    record = run(
        call.config,
        call.options.out or Path("runs") / Path(call.path).stem,
        view=view,
        profile=call.options.profile,
        tensorboard=call.options.tensorboard,
        about={"config": call.path, "overrides": call.given},
    )
    # The report's text has been shown by the run.
    return _show(call.options, record.report, None)


def evaluate(arguments: list[str], *, restart: bool) -> int:
    """The verb `eval`."""
    call = _configured(_Eval, arguments, "eval", "The loss on held-out data.")
    _start(call.config, restart=restart)
    from shardlab.run.evaluate import evaluate as run

    return _show(call.options, run(call.config, call.options.run or None, view=call.view()), None)


def report(arguments: list[str], *, restart: bool) -> int:
    """The verb `report`."""
    about = "What a run compiled to and what came of it."
    options = _read(_Report, arguments, prog="shardlab report", about=about)
    from shardlab.report.text import report_text
    from shardlab.run.record import read_run

    record = read_run(options.run)
    return _show(options, record.report, report_text(record.report))


VERBS: Mapping[str, Callable[..., int]] = {
    "plan": plan,
    "verify": verify,
    "train": train,
    "eval": evaluate,
    "report": report,
    "schedule": schedule,
}


@dataclass(frozen=True)
class _Call:
    """A verb called on a config: the verb's own options, and the config with what was given anew.

    `remarks` are facts about what was given that no plan can know.
    """

    options: Any
    path: str
    config: Config
    given: dict[str, Any]
    remarks: list[str]

    def view(self) -> View:
        """What the user sees; on standard error where standard output is for JSON."""
        from shardlab.run.view import make_view

        return make_view(sys.stderr if self.options.json else sys.stdout)


def _configured(kind: type, arguments: list[str], verb: str, about: str, **defaults: Any) -> _Call:
    """The call of a verb on a config. `defaults` are the verb's own, before what the user gives."""
    from shardlab.run.config import load_config, override, scalars, scalars_of_every_config

    prog = f"shardlab {verb} CONFIG"
    place = next((k for k, text in enumerate(arguments) if _is_config(k, text)), None)
    if place is None:
        if "-h" in arguments or "--help" in arguments:
            about += " What a config declares is the default: for its values, give it before --help."
            _read(kind, ["--help"], prog=prog, about=about, scalars=scalars_of_every_config(), defaults=False)
        raise DeclarationError(
            f"{verb}: CONFIG is missing; give a config file first: shardlab {verb} configs/quickstart.py"
        )
    path, rest = arguments[place], arguments[:place] + arguments[place + 1 :]
    with _interrupted_afterwards():
        config = load_config(path)
    config = dataclasses.replace(config, **defaults)
    known = scalars(config)
    options = _read(kind, rest, prog=prog, about=about, scalars=known)
    given = {}
    for scalar in known:
        value = options
        for name in scalar.name.split("."):
            value = getattr(value, name)
        if value != scalar.value:
            given[scalar.name] = value
    config = override(config, given)
    for name in ("mesh", "target"):
        if getattr(options, name):
            given[name] = getattr(options, name)
    if options.mesh or options.target:
        mesh = config.mesh.override(options.mesh or config.mesh.sizes, target=options.target or None)
        config = dataclasses.replace(config, mesh=mesh)
    if config.dtype == "float64":
        import jax

        jax.config.update("jax_enable_x64", True)
    return _Call(options, path, config, given, _remarks(config, rest))


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Until it is left, the first Ctrl-C waits; the second is a KeyboardInterrupt.

    A config imports JAX and NumPy, and makes an ImportError of a Ctrl-C that comes meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _is_config(place: int, text: str) -> bool:
    """CONFIG comes first; after options only a Python file can be told from an option's value."""
    return text.endswith(".py") or (place == 0 and not text.startswith("-"))


def _remarks(config: Config, arguments: list[str]) -> list[str]:
    # The plan notes a schedule that it ignores, but cannot tell the default from one that was asked for.
    asked = any(text.partition("=")[0] == "--schedule" for text in arguments)
    stages = config.mesh.sizes[config.mesh.stage] if config.mesh.stage else 1
    if asked and stages == 1 and config.schedule == "1f1b":
        return ["schedule 1f1b is ignored: one stage only accumulates its microbatches"]
    return []


def _with_number(arguments: list[str], option: str, number: str) -> list[str]:
    """The arguments with a number after an option that stands alone."""
    out: list[str] = []
    for text in arguments:
        if out and out[-1] == option and not text.isdecimal():
            out.append(number)
        out.append(text)
    return [*out, number] if out and out[-1] == option else out


def _read(
    kind: type,
    arguments: list[str],
    *,
    prog: str,
    about: str,
    scalars: Sequence[Scalar] = (),
    defaults: bool = True,
) -> Any:
    """The options of `kind` and those of `scalars`, read from the arguments; `defaults` says whether help shows them.

    Raises:
      SystemExit: by tyro, which has printed the help, or what is wrong with the arguments.
    """
    import tyro

    fields: list[Any] = []
    annotation: Any
    for item in dataclasses.fields(kind):
        text, metavar = item.metadata["help"], item.metadata["metavar"]
        if item.default is dataclasses.MISSING:
            positional = Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=text, metavar=metavar)]
            fields.append((item.name, positional))
        else:
            # An empty or false default says nothing to a reader.
            hint = None if item.default else ""
            shown = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hint)
            annotation = Annotated[type(item.default), shown, tyro.conf.FlagCreatePairsOff]
            fields.append((item.name, annotation, item.default))
    inner: dict[str, list[Any]] = {}
    for scalar in scalars:
        owner, _, name = scalar.name.rpartition(".")
        shown = tyro.conf.arg(help=scalar.help.removesuffix("."), help_behavior_hint=None if defaults else "")
        annotation = Annotated[scalar.kind, shown, tyro.conf.FlagConversionOff]
        (inner.setdefault(owner, []) if owner else fields).append((name, annotation, scalar.value))
    for owner, items in inner.items():
        made = dataclasses.make_dataclass(owner, items, frozen=True, kw_only=True)
        fields.append((owner, Annotated[made, tyro.conf.arg(help="")], made()))
    names = [item[0] for item in fields if item[0] not in inner and len(item) == 3]  # what has no default is positional
    names += [f"{owner}.{name}" for owner, items in inner.items() for name, *_ in items]
    known = [f"--{name.replace('_', '-')}" for name in names]
    given = [text.partition("=")[0].replace("_", "-") for text in arguments if text.startswith("--")]
    raise_faults(
        Fault(name, f"is no option of {prog}", f"{suggestion(name, known)}--help lists them")
        for name in given
        if name not in (*known, "--help", "--") and not name.startswith("--tyro-")
    )
    options = dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)
    return tyro.cli(options, prog=prog, description=about, args=arguments)


def _start(config: Config, *, restart: bool) -> None:
    """Emulated devices for a CPU target.

    A config file that has started JAX with other settings is not asked to do otherwise: the process is started
    again, once, with the right settings in its environment.
    """
    machine = parse_target(config.mesh.target)
    if machine.platform != "cpu" or machine.text == "local":
        return
    try:
        emulate(machine.num_devices)
    except DeclarationError:
        if not restart or _RESTARTED in os.environ:
            raise
        variables = {**os.environ, **environment(machine.num_devices), _RESTARTED: "1"}
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, variables)


_RESTARTED = "SHARDLAB_RESTARTED"


def _show(options: Any, facts: Mapping[str, Any], text: str | None) -> int:
    """Prints the facts as JSON where that is asked for, otherwise the text if there is one."""
    from shardlab.run.record import plain

    if options.json:
        write(json.dumps(plain(facts), allow_nan=False), sys.stdout)
    elif text is not None:
        write(text, sys.stdout)
    return 0
