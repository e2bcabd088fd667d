"""Who may import whom, read from the sources: each package only what stands to its left, and no cycle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "shardlab"

# mesh, pipeline, hlo <- sharding <- module <- plan <- step <- report, checkpoint <- run <- search <- cli
RANKS = (
    ("mesh", "pipeline", "hlo"),
    ("sharding",),
    ("module",),
    ("plan",),
    ("step",),
    ("report", "checkpoint", "testing"),
    ("run",),
    ("search",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(file: Path) -> str:
    """The package, or the module directly under shardlab, that a file belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports, inside functions too; `from a import b` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides what it crosses"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def fault(name: str, imported: str) -> str | None:
    """What is wrong with a file of the package `name` importing `imported`, or None."""
    top, *rest = imported.split(".")
    if name in ("pipeline", "hlo") and top in ("jax", "jaxlib", "flax", "numpy", "optax"):
        return f"{name} is pure Python, and imports {imported}"
    if top != "shardlab" or not rest or rest[0] == name or name == "__init__":
        return None
    if name == "models":
        return None if imported.startswith("shardlab.sharding.rules.") else f"models imports {imported}"
    if rest[0] not in RANK:
        return f"{name} imports {imported}, which has no place in the order"
    return None if RANK[rest[0]] < RANK[name] else f"{name} imports {imported}, which does not stand to its left"


@pytest.mark.parametrize("file", FILES, ids=[file.relative_to(PACKAGE).as_posix() for file in FILES])
def test_a_file_imports_only_what_stands_to_its_left(file: Path) -> None:
    assert place(file) in {*RANK, "models", "__init__"}, "a package that the order does not name"
    assert [found for name in imports(file.read_text()) if (found := fault(place(file), name))] == []


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("pipeline", "jax.numpy"),
        ("hlo", "shardlab.mesh.faults.Fault"),
        ("mesh", "shardlab.pipeline.schedules"),
        ("sharding", "shardlab.module.model"),
        ("report", "shardlab.checkpoint.store"),
        ("plan", "shardlab.models.decoder"),
        ("models", "shardlab.mesh.faults"),
        ("run", "shardlab.cli"),
    ],
)
def test_what_crosses_a_boundary_is_a_fault(name: str, imported: str) -> None:
    assert fault(name, imported) is not None


@pytest.mark.parametrize("file", FILES, ids=[file.relative_to(PACKAGE).as_posix() for file in FILES])
def test_no_module_is_imported_in_a_circle(file: Path) -> None:
    known = {
        ".".join(("shardlab", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }

    def direct(path: Path) -> set[Path]:
        names = list(top_level(path.read_text()))
        return {known[part] for name in names for part in (name, name.rpartition(".")[0]) if part in known}

    seen: set[Path] = set()
    todo = direct(file)
    while todo:
        seen |= todo
        todo = {path for other in todo for path in direct(other)} - seen
    assert file not in seen


def top_level(source: str) -> Iterator[str]:
    """The modules imported when this one is, not those imported inside functions or for types only."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.unparse(node))
