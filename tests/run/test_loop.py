"""A run: rows that are the model's own numbers, the same whatever the mesh, and what it leaves, says and refuses."""

import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import shardlab.run.loop
from shardlab.mesh.faults import DeclarationError
from shardlab.models import mlp
from shardlab.models.mlp import label_loss
from shardlab.plan.plan import Plan
from shardlab.run.evaluate import evaluate
from shardlab.run.loop import train
from shardlab.run.record import FILES, Row, RunRecord, read_arrays, read_run
from shardlab.run.steps import RUN_AHEAD
from shardlab.run.view import Silent
from tests.run.tiny import Points, tiny

STEPS, EVERY = 5, 2


class Heard(Silent):
    """Keeps what a run says and shows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.rows: list[Row] = []
        self.evaluations: list[tuple[int, float | None]] = []
        self.order: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)

    def step(self, row: Row) -> None:
        self.rows.append(row)
        self.order.append(f"step {row['step']}")

    def evaluation(self, step: int, loss: float | None) -> None:
        self.evaluations.append((step, loss))
        self.order.append(f"evaluation {step}")


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, heard: Heard) -> RunRecord:
    """A run on one device, with evaluations, as deep in new directories as a user likes."""
    out = tmp_path_factory.mktemp("runs") / "a" / "b"
    return train(tiny(steps=STEPS, eval_every=EVERY), out, view=heard, about={"config": "mine.py"})


def numbers(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """The rows without their seconds."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def mean_loss(parameters: dict[str, Any], batch: Any) -> jax.Array:
    """Of the MLP written out in plain JAX, from its arrays by path."""
    get = {path: jnp.asarray(value) for path, value in parameters.items()}
    x = batch["features"] @ get["inputs/kernel"] + get["inputs/bias"]
    for layer in range(2):
        up, down = f"blocks/{layer}/up", f"blocks/{layer}/down"
        x = x + jnp.tanh(x @ get[f"{up}/kernel"] + get[f"{up}/bias"]) @ get[f"{down}/kernel"] + get[f"{down}/bias"]
    total, weight = label_loss(x @ get["outputs/kernel"] + get["outputs/bias"], batch)
    return total / weight


