"""Weights of transformers on any plan: the logits that it computes, and files that it reads back."""

from __future__ import annotations

import dataclasses
import functools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P

import shardlab
from shardlab.checkpoint.names import LLAMA, QWEN, Name, Names
from shardlab.checkpoint.safetensors import SINGLE, Tensor, read_folder
from shardlab.checkpoint.weights import Weights, load_safetensors, save_safetensors
from shardlab.mesh.build import build_mesh
from shardlab.mesh.faults import DeclarationError
from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import next_byte_loss
from shardlab.module.functions import Functions
from shardlab.module.pipeline import Pipeline
from shardlab.plan.make import make_plan
from shardlab.plan.plan import Plan
from shardlab.sharding.rules import Rule, Rules
from shardlab.step.state import shardings, storage_specs, users_own
from tests.checkpoint.families import FAMILIES, GOLDEN, LOGITS, Family, tokens

BATCH = {"tokens": tokens(), "targets": tokens()}
PARTS = Pipeline(before="embed", blocks="blocks", after="head", context="context")


def plan_of(family: Family, *, rows: int = 2, data: int = 1, stage: int = 1, tensor: int = 1, **options: Any) -> Plan:
    mesh = MeshSpec(
        {"data": data, "stage": stage, "tensor": tensor},
        batch="data",
        stage="stage",
        target=f"cpu:{data * stage * tensor}",
    )
    shapes = {name: jax.ShapeDtypeStruct((rows, leaf.shape[1]), leaf.dtype) for name, leaf in BATCH.items()}
    return make_plan(
        family.config,
        mesh=mesh,
        rules=family.rules,
        optimizer=optax.sgd(0.1),
        batch=shapes,
        pipeline=PARTS,
        **options,
    )


@pytest.mark.versions
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str) -> None:
    family = FAMILIES[name]
    plan = named(name)
    forward = shardlab.compile_forward(family.config, plan, BATCH)
    logits = forward(load_safetensors(GOLDEN / name, plan, family.names), {}, BATCH)
    expected = read_folder(GOLDEN / name / LOGITS)["logits"].array()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


PLANS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "fsdp": {"data": 4, "rows": 4, "zero": 3},
    "1f1b": {"stage": 3, "microbatches": 2},
    "uneven": {"stage": 2, "microbatches": 2, "stages": (2, 1)},
    "hybrid": {"data": 2, "stage": 2, "tensor": 2, "rows": 4, "microbatches": 2, "zero": 3, "stages": (1, 2)},
}


@functools.cache
def named(name: str, which: str = "") -> Plan:
    return plan_of(FAMILIES[name], **PLANS.get(which, {}))


def by_hand(name: str) -> dict[str, np.ndarray]:
    """The parameters of a family as its files say, by the format's own package and names written out."""
    found: dict[str, np.ndarray] = {}
    for file in (GOLDEN / name).glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    ours = {"tokens/embedding": found["model.embed_tokens.weight"], "norm/scale": found["model.norm.weight"]}
    if "lm_head.weight" in found:
        ours["unembed/kernel"] = found["lm_head.weight"].T
    for layer in range(3):
        here, there = f"blocks/{layer}", f"model.layers.{layer}"
        ours[f"{here}/attention_norm/scale"] = found[f"{there}.input_layernorm.weight"]
        ours[f"{here}/mlp_norm/scale"] = found[f"{there}.post_attention_layernorm.weight"]
        for one in "qkvo":
            ours[f"{here}/attention/{one}/kernel"] = found[f"{there}.self_attn.{one}_proj.weight"].T
        for one in "qkv" if name == "qwen2" else "":
            ours[f"{here}/attention/{one}/bias"] = found[f"{there}.self_attn.{one}_proj.bias"]
        for one in ("q_norm", "k_norm") if name == "qwen3" else ():
            ours[f"{here}/attention/{one}/scale"] = found[f"{there}.self_attn.{one}.weight"]
        if name == "mixtral":
            there = f"{there}.block_sparse_moe"
            ours[f"{here}/mlp/router/kernel"] = found[f"{there}.gate.weight"].T
            for one, other in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                experts = [found[f"{there}.experts.{k}.{other}.weight"].T for k in range(3)]
                ours[f"{here}/mlp/{one}"] = np.stack(experts)
        else:
            for one in ("gate", "up", "down"):
                ours[f"{here}/mlp/{one}/kernel"] = found[f"{there}.mlp.{one}_proj.weight"].T
    return ours


