"""Where a plan's axes lie: on other links than usual, and over slices joined by slow ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import shardlab.cli
from shardlab.mesh.spec import MeshSpec
from shardlab.mesh.topology import lay_out
from shardlab.models.decoder import DecoderConfig
from shardlab.search.candidates import meshes
from shardlab.search.choice import Choice, changed, choice_of, command
from shardlab.search.confirm import compiled
from shardlab.search.estimate import Estimator
from shardlab.search.explain import links
from shardlab.search.places import other_links, slices_over
from shardlab.search.plan_file import PlanFile, read_plan, write_plan
from shardlab.search.search import Found, search
from shardlab.search.subject import Subject
from shardlab.search.text import how, plan_facts, text
from shardlab.search.why import difference
from tests.search.subjects import decoder

AXES = {"data": 8, "stage": 1, "tensor": 1}
MODEL = DecoderConfig(
    num_layers=8, model_dim=2048, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=8192, vocab_size=32000
)
SMALL_SLICE, SLICES = "tpu:v5e:2x8", "2*tpu:v5e:4x4"


@pytest.fixture(scope="module")
def laid() -> tuple[Subject, Found]:
    """Four examples on 2 x 8 chips: data 4 and tensor 4 are best, data in shards over both dims."""
    config = decoder(AXES, model=MODEL, seq=1024, dtype="bfloat16", remat="full", batch_size=4)
    return search(config, SMALL_SLICE)


@pytest.fixture(scope="module")
def sliced() -> tuple[Subject, Found]:
    """Two slices: what stages send over the network between them is less than gradients are."""
    model = dataclasses.replace(MODEL, model_dim=4096, num_heads=32, mlp_dim=14336)
    config = decoder(AXES, model=model, seq=1024, dtype="bfloat16", remat="full", batch_size=16)
    return search(config, SLICES)


SPECS = {
    "stages over islands": MeshSpec(
        {"data": 4, "stage": 4, "tensor": 4}, batch="data", stage="stage", target="gpu:h100:8x8"
    ),
    "three dims": MeshSpec({"data": 16, "stage": 2, "tensor": 2}, batch="data", stage="stage", target="tpu:v5p:4x4x4"),
    "slices": MeshSpec({"data": 32, "tensor": 4}, batch="data", target="2*tpu:v5e:4x16", dcn={"data": 2}),
}


@pytest.mark.parametrize("name", list(SPECS))
def test_other_links_are_layouts_that_differ(name: str) -> None:
    spec = SPECS[name]
    found = other_links(spec)
    assert found
    layouts = [lay_out(spec), *(lay_out(dataclasses.replace(spec, links=links)) for links in found)]
    parts = [{links.axis: links.dims for links in layout.axes} for layout in layouts]
    assert all(one != other for place, one in enumerate(parts) for other in parts[:place])


def test_an_axis_alone_lies_on_all_links_there_are() -> None:
    assert other_links(MeshSpec({"data": 64, "tensor": 1}, batch="data", target="tpu:v5p:4x4x4")) == ()


def test_a_plan_on_other_links_is_first_where_it_is_faster(laid: tuple[Subject, Found]) -> None:
    subject, plans = laid
    best = plans.ranked[0]
    assert best.choice.links
    estimator = Estimator(subject)
    usual = estimator.estimate(dataclasses.replace(best.choice, links=()))
    assert best.total_seconds < 0.99 * usual.total_seconds
    assert (best.wire, best.memory) == (usual.wire, usual.memory)
    told = {what: (a, b) for what, a, b in difference(best, usual)}
    assert told["links"] == ("data on x x y, tensor on y", "as laid out")
    assert "data on x x y, tensor on y" in how(best.choice, subject)
    assert "data on x x y, tensor on y" in text(plans, subject, config_path="c.py", top=1)
    assert " on " not in how(usual.choice, subject)


def test_a_plan_file_keeps_the_links(laid: tuple[Subject, Found], tmp_path: Path) -> None:
    subject, plans = laid
    best, config = plans.ranked[0].choice, subject.config
    assert command("c.py", best, config, SMALL_SLICE) is None  # options have no spelling for them
    overrides = json.loads(json.dumps(best.overrides(SMALL_SLICE)))
    made = changed(config, overrides)
    assert choice_of(made) == best
    assert made.mesh.links == best.links
    write_plan(tmp_path / "plan.json", PlanFile("c.py", {}, overrides, made.plan()))
    held = read_plan(tmp_path / "plan.json")
    assert held.plan.mesh.links == best.links
    held.check(held.apply(config).plan(), "plan.json")


def test_of_several_slices_every_mesh_runs_over_them_by_batch_or_stages() -> None:
    subject = Subject(decoder(AXES, batch_size=64), "4*tpu:v5e:2x2")
    found = list(meshes(subject))
    over = {dcn for _, dcn in found}
    assert over == {(("data", 4),), (("data", 2), ("stage", 2)), (("stage", 4),)}
    for mesh, dcn in found:
        sizes = dict(mesh)
        assert all(sizes[axis] % parts == 0 for axis, parts in dcn)
        MeshSpec(mesh, batch="data", stage="stage", target="4*tpu:v5e:2x2", dcn=dcn)


def test_slices_are_shared_out_whole() -> None:
    assert len(list(slices_over({"data": 4, "stage": 4}, ("data", "stage"), 4))) == 3
    assert list(slices_over({"data": 6, "stage": 2}, ("data", "stage"), 4)) == [(("data", 2), ("stage", 2))]
    assert list(slices_over({"data": 3}, ("data",), 2)) == []
    assert list(slices_over({"data": 3}, ("data",), 1)) == [()]


def test_stages_over_slices_win_where_gradients_are_more_than_x(sliced: tuple[Subject, Found]) -> None:
    subject, plans = sliced
    best = plans.ranked[0].choice
    assert best.dcn == (("stage", 2),)
    assert "stage over 2 slices" in how(best, subject)
    over_data = next(one for one in plans.ranked if one.choice.dcn == (("data", 2),))
    assert over_data.total_seconds > plans.ranked[0].total_seconds
    assert links(over_data, subject, ("data",)) == "DCN"
    assert links(plans.ranked[0], subject, ("stage",)) == "DCN"
    facts = plan_facts(plans.ranked[0], plans, subject, "c.py")
    assert {row["links"] for row in facts["wire"] if row["axes"] == ["stage"]} == {"DCN"}
    assert {row["links"] for row in facts["wire"] if row["axes"] == ["tensor"]} == {"ICI"}
    assert facts["plan"]["dcn"] == {"stage": 2}


def test_the_network_between_slices_is_what_gradients_over_it_wait_for() -> None:
    """Of the same devices: one slice of 32 chips, and two of 16."""
    config = decoder(AXES, model=MODEL, seq=1024, dtype="bfloat16", remat="full", batch_size=32)
    mesh = (("data", 32), ("stage", 1), ("tensor", 1))
    whole = Estimator(Subject(config, "tpu:v5e:4x8")).estimate(Choice(mesh=mesh))
    two = Estimator(Subject(config, SLICES)).estimate(Choice(mesh=mesh, dcn=(("data", 2),)))
    assert two.wire == whole.wire
    assert two.seconds["gradients"] > 1.5 * whole.seconds["gradients"]
    assert two.seconds["compute"] == whole.seconds["compute"]


def test_a_plan_over_slices_is_made_and_has_a_command_line(sliced: tuple[Subject, Found]) -> None:
    subject, plans = sliced
    best = plans.ranked[0].choice
    plan = changed(subject.config, best.overrides(SLICES)).plan()
    assert plan.mesh.slices == {"stage": 2}
    line = command("c.py", best, subject.config, SLICES)
    assert line is not None
    sizes = best.sizes
    assert f"--mesh data={sizes['data']},stage=2*{sizes['stage'] // 2},tensor={sizes['tensor']}" in line


CONFIG = str(Path(__file__).parents[2] / "configs/hybrid.py")


def test_the_command_line_searches_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert shardlab.cli.main(["plan", "--search", CONFIG, "--target", "2*tpu:v5e:2x2", "--out", str(file)]) == 0
    assert " over 2 slices" in capsys.readouterr().out
    assert shardlab.cli.main(["plan", CONFIG, "--plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"] == read_plan(file).plan.mesh.sizes
    assert set(read_plan(file).plan.mesh.slices.values()) == {2}


@pytest.mark.tpu
def test_a_plan_on_other_links_compiles_for_its_target() -> None:
    from shardlab.run.config import load_config

    config, target = load_config(CONFIG), "tpu:v5e:2x4"
    mesh = (("data", 4), ("stage", 1), ("tensor", 2))
    found = other_links(MeshSpec(mesh, batch="data", stage="stage", target=target))
    told = compiled(CONFIG, config, {}, Choice(mesh=mesh, links=found[0], zero=3), target)
    assert "error" not in told
    assert told["wire_bytes"] > 0
