"""`Config`: everything a run needs, as one frozen value; and how the command line changes a scalar of it.

A config file is Python with a function ``config()`` that returns a `Config`. One file serves many plans: every
scalar can be given anew by its dotted name, ``steps``, ``model.num_layers``, ``optimizer.learning_rate``.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shardlab.mesh.faults import DeclarationError, Fault, raise_faults, suggestion
from shardlab.mesh.spec import MeshSpec
from shardlab.pipeline.stages import LayerCosts

if TYPE_CHECKING:
    import optax
    from jax.sharding import PartitionSpec

    from shardlab.checkpoint.names import Names
    from shardlab.checkpoint.weights import Weights
    from shardlab.module.pipeline import Pipeline
    from shardlab.plan.plan import Plan
    from shardlab.sharding.rules import Rules

# JAX is imported where it is used: `shardlab --help` reads the fields of `Config` and starts nothing.


class DataSet(Protocol):
    """What a config's `data` must have; `shardlab.run.data.ByteText` has it.

    A `train` that takes ``process_index`` and ``process_count`` too is asked for a process's rows of every batch alone;
    the position that its iterator gives is then the same in all of them, however many they are.
    """

    def abstract_batch(self, batch_size: int) -> Any:
        """Shapes of a batch; nothing is read."""

    def train(self, batch_size: int, *, seed: int = 0) -> Any:
        """An endless iterator over batches."""

    def held_out(self, batch_size: int, num_batches: int) -> Any:
        """Batches that training never sees, the same at every call."""


@dataclass(frozen=True)
class AdamW:
    """AdamW (arXiv 1711.05101) after clipping, with a warmup and a cosine decay; called, it makes the optax optimizer.

    Attributes:
      learning_rate: at its peak.
      warmup: steps in which it rises in equal parts, the first of them a part above 0.
      decay: the step at which its cosine ends, whatever the steps trained; 0 keeps it at the peak.
      final: what it ends at, as a part of the peak.
      b1: decay of the gradient's mean.
      b2: decay of its square's mean.
      weight_decay: of every parameter.
      clip_norm: global norm that gradients are cut to; 0 cuts nothing.

    >>> rate = AdamW(learning_rate=1e-3, warmup=10).rate
    >>> [round(float(rate(steps_done)), 6) for steps_done in (0, 4, 9)]
    [0.0001, 0.0005, 0.001]
    """

    learning_rate: float = 1e-3
    warmup: int = 0
    decay: int = 0
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.decay and self.decay <= self.warmup:
            raise DeclarationError(
                f"decay: ends at step {self.decay}, before the warmup of {self.warmup} steps; give a later step, "
                "or 0 for none"
            )

    def __call__(self) -> optax.GradientTransformation:
        import optax

        adamw = optax.adamw(self.rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw) if self.clip_norm else adamw

    @property
    def rate(self) -> Callable[[Any], Any]:
        """The learning rate as a function of the steps done."""
        import optax

        # Not from 0, at which the first step would change nothing.
        first, rising = self.learning_rate / max(self.warmup, 1), max(self.warmup - 1, 0)
        if self.decay:
            return optax.warmup_cosine_decay_schedule(
                first, self.learning_rate, rising, self.decay, self.learning_rate * self.final
            )
        if rising:
            return optax.linear_schedule(first, self.learning_rate, rising)
        return optax.constant_schedule(self.learning_rate)


@dataclass(frozen=True)
class Config:
    """A run, declared.

    Attributes:
      model: what `make_plan` takes; a frozen dataclass called with `nnx.Rngs` lets its scalars be overridden.
      loss: ``(y, batch) -> (sum, weight)``.
      optimizer: an optax optimizer, or what makes one when called without arguments.
      data: batches to train on and to hold out.
      mesh: the devices, and the roles of the axes.
      rules: a spec for every parameter, by path pattern; pairs (pattern, spec) are made rules.
      pipeline: names of the model's parts; None takes it whole.
      specs: specs by path, before the rules.
      activation: spec of what flows between blocks.
      saved_activation: spec of the same where it is kept for the backward; None: as it flows.
      batch_size: global examples a step.
      microbatches: microbatches a step; with one stage, gradient accumulation.
      schedule: pipeline schedule, or a CSV file with a table of your own; shardlab schedule --compare lists them.
      virtual: stages that a device of the stage axis holds; 0 leaves it to the schedule.
      stages: the blocks of each stage, "E t*2 | t*3 | t*3 | t*2 H" or 2,3,3,2; or balanced, by their estimated cost and
        that of what is before and after; nothing makes them as even as can be.
      zero: ZeRO level: what is stored in parts over the batch axes. 0 nothing, 1 and 2 the optimizer state (of bfloat16
        steps the float32 parameters too), 3 the parameters. Gradients accumulate whole over the microbatches of a step
        and are cut, from 1 on, when they are reduced at its end; from 2 on accumulate=sharded cuts them before.
      remat: what the forward pass keeps: none (everything), full (a block's input), stage (a stage's input; stage/full:
        its blocks' inputs while it runs again), or a policy of jax.checkpoint_policies; or one for each stage, with |
        between them.
      dtype: what the step computes in: float32, bfloat16, float64.
      reduce_dtype: what gradients are summed over the batch axes in: auto (float32, or a wider dtype), bfloat16.
      head: how the parts before and after the blocks are spread: examples, last_stage, vocab, auto; see `make_plan`.
      gather: when weights in shards are gathered: step (all once a step), layer (each when it is used), or auto (by
        layer with one stage).
      accumulate: gradients over the microbatches: full (reduced once a step), sharded (in every backward), or auto
        (sharded from ZeRO 2).
      sends: when what a tick makes for another stage is sent: direct (at its end) or delayed (during the next tick,
        beside what that computes).
      scatter: how gradients are scattered over a batch axis: whole, in parts as data=32x8, or auto (what is faster on
        the target's links).
      batch_axes: manual (gradients are reduced once a step) or automatic (XLA places every reduction).
      steps: train steps.
      seed: of the parameters, dropout and the order of the data.
      eval_every: steps between evaluations on held-out data; 0 never evaluates.
      eval_batches: held-out batches of an evaluation.
      unit: what the loss is counted in, for reports.
      compiler_options: of XLA, for the train step alone: NAME=VALUE,NAME=VALUE.
      weights: a folder of safetensors that the parameters are read from, in place of those that the seed gives.
      names: the names that parameters have there: llama, qwen, mixtral, or in a config a shardlab.checkpoint.Names.
      cast_weights: whether weights of another dtype are made what the parameters are; otherwise they are refused.
    """

    model: Any
    loss: Callable[[Any, Any], tuple[Any, Any]]
    optimizer: optax.GradientTransformation | Callable[[], optax.GradientTransformation]
    data: DataSet
    mesh: MeshSpec
    rules: Rules | Iterable[Any]
    pipeline: Pipeline | None = None
    specs: Mapping[str, PartitionSpec] | None = None
    activation: PartitionSpec | None = None
    saved_activation: PartitionSpec | None = None
    batch_size: int = 8
    microbatches: int = 1
    schedule: str = "1f1b"
    virtual: int = 0
    stages: str | Sequence[int] | LayerCosts = ""
    zero: int = 0
    remat: str = "none"
    dtype: str = "float32"
    reduce_dtype: str = "auto"
    head: str = "auto"
    gather: str = "step"
    accumulate: str = "full"
    sends: str = "direct"
    scatter: str = "auto"
    batch_axes: str = "manual"
    steps: int = 100
    seed: int = 0
    eval_every: int = 0
    eval_batches: int = 4
    unit: str = "nats"
    compiler_options: str = ""
    weights: str = ""
    names: str | Names = ""
    cast_weights: bool = False

    def __post_init__(self) -> None:
        from jax.sharding import PartitionSpec

        from shardlab.sharding.rules import axes_of, read_rules, spec_faults

        least = {"batch_size": 1, "steps": 1, "virtual": 0, "eval_every": 0, "eval_batches": 1, "seed": 0}
        faults = [
            Fault(name, f"is {getattr(self, name)!r}", f"give a whole number, {low} or more")
            for name, low in least.items()
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low
        ]
        flows = ("activation", "saved_activation")
        faults += self._type_faults() + [fault for name in flows for fault in spec_faults(name, getattr(self, name))]
        raise_faults(faults)
        self.options_of_xla()  # refused where it is declared
        object.__setattr__(self, "rules", read_rules(self.rules))
        for name in flows:
            if (spec := getattr(self, name)) is None:
                continue
            object.__setattr__(self, name, PartitionSpec(*spec))
            raise_faults(
                Fault(
                    name,
                    f"axis {axis!r} is not in the mesh ({', '.join(self.mesh.names)})",
                    f"{suggestion(axis, self.mesh.names)}name a mesh axis, or None",
                )
                for axes in spec
                for axis in axes_of(axes)
                if axis not in self.mesh.names
            )

    def _type_faults(self) -> list[Fault]:
        """Fields that hold something of another kind than can be used."""
        from shardlab.module.pipeline import Pipeline

        kinds: dict[str, tuple[Any, str]] = {
            "mesh": (MeshSpec, "MeshSpec({'data': 8}, batch='data', target='cpu:8')"),
            "pipeline": (Pipeline | None, "Pipeline(before=..., blocks=..., after=...), or None"),
            "specs": (Mapping | None, "specs by path, as {'norm/scale': P()}, or None"),
            "microbatches": (int, "a whole number"),
            "stages": (
                str | Sequence | LayerCosts,
                "a list as 'E t*2 | t*2 H' or (2, 2), 'balanced', LayerCosts, or '' for even ones",
            ),
            "zero": (int, "a whole number, 0 to 3"),
        }
        names = (
            "schedule",
            "remat",
            "dtype",
            "reduce_dtype",
            "head",
            "gather",
            "accumulate",
            "sends",
            "scatter",
            "batch_axes",
        )
        kinds |= dict.fromkeys((*names, "unit", "compiler_options", "weights"), (str, "a text"))
        faults = [
            Fault(name, f"is {_shown(getattr(self, name))}", f"give {way_out}")
            for name, (kind, way_out) in kinds.items()
            if not isinstance(getattr(self, name), kind)
        ]
        if not callable(self.loss):
            faults.append(Fault("loss", f"is {_shown(self.loss)}", "give a function (y, batch) -> (sum, weight)"))
        if not callable(self.optimizer) and not hasattr(self.optimizer, "update"):
            way_out = "give an optax optimizer, or a function that makes one"
            faults.append(Fault("optimizer", f"is {_shown(self.optimizer)}", way_out))
        lacking = [name for name in ("abstract_batch", "train", "held_out") if not hasattr(self.data, name)]
        if lacking:
            way_out = "give an object that has them, as shardlab.run.data.ByteText does"
            faults.append(Fault("data", f"is {_shown(self.data)}, which has no {', '.join(lacking)}", way_out))
        return faults

    def options_of_xla(self) -> dict[str, str]:
        """`compiler_options` by name.

        Raises:
          DeclarationError: a part of it is not NAME=VALUE.
        """
        found = {}
        faults = []
        for part in filter(None, (part.strip() for part in self.compiler_options.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not (name and equals and value):
                faults.append(
                    Fault("compiler_options", f"{part!r} is not NAME=VALUE", "write xla_name=true,xla_other=2")
                )
            found[name] = value
        raise_faults(faults)
        return found

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optax optimizer: `optimizer` where it is one, otherwise what it makes."""
        return self.optimizer if hasattr(self.optimizer, "update") else self.optimizer()

    def abstract_batch(self) -> Any:
        """Shapes of a global batch."""
        return self.data.abstract_batch(self.batch_size)

    def plan(self) -> Plan:
        """The plan; no device is needed, and no data is read.

        Raises:
          DeclarationError: with every fault of the declaration.
        """
        from shardlab.pipeline.table_csv import read_csv
        from shardlab.plan.make import make_plan

        return make_plan(
            self.model,
            mesh=self.mesh,
            rules=self.rules,
            optimizer=self.make_optimizer(),
            batch=self.abstract_batch(),
            pipeline=self.pipeline,
            specs=self.specs,
            schedule=read_csv(self.schedule) if self.schedule.endswith(".csv") else self.schedule,
            virtual=self.virtual or None,
            stages=self.stages,
            microbatches=self.microbatches,
            zero=self.zero,
            remat=self.remat,
            dtype=self.dtype,
            reduce_dtype=self.reduce_dtype,
            head=self.head,
            gather=self.gather,
            accumulate=self.accumulate,
            sends=self.sends,
            scatter=self.scatter,
            batch_axes=self.batch_axes,
            activation=self.activation,
            saved_activation=self.saved_activation,
        )

    def open_weights(self, plan: Plan) -> Weights | None:
        """`weights`, found to be those of the plan's parameters; None where there are none. No number is read yet.

        Raises:
          DeclarationError: with everything in the folder that is not as the plan needs it.
        """
        if not self.weights:
            return None
        from shardlab.checkpoint.weights import open_weights

        return open_weights(self.weights, plan, self.names, cast=self.cast_weights)


@dataclass(frozen=True)
class Scalar:
    """A scalar of a config that can be overridden: dotted name, type, value now, and what it is.

    Of a field that holds no scalar now and has one as default, the value is that.
    """

    name: str
    kind: Any
    value: Any
    help: str


def scalars(config: Config) -> tuple[Scalar, ...]:
    """Every scalar that can be overridden, those of the nested dataclasses (model, optimizer, data) by dotted name.

    The mesh is not among them: its sizes are overridden together, by `MeshSpec.override`.
    """
    found = list(_own(config, ""))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and field.name in ("model", "loss", "optimizer", "data"):
            found += _own(value, f"{field.name}.")
    return tuple(found)


def scalars_of_every_config() -> tuple[Scalar, ...]:
    """The scalars that any config has, with their defaults."""
    texts = attribute_help(Config)
    return tuple(
        Scalar(field.name, type(field.default), field.default, texts[field.name])
        for field in dataclasses.fields(Config)
        if _is_scalar(type(field.default))
    )


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with other scalars, by the names that `scalars` gives.

    Raises:
      DeclarationError: a name that is no scalar of the config (nearest given), or a value that it refuses.
    """
    known = [scalar.name for scalar in scalars(config)]
    raise_faults(
        Fault(name, "is not a scalar of this config", f"{suggestion(name, known)}there are {', '.join(known)}")
        for name in changes
        if name not in known
    )
    inner: dict[str, dict[str, Any]] = {}
    outer: dict[str, Any] = {}
    for name, value in changes.items():
        owner, _, field = name.rpartition(".")
        (inner.setdefault(owner, {}) if owner else outer)[field] = value
    for owner, fields in inner.items():
        try:
            outer[owner] = dataclasses.replace(getattr(config, owner), **fields)
        except (ValueError, TypeError) as error:  # what a user's own dataclass refuses a value with
            raise DeclarationError(f"{owner}: {error}") from error
    return dataclasses.replace(config, **outer)


def load_config(path: str | Path) -> Config:
    """What the function ``config()`` of a Python file returns.

    Raises:
      DeclarationError: no such file, a file that fails, one without ``config()``, or another result than a `Config`.
    """
    file = Path(path)
    if not file.is_file():
        here = sorted(str(other) for other in file.parent.glob("*.py")) if file.parent.is_dir() else []
        hint = suggestion(str(file), here)
        raise DeclarationError(f"config {str(path)!r}: there is no such file; {hint}give the path of a Python file")
    example = "def config() -> Config: return Config(model=..., ...)"
    try:
        names = runpy.run_path(str(file))
    except (DeclarationError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise DeclarationError(f"config {str(path)!r}: {_told(error, file)}") from error
    if not callable(names.get("config")):
        raise DeclarationError(f"config {str(path)!r}: has no function config(); write {example}")
    try:
        made = names["config"]()
    except (DeclarationError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise DeclarationError(f"config {str(path)!r}: {_told(error, file)}") from error
    if not isinstance(made, Config):
        raise DeclarationError(
            f"config {str(path)!r}: config() returns {type(made).__name__}, not shardlab.run.config.Config; "
            f"write {example}"
        )
    return made


def _shown(value: Any) -> str:
    """A value for a message: short values whole, of others only what they are.

    >>> _shown([1, 2]), _shown("x" * 100)
    ('[1, 2], a list', 'a str')
    """
    kind = f"a{'n' if type(value).__name__[0] in 'aeiouAEIOU' else ''} {type(value).__name__}"
    text = repr(value)
    return f"{text}, {kind}" if len(text) <= 40 else kind


def _told(error: BaseException, file: Path) -> str:
    """The line of the config file, the error, and the nearest name for a field that `Config` does not have."""
    typo = re.search(r"Config\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    hint = suggestion(typo[1], [field.name for field in dataclasses.fields(Config)]) if typo else ""
    return f"{_where(error, file)}{type(error).__name__}: {error}{'; ' + hint.rstrip() if hint else ''}"


def _where(error: BaseException, file: Path) -> str:
    """The last line of the config file on the way to the error."""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.lineno is not None:
        lines.append(error.lineno)
    return f"line {lines[-1]}, " if lines else ""


def _own(value: Any, prefix: str) -> list[Scalar]:
    try:
        hints = typing.get_type_hints(type(value))
    except (NameError, TypeError):  # annotations only a type checker can read
        hints = {}
    texts = attribute_help(type(value))
    found = []
    for field in dataclasses.fields(value):
        now = getattr(value, field.name)
        kind = hints.get(field.name, type(now))
        # An annotation may be wider than a scalar (Any, a union with a callable): then the value decides.
        if not _is_scalar(kind):
            kind = type(now)
        # A list or costs where a text would do, as of stages, can still be overridden by a text.
        if not _is_scalar(kind) and _is_scalar(type(field.default)):
            kind, now = type(field.default), field.default
        if _is_scalar(kind) and kind is not type(None):
            found.append(Scalar(prefix + field.name, kind, now, texts.get(field.name, "")))
    return found


def _is_scalar(kind: Any) -> bool:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return all(part is type(None) or _is_scalar(part) for part in typing.get_args(kind))
    return typing.get_origin(kind) is typing.Literal or kind in (int, float, bool, str)


def attribute_help(kind: type) -> dict[str, str]:
    """What the ``Attributes:`` of a class's docstring say, by name.

    >>> attribute_help(AdamW)["warmup"]
    'steps in which it rises in equal parts, the first of them a part above 0.'
    """
    text = (kind.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        start = re.match(r"\s+(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif not line.strip():
            break
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