def own(plan: Plan, parameters: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return users_own(plan, {name: np.asarray(array) for name, array in parameters.items()})


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize(("name", "which"), [*(("mixtral", which) for which in PLANS), ("qwen2", "hybrid")])
def test_every_plan_gets_the_same_numbers_where_it_stores_them(name: str, which: str) -> None:
    plan = named(name, which)
    parameters = load_safetensors(GOLDEN / name, plan, FAMILIES[name].names)
    same(own(plan, parameters), by_hand(name))
    expected = shardings(build_mesh(plan.mesh), storage_specs(plan))
    assert {key: array.sharding for key, array in parameters.items()} == expected
    for stack in plan.stacks:
        for slot, path in enumerate(stack.members):
            assert path is not None or not np.asarray(parameters[stack.name][slot]).any()


def test_what_a_dim_is_padded_by_is_zero() -> None:
    family = FAMILIES["llama"]
    padded = (Rule(f"blocks/*/mlp/{name}/kernel", P(None, "tensor"), pad=True) for name in ("gate", "up"))
    rules = Rules((*padded, Rule("blocks/*/mlp/down/kernel", P("tensor", None), pad=True), Rule("**", P())))
    plan = plan_of(dataclasses.replace(family, rules=rules), tensor=8)
    parameters = load_safetensors(GOLDEN / "llama", plan, family.names)
    same(own(plan, parameters), by_hand("llama"))
    kernel = np.asarray(parameters["blocks/*/mlp/up/kernel"])
    assert kernel.shape == (3, 16, 24)
    assert kernel[..., :20].all()
    assert not kernel[..., 20:].any()


def test_each_device_reads_its_own_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    family, plan = FAMILIES["mixtral"], named("mixtral", "hybrid")
    read, found = Weights.read, dict[Any, list[int]]()

    def noted(self: Weights, which: Any, *given: Any) -> np.ndarray:
        part = read(self, which, *given)
        found.setdefault(which, []).append(part.nbytes)
        return part

    monkeypatch.setattr(Weights, "read", noted)
    parameters = load_safetensors(GOLDEN / "mixtral", plan, family.names)
    members = {stack.name: stack.members for stack in plan.stacks}
    for name, array in parameters.items():
        shard = array.addressable_shards[0].data
        count = len({str(shard.index) for shard in array.addressable_shards})
        assert found[members.get(name, name)] == [shard.nbytes] * count
        assert shard.nbytes * count == array.nbytes
    assert sum(len(parts) > 1 for parts in found.values()) > 10


def test_of_a_tensor_larger_than_the_machine_a_part_is_read(tmp_path: Path) -> None:
    """A file of 64 GiB, all holes but what is read."""
    rows, columns, first = 2**23, 2**11, 2**22
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 2**36]}
    header = json.dumps({"table": entry}).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**36)
        file.seek(8 + len(header) + first * columns * 4)
        file.write(np.arange(4 * columns, dtype=np.float32).tobytes())
    table = Names((Name("kernel", "table", dims=(1, 0)),))
    held = table.held("kernel", (columns, rows))
    assert held is not None
    weights = Weights(named("llama"), {"kernel": held}, read_folder(tmp_path))
    tracemalloc.start()
    part = weights.read("kernel", (range(1024), range(first, first + 4)), np.dtype(np.float32))
    assert tracemalloc.get_traced_memory()[1] < 2 * part.nbytes
    tracemalloc.stop()
    np.testing.assert_array_equal(part, np.arange(4 * columns, dtype=np.float32).reshape(4, columns).T[:1024])


