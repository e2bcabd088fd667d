"""`shardlab <verb>`: declare in a file, then plan, verify, train, evaluate, report.

The options of a verb are a dataclass made for the config at hand, so that every scalar of the config is an option
with its value as the default, and tyro reads the command line into it. Only scalars are handed to tyro: what else a
config holds (callables, specs, a mesh) has no spelling on a command line but the few given here.

JAX is imported after the arguments are read: `shardlab --help` and `shardlab schedule` start nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardlab.cli.audits import diff
from shardlab.cli.checkpoint import checkpoint
from shardlab.cli.compile import compile_
from shardlab.cli.configured import Configured, configured, start
from shardlab.cli.export import export
from shardlab.cli.launch import ABOUT as LAUNCH
from shardlab.cli.launch import launch as launch_train
from shardlab.cli.options import Common, option, read, show
from shardlab.cli.schedules import schedule
from shardlab.cli.search import search, why
from shardlab.cli.targets import targets
from shardlab.mesh import processes
from shardlab.mesh.faults import DeclarationError, Fault, raise_faults, suggestion
from shardlab.pipeline.actions import ScheduleError
from shardlab.run.output import write

HELP = """\
usage: shardlab VERB ... [options]

Declare a mesh and a PartitionSpec for every parameter of your own Flax model in a config file; then

  shardlab plan CONFIG       where every array lives, bytes per device, the schedule; needs no device
                             --search --target T: the best plans for a target; --why A B: two plans compared
  shardlab compile CONFIG    compile it for --target, which need not be here, and audit what was compiled
  shardlab verify CONFIG     prove it: the plan against the same step on one device, in float64
  shardlab train CONFIG      train; writes metrics.jsonl, report.json, plan.json, parameters.npz, loss.png
                             --checkpoint-every K saves; the same command with --resume goes on, on any plan
                             --weights FOLDER --names llama: from safetensors; llama, qwen, mixtral
  shardlab launch CONFIG     train in several processes on this machine, as the hosts of a pod do: --processes 2
  shardlab checkpoint RUN    what a run has saved; --verify: every file and array against what was written
  shardlab eval CONFIG       held-out loss, of a run's parameters with --run DIR
  shardlab export CONFIG     a run's parameters as safetensors that others read: --run DIR --out FOLDER --names llama
  shardlab report RUN        what a run compiled to and came to
  shardlab schedule NAME     a pipeline schedule drawn, its bubble, what is in flight
  shardlab diff A B          what changed between two audits that compile --save wrote
  shardlab targets           the machines that can be compiled for; with one, how a mesh lies on its links

CONFIG is a Python file with a function config() that returns a shardlab.run.config.Config; configs/ holds some.
Every scalar of it is an option, and so are the sizes of its mesh's axes:

  shardlab train configs/quickstart.py --mesh data=4,tensor=2 --steps 20 --model.num-layers 4

options of every verb:
  --json    the same facts for programs, as one JSON object on standard output
  --debug   the traceback of an error that is otherwise one message
  --help    of a verb: its options; after a CONFIG: with that config's values

  shardlab --version

Ctrl-C ends a training run after the steps under way, with everything written; a second one at once.

