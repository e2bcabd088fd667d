"""The package is pure Python: it imports the standard library and itself, nothing else."""

import ast
import sys
from pathlib import Path

import pytest

import shardlab.pipeline

FILES = sorted(Path(shardlab.pipeline.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        else:
            continue
        for name in names:
            assert name.startswith("shardlab.pipeline.") or name.split(".")[0] in sys.stdlib_module_names