def initial_parameters() -> dict[str, Any]:
    """What Flax gives for the seed, on one device."""
    from flax import nnx

    state = nnx.state(mlp.MLPConfig(num_layers=2, model_dim=8, hidden_dim=16)(nnx.Rngs(0)), nnx.Param)
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def test_a_row_a_step_and_an_evaluation_is_a_field_of_its_steps_row(first: RunRecord, heard: Heard) -> None:
    lines = (first.directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert tuple(rows) == first.rows == tuple(heard.rows)
    fields = ["step", "loss", "grad_norm", "seconds", "tokens"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:  # every second step, and the last
        assert list(row) == fields + ["eval_loss"] * (row["step"] in (2, 4, 5))
        assert row["tokens"] == 16
        assert row["seconds"] > 0
    evaluated = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    assert heard.evaluations == [(0, first.report["initial_eval_loss"]), *evaluated]
    steps = ["step 1", "step 2", "evaluation 2", "step 3", "step 4", "evaluation 4", "step 5", "evaluation 5"]
    assert heard.order == ["evaluation 0", *steps]


def test_the_numbers_are_those_of_the_model_in_plain_jax(first: RunRecord) -> None:
    """Gradient descent by hand over the same batches: losses, norms of the gradients, held-out losses, parameters."""
    config, parameters = tiny(), initial_parameters()
    held_out = config.data.held_out(16, 2)
    loss_of, gradients_of = jax.jit(mean_loss), jax.jit(jax.value_and_grad(mean_loss))

    def evaluated() -> float:
        return float(np.mean([loss_of(parameters, batch) for batch in held_out]))

    assert first.report["initial_eval_loss"] == pytest.approx(evaluated(), rel=1e-5)
    for row, batch in zip(first.rows, config.data.train(16, seed=0), strict=False):
        loss, gradients = gradients_of(parameters, batch)
        norm = math.sqrt(sum(float(jnp.sum(gradient**2)) for gradient in gradients.values()))
        assert (row["loss"], row["grad_norm"]) == pytest.approx((float(loss), norm), rel=1e-5)
        parameters = {path: value - 0.1 * gradients[path] for path, value in parameters.items()}
        if "eval_loss" in row:
            assert row["eval_loss"] == pytest.approx(evaluated(), rel=1e-5)
    found = read_arrays(first.directory)
    assert set(found) == set(parameters)
    for path, value in parameters.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6)


def test_the_report_has_what_was_compiled_and_what_came_of_it(first: RunRecord) -> None:
    report = first.report
    assert json.loads((first.directory / "report.json").read_text()) == report
    assert read_run(first.directory) == first
    contract = ("mesh", "num_parameters", "bytes_per_device", "collectives", "schedule", "bubble_fraction")
    assert set(contract) <= set(report)
    assert (report["config"], report["seed"], report["interrupted"]) == ("mine.py", 0, False)
    assert (report["steps"], report["steps_done"]) == (STEPS, STEPS)
    assert (report["initial_loss"], report["final_loss"]) == (first.rows[0]["loss"], first.rows[-1]["loss"])
    assert report["eval_loss"] == first.rows[-1].get("eval_loss")
    median = statistics.median(row["seconds"] for row in first.rows)
    assert (report["seconds_per_step"], report["tokens_per_second"]) == (median, 16 / median)
    assert (report["jax"], report["device"]) == (jax.__version__, jax.devices()[0].device_kind)


def test_the_plan_and_the_curve_are_beside_it(first: RunRecord) -> None:
    assert sorted(path.name for path in first.directory.iterdir()) == sorted(FILES)
    plan = Plan.from_json((first.directory / "plan.json").read_text())
    assert plan == tiny(steps=STEPS, eval_every=EVERY).plan()
    with Image.open(first.directory / "loss.png") as image:
        assert (image.format, image.size) == ("PNG", (960, 540))
        image.verify()


def test_the_report_and_the_files_are_shown_last(first: RunRecord, heard: Heard) -> None:
    assert heard.texts[-1] == f"in {first.directory}: {', '.join(FILES)}"
    assert "754 parameters on mesh data=1 x stage=1 x tensor=1 (cpu:1)" in heard.texts[-2]
    assert not any("replaces" in text for text in heard.texts)


def test_the_same_seed_gives_the_same_numbers_and_a_run_is_replaced_aloud(first: RunRecord, tmp_path: Path) -> None:
    config, view = tiny(steps=STEPS, eval_every=EVERY), Heard()
    for name in FILES:
        (tmp_path / name).write_text("an earlier run's")
    (tmp_path / "notes.txt").write_text("the user's own")
    again = train(config, tmp_path, view=view)
    assert numbers(again.rows) == numbers(first.rows)
    assert f"{tmp_path} holds an earlier run, which this one replaces at its first step" in view.texts
    assert (tmp_path / "notes.txt").read_text() == "the user's own"
    assert not any(b"an earlier" in (tmp_path / name).read_bytes() for name in FILES)
    for path, value in read_arrays(first.directory).items():
        np.testing.assert_array_equal(read_arrays(tmp_path)[path], value)


@pytest.mark.parametrize("sizes", ["data=4", "data=2,stage=2,tensor=2"])
def test_other_meshes_give_the_same_losses(first: RunRecord, tmp_path: Path, sizes: str) -> None:
    other = train(tiny(sizes, steps=STEPS, eval_every=EVERY, microbatches=2, zero=1), tmp_path)
    for mine, theirs in zip(numbers(other.rows), numbers(first.rows), strict=True):
        assert set(mine) == set(theirs)
        np.testing.assert_allclose(list(mine.values()), [theirs[name] for name in mine], rtol=2e-6)
    assert other.report["mesh"] == tiny(sizes).mesh.sizes
    found, expected = read_arrays(tmp_path), read_arrays(first.directory)
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6)


def test_a_seed_is_the_datas_too_and_a_loss_that_is_not_finite_is_said(first: RunRecord, tmp_path: Path) -> None:
    """Features grow until they overflow: fine for two steps, and no number afterwards."""
    seeds = []

    @dataclass(frozen=True)
    class Growing(Points):
        def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
            seeds.append(seed)
            for step, batch in enumerate(super().train(batch_size, seed=seed), start=1):
                yield batch if step < 3 else {**batch, "features": batch["features"] * np.float32(np.inf)}

    view = Heard()
    record = train(tiny(steps=4, seed=1, eval_every=9, data=Growing(), pipeline=None), tmp_path, view=view)
    losses = [row["loss"] for row in record.rows]
    assert losses[2:] == [None, None]
    assert all(loss is not None and math.isfinite(loss) for loss in losses[:2])
    assert seeds == [1]
    assert losses[0] != first.rows[0]["loss"]
    said = [text for text in view.texts if "finite" in text]
    assert said == ["step 3: the loss is not finite; a lower learning rate may help"]
    assert (record.report["final_loss"], record.report["eval_loss"]) == (None, None)
    assert '"step": 3, "loss": null, "grad_norm": null, ' in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "loss.png").is_file()


