"""What is done with a trained folder: it is scored, a run starts from it, and it is still there after."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from finished_run import edit
from safetensors.torch import load_file, save_file
from tiny_run import options, results_of

from training.evaluate import main as evaluate
from training.records.run_record import read_options
from training.train import main


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    """Runs of a KRU and of an LSTM, by name."""
    folder = tmp_path_factory.mktemp("trained")
    lstm = {"architecture": "lstm", "state_size": 12, "factor_shapes": None, "block_type": None, "num_hidden_layers": 1}
    for name, changes in {"kru": {}, "lstm": {**lstm, "hidden_size": 8}}.items():
        assert main(options(text_file, folder / name, max_steps=3, eval_steps=3, **changes)) == 0
    return folder


def again(text_file, folder, model, **changes) -> list[str]:
    """Options of a run that starts from a model."""
    own = dict.fromkeys(("state_size", "factor_shapes", "block_type", "state_dropout"))
    return options(text_file, folder, model=model, max_steps=2, eval_steps=2, **{**own, **changes})


def corpus(path: Path, words: list[str]) -> Path:
    path.write_text("".join(random.Random(1).choices(words, k=400)))
    return path


# ---- scored ----


def test_evaluate_finds_the_data_or_says_what_to_pass(trained, text_file, tmp_path, capsys):
    for split in ("test", "validation"):
        assert evaluate([f"--model={trained / 'kru'}", f"--split={split}", "--use_cpu"]) == 0  # by its recipe's path
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert figures == {name: results_of(trained / "kru")[f"{split}_{name}"] for name in ("loss", "bpc")}
    edit(Path(shutil.copytree(trained / "kru", tmp_path / "run")) / "recipe.yaml", dataset=None)
    assert evaluate([f"--model={tmp_path / 'run'}", "--use_cpu"]) == 1
    assert "'corpus.txt', cannot be found here; pass --dataset" in capsys.readouterr().err


def test_evaluate_on_changed_data(trained, tmp_path, capsys):
    changed = corpus(tmp_path / "corpus.txt", ["the ", "state ", "of a ", "unit\n"])
    words = [f"--model={trained / 'kru'}", f"--dataset={changed}", "--use_cpu"]
    assert evaluate(words) == 1
    assert "differs from what the model was trained on: SHA-256" in capsys.readouterr().err
    assert evaluate([*words, "--allow_other_dataset", "true"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bpc"] > 0


def test_evaluate_bad_input(trained, tmp_path, capsys):
    for words, message in (
        ([], "model is missing"),
        ([f"--model={tmp_path}"], "has no readable recipe.yaml and run.json"),
        ([f"--model={trained / 'kru'}", "--splt=test"], "did you mean 'split'"),
        ([f"--model={trained / 'kru'}", "--split=train"], "invalid choice: 'train'"),
        ([f"--model={trained / 'kru'}", "--dataset_revision=v1"], "dataset_revision='v1' has no effect here: it works"),
        ([f"--model={trained / 'kru'}", "--text_column=text"], "works with dataset; remove text_column"),
    ):
        assert evaluate(words) == 1
        assert message in capsys.readouterr().err


# ---- started from ----


def test_a_run_that_starts_from_a_trained_folder(trained, text_file, tmp_path, capsys):
    for name in ("kru", "lstm"):
        assert main(again(text_file, tmp_path / name, trained / name)) == 0
        before, after = (results_of(folder / name)["test_bpc"] for folder in (trained, tmp_path))
        assert before != after < before + 0.5
        assert read_options(tmp_path / name / "recipe.yaml")["architecture"] == name
    other = corpus(tmp_path / "other.txt", ["Zürich ", "Ωmega "])
    for changes, message in (
        ({"dataset": other}, "vocabulary mismatch: "),
        ({"state_size": 5}, "brings its own configuration; remove state_size"),
        ({"architecture": "lstm"}, "architecture='lstm' has no effect here: it works with a new network"),
        ({"model": tmp_path / "none"}, "none' does not exist; pass the folder of a model or a Hub id"),
    ):
        capsys.readouterr()
        assert main(again(text_file, tmp_path / "other", **{"model": trained / "kru", **changes})) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_usual_folder_is_that_of_the_models_architecture(trained, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "lstm", "runs/char_lm-lstm")
    assert main(again(text_file, None, "runs/char_lm-lstm")) == 1
    assert "output_dir='runs/char_lm-lstm' already holds a run" in capsys.readouterr().err
    weights = (folder / "model.safetensors" for folder in (trained / "lstm", Path("runs/char_lm-lstm")))
    assert len({path.read_bytes() for path in weights}) == 1
    assert [path.name for path in Path("runs").iterdir()] == ["char_lm-lstm"]


@pytest.mark.parametrize("inside", [".", "checkpoint-3"])
def test_the_model_that_a_run_starts_from_is_not_deleted(trained, text_file, tmp_path, capsys, inside):
    folder = tmp_path / "run"
    shutil.copytree(trained / "kru", folder)
    words = again(text_file, folder, folder / inside, overwrite_output_dir="true", learning_rate="1e30")
    assert main(words) == 1
    assert "overwrite_output_dir=True would delete model=" in capsys.readouterr().err
    assert (folder / "model.safetensors").is_file() and (folder / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("adding", "does not fit the task adding: its input_size is None, not 2"),
        ("copy_memory", "does not fit the task copy_memory: its num_labels is 2, not 9"),
    ],
)
def test_a_model_of_another_task_is_refused_before_anything_is_written(trained, tmp_path, capsys, task, message):
    words = [f"--task={task}", f"--model={trained / 'kru'}", f"--output_dir={tmp_path / 'run'}", "--max_steps=1"]
    assert main([*words, "--report_to=none", "--use_cpu"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- damaged (see test_damaged_models.py for files that cannot be read) ----


def test_folders_whose_parts_do_not_fit_give_no_figures(trained, text_file, tmp_path, capsys):
    gone, broken, longer = (Path(shutil.copytree(trained / "kru", tmp_path / name)) for name in ("a", "b", "c"))
    weights = load_file(trained / "kru" / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != "lm_head.weight"}, gone / "model.safetensors", {"format": "pt"})
    weights["lm_head.bias"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((longer / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Ω"] = len(tokenizer["model"]["vocab"])
    (longer / "tokenizer.json").write_text(json.dumps(tokenizer))
    for folder, message in (
        (gone, "missing keys: lm_head.weight"),
        (broken, "are not finite: lm_head.bias"),
        (longer, "the tokenizer has"),
    ):
        assert evaluate([f"--model={folder}", f"--dataset={text_file}", "--use_cpu"]) == 1
        assert message in capsys.readouterr().err
        assert main(again(text_file, tmp_path / "more", folder)) == 1
        assert message in capsys.readouterr().err