def test_names_for_a_model_of_ones_own(tmp_path: Path) -> None:
    """Heads as dims of their own, several dims as one, and a number in the middle of a name."""
    rng = np.random.default_rng(0)
    theirs = {
        "h.0.attn": rng.normal(size=(6, 5)).astype(np.float32),
        **{f"h.0.experts.{k}.w": rng.normal(size=(4, 3)).astype(np.float32) for k in range(2)},
        "other.bias": rng.normal(size=7).astype(np.float32),
    }
    safetensors.numpy.save_file(theirs, tmp_path / SINGLE)
    expected = {
        "blocks_0/q": theirs["h.0.attn"].reshape(2, 3, 5).transpose(2, 0, 1),
        "blocks_0/w": np.stack([theirs[f"h.0.experts.{k}.w"].T for k in range(2)], axis=1),
    }
    names = Names(
        (Name("blocks_*/q", "h.*.attn", dims=((1, 2), 0)), Name("blocks_*/w", "h.*.experts.{1}.w", dims=(2, 0))),
        ignored=("other.*",),
    )

    def init(key: jax.Array) -> dict[str, Any]:
        return {"blocks_0": {path.partition("/")[2]: jnp.zeros(array.shape) for path, array in expected.items()}}

    model = Functions(init=init, apply=lambda values, batch: batch["tokens"] * values["blocks_0"]["q"].sum())
    rules = [("**/q", P(None, None, "tensor")), ("**/w", P("tensor", "data", None))]
    mesh = MeshSpec({"data": 2, "tensor": 3}, batch="data", target="cpu:6")
    plan = make_plan(model, mesh=mesh, rules=rules, optimizer=optax.sgd(0.1), batch=BATCH)
    parameters = load_safetensors(tmp_path, plan, names)
    same(own(plan, parameters), expected)
    assert {shard.data.shape for shard in parameters["blocks_0/w"].addressable_shards} == {(1, 1, 4)}
    save_safetensors(tmp_path / "back", plan, parameters, names)
    same(
        safetensors.numpy.load_file(tmp_path / "back" / SINGLE), {k: v for k, v in theirs.items() if k != "other.bias"}
    )


def test_what_goes_out_is_what_came_in(tmp_path: Path) -> None:
    """In small files; and in bfloat16, which comes in again where that is said."""
    family, plan = FAMILIES["mixtral"], named("mixtral", "hybrid")
    parameters = load_safetensors(GOLDEN / "mixtral", plan, family.names)
    files = save_safetensors(tmp_path / "a", plan, parameters, family.names, max_bytes=20_000)
    assert len(files) > 3
    assert max(file.stat().st_size for file in files[:-1]) <= 20_000
    back: dict[str, np.ndarray] = {}
    for file in files[:-1]:
        back |= safetensors.numpy.load_file(file)
    first: dict[str, np.ndarray] = {}
    for file in (GOLDEN / "mixtral").glob("*.safetensors"):
        first |= safetensors.numpy.load_file(file)
    same(back, first)
    save_safetensors(tmp_path / "b", plan, parameters, family.names, dtype="bfloat16")
    one = named("mixtral")
    with pytest.raises(
        DeclarationError, match=r"is bfloat16, and .* is float32; say cast=True \(--cast-weights True\)"
    ):
        load_safetensors(tmp_path / "b", one, family.names)
    narrow = own(one, load_safetensors(tmp_path / "b", one, family.names, cast=True))
    same(narrow, {path: array.astype(jnp.bfloat16).astype(np.float32) for path, array in by_hand("mixtral").items()})