def test_few_steps_are_in_flight_and_never_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waited: set[int] = set()
    ahead = []

    class Metric:
        """A number of a step, which whoever reads it has waited for."""

        def __init__(self, step: int, value: Any) -> None:
            self.step, self.value = step, value

        def __float__(self) -> float:
            waited.add(self.step)
            return float(self.value)

    class Counted:
        def __init__(self, step: Any) -> None:
            self.inner, self.count = step, 0

        def __call__(self, state: Any, batch: Any) -> Any:
            ahead.append(self.count - len(waited))
            self.count += 1
            state, metrics = self.inner(state, batch)
            return state, {name: Metric(self.count, value) for name, value in metrics.items()}

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    made = shardlab.run.loop.compile_train_step
    monkeypatch.setattr(
        shardlab.run.loop, "compile_train_step", lambda *given, **options: Counted(made(*given, **options))
    )
    record = train(tiny(steps=6, pipeline=None), tmp_path)
    assert RUN_AHEAD == 2
    assert ahead == [0, 1, 2, 2, 2, 2]
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4, 5, 6]
    assert waited == {1, 2, 3, 4, 5, 6}


@dataclass(frozen=True)
class Interrupting(Points):
    """Points that press Ctrl-C while the third batch is drawn."""

    times: int = 1

    def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(super().train(batch_size, seed=seed), start=1):
            for _ in range(self.times * (step == 3)):
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def test_ctrl_c_ends_a_run_after_its_step_with_everything_written(first: RunRecord, tmp_path: Path) -> None:
    view = Heard()
    record = train(tiny(steps=STEPS, eval_every=9, data=Interrupting()), tmp_path, view=view)
    mine, theirs = (
        [{name: value for name, value in row.items() if name != "eval_loss"} for row in numbers(rows)]
        for rows in (record.rows, first.rows)
    )
    assert mine == theirs[:3]
    report = record.report
    # Where it was stopped it is evaluated, as at the end.
    assert ["eval_loss" in row for row in record.rows] == [False, False, True]
    assert report["eval_loss"] == record.rows[-1]["eval_loss"] == evaluate(tiny(), tmp_path)["eval_loss"]
    assert (report["interrupted"], report["steps"], report["steps_done"]) == (True, STEPS, 3)
    assert report["initial_eval_loss"] == first.report["initial_eval_loss"]
    assert read_run(tmp_path) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert any("3 of 5 steps, stopped by Ctrl-C" in text and "\n  held-out loss " in text for text in view.texts)


