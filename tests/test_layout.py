"""Rules of the source tree that no type checker knows."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("kru_hf", "training", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCES
    if path.relative_to(ROOT).parts[0] != "tests"
}
KRU_HF = sorted(module for module in MODULES if module.partition(".")[0] == "kru_hf")
TRAINING = sorted(module for module in MODULES if module.partition(".")[0] == "training")
# Sub-packages of training: each imports itself and those before it. What lies beside them are commands.
ORDER = ("common", "options", "data", "models", "tasks", "records", "loop")
# What travels with a model: the files that a head imports, and those that they import.
HEADS = ("kru_hf.heads_kru", "kru_hf.piano_roll_head")


def imports(module: str) -> set[str]:
    """The modules of kru_hf and training that a module imports, wherever in it."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {base} & MODULES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found - {module}


def pushed() -> set[str]:
    """Every module that is pushed with a model."""
    found, todo = set(), [*HEADS]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += imports(module)
    return found


def test_no_circles_of_imports():
    order = list(graphlib.TopologicalSorter({module: imports(module) for module in MODULES}).static_order())
    place = {module: index for index, module in enumerate(order)}  # CycleError: there is a circle
    layers = ("kronecker", "scan", "recurrence", "modeling_kru")
    assert sorted(layers, key=lambda name: place[f"kru_hf.{name}"]) == list(layers)


def test_top_level_of_the_package_is_what_is_pushed():
    top = {module for module in KRU_HF if MODULES[module].parent == ROOT / "kru_hf"}
    assert top == pushed() | {"kru_hf"} and len(top) <= 18
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "kru_hf").glob("**/__init__.py")}
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed and set(re.findall(r'"(.+?)"', listed[1])) == folders


@pytest.mark.parametrize("module", sorted(pushed()))
def test_pushed_files_import_flat(module):
    """Names are those of files beside it, inside ``try`` and in docstrings too: what is pushed is one flat folder."""
    text = MODULES[module].read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in ("kru_hf", "training") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, "from . import name is not found when a model is pushed"
            assert node.level <= 1 and (node.level == 0 or "." not in node.module)
            assert node.level == 1 or node.module.split(".")[0] not in ("kru_hf", "training")
    for name in re.findall(r"from\s+\.(\S+)\s+import", text):
        assert (ROOT / "kru_hf" / f"{name}.py").is_file(), name


@pytest.mark.parametrize("module", KRU_HF)
def test_package_does_not_import_training(module):
    assert not imports(module) & set(TRAINING)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_short_and_free_of_this_machine(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 800
    assert not re.search(r"[\"'( ](/work/|/home/|/root/|/tmp/)", text) or path == Path(__file__).resolve()


def part_of(module: str) -> str:
    """The sub-package of a module of training, or the name of a command."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", TRAINING)
def test_parts_of_training_import_one_way(module):
    own = part_of(module)
    for other in imports(module) & set(TRAINING):
        if own in ORDER:
            assert part_of(other) in ORDER[: ORDER.index(own) + 1], f"{module} imports {other}"


def test_the_top_of_training_is_commands():
    top = [module for module in TRAINING if MODULES[module].parent == ROOT / "training"]
    assert len(top) <= 10
    parts = {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")}
    assert parts == set(ORDER)
