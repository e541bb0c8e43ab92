"""Rules of the source tree that no type checker knows."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "kru_hf").glob("*.py"))
SOURCES = [path for folder in ("kru_hf", "training", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
# What travels with a model: the files that a head imports, and those that they import.
HEADS = ("heads_kru", "piano_roll_head")


def imported(stem: str) -> set[str]:
    """Modules beside it that a file of the package imports."""
    nodes = ast.walk(ast.parse((ROOT / "kru_hf" / f"{stem}.py").read_text()))
    return {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}


def pushed() -> dict[str, set[str]]:
    """Every pushed file and what it imports."""
    found, todo = {}, list(HEADS)
    while todo:
        stem = todo.pop()
        if stem not in found:
            found[stem] = imported(stem)
            todo += found[stem]
    return found


def test_imports_run_one_way():
    order = list(graphlib.TopologicalSorter(pushed()).static_order())  # CycleError: they do not
    assert order.index("kronecker") < order.index("scan") < order.index("recurrence") < order.index("modeling_kru")


@pytest.mark.parametrize("stem", sorted(pushed()))
def test_pushed_files_import_flat(stem):
    for node in ast.walk(ast.parse((ROOT / "kru_hf" / f"{stem}.py").read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in ("kru_hf", "training") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, "from . import name is not found when a model is pushed"
            assert node.level <= 1 and (node.level == 0 or "." not in node.module)
            assert node.level == 1 or node.module.split(".")[0] not in ("kru_hf", "training")


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_package_does_not_import_training(path):
    assert not re.search(r"^\s*(from|import) training\b", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_short_and_free_of_this_machine(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 800
    assert not re.search(r"[\"'( ](/work/|/home/|/root/|/tmp/)", text) or path == Path(__file__).resolve()
