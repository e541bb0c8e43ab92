"""``training.evaluate --dtype``: the figures of a trained model as the C runtime computes it."""

import json
import shutil

import pytest
import torch
from tiny_run import PROGRAMS, options

from kru_hf import KRUForCausalLM
from kru_hf.export.streaming import load_model
from kru_hf.export.weight_file import rounded_weights
from training.evaluate import main as evaluate
from training.train import main as train

TOLERANCE = 1e-4  # of a figure in nats, bits or shares


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
    run, same = tmp_path / "run", tmp_path / "rounded"
    shutil.copytree(run, same)
    model, _ = load_model(run)
    for dtype in ("fp32", "int8", "int4"):
        model.load_state_dict(rounded_weights(load_model(run)[0], dtype), strict=False)
        model.save_pretrained(same)
        found = figures(capsys, run, "--dtype", dtype)
        assert found == pytest.approx(figures(capsys, same), abs=TOLERANCE), dtype
    assert found["loss"] != pytest.approx(figures(capsys, run)["loss"], abs=2 * TOLERANCE)  # of int4


@pytest.mark.parametrize("program", PROGRAMS)
def test_training_with_rounded_weights(program, text_file, tmp_path, capsys):
    """What is saved is what a weight file holds, and a resumed run ends with the weights of an uninterrupted one."""
    changes = {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "weight_dtype": "int4", "learning_rate": 0.05}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert PROGRAMS[program](options(text_file, whole, **changes)) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    again = options(text_file, resumed, resume_from_checkpoint="last", **changes)
    assert PROGRAMS[program](again) == 0
    model = KRUForCausalLM.from_pretrained(whole)
    for name, weight in rounded_weights(model, "int4").items():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=1e-6, atol=1e-7)
    states = [path / "checkpoint-6" / "training_state.pt" for path in (whole, resumed)]
    exact, exact_resumed = (torch.load(path, weights_only=True)["rounding"] for path in states)
    assert all(torch.equal(weight, exact_resumed[name]) for name, weight in exact.items())
    assert not torch.equal(exact["lm_head.weight"], model.lm_head.weight)
    capsys.readouterr()
    results = json.loads((whole / "all_results.json").read_text())
    assert figures(capsys, whole, "--dtype", "int4")["bpc"] == pytest.approx(results["test_bpc"], abs=1e-4)


def test_a_precision_of_products_beside_it(capsys):
    assert evaluate(["--model", "run", "--dtype", "int8", "--mixed_precision", "bf16"]) != 0
    assert "mixed_precision='bf16' does nothing beside dtype='int8'" in capsys.readouterr().err
