"""The templates for clusters: they parse, and what they call is there."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardlab.cli import _Train
from shardlab.cli.configured import configured

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_there_is_one_for_each_kind_of_cluster() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == ["jobset.yaml", "slurm.sh", "tpu_vms.sh"]


def options_of(words: list[str]) -> Any:
    """What `shardlab train` reads of a command that starts the processes of a cluster."""
    assert words[:2] == ["shardlab", "train"]
    options = configured(_Train, words[2:], "train", "").options
    assert options.distributed
    assert options.resume
    assert options.checkpoint_every > 0
    return options


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_starts_train_with_options_that_it_has(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with programs in place of the cluster's, which write down what they are called with."""
    for name in ("srun", "gcloud"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@" > ' + str(tmp_path / "called") + "\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    config = str(ROOT / "configs/llama3_8b.py")
    given = [config, "--mesh", "data=64"]
    if script.name == "tpu_vms.sh":
        given = ["pod", "zone", *given, "--target", "tpu:v5p:4x4x4"]
    subprocess.run(["bash", str(script), *given], check=True, timeout=60)
    called = (tmp_path / "called").read_text().splitlines()
    if script.name == "slurm.sh":
        words = called[called.index("shardlab") :]
        assert "--kill-on-bad-exit=1" in called
    else:
        assert "--worker=all" in called
        words = shlex.split("\n".join(called).partition("--command=")[2])
    assert options_of(words).mesh == "data=64"


def test_the_job_set_starts_as_many_pods_as_its_slice_has_hosts() -> None:
    held = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    assert (held["apiVersion"], held["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [job] = held["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    words = [*container["command"], *container["args"]]
    options = options_of([*words[:2], str(ROOT / words[2]), *words[3:]])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert options.target == f"tpu:v5p:{topology}"
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == 4 * 8 * 8 // chips
    assert job["backoffLimit"] == 0
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
