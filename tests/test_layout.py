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


# Sub-packages of training: each imports itself and those before it. What lies beside them are commands.
ORDER = ("common", "options", "data", "models", "tasks", "records", "loop")
TRAINING = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "training").rglob("*.py"))
}


def training_imports(module: str) -> set[str]:
    """The modules of training that a module imports, wherever in it."""
    path, found = TRAINING[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & TRAINING.keys()
            found |= inner or {base} & TRAINING.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & TRAINING.keys()
    return found - {module}


def part_of(module: str) -> str:
    """The sub-package of a module of training, or the name of a command."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(TRAINING))
def test_parts_of_training_import_one_way(module):
    own = part_of(module)
    for other in training_imports(module):
        if own in ORDER:
            assert part_of(other) in ORDER[: ORDER.index(own) + 1], f"{module} imports {other}"


def test_training_imports_in_no_circle():
    tuple(graphlib.TopologicalSorter({module: training_imports(module) for module in TRAINING}).static_order())


def test_the_top_of_training_is_commands():
    top = [path for path in TRAINING.values() if path.parent == ROOT / "training"]
    assert len(top) <= 10
    parts = {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")}
    assert parts == set(ORDER)
