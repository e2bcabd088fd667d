"""The held-out loss: the same on any mesh, a mean over all batches together, and of no other model's run."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from shardlab.mesh.faults import DeclarationError
from shardlab.models.mlp import MLP, MLPConfig, label_loss
from shardlab.run.config import Config, override
from shardlab.run.evaluate import evaluate
from shardlab.run.loop import train
from shardlab.run.record import RunRecord, read_arrays, write_arrays
from shardlab.run.view import Silent
from shardlab.sharding.rules import Rule, Rules
from tests.run.tiny import tiny

# 17 columns, which neither 2 nor 4 divides, are stored padded; three layers on two stages leave a slot empty.
RULES = Rules(
    (
        Rule("blocks/*/up/kernel", P(None, "tensor"), pad=True),
        Rule("blocks/*/down/kernel", P("tensor"), pad=True),
        Rule("**", P()),
    )
)


def weighted(logits: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of each example, counted as often as its label says: no two batches weigh the same."""
    rows = jax.vmap(lambda y, label: label_loss(y[None], {"labels": label[None]})[0])(logits, batch["labels"])
    return jnp.sum(rows * batch["labels"]), jnp.sum(batch["labels"]).astype(logits.dtype)


def declared(sizes: str, **changes: Any) -> Config:
    given = {"model": MLPConfig(num_layers=3, model_dim=8, hidden_dim=17), "rules": RULES, "loss": weighted}
    return tiny(sizes, **{**given, "eval_batches": 3, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return train(declared("data=2", steps=2, eval_every=1), tmp_path_factory.mktemp("run"))


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def test_a_runs_parameters_have_its_last_loss_on_another_mesh(run: RunRecord) -> None:
    view = Heard()
    found = evaluate(declared("stage=2,tensor=4", zero=3, batch_size=16), run.directory, view=view)
    assert found["eval_loss"] == pytest.approx(run.report["eval_loss"], rel=1e-6)
    assert view.texts == [f"held-out loss {found['eval_loss']:.3f} nats"]
    held_out = declared("data=1").data.held_out(16, 3)
    assert found == {
        "eval_loss": found["eval_loss"],
        "unit": "nats",
        "tokens": sum(int(batch["labels"].sum()) for batch in held_out),
        "batches": 3,
        "batch_size": 16,
        "parameters": str(run.directory),
    }


def test_the_loss_is_over_all_batches_together(run: RunRecord) -> None:
    """Sum over sum in NumPy: the mean of the batches' means is another number."""
    get = read_arrays(run.directory)
    sums, weights = [], []
    for batch in declared("data=1").data.held_out(16, 3):
        x = batch["features"] @ get["inputs/kernel"] + get["inputs/bias"]
        for layer in range(3):
            up, down = f"blocks/{layer}/up", f"blocks/{layer}/down"
            x = x + np.tanh(x @ get[f"{up}/kernel"] + get[f"{up}/bias"]) @ get[f"{down}/kernel"] + get[f"{down}/bias"]
        logits = x @ get["outputs/kernel"] + get["outputs/bias"]
        rows = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(16), batch["labels"]]
        sums.append((rows * batch["labels"]).sum())
        weights.append(batch["labels"].sum())
    assert run.report["eval_loss"] == pytest.approx(sum(sums) / sum(weights), rel=1e-6)
    means = [total / weight for total, weight in zip(sums, weights, strict=True)]
    assert abs(np.mean(means) - sum(sums) / sum(weights)) > 1e-3


def test_without_a_run_the_seeds_parameters_are_evaluated_aloud(run: RunRecord) -> None:
    view = Heard()
    found = evaluate(declared("tensor=2"), view=view)
    assert found["eval_loss"] == pytest.approx(run.report["initial_eval_loss"], rel=1e-6)
    assert found["parameters"] == "initial"
    assert view.texts[0] == "no run is named: these are the parameters that seed 0 gives, before any step"


def test_parameters_that_are_narrow_themselves(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Narrow(MLPConfig):
        def __call__(self, rngs: nnx.Rngs) -> MLP:
            made = super().__call__(rngs)
            nnx.update(made, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(made, nnx.Param)))
            return made

    model = Narrow(num_layers=1, model_dim=4, hidden_dim=4)
    config = tiny("data=1", model=model, dtype="bfloat16", steps=1, eval_every=1, pipeline=None)
    assert {parameter.dtype for parameter in config.plan().parameters} == {"float32"}  # the master copies
    made = train(config, tmp_path)
    assert evaluate(config, tmp_path)["eval_loss"] == made.report["eval_loss"]


def test_a_loss_over_nothing_is_no_number() -> None:
    config = tiny("data=1", loss=lambda y, batch: (0 * jnp.sum(y), jnp.zeros(())), eval_batches=1, pipeline=None)
    found = evaluate(config)
    assert np.isnan(found["eval_loss"])
    assert found["tokens"] == 0


def test_a_run_of_another_model_is_refused_with_every_difference(run: RunRecord) -> None:
    config = override(declared("data=1"), {"model.num_layers": 1, "model.num_classes": 12})
    with pytest.raises(DeclarationError) as error:
        evaluate(config, run.directory)
    way_out = "give the config, with the overrides, that the run was made with"
    where = f"run {str(run.directory)!r}"
    expected = [
        # of two layers, each array once
        *(f"blocks/1/{name} and 1 more like it: is in {where} and not in the model" for name in _block()),
        f"outputs/bias: is [10] in {where} and [12] in the model",
        f"outputs/kernel: is [8, 10] in {where} and [8, 12] in the model",
    ]
    first, *faults = str(error.value).splitlines()
    assert first == "6 faults in the declaration:"
    assert sorted(re.sub(r"^ +\d+\. ", "", fault) for fault in faults) == [f"{text}; {way_out}" for text in expected]


def test_an_array_that_a_run_lacks(run: RunRecord, tmp_path: Path) -> None:
    arrays = read_arrays(run.directory)
    write_arrays(tmp_path, [(path, array) for path, array in arrays.items() if path != "inputs/bias"])
    with pytest.raises(DeclarationError, match=rf"^inputs/bias: run '{tmp_path}' has none; give the config, "):
        evaluate(declared("data=1"), tmp_path)


def test_arrays_of_another_kind_are_refused(run: RunRecord, tmp_path: Path) -> None:
    arrays = read_arrays(run.directory)
    write_arrays(tmp_path, ({**arrays, "inputs/bias": arrays["inputs/bias"].astype(np.complex64)}).items())
    with pytest.raises(
        DeclarationError, match=rf"^inputs/bias: is complex64 in run '{tmp_path}' and float32 in the mod"
    ):
        evaluate(declared("data=1"), tmp_path)


def test_a_directory_without_parameters_is_refused_before_a_plan_is_made(tmp_path: Path) -> None:
    config = dataclasses.replace(declared("data=1"), model=None)
    with pytest.raises(DeclarationError, match=rf"^run '{tmp_path}': holds no parameters\.npz; "):
        evaluate(config, tmp_path)


def _block() -> tuple[str, ...]:
    return "down/bias", "down/kernel", "up/bias", "up/kernel"
