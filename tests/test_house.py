"""The house: the README's commands and example, the requirements, and that CI and hooks check the same."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRAIN = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/shardlab train configs/quickstart.py"
TEST = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n 2"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(("marker", "command"), [("train", TRAIN), ("test", TEST)])
def test_each_command_of_the_readme_stands_alone_behind_its_marker(marker: str, command: str) -> None:
    assert f"<!-- {marker} -->\n```sh\n{command}\n```\n" in README


def test_ci_finds_the_test_command_in_the_readme() -> None:
    awk = re.search(r"^command=\$\((awk .*)\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert awk is not None
    found = subprocess.run(["bash", "-c", awk[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == TEST + "\n"


def test_ci_ends_with_the_tests() -> None:
    assert (ROOT / ".ci/run").read_text().endswith('bash -euo pipefail -c "$command"\n')
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)


def test_the_checks_before_a_commit_are_those_of_ci() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    ci = (ROOT / ".ci/run").read_text()
    for tool in ("ruff format", "ruff check", "mypy"):
        assert f"python -m {tool}" in hooks
        assert f'/bin/{tool.split()[0]}" {tool.removeprefix("ruff ")}'.removesuffix(" mypy") in ci
    assert "http" not in hooks


def test_requirements_have_lower_bounds_only() -> None:
    required = project()["project"]
    extras = required["optional-dependencies"]
    machines = {"tpu", "cuda13", "gpu-compiler"}
    assert set(extras) == {"test", "dev", *machines, "tensorboard", "gcs", "gcs-emulator", "transformers"}
    for requirement in (*required["dependencies"], *chain.from_iterable(extras.values())):
        assert re.fullmatch(r"[A-Za-z\d-]+(\[\w+\])?>=[\d.]+", requirement)
    assert required["requires-python"] == ">=3.11"


def test_the_package_says_that_it_is_typed_and_its_licence_is_whole() -> None:
    assert (ROOT / "shardlab/py.typed").is_file()
    assert project()["tool"]["setuptools"]["package-data"] == {"shardlab": ["py.typed"]}
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert licence.rstrip().endswith("limitations under the License.")


def test_nothing_is_read_that_can_run_code() -> None:
    """No pickle and no `eval`; NumPy is told so wherever it reads. A config file alone is Python."""
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sorted((ROOT / "shardlab").rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if re.search(r"(import|from) (c?[pP]ickle|dill|marshal|shelve|joblib)\b", line)
        or re.search(r"(?<![\w.])(eval|exec)\(|allow_pickle=True", line)
        or (re.search(r"np\.load\(|read_array\(", line) and "allow_pickle=False" not in line)
    ]
    assert found == []


def test_the_example_of_the_readme_trains() -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    ran = subprocess.run([sys.executable, "-c", example[1]], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    losses = [float(line.split()[0]) for line in ran.stdout.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < 5.0 < losses[0] < 6.0
