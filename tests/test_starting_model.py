"""What a run does with the trained model that it starts from: it fits, it is whole, and it is still there after."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import options, text_file  # noqa: F401 (a fixture)

from training import evaluate
from training.records.run_record import read_options
from training.train import main


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):  # noqa: F811
    """Runs of a KRU and of an LSTM, by name."""
    folder = tmp_path_factory.mktemp("trained")
    lstm = {"architecture": "lstm", "state_size": 12, "factor_shapes": None, "block_type": None, "num_hidden_layers": 1}
    for name, changes in {"kru": {}, "lstm": {**lstm, "hidden_size": 8}}.items():
        assert main(options(text_file, folder / name, max_steps=3, eval_steps=3, **changes)) == 0
    return folder


def again(text_file, folder, model, **changes) -> list[str]:  # noqa: F811
    """Options of a run that starts from a model."""
    own = dict.fromkeys(("state_size", "factor_shapes", "block_type", "state_dropout"))
    return options(text_file, folder, model=model, max_steps=2, eval_steps=2, **{**own, **changes})


def test_the_usual_folder_is_that_of_the_models_architecture(trained, text_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "lstm", "runs/char_lm-lstm")
    before = load_file("runs/char_lm-lstm/model.safetensors")
    assert main(again(text_file, None, "runs/char_lm-lstm")) == 1
    assert "output_dir='runs/char_lm-lstm' already holds a run" in capsys.readouterr().err
    for name, value in load_file("runs/char_lm-lstm/model.safetensors").items():
        assert torch.equal(value, before[name])
    assert not (tmp_path / "runs" / "char_lm-kru").exists()


def test_another_architecture_than_the_models_is_an_error(trained, text_file, tmp_path, capsys):  # noqa: F811
    assert main(again(text_file, tmp_path / "run", trained / "kru", architecture="lstm")) == 1
    assert "architecture='lstm' has no effect here: it works with a new network" in capsys.readouterr().err


def test_a_model_that_does_not_exist_is_no_question_for_the_hub(text_file, tmp_path, capsys):  # noqa: F811
    assert main(again(text_file, tmp_path / "run", tmp_path / "none")) == 1
    assert "none' does not exist; pass the folder of a model or a Hub id" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [".", "checkpoint-3"])
def test_the_model_that_a_run_starts_from_is_not_deleted(trained, text_file, tmp_path, capsys, inside):  # noqa: F811
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


def damaged(trained, folder, edit):
    """A copy of the KRU's run with other weights."""
    shutil.copytree(trained / "kru", folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_missing_or_not_finite_give_no_figures(trained, text_file, tmp_path, capsys):  # noqa: F811
    gone = damaged(trained, tmp_path / "gone", lambda weights: weights.pop("lm_head.weight"))
    broken = damaged(trained, tmp_path / "broken", lambda weights: weights["lm_head.bias"].fill_(torch.nan))
    for folder, message in ((gone, "missing keys: lm_head.weight"), (broken, "are not finite: lm_head.bias")):
        for call in (evaluate.main, main):
            words = [f"--model={folder}", f"--dataset={text_file}", "--use_cpu"]
            more = [f"--output_dir={tmp_path / 'more'}", "--report_to=none", "--max_steps=1"]
            assert call(words if call is evaluate.main else [*words, *more]) == 1
            assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(
            ("run", text, "no readable recipe.yaml and run.json")
            for text in ("[]", "{}", '{"data": {}}', '{"data": []}')
        ),
        *(("tokenizer", text, "run' cannot be loaded: tokenizer.json") for text in ("{}", '{"model": 1}')),
        ("tokenizer", "[]", "tokenizer.json' is damaged: "),
    ],
)
def test_json_of_another_form_is_named(trained, text_file, tmp_path, capsys, name, content, message):  # noqa: F811
    shutil.copytree(trained / "kru", tmp_path / "run")
    (tmp_path / "run" / f"{name}.json").write_text(content)
    assert evaluate.main([f"--model={tmp_path / 'run'}", f"--dataset={text_file}", "--use_cpu"]) == 1
    assert message in capsys.readouterr().err


def test_an_empty_dataset_is_not_the_built_in_one(tmp_path, capsys):
    assert main(["--dataset", "", "--output_dir", str(tmp_path / "run")]) == 1
    assert "dataset='' is not valid" in capsys.readouterr().err


def test_factor_sizes_are_whole_numbers(tmp_path, capsys):
    assert main(["--factor_shapes", "[[2.9, 2.9], [4, 4]]", "--output_dir", str(tmp_path / "run")]) == 1
    assert "factor_shapes='[[2.9, 2.9], [4, 4]]' is not valid" in capsys.readouterr().err


def test_resuming_leaves_out_overwriting_in_either_spelling():
    from training.common.processes import how_to_resume

    for words in (["--overwrite-output-dir", "true"], ["--overwrite_output_dir=true"], ["--overwrite_output_dir"]):
        shown = how_to_resume([*words, "--seed", "3"], "training.train")
        assert "overwrite" not in shown and shown.endswith("--seed 3 --resume_from_checkpoint last")


def test_the_record_names_the_architecture_that_was_trained(trained, text_file, tmp_path):  # noqa: F811
    assert main(again(text_file, tmp_path / "run", trained / "lstm")) == 0
    assert read_options(tmp_path / "run" / "recipe.yaml")["architecture"] == "lstm"
