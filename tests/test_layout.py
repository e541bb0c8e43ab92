"""Rules of the source tree that no type checker knows."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Imports run one way: a file may import files of lower rank only.
RANK = {
    "configuration_kru": 1,
    "kronecker": 0,
    "transforms": 0,
    "scan_checks": 1,
    "scan_reference": 2,
    "scan_torch": 2,
    "scan_cpu": 2,
    "triton_kernels": 1,
    "scan_triton": 2,
    "scan_gated_cpu": 3,
    "scan_gated_torch": 3,
    "scan_gated": 4,
    "scan": 5,
    "cells": 6,
    "cache_kru": 6,
    "kronecker_linear": 6,
    "readout": 7,
    "feed_forward": 7,
    "gated_cells": 7,
    "bidirectional": 8,
    "blocks": 9,
    "modeling_kru": 10,
    "heads_kru": 11,
    "piano_roll_head": 11,
}
PACKAGE = sorted((ROOT / "kru_hf").glob("*.py"))
SOURCES = [path for folder in ("kru_hf", "training", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
PUSHED = [path for path in PACKAGE if path.stem in RANK]


@pytest.mark.parametrize("path", PUSHED, ids=lambda path: path.stem)
def test_pushed_files_import_flat_and_one_way(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert not any(name.split(".")[0] in ("kru_hf", "training") for name in names)
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, "from . import name is not found when a model is pushed"
            if node.level == 0:
                assert node.module.split(".")[0] not in ("kru_hf", "training")
                continue
            assert node.level == 1 and "." not in node.module
            if node.module in RANK:
                assert RANK[node.module] < RANK[path.stem], f"{path.stem} imports {node.module}"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_package_does_not_import_training(path):
    assert not re.search(r"^\s*(from|import) training\b", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_short_and_free_of_this_machine(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 800
    assert not re.search(r"[\"'( ](/work/|/home/|/root/|/tmp/)", text) or path == Path(__file__).resolve()