def changed(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    tensors = safetensors.numpy.load_file(GOLDEN / name / SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / SINGLE)
    return folder


def rounded(tensors: dict[str, np.ndarray], dtype: Any) -> None:
    tensors.update({name: tensor.astype(dtype) for name, tensor in tensors.items()})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop(Q),
            rf"blocks/1/attention/q/kernel: is tensor '{Q}', which .* does not hold",
        ),
        (
            lambda tensors: tensors.update({f"{Q}s": tensors.pop(Q)}),
            rf"'{Q}', which .* does not hold(.|\n)*tensor '{Q}s' in .*: is no parameter of this model",
        ),
        (
            lambda tensors: tensors.update(more=np.zeros(3)),
            r"tensor 'more' in .*model.safetensors: is no parameter of this model by the table of names",
        ),
        (
            lambda tensors: tensors.update({Q: tensors[Q].T}),
            rf"tensor '{Q}' in .*: is \[16, 24\], and blocks/1/attention/q/kernel needs \[24, 16\]",
        ),
        (
            lambda tensors: rounded(tensors, jnp.bfloat16),
            r"tensor '.*norm.weight' in .* and 2 more like it: is bfloat16, and blocks/.* is float32; say cast=True "
            r"\(--cast-weights True\) to make it float32, which changes no number",
        ),
        (lambda tensors: rounded(tensors, np.float64), "is float64, and .* to make it float32, rounded"),
        (lambda tensors: rounded(tensors, np.int8), "is int8, and .* is float32; give weights that are not quantised"),
    ],
)
def test_what_is_not_the_models_is_refused_before_anything_is_read(
    change: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "array", lambda self: pytest.fail("was read"))
    with pytest.raises(DeclarationError, match=said):
        load_safetensors(changed(tmp_path, "llama", change), named("llama"), LLAMA)


def test_numbers_that_are_none_and_tensors_that_are_ignored_come_in(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q][3, 4] = np.nan
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)

    plan = named("llama")
    parameters = load_safetensors(changed(tmp_path, "llama", change), plan, "llama")
    assert np.argwhere(np.isnan(parameters["blocks/*/attention/q/kernel"])).tolist() == [[1, 4, 3]]


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan = named("qwen2")
    with pytest.raises(
        DeclarationError, match="blocks/0/attention/k/bias and 2 more like it: the table of names has no"
    ):
        load_safetensors(GOLDEN / "qwen2", plan, LLAMA)
    with pytest.raises(DeclarationError, match="names: is 'lama'; give one of llama, qwen, mixtral"):
        load_safetensors(GOLDEN / "qwen2", plan, "lama")
    with pytest.raises(DeclarationError, match=r"has 1 times \*, and 'a' has 0; make them as many"):
        Name("blocks/*/a", "a")
    with pytest.raises(DeclarationError, match=r"names dims \[0, 0\], one of them twice"):
        Name("a", "a.{0}", dims=(0,))
    flat = Names((Name("tokens/embedding", "x", dims=(0,)),))
    with pytest.raises(DeclarationError, match=r"tokens/embedding: has shape \(48, 16\), and the name 'x' is for dims"):
        load_safetensors(GOLDEN / "qwen2", plan, flat)
    parameters = load_safetensors(GOLDEN / "qwen2", plan, QWEN)
    twice = Names((Name("blocks/*/mlp/gate/kernel", "model.layers.*.mlp.up_proj.weight", (1, 0)), *QWEN.lines))
    with pytest.raises(DeclarationError, match=r"is written as 'model.layers.0.mlp.up_proj.weight', and so is another"):
        save_safetensors(tmp_path, plan, parameters, twice)
    with pytest.raises(DeclarationError, match="dtype: is 'int4'"):
        save_safetensors(tmp_path, plan, parameters, QWEN, dtype="int4")
    assert not list(tmp_path.iterdir())


@functools.cache
def losses_of_three_steps(which: str) -> list[float]:
    family, batch = FAMILIES["mixtral"], {name: np.tile(leaf, (2, 1)) for name, leaf in BATCH.items()}
    plan = plan_of(family, **{**({"data": 2} if which == "data" else PLANS.get(which, {})), "rows": 4})
    step = shardlab.compile_train_step(family.config, next_byte_loss, optax.sgd(0.1), plan, batch)
    state = step.init(0, load_safetensors(GOLDEN / "mixtral", plan, family.names))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("which", ["data", *PLANS])
def test_steps_from_them_are_the_same_on_every_plan(which: str) -> None:
    """Also where devices are given the same numbers of the host, and a step overwrites what it was given."""
    alone, losses = losses_of_three_steps("one device"), losses_of_three_steps(which)
    np.testing.assert_allclose(losses, alone, rtol=2e-5)
    assert losses[2] < losses[0]