def test_ctrl_c_while_a_step_is_waited_for_starts_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it mostly comes: the loss of step 2 is waited for while step 4 is under way."""

    class Metric(float):
        def __float__(self) -> float:
            os.kill(os.getpid(), signal.SIGINT)
            return float.__add__(self, 0.0)

    class Pressing:
        def __init__(self, step: Any) -> None:
            self.inner, self.count = step, 0

        def __call__(self, state: Any, batch: Any) -> Any:
            self.count += 1
            state, metrics = self.inner(state, batch)
            return state, {**metrics, "loss": Metric(metrics["loss"])} if self.count == 2 else metrics

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    made = shardlab.run.loop.compile_train_step
    monkeypatch.setattr(
        shardlab.run.loop, "compile_train_step", lambda *given, **options: Pressing(made(*given, **options))
    )
    record = train(tiny(steps=9, pipeline=None), tmp_path)
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4]
    assert record.report["interrupted"]


def test_a_second_ctrl_c_ends_it_at_once_and_leaves_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("an earlier run's")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(steps=STEPS, data=Interrupting(times=2), pipeline=None), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "plan.json"]


def test_what_tensorboard_was_given_is_written_whatever_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            pass

        def add_scalar(self, *given: Any) -> None:
            told.append("given")

        def close(self) -> None:
            told.append("closed")

    module = ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)

    class Short(Points):
        def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
            yield from itertools.islice(super().train(batch_size, seed=seed), 4)

    message = "data: train gives 4 batches, and the run has 6 steps; make it endless, or give fewer steps"
    with pytest.raises(DeclarationError, match=f"^{message}$"):
        train(tiny(steps=6, data=Short(), pipeline=None), tmp_path, tensorboard=True)
    assert told[-1] == "closed"
    assert "given" in told


@pytest.mark.parametrize("error", [KeyboardInterrupt, DeclarationError])
@pytest.mark.parametrize("place", ["compile_train_step", "Evaluation"])
def test_until_it_is_compiled_an_earlier_run_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, error: type[BaseException]
) -> None:
    for name in FILES:
        (tmp_path / name).write_text("an earlier run's")

    def stop(*given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(shardlab.run.loop, "compile_train_step", lambda *given, **options: None)
    monkeypatch.setattr(shardlab.run.loop, place, stop)
    view = Heard()
    with pytest.raises(error):
        train(tiny(eval_every=1), tmp_path, view=view)
    assert {(tmp_path / name).read_text() for name in FILES} == {"an earlier run's"}
    assert f"{tmp_path} holds an earlier run, which this one replaces at its first step" in view.texts


@dataclass(frozen=True)
class Otherwise(Points):
    """Points whose batches are not as they say from one batch on."""

    start: int = 1
    held: bool = False

    def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(super().train(batch_size, seed=seed), start=1):
            yield batch if step < self.start or self.held else {**batch, "labels": batch["labels"][:7]}

    def held_out(self, batch_size: int, num_batches: int) -> list[dict[str, np.ndarray]]:
        batches = super().held_out(batch_size, num_batches)
        return [{**batch, "labels": batch["labels"][:7]} for batch in batches] if self.held else batches


OTHERWISE = r"^batch labels: the plan has int32\[16\], the batch int32\[7\]; "


@pytest.mark.usefixtures("uncompiled")
def test_a_first_batch_that_is_not_as_planned_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=f"{OTHERWISE}make data.abstract_batch say what data.train gives$"):
        train(tiny("data=2", data=Otherwise()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_batches_that_are_not_as_planned(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=f"{OTHERWISE}give every batch the shapes that were planned, or "):
        train(tiny("data=2", data=Otherwise(start=2), pipeline=None), tmp_path)
    with pytest.raises(DeclarationError, match=f"{OTHERWISE}make data.abstract_batch say what data.held_out gives$"):
        evaluate(tiny(data=Otherwise(held=True)))


@pytest.mark.usefixtures("uncompiled")
def test_devices_that_are_not_there_are_missed_before_the_data_is_read(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Unread(Points):
        def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
            raise AssertionError("the data was read")

    with pytest.raises(DeclarationError, match=r"has 16 devices, 8 are here; "):
        train(tiny("data=16", data=Unread()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling, in a run that must be refused before."""

    def refuse(*given: Any) -> None:
        raise AssertionError("the run was not refused")

    monkeypatch.setattr(shardlab.run.loop, "compile_train_step", refuse)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"tensorboard": True}, "tensorboard: tensorboardX is not installed; "),
        ({}, {"profile": 5}, "profile: 5 steps of a run of 4; give 1 to 4, or 0 for none"),
        ({"batch_size": 15}, {}, "batch"),
        ({"zero": 4}, {}, "zero"),
    ],
)
def test_a_run_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: Any, options: Any, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(DeclarationError, match=f"^{message}"):
        train(tiny("data=2", **changes), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("uncompiled")
def test_data_that_cannot_be_read_leaves_an_earlier_run_alone(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Missing(Points):
        def train(self, batch_size: int, *, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
            raise DeclarationError("data: there is none")

    (tmp_path / "metrics.jsonl").write_text("an earlier run's")
    with pytest.raises(DeclarationError, match=r"^data: there is none$"):
        train(tiny(data=Missing()), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "an earlier run's"


@pytest.mark.usefixtures("uncompiled")
def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("the user's own")
    message = re.escape(f"out {str(file)!r}: is a file; give a directory")
    with pytest.raises(DeclarationError, match=f"^{message}$"):
        train(tiny(), file)
    message = re.escape(f"out {str(file / 'in' / 'it')!r}: Not a directory; give a directory that can be made")
    with pytest.raises(DeclarationError, match=f"^{message}$"):
        train(tiny(), file / "in" / "it")
    assert file.read_text() == "the user's own"


@pytest.mark.usefixtures("uncompiled")
def test_a_place_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # whoever runs the tests may write anywhere
    message = re.escape(f"out {str(tmp_path / 'out')!r}: Permission denied; give a directory that can be made")
    with pytest.raises(DeclarationError, match=f"^{message}$"):
        train(tiny(), tmp_path / "out")


def test_a_place_where_a_file_is_to_be_and_a_directory_is(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(DeclarationError, match=r"report\.json in it is a directory; give another place"):
        train(tiny(), tmp_path)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("link", "options"),
    [("profile", {"profile": 1}), ("profile/plugins", {"profile": 1}), ("tensorboard", {"tensorboard": True})],
)
def test_what_a_link_leads_to_gets_neither_profiles_nor_metrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, link: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", ModuleType("tensorboardX"))
    setattr(sys.modules["tensorboardX"], "SummaryWriter", None)  # noqa: B010
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(elsewhere)
    message = re.escape(f"out {str(out)!r}: {link} in it is a link, and what is written there lands elsewhere; remove")
    with pytest.raises(DeclarationError, match=f"^{message}"):
        train(tiny(), out, **options)
    assert list(elsewhere.iterdir()) == []
