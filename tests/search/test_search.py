"""The search: which plan wins where, what is dropped and why, and what is said when nothing fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardlab.cli
from shardlab.mesh.faults import DeclarationError
from shardlab.models.decoder import DecoderConfig
from shardlab.search.choice import Choice, changed, choice_of, command
from shardlab.search.estimate import Estimator
from shardlab.search.explain import bound_by
from shardlab.search.plan_file import PlanFile, read_plan, write_plan
from shardlab.search.search import Found, search
from shardlab.search.subject import Subject
from shardlab.search.text import facts, pipelining, text
from shardlab.search.why import difference, table
from tests.search.subjects import decoder

AXES = {"data": 8, "stage": 1, "tensor": 1}
LARGE = DecoderConfig(
    num_layers=16, model_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14336, vocab_size=32000
)


def found(target: str, **options: Any) -> tuple[Subject, Found]:
    return search(decoder(AXES, **{"batch_size": 64, **options}), target)


def test_a_tpu_pod_needs_no_stages() -> None:
    subject, plans = found("tpu:v5p:4x4x4", model=LARGE, seq=4096, remat="full", dtype="bfloat16", batch_size=128)
    stages = dict(plans.ranked[0].choice.mesh)["stage"]
    assert stages == 1
    verdict = pipelining(plans, subject)
    assert verdict["pays"] is False
    assert verdict["words"].startswith("pipelining loses by ")
    assert verdict["by"] == pytest.approx(
        verdict["with_stages"]["estimate_seconds"] / verdict["without_stages"]["estimate_seconds"] - 1
    )


def test_mid_tier_gpus_over_a_slow_network_want_stages() -> None:
    """One GPU a host: every axis crosses the network, and stages send the least over it."""
    subject, plans = found("gpu:a6000:8x1", model=LARGE, seq=1024, remat="full", dtype="bfloat16", batch_size=16)
    assert dict(plans.ranked[0].choice.mesh)["stage"] > 1
    assert pipelining(plans, subject)["words"].startswith("pipelining wins by ")


def test_what_cannot_fit_is_dropped_and_counted() -> None:
    _, plans = found("tpu:v5e:2x4", model=LARGE, seq=2048, remat="full", dtype="bfloat16")
    assert plans.searched == len(plans.ranked) + sum(plans.dropped.values())
    assert plans.dropped["does not fit"] > 0
    room = 15.75 * 2**30
    assert all(one.needed_bytes <= room for one in plans.ranked)
    assert [one.total_seconds for one in plans.ranked] == sorted(one.total_seconds for one in plans.ranked)


def test_where_nothing_fits_it_says_what_lacks_the_least_and_what_would_help() -> None:
    huge = DecoderConfig(
        num_layers=80, model_dim=8192, num_heads=64, num_kv_heads=8, head_dim=128, mlp_dim=28672, vocab_size=128256
    )
    subject, plans = found("tpu:v5e:2x4", model=huge, seq=2048, remat="full", dtype="bfloat16")
    assert plans.ranked == ()
    assert plans.least is not None
    said = text(plans, subject, config_path="big.py", top=3)
    assert "nothing fits: " in said
    assert " lacks the least, " in said
    assert " would help" in said
    assert facts(plans, subject, config_path="big.py", top=3)["least"]["fits"] is False


def test_a_tensor_axis_that_does_not_divide_is_dropped_by_name() -> None:
    odd = DecoderConfig(num_layers=2, model_dim=36, num_heads=6, num_kv_heads=6, head_dim=6, mlp_dim=72, vocab_size=64)
    _, plans = found("tpu:v5e:2x4", model=odd)
    assert plans.dropped["a dim does not divide by its axes"] > 0


def test_the_first_plan_is_one_that_make_plan_makes_and_its_command_line_gives_it() -> None:
    config = decoder(AXES, batch_size=64)
    subject, plans = search(config, "tpu:v5e:2x4")
    best = plans.ranked[0].choice
    made = changed(config, best.overrides("tpu:v5e:2x4")).plan()
    assert made.mesh.sizes == best.sizes
    assert (made.zero, made.remat, made.num_microbatches) == (best.zero, best.remat, best.microbatches)
    line = command("c.py", best, config, "tpu:v5e:2x4")
    assert line is not None
    assert f"--mesh {','.join(f'{axis}={size}' for axis, size in best.mesh)}" in line
    assert bound_by(plans.ranked[0], subject)


def test_an_emulated_target_has_no_speed_to_rank_by() -> None:
    with pytest.raises(DeclarationError, match="a CPU has no published record"):
        search(decoder(AXES), "cpu:8")


def test_overrides_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(DeclarationError, match=r"overrides 'zeroo': is none of a plan's; did you mean 'zero'"):
        changed(decoder(AXES), {"zeroo": 1})


def test_a_kind_of_parameter_can_be_kept_whole() -> None:
    config = decoder({"data": 4, "stage": 1, "tensor": 2})
    overrides = {"whole": [["unembed/kernel", "tensor"]]}
    specs = {parameter.path: parameter.spec for parameter in changed(config, overrides).plan().parameters}
    assert "tensor" not in str(specs["unembed/kernel"])
    assert "tensor" in str(specs["tokens/embedding"])
    with pytest.raises(DeclarationError, match="whole 'unembed': is the pattern of no rule"):
        changed(config, {"whole": [["unembed", "tensor"]]})


def test_two_plans_differ_in_what_is_told_and_in_nothing_else() -> None:
    config = decoder(AXES)
    estimator = Estimator(Subject(config, "tpu:v5e:2x4"))
    one = estimator.estimate(choice_of(config))
    assert difference(one, one) == []
    assert table([], ("a", "b")) == "nothing differs"
    mesh = (("data", 8), ("stage", 1), ("tensor", 1))
    other = estimator.estimate(Choice(mesh=mesh, zero=3, gather="layer", accumulate="sharded"))
    told = {what: (a, b) for what, a, b in difference(one, other)}
    assert told["zero"] == ("0", "3")
    assert told["gather"] == ("step", "layer")
    assert "memory: parameters" in told
    assert "mesh data" not in told


def test_a_plan_file_gives_the_plan_back_and_says_what_differs(tmp_path: Path) -> None:
    config = decoder(AXES)
    overrides = {"mesh": {"data": 4, "tensor": 2}, "target": "cpu:8", "zero": 3}
    plan = changed(config, overrides).plan()
    write_plan(tmp_path / "plan.json", PlanFile("c.py", {}, overrides, plan))
    held = read_plan(tmp_path / "plan.json")
    held.check(held.apply(config).plan(), "plan.json")
    with pytest.raises(DeclarationError, match=r"is not the one it holds: .*zero: 3 -> 1"):
        held.check(changed(config, {**overrides, "zero": 1}).plan(), "plan.json")
    with pytest.raises(DeclarationError, match="there is no such file; give a file that shardlab plan --search"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DeclarationError, match="is no plan file"):
        read_plan(tmp_path / "bad.json")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"[]", b'{"plan": {"mesh": 1}}'])
def test_a_file_that_is_no_plan(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(DeclarationError, match=r"bad\.json': is no plan file \(.*; give a file that shardlab plan"):
        read_plan(tmp_path / "bad.json")


KINDS: dict[str, list[Any]] = {
    "given": [None, [], ["x", 3]],
    "overrides": [
        *(None, [], {"mesh": None}, {"mesh": [[1]]}, {"dcn": -1}, {"links": {"a": 1}}),
        *({"activation": 3}, {"whole": "x"}, {"zero": "x"}),
    ],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in KINDS.items() for value in values])
def test_a_plan_file_whose_changes_are_of_another_kind(name: str, value: Any) -> None:
    data: dict[str, Any] = {"given": {}, "overrides": {}, "plan": None, name: value}
    with pytest.raises(DeclarationError):
        PlanFile("c.py", **data).apply(decoder(AXES))


CONFIG = Path(__file__).parents[2] / "configs/hybrid.py"


def test_the_command_line_searches_and_writes_a_plan_that_plan_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    given = ["plan", "--search", str(CONFIG), "--target", "tpu:v5e:2x4", "--out", str(file), "--json", "--top", "3"]
    assert shardlab.cli.main(given) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["plans"]) == 3
    first = told["plans"][0]
    for name in ("plan", "fits", "hbm_bytes", "estimate_seconds", "bound_by", "confirmed"):
        assert name in first
    assert first["confirmed"] is False
    assert told["searched"] > 1000
    assert shardlab.cli.main(["plan", str(CONFIG), "--plan", str(file), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["mesh"] == first["plan"]["mesh"]
    assert shardlab.cli.main(["plan", str(CONFIG), "--plan", str(file), "--zero", "0"]) == 2
    assert "is not the one it holds" in capsys.readouterr().err


def test_the_command_line_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert shardlab.cli.main(["plan", str(CONFIG), "--why", "--zero 1", "--zero 3", "--json"]) == 0
    rows = {row["what"]: (row["first"], row["second"]) for row in json.loads(capsys.readouterr().out)["differs"]}
    assert rows["zero"] == ("1", "3")
    assert shardlab.cli.main(["plan", str(CONFIG), "--why", "--zero 1"]) == 2
    assert "compares two plans" in capsys.readouterr().err


def test_sizes_of_the_mesh_are_not_given_to_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert shardlab.cli.main(["plan", "--search", str(CONFIG), "--mesh", "data=8"]) == 2
    assert "--mesh: sizes of the mesh are what --search finds" in capsys.readouterr().err