Exit status: 0; 1 where verify fails, or diff finds other communication, memory or findings; 2 for a faulty
declaration; 3 where nothing went on for too long; 130 for what Ctrl-C left unfinished; launch has that of the first
process that ended with an error, 128 and the number of the signal where one ended it.
"""


@dataclass(frozen=True, kw_only=True)
class _Plan(Configured):
    search: bool = option(False, "rank the plans of this config on the target")
    top: int = option(10, "how many of them to show")
    confirm: int = option(0, "how many of the first to compile for the target")
    out: str = option("", "write the first as a plan file", "FILE")


@dataclass(frozen=True, kw_only=True)
class _Train(Configured):
    out: str = option("", "directory to write to, instead of runs/ and the config's name", "DIR")
    profile: int = option(0, "capture a JAX profile of this many steps (3 if no number follows) in DIR/profile")
    tensorboard: bool = option(False, "write the metrics to DIR/tensorboard too")
    checkpoint_every: int = option(0, "save a checkpoint in DIR/checkpoints after so many steps, and at the end")
    checkpoints: str = option("", "where to save them instead: another directory, or gs://BUCKET/PATH", "PLACE")
    keep: int = option(2, "how many of the last checkpoints to keep")
    keep_every: int = option(0, "keep also those of steps that divide by this")
    max_skipped: int = option(0, "skip updates that are not finite, and stop after so many in a row; 0 skips none")
    max_spike: float = option(0, "stop at a loss so many times the median of the 20 steps before; 0 lets all pass")
    check_replicas: int = option(0, "compare what several devices hold copies of, every so many steps")
    resume: bool = option(False, "go on from the last checkpoint in DIR, on this plan or another; from 0 without one")
    skip_batches: int = option(0, "with --resume: leave out so many batches of the data first")
    distributed: bool = option(
        False, "one of several processes, as started by srun, mpirun, Kubernetes or on a TPU pod"
    )
    stuck_after: int = option(
        600,
        "with --distributed: print every stack and exit after so many seconds without a step, or ten times as many in "
        "compiling or a checkpoint",
    )


@dataclass(frozen=True, kw_only=True)
class _Launch(_Train):
    processes: int = option(2, "how many processes")
    devices_per_process: int = option(0, "emulated devices of each, instead of equal shares of the target's")
    grace: int = option(120, "seconds that they have to end by themselves when asked to, before they are killed")


@dataclass(frozen=True, kw_only=True)
class _Eval(Configured):
    run: str = option("", "the run whose parameters to evaluate, instead of those that the seed gives", "DIR")


@dataclass(frozen=True, kw_only=True)
class _Report(Common):
    run: str = field(metadata={"help": "the --out directory of a run", "metavar": "RUN"})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        status = _main(argv)
    except Exception:
        if argv is not None or not processes.joined():
            raise
        traceback.print_exc()
        status = 1
    if status and argv is None:
        # JAX would wait here for the other processes to end as well, and they wait for this one to go on; Orbax, after
        # a save that failed, for its threads that wait for the rest of it, minutes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _main(argv: Sequence[str] | None) -> int:
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
    here = Path(__file__).resolve().parent.parent
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


def plan(arguments: list[str], *, restart: bool) -> int:
    """The verb `plan`: no device is needed."""
    about = "Where every array lives, bytes per device, the schedule. No device is needed."
    if "--why" in arguments:
        return why(arguments)
    call = configured(_Plan, arguments, "plan", about)
    if call.options.search:
        return search(call)
    raise_faults(
        Fault(f"--{name}", "is of --search", "give that too, or leave this out")
        for name in ("confirm", "out")
        if getattr(call.options, name)
    )
    from shardlab.report.summary import plan_facts
    from shardlab.report.text import schedule_text

    made = call.config.plan()
    call.config.open_weights(made)  # what does not fit is told here too; no number is read
    facts = plan_facts(made)
    text = [str(made), *(f"note: {remark}" for remark in call.remarks), "", schedule_text(facts)]
    facts["notes"] += call.remarks
    return show(call.options, {**json.loads(made.to_json()), **facts}, "\n".join(text))


def verify(arguments: list[str], *, restart: bool) -> int:
    """The verb `verify`: exit status 1 where a number differs."""
    about = (
        "The plan against the same step on one device: initial parameters, loss, gradients, parameters after the last "
        "step. Over 5 steps in float64, unless --steps and --dtype say otherwise."
    )
    call = configured(Configured, arguments, "verify", about, steps=5, dtype="float64", reduce_dtype="auto")
    start(call.config, restart=restart)
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
    show(call.options, facts, str(found))
    return 0 if found.passed else 1


def train(arguments: list[str], *, restart: bool) -> int:
    """The verb `train`."""
    about = "Trains, and reports what was compiled and what came of it."
    # Before the config is read, which may count devices.
    if "--distributed" in arguments and not {"-h", "--help"} & {*arguments}:
        processes.join()
    call = configured(_Train, _with_number(arguments, "--profile", "3"), "train", about)
    if not call.options.distributed:
        processes.check_not_alone()
    if call.options.checkpoints and not (call.options.checkpoint_every or call.options.resume):
        raise DeclarationError("--checkpoints: is given, and nothing is saved; give --checkpoint-every too")
    start(call.config, restart=restart)
    from shardlab.run.guards import Guards
    from shardlab.run.loop import train as run
    from shardlab.run.resume import Saving

    view = call.view()
    for remark in call.remarks if processes.index() == 0 else ():
        view.say(f"note: {remark}")
    with processes.losses_named():
        record = run(
            call.config,
            call.options.out or Path("runs") / Path(call.path).stem,
            view=view,
            profile=call.options.profile,
            tensorboard=call.options.tensorboard,
            saving=Saving(
                call.options.checkpoint_every, call.options.keep, call.options.keep_every, call.options.checkpoints
            ),
            resume=call.options.resume,
            skip_batches=call.options.skip_batches,
            guards=Guards(call.options.max_skipped, call.options.max_spike, call.options.check_replicas),
            stuck_after=call.options.stuck_after if call.options.distributed else 0,
            about={"config": call.path, "overrides": call.given},
        )
    # The report's text has been shown by the run, and one process speaks for all.
    return show(call.options, record.report, None) if processes.index() == 0 else 0


def launch(arguments: list[str], *, restart: bool) -> int:
    """The verb `launch`."""
    arguments = _with_number(arguments, "--profile", "3")
    return launch_train(configured(_Launch, arguments, "launch", LAUNCH), arguments)


def evaluate(arguments: list[str], *, restart: bool) -> int:
    """The verb `eval`."""
    call = configured(_Eval, arguments, "eval", "The loss on held-out data.")
    start(call.config, restart=restart)
    from shardlab.run.evaluate import evaluate as run

    return show(call.options, run(call.config, call.options.run or None, view=call.view()), None)


def report(arguments: list[str], *, restart: bool) -> int:
    """The verb `report`."""
    about = "What a run compiled to and what came of it."
    options = read(_Report, arguments, prog="shardlab report", about=about)
    from shardlab.report.text import report_text
    from shardlab.run.record import read_run

    record = read_run(options.run)
    try:
        text = report_text(record.report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problem = f"report.json is not one that this version reads ({type(error).__name__}: {error})"
        raise DeclarationError(f"run {options.run!r}: {problem}; run shardlab train again") from error
    return show(options, record.report, text)


VERBS: Mapping[str, Callable[..., int]] = {
    "plan": plan,
    "compile": compile_,
    "verify": verify,
    "train": train,
    "launch": launch,
    "eval": evaluate,
    "export": export,
    "report": report,
    "schedule": schedule,
    "checkpoint": checkpoint,
    "diff": diff,
    "targets": targets,
}


def _with_number(arguments: list[str], option: str, number: str) -> list[str]:
    """The arguments with a number after an option that stands alone."""
    out: list[str] = []
    for text in arguments:
        if out and out[-1] == option and not text.isdecimal():
            out.append(number)
        out.append(text)
    return [*out, number] if out and out[-1] == option else out
