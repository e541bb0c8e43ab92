"""A trained language model made smaller: the table, the folders and bad input."""

import json
import math
import signal

import pytest
from tiny_run import options

from kru_hf.kronecker import factorings
from training.common.errors import Interrupted, UserError
from training.common.lock import locked
from training.evaluate import main as evaluate
from training.kroneckerize_lm import main, nearest_shapes
from training.loop.accelerate_loop import TrainingLoop
from training.models.build import load_model
from training.train import main as train


@pytest.fixture(scope="module")
def lstm(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lstm"
    lstm = {"architecture": "lstm", "hidden_size": 5, "num_hidden_layers": 2, "factor_shapes": None, "block_type": None}
    assert train(options(text_file, folder, max_steps=8, per_device_train_batch_size=2, state_dropout=0, **lstm)) == 0
    return folder


def test_table_folders_and_json(lstm, text_file, tmp_path, capsys):
    words = [f"--model={lstm}", f"--dataset={text_file}", "--ratios=3,20", "--max_steps=6", "--use_cpu"]
    assert main([*words, f"--output_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "kroneckerize.json").read_text())
    dense, few, fewer = record["rows"]
    assert json.loads(printed.strip().splitlines()[-1]) == record["rows"]
    before = json.loads((lstm / "all_results.json").read_text())
    assert (dense["test_bpc_before"], dense["validation_bpc_before"]) == (before["test_bpc"], before["validation_bpc"])
    assert dense["num_recurrent_parameters"] == before["num_recurrent_parameters"] == 2 * 4 * 24 * 24
    assert few["factor_shapes"] == [[2, 2], [12, 12]] and fewer["factor_shapes"] == [[2, 2], [3, 3], [4, 4]]
    assert few["num_recurrent_parameters"] == 2 * 4 * (4 + 144)
    assert fewer["compression"] == round(24 * 24 / (4 + 9 + 16), 2) == 19.86
    assert 0 < few["mean_relative_error"] < fewer["mean_relative_error"] < 1
    for row in record["rows"]:
        folder = tmp_path / row["name"]
        results = json.loads((folder / "all_results.json").read_text())
        assert (results["test_bpc"], results["steps"]) == (row["test_bpc_after"], 6)
        assert row["test_bpc_after"] < row["test_bpc_before"]  # a model of eight steps has much to learn
        assert f"{row['test_bpc_before']:.3f} | {row['test_bpc_after']:.3f} |" in printed
        assert evaluate([f"--model={folder}", f"--dataset={text_file}", "--use_cpu"]) == 0
        assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["bpc"] == row["test_bpc_after"]
    assert str(tmp_path) not in (tmp_path / "kroneckerize.json").read_text()
    assert load_model(str(tmp_path / "20x"), "causal_lm")[0].num_recurrent_parameters() == 2 * 4 * (4 + 9 + 16)
    assert main([*words, f"--output_dir={tmp_path}"]) == 1
    assert "holds the fine-tune 'dense', and rows are made from the beginning" in capsys.readouterr().err
    again = [f"--model={tmp_path / 'dense'}", *words[1:], f"--output_dir={tmp_path}", "--overwrite_output_dir=true"]
    assert main(again) == 1
    assert "would replace model=" in capsys.readouterr().err
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    other = tmp_path / "other"
    assert main([f"--model={tmp_path / '20x'}", f"--dataset={text_file}", f"--output_dir={other}"]) == 1
    assert "is not a dense rnn, lstm, gru" in capsys.readouterr().err
    assert not other.exists()


def test_an_interruption_says_what_is_kept(lstm, text_file, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise Interrupted("stopped at step 3; the checkpoint is written", signal.SIGTERM)

    monkeypatch.setattr(TrainingLoop, "run", stopped)
    words = [f"--model={lstm}", f"--dataset={text_file}", "--ratios=3", "--max_steps=6", "--use_cpu"]
    assert main([*words, f"--output_dir={tmp_path}"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip().endswith("error: stopped; the rows so far are saved")


def test_a_folder_in_use_is_refused_before_any_row(lstm, text_file, tmp_path, capsys):
    words = ["--model", str(lstm), "--dataset", str(text_file), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    with locked(tmp_path / "5x"):
        assert main([*words, "--ratios", "5", "--max_steps", "1"]) == 1
    said = capsys.readouterr()
    assert f"error: output_dir='{tmp_path}/5x' is in use by process" in said.err and not list(tmp_path.iterdir())


def test_without_a_fine_tune_nothing_is_trained(lstm, text_file, tmp_path, capsys):
    words = [f"--model={lstm}", f"--dataset={text_file}", "--ratios=11,12", "--max_steps=0", "--use_cpu"]
    assert main([*words, f"--output_dir={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "kroneckerize.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "11x"]
    assert "12x is left out" in capsys.readouterr().out
    assert all("test_bpc_after" not in row for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["kroneckerize.json"]


def test_shapes_are_the_nearest_of_all():
    assert factorings(12) == [(12,), (2, 6), (2, 2, 3), (3, 4)]
    assert nearest_shapes(180, 5) == [[2, 2], [90, 90]]
    assert nearest_shapes(180, 20) == [[5, 5], [36, 36]]
    assert nearest_shapes(180, 100) == [[2, 2], [5, 5], [18, 18]]
    for ratio in (5, 20, 100):
        wanted = math.log(ratio)
        found = nearest_shapes(360, ratio)
        assert math.prod(p for p, _ in found) == 360
        distance = abs(math.log(360**2 / sum(p * p for p, _ in found)) - wanted)
        for sizes in factorings(360)[1:]:
            assert distance <= abs(math.log(360**2 / sum(n * n for n in sizes)) - wanted) + 1e-12
    with pytest.raises(UserError, match="state_size=13 of the model is prime"):
        nearest_shapes(13, 5)


def test_options_of_a_data_set_without_its_name(tmp_path, capsys):
    assert main([f"--model={tmp_path}", f"--output_dir={tmp_path / 'out'}", "--text_column=text"]) == 1
    assert "text_column='text' has no effect here: it works with dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model is missing: pass --model: Trained folder"),
        (["--model=x"], "output_dir is missing"),
        (["--model=x", "--output_dir=y", "--ratios=5,zero"], "ratios='5,zero' is not valid"),
        (["--model=x", "--output_dir=y", "--ratios=1"], "numbers above 1"),
        (["--model=x", "--output_dir=y", "--max_steps=-1"], "max_steps=-1 is not valid"),
        (["--model=x", "--output_dir=y", "--learning_rate=0"], "learning_rate=0.0 is not valid"),
    ],
)
def test_bad_options(words, message, capsys):
    assert main(words) == 1
    assert message in capsys.readouterr().err
