"""``training.evaluate --dtype``: the figures of a trained model as the C runtime computes it."""

import json

import pytest
from tiny_run import options

from training.evaluate import main as evaluate
from training.train import main as train


def figures(capsys, folder, *words):
    assert evaluate(["--model", str(folder), *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("task", ["char_lm", "piano_roll", "pixel_mnist"])
def test_figures_are_those_of_the_model(request, task, tmp_path, capsys):
    """Carried states, padded pieces with a chain of keys, and a label at the end."""
    data = {"char_lm": "text_file", "piano_roll": "pieces"}.get(task)
    changes = {"task": task, "max_steps": 3, "eval_steps": None, "save_steps": None, "output_dir": tmp_path / "run"}
    if task == "pixel_mnist":
        changes |= {"sequence_length": None}
    words = options(request.getfixturevalue(data) if data else "digits", tmp_path / "run", **changes)
    assert train(words) == 0
    capsys.readouterr()
    expected = figures(capsys, tmp_path / "run")
    for dtype, tolerance in (("fp32", 1e-4), ("int8", 3e-2)):
        found = figures(capsys, tmp_path / "run", "--dtype", dtype)
        assert found == pytest.approx(expected, abs=tolerance), dtype


def test_a_precision_of_products_beside_it(capsys):
    assert evaluate(["--model", "run", "--dtype", "int8", "--mixed_precision", "bf16"]) != 0
    assert "mixed_precision='bf16' does nothing beside dtype='int8'" in capsys.readouterr().err
