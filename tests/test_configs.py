"""The configs that are shipped: each loads, plans and says what it shows; the quickstart on every mesh of eight."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from shardlab.plan.plan import Plan
from shardlab.run.config import Config, load_config, override
from shardlab.run.loop import train
from shardlab.step.verify import verify

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
LARGE = ("llama3_8b", "llama3_70b")
SHAPES = [(d, s, 8 // d // s) for d in (1, 2, 4, 8) for s in (1, 2, 4, 8) if d * s <= 8]


@pytest.fixture(scope="module")
def quickstart() -> Config:
    return load_config(CONFIGS["quickstart"])


def test_there_are_configs_and_ten_meshes() -> None:
    assert {"quickstart", "data_parallel", "tensor_parallel", "fsdp", "pipeline_1f1b", "hybrid"} <= set(CONFIGS)
    assert len(SHAPES) == 10


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = runpy.run_path(str(CONFIGS[name]))["__doc__"]
    shows, blank, *rest = text.strip().splitlines()
    assert re.fullmatch(r"[A-Z].{20,}\.", shows)
    assert blank == ""
    assert f"shardlab train configs/{name}.py" in rest


# A sentence of each docstring, as facts of the plan.
def stored_in_eighths(plan: Plan) -> bool:
    held = plan.bytes_per_device()
    cut = held["parameters"] * 8 == held["gradients"] == 4 * plan.num_parameters  # which accumulate whole
    return plan.zero == 3 and plan.mesh.sizes == {"fsdp": 8} and cut and not plan.notes


def is_fsdp_over(shards: int, plan: Plan) -> bool:
    held = plan.bytes_per_device()
    # Every number of the model and of its optimizer lies on one device alone, but for the scales of the norms.
    return (
        plan.zero == 3
        and set(plan.kinds) == {0}  # one program for all blocks
        and plan.mesh.sizes["data"] == shards
        and held["parameters"] < 4.01 * plan.num_parameters / shards
    )


SHOWN = {
    "data_parallel": lambda plan: plan.mesh.sizes == {"data": 8} and plan.mesh.batch == ("data",) and plan.zero == 0,
    "fsdp": stored_in_eighths,
    "hybrid": lambda plan: (
        plan.mesh.sizes == {"data": 2, "stage": 2, "tensor": 2}
        and plan.zero == 1
        and len(set(plan.layers)) == 2
        and plan.remat != "none"
        and plan.activation_spec == P("data", "tensor", None)
    ),
    "llama3_8b": lambda plan: plan.num_parameters == 8_030_261_248 and is_fsdp_over(128, plan),
    "llama3_70b": lambda plan: plan.num_parameters == 70_553_706_496 and is_fsdp_over(256, plan),
    "pipeline_1f1b": lambda plan: (plan.schedule, plan.layers, plan.num_microbatches) == ("1f1b", (1, 1, 1, 1), 8),
    "quickstart": lambda plan: plan.mesh.sizes == {"data": 2, "stage": 2, "tensor": 2},
    "tensor_parallel": lambda plan: plan.mesh.sizes == {"tensor": 8},
    "vocabulary": lambda plan: plan.vocabulary == {"unembed/kernel": 1} and plan.layers == (1, 1, 1, 1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_plans_what_it_shows(name: str) -> None:
    config = load_config(CONFIGS[name])
    assert config.eval_every
    plan = config.plan()
    assert SHOWN.get(name, bool)(plan)
    assert plan.mesh.target.startswith("tpu:v5p:" if name in LARGE else "cpu:")


@pytest.mark.parametrize(("data", "stage", "tensor"), SHAPES)
def test_the_quickstart_plans_on_every_mesh_of_eight(quickstart: Config, data: int, stage: int, tensor: int) -> None:
    mesh = quickstart.mesh.override(f"data={data},stage={stage},tensor={tensor}")
    plan = dataclasses.replace(quickstart, mesh=mesh).plan()
    assert plan.mesh.sizes == {"data": data, "stage": stage, "tensor": tensor}
    assert plan.layers == (8 // stage,) * stage
    # Kernels are split by tensor, blocks by stage; what comes before and after them is stored over the stages.
    block, outside = 4 * 64 * 64 + 3 * 64 * 192, 2 * 256 * 64
    held = 8 // stage * (block // tensor + 2 * 64) + outside // (tensor * stage) + 64 // stage
    assert plan.bytes_per_device()["parameters"] == 4 * held
    assert plan.num_parameters == 8 * (block + 2 * 64) + outside + 64


@pytest.mark.slow
def test_in_bfloat16_a_config_is_held_to_its_own_rounding() -> None:
    """Each token's embedding is in the batch a hundred times: a reference in bfloat16 would lose a fifth of the sum."""
    small = {"model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 2, "data.max_megabytes": 1.0}
    config = override(load_config(CONFIGS["data_parallel"]), {**small, "dtype": "bfloat16"})
    batch = next(config.data.train(config.batch_size))
    found = verify(config.model, config.loss, config.optimizer(), config.plan(), [batch])
    assert found.passed, str(found)
    assert found.moved
    # It was computed in bfloat16, whose rounding shows; the tolerance is twice that, or more.
    assert 1e-3 < found.max_rel_err_grad < 2e-2


def test_a_small_quickstart_learns(quickstart: Config, tmp_path: Path) -> None:
    small = {
        **{"model.num_layers": 2, "model.model_dim": 16, "model.num_heads": 2, "model.num_kv_heads": 2},
        **{"model.mlp_dim": 24, "data.seq_len": 16, "data.max_megabytes": 1.0, "optimizer.warmup": 1},
        **{"steps": 5, "batch_size": 8, "microbatches": 2, "eval_every": 0},
    }
    record = train(override(quickstart, small), tmp_path)
    assert record.report["mesh"] == {"data": 2, "stage": 2, "tensor": 2}
    assert [row["tokens"] for row in record.rows] == [8 * 16] * 5
    # 256 bytes that seem equally likely at first: log 256 = 5.545 nats.
    assert record.report["initial_loss"] == pytest.approx(5.545, abs=0.05)
    assert record.report["final_loss"] < record.report["initial_loss"] - 0.1
