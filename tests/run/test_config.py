"""The config: its scalars by dotted name, what an override is refused for, and what a faulty file is told."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.pipeline.stages import LayerCosts
from shardlab.run.config import (
    AdamW,
    Config,
    attribute_help,
    load_config,
    override,
    scalars,
    scalars_of_every_config,
)
from shardlab.sharding.rules import Rule, Rules
from tests.run import tiny


def written(folder: Path, text: str) -> str:
    file = folder / "mine.py"
    file.write_text(text)
    return str(file)


def test_the_scalars_are_the_configs_own_and_those_of_its_dataclasses() -> None:
    found = {scalar.name: scalar for scalar in scalars(tiny.config())}
    own = {field.name for field in dataclasses.fields(Config) if isinstance(field.default, str | int | float)}
    assert own == {
        *(
            "batch_size",
            "microbatches",
            "schedule",
            "virtual",
            "stages",
            "zero",
            "remat",
            "dtype",
            "reduce_dtype",
            "head",
            "gather",
            "accumulate",
            "sends",
            "scatter",
            "batch_axes",
        ),
        *("steps", "seed", "eval_every", "eval_batches", "unit", "compiler_options"),
        *("weights", "names", "cast_weights"),
    }
    model = ("num_features", "num_layers", "model_dim", "hidden_dim", "num_classes", "dropout")
    inner = {"optimizer.learning_rate", "data.scale", *(f"model.{name}" for name in model)}
    assert set(found) == own | inner
    assert (found["steps"].kind, found["steps"].value, found["steps"].help) == (int, 4, "train steps.")
    assert (found["data.scale"].kind, found["data.scale"].value) == (float, 1.0)
    assert found["data.scale"].help == "of the features."


def test_every_scalar_that_any_config_has_is_explained() -> None:
    found = scalars_of_every_config()
    assert {scalar.name for scalar in found} < {scalar.name for scalar in scalars(tiny.config())}
    assert all(scalar.help.endswith(".") for scalar in found)
    assert set(attribute_help(Config)) == {field.name for field in dataclasses.fields(Config)}


def test_help_goes_on_over_lines_and_is_shared_by_names() -> None:
    class Sizes:
        """Some sizes.

        Attributes:
          width, depth: of the model,
            in units.
          rate: of dropout.

        More: text.
        """

    assert attribute_help(Sizes) == {
        "width": "of the model, in units.",
        "depth": "of the model, in units.",
        "rate": "of dropout.",
    }


def test_a_scalar_may_be_none_and_a_wider_annotation_takes_the_values_type() -> None:
    @dataclasses.dataclass(frozen=True)
    class Data(tiny.Points):
        root: str | None = None
        size: Any = 3
        names: tuple[str, ...] = ()
        nothing: Any = None

    found = {scalar.name: scalar.kind for scalar in scalars(tiny.tiny(data=Data())) if scalar.name.startswith("data.")}
    assert found == {"data.scale": float, "data.root": str | None, "data.size": int}


def test_an_override_changes_what_it_names() -> None:
    before = tiny.config()
    after = override(before, {"steps": 9, "model.num_layers": 5, "model.model_dim": 4, "data.scale": 2.0})
    assert (after.steps, after.model.num_layers, after.model.model_dim, after.data) == (9, 5, 4, tiny.Points(2.0))
    assert dataclasses.replace(after, steps=4, model=before.model, data=before.data) == before
    assert override(before, {}) == before


def test_an_override_of_what_is_no_scalar_names_the_nearest() -> None:
    with pytest.raises(DeclarationError) as error:
        override(tiny.config(), {"model.num_layer": 3, "mesh": "data=8"})
    first, *faults = str(error.value).splitlines()
    assert first == "2 faults in the declaration:"
    assert faults[0].startswith(
        "  1. model.num_layer: is not a scalar of this config; did you mean 'model.num_layers'? there are batch_size, "
    )
    assert faults[1].startswith("  2. mesh: is not a scalar of this config; ")


def test_what_a_users_dataclass_refuses_is_told_with_its_name() -> None:
    @dataclasses.dataclass(frozen=True)
    class Data(tiny.Points):
        def __post_init__(self) -> None:
            if self.scale <= 0:
                raise ValueError(f"scale={self.scale} is not positive")

    with pytest.raises(DeclarationError, match=r"^data: scale=-1\.0 is not positive$"):
        override(tiny.tiny(data=Data()), {"data.scale": -1.0})


def test_whole_numbers_that_are_none_are_refused_together() -> None:
    message = (
        "5 faults in the declaration:\n"
        "  1. batch_size: is 0; give a whole number, 1 or more\n"
        "  2. steps: is 2.5; give a whole number, 1 or more\n"
        "  3. eval_every: is -1; give a whole number, 0 or more\n"
        "  4. eval_batches: is 0; give a whole number, 1 or more\n"
        "  5. seed: is -1; give a whole number, 0 or more"
    )
    changes: dict[str, Any] = {"batch_size": 0, "steps": 2.5, "eval_every": -1, "eval_batches": 0, "seed": -1}
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(tiny.config(), **changes)


def test_an_optax_optimizer_pairs_for_rules_and_a_tuple_for_a_spec_are_taken_as_they_are() -> None:
    made = optax.adamw(1e-3)
    pairs: list[Any] = [("**/kernel", P(None, "tensor")), Rule("**", None)]
    config = tiny.tiny("data=2,tensor=2", optimizer=made, rules=pairs, activation=("data",))
    assert config.make_optimizer() is made
    assert config.rules == Rules(pairs)
    assert config.activation == P("data")
    plan = config.plan()
    assert plan.activation_spec == P("data")
    assert {parameter.source for parameter in plan.parameters} == {'rule 1, "**/kernel"', 'rule 2, "**"'}
    assert dataclasses.replace(config, steps=5).rules == config.rules
    saved = tiny.tiny("data=2,tensor=2", saved_activation=("data", "tensor"))
    assert saved.saved_activation == saved.plan().saved_activation_spec == P("data", "tensor")
    with pytest.raises(DeclarationError, match="saved_activation: axis 'tensr' is not in the mesh"):
        tiny.tiny("data=2,tensor=2", saved_activation=("data", "tensr"))
    assert tiny.tiny(optimizer=lambda: made).make_optimizer() is made
    with pytest.raises(DeclarationError, match="no rule matches it"):
        tiny.tiny(rules=[]).plan()


def test_stages_may_be_numbers_or_costs_too() -> None:
    model = tiny.MLPConfig(num_layers=5, model_dim=8, hidden_dim=16)
    for stages in ("E t*4 | t H", (4, 1)):
        assert tiny.tiny("data=2,stage=2", model=model, stages=stages).plan().layers == (4, 1)
    dear = LayerCosts(blocks=(1,) * 5, before=9)
    assert tiny.tiny("data=2,stage=2", model=model, head="last_stage", stages=dear).plan().layers == (2, 3)
    assert tiny.tiny("data=2,stage=2", model=model).plan().layers == (3, 2)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mesh": (
        {"mesh": {"data": 8}},
        "mesh: is {'data': 8}, a dict; give MeshSpec({'data': 8}, batch='data', target='cpu:8')",
    ),
    "data": (
        {"data": [1, 2]},
        "data: is [1, 2], a list, which has no abstract_batch, train, held_out; give an object that has them, as "
        "shardlab.run.data.ByteText does",
    ),
    "optimizer": (
        {"optimizer": 0.1},
        "optimizer: is 0.1, a float; give an optax optimizer, or a function that makes one",
    ),
    "stages": (
        {"stages": 4},
        "stages: is 4, an int; give a list as 'E t*2 | t*2 H' or (2, 2), 'balanced', LayerCosts, or '' for even ones",
    ),
    "loss": ({"loss": None}, "loss: is None, a NoneType; give a function (y, batch) -> (sum, weight)"),
    "pipeline": (
        {"pipeline": "blocks"},
        "pipeline: is 'blocks', a str; give Pipeline(before=..., blocks=..., after=...), or None",
    ),
    "specs": ({"specs": ["a"]}, "specs: is ['a'], a list; give specs by path, as {'norm/scale': P()}, or None"),
    "activation": (
        {"activation": "data"},
        "activation: 'data' is not a PartitionSpec; write P(...) with one entry per dim, or None to replicate",
    ),
    "an axis of the activation": (
        {"activation": ("data", ("tensor", "tensr"))},
        "activation: axis 'tensr' is not in the mesh (data, stage, tensor); did you mean 'tensor'? name a mesh axis, "
        "or None",
    ),
    "rules": (
        {"rules": 3},
        "rules: is 3; give Rules, or pairs as [('**/kernel', P(None, 'tensor')), ('**', None)]",
    ),
    "a rule": (
        {"rules": [("**", None), "**"]},
        "rules, number 2: is '**', neither a Rule nor a pair; give Rules, or pairs as [('**/kernel', "
        "P(None, 'tensor')), ('**', None)]",
    ),
    "stages by number": (
        {"stages": {0: 1, 1: 1}},
        "stages: is {0: 1, 1: 1}, a dict; give a list as 'E t*2 | t*2 H' or (2, 2), 'balanced', LayerCosts, or '' for "
        "even ones",
    ),
    "several": (
        {"zero": "1", "head": 3},
        "2 faults in the declaration:\n  1. zero: is '1', a str; give a whole number, 0 to 3\n"
        "  2. head: is 3, an int; give a text",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_kind_than_can_be_used(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(tiny.config(), **changes)


def test_a_plan_has_what_the_config_declares() -> None:
    declared: dict[str, Any] = {
        "microbatches": 4,
        "schedule": "gpipe",
        "zero": 1,
        "remat": "full",
        "dtype": "bfloat16",
        "reduce_dtype": "bfloat16",
        "head": "last_stage",
        "batch_size": 24,
    }
    plan = tiny.tiny("data=2,stage=2", **declared).plan()
    names = {"microbatches": "num_microbatches"}
    assert {name: getattr(plan, names.get(name, name)) for name in declared} == declared
    assert plan.mesh.sizes == {"data": 2, "stage": 2, "tensor": 1}
    assert plan.pipeline == tiny.config().pipeline
    assert not tiny.tiny("data=2", batch_axes="automatic").plan().batch_axes_manual


@pytest.mark.parametrize(
    ("stages", "layers"),
    [
        *(
            ("E t | t H", (1, 1)),
            ("0,2", (0, 2)),
            ((2, 0), (2, 0)),
            ([0, 2], (0, 2)),
            ("balanced", (1, 1)),
            ("", (1, 1)),
        ),
        (LayerCosts((3, 1)), (1, 1)),
    ],
)
def test_stages_of_a_config(stages: Any, layers: tuple[int, ...]) -> None:
    config = tiny.tiny("data=2,stage=2", stages=stages)
    assert config.plan().layers == layers
    (scalar,) = [one for one in scalars(config) if one.name == "stages"]
    assert (scalar.kind, scalar.value) == (str, stages if isinstance(stages, str) else "")
    assert override(config, {"stages": "t*2 | t*0"}).plan().layers == (2, 0)


def test_a_file_is_loaded(tmp_path: Path) -> None:
    assert isinstance(load_config(tiny.__file__), Config)
    text = (
        "from __future__ import annotations\nimport dataclasses\nfrom tests.run import tiny\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Data(tiny.Points):\n    size: int = 3\n    width: float = 1.5\n\n"
        "def config():\n    return dataclasses.replace(tiny.config(), data=Data())\n"
    )
    # What the text annotations of a file that was run mean, nobody can look up afterwards: the values tell.
    kinds = {scalar.name: scalar.kind for scalar in scalars(load_config(written(tmp_path, text)))}
    assert (kinds["data.size"], kinds["data.width"], kinds["data.scale"]) == (int, float, float)


FAULTY = {
    "x = 1\nraise RuntimeError('no luck')\n": "line 2, RuntimeError: no luck",
    "x = 1\n\ndef config(:\n": "line 3, SyntaxError: ",
    "import sys\nsys.exit('bye')\n": "line 2, SystemExit: bye",
    "x = 1\nraise BaseException('x')\n": "line 2, BaseException: x",
    "def config():\n    raise BaseException('y')\n": "line 2, BaseException: y",
    "def config():\n    return inner()\n\ndef inner():\n    return [][1]\n": "line 5, IndexError: list index out",
    "import json\ndef config():\n    return json.loads('{')\n": "line 3, JSONDecodeError: ",
    "configuration = None\n": "has no function config(); write def config() -> Config: return Config(model=..., ...)",
    "config = 3\n": "has no function config(); write ",
    (
        "from shardlab.run.config import Config\n\ndef config():\n    return Config(model=None, microbatchs=8)\n"
    ): "line 4, TypeError: Config.__init__() got an unexpected keyword argument 'microbatchs'; did you mean "
    "'microbatches'?",
    "def config():\n    return 3\n": "config() returns int, not shardlab.run.config.Config; write def config()",
}


@pytest.mark.parametrize("text", FAULTY)
def test_a_faulty_file_is_told_its_line(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DeclarationError) as error:
        load_config(path)
    assert str(error.value).startswith(f"config {path!r}: {FAULTY[text]}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["raise KeyboardInterrupt", "def config():\n    raise KeyboardInterrupt"])
def test_ctrl_c_in_a_file_is_no_fault_of_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_config(written(tmp_path, text))


def test_a_declaration_that_is_faulty_speaks_for_itself(tmp_path: Path) -> None:
    text = (
        "from shardlab.mesh.spec import MeshSpec\n\ndef config():\n    return MeshSpec({'data': 3}, target='cpu:8')\n"
    )
    with pytest.raises(DeclarationError, match=r"^mesh: data=3 is 3 devices, target cpu:8 has 8; "):
        load_config(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    there = written(tmp_path, "")
    missing = str(tmp_path / "mime.py")
    message = f"config {missing!r}: there is no such file; did you mean {there!r}? give the path of a Python file"
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        load_config(missing)
    with pytest.raises(DeclarationError, match=r"there is no such file; give the path of a Python file$"):
        load_config("/nowhere/mine.py")


def test_the_learning_rate_rises_and_falls_along_a_cosine() -> None:
    rate = AdamW(learning_rate=0.5, warmup=4, decay=12, final=0.2).rate
    # The first step is one that moves.
    assert [float(rate(step)) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
    # At the peak after three steps and at the end after twelve: in 4.5 more a cosine is half of the way down.
    assert math.isclose(float((rate(7) + rate(8)) / 2), (0.5 + 0.1) / 2, rel_tol=1e-6)
    assert math.isclose(float(rate(12)), 0.1, rel_tol=1e-6)
    assert float(rate(1000)) == float(rate(12))
    assert float(AdamW(learning_rate=0.5, decay=12).rate(0)) == 0.5
    held = AdamW(learning_rate=0.5, warmup=2).rate
    assert [float(held(step)) for step in (0, 1, 2, 1000)] == [0.25, 0.5, 0.5, 0.5]
    for decay in (0, 12):
        assert float(AdamW(learning_rate=0.5, warmup=1, decay=decay).rate(0)) == 0.5
    assert float(AdamW(learning_rate=0.5).rate(1000)) == 0.5


def test_a_decay_that_ends_in_the_warmup() -> None:
    message = "decay: ends at step 5, before the warmup of 5 steps; give a later step, or 0 for none"
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        AdamW(warmup=5, decay=5)


@pytest.mark.parametrize("clip_norm", [0.0, 2.0, 20.0])
def test_adamw_by_hand(clip_norm: float) -> None:
    """Two steps in NumPy, after arXiv 1711.05101; two, since Adam's first forgets how long the gradient was."""
    made = AdamW(learning_rate=0.25, b1=0.5, b2=0.75, weight_decay=0.125, clip_norm=clip_norm)()
    found = jnp.array([1.0, -2.0])
    state, expected, mean, square = made.init(found), np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate((np.array([5.0, 12.0]), np.array([3.0, -4.0])), start=1):
        updates, state = made.update(jnp.asarray(gradient, jnp.float32), state, found)
        found = found + updates
        cut = gradient * min(1.0, clip_norm / np.linalg.norm(gradient)) if clip_norm else gradient
        mean, square = 0.5 * mean + 0.5 * cut, 0.75 * square + 0.25 * cut**2
        direction = (mean / (1 - 0.5**step)) / (np.sqrt(square / (1 - 0.75**step)) + 1e-8)
        expected = expected - 0.25 * (direction + 0.125 * expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_reading_the_scalars_starts_no_jax() -> None:
    code = (
        "import sys\nfrom shardlab.run.config import scalars_of_every_config\n"
        "scalars_of_every_config()\nprint('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_options_of_the_compiler_are_read_and_refused_where_they_are_declared() -> None:
    assert tiny.tiny(compiler_options="xla_a=true, xla_b=2").options_of_xla() == {"xla_a": "true", "xla_b": "2"}
    assert tiny.tiny().options_of_xla() == {}
    with pytest.raises(DeclarationError) as caught:
        tiny.tiny(compiler_options="xla_a,xla_b=")
    assert str(caught.value) == (
        "2 faults in the declaration:\n"
        "  1. compiler_options: 'xla_a' is not NAME=VALUE; write xla_name=true,xla_other=2\n"
        "  2. compiler_options: 'xla_b=' is not NAME=VALUE; write xla_name=true,xla_other=2"
    )
