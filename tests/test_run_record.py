"""A run's folder is its record: written, read back, thinned, and repeated from its recipe."""

import json
import time
from pathlib import Path

import pytest
from finished_run import edit
from tiny_run import figures_of, options, same_weights

from training.common.run_folder import remove_checkpoint
from training.evaluate import main as evaluate
from training.loop.arguments import OCCASION, Arguments, parse_arguments, resolved
from training.models.build import build_model
from training.records.run_record import (
    RunRecord,
    history_text,
    read_history,
    read_options,
    recipe_text,
    thinned,
)
from training.records.runs import entry_of, read_runs, write_runs
from training.train import main
from training.train_lightning import main as lightning_main

BIG = [{"step": step, "train_loss": 1 / step, "learning_rate": 0.1} for step in range(1, 1234)]


def test_thinning_keeps_every_evaluation_and_the_last_steps():
    history = [entry | ({"validation_bpc": 2.0} if entry["step"] % 3 == 0 else {}) for entry in BIG]
    rows = thinned(history)
    assert [row["step"] for row in rows if "validation_bpc" in row] == list(range(3, 1234, 3))
    trained = [row["step"] for row in rows if "train_loss" in row]
    assert len(trained) <= 40 and trained[-1] == 1233
    assert len({after - before for before, after in zip(trained, trained[1:], strict=False)}) == 1
    assert thinned(BIG[:40]) == BIG[:40] and thinned([]) == []


def test_history_is_read_back_exactly(tmp_path: Path):
    history = [{"step": 3, "seconds": 0.5, "train_loss": 1 / 3}, {"step": 4, "validation_bpc": 1e-300, "seconds": 0.7}]
    (tmp_path / "history.csv").write_text(history_text(history))
    assert read_history(tmp_path / "history.csv") == history


MODELS = [
    ["--state_size=24", "--factor_shapes=4x4,6x6", "--block_type=plain", "--max_recurrent_norm=1"],
    ["--parameter_budget=40000", "--hidden_size=16", "--kronecker_terms=2"],
    ["--parameter_budget=40000", "--hidden_size=16", "--io_rank=4", "--cell_type=kru_gru"],
    ["--state_size=16", "--cell_type=kru_lstm", "--chrono_max_length=9", "--num_hidden_layers=1"],
    ["--architecture=unitary", "--state_size=24", "--factor_size=4"],
    *([f"--architecture={kind}", "--parameter_budget=9000"] for kind in ("rnn", "lstm", "gru", "orthogonal")),
    ["--architecture=low_rank", "--state_size=24"],
]


@pytest.mark.parametrize("words", MODELS, ids=" ".join)
def test_a_recipe_says_all_that_a_run_was(tmp_path: Path, words: list[str]):
    def built(arguments: Arguments) -> dict:
        return build_model("causal_lm", arguments.model, vocab_size=30).config.to_dict()

    first = parse_arguments([*words, "--max_steps=7", "--optimizer=rmsprop", "--weight_decay=0"])
    config = build_model("causal_lm", first.model, vocab_size=30).config
    recipe = resolved(first, config, "bf16")
    assert set(recipe) == set(first.flat()) - OCCASION
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert read_options(tmp_path / "recipe.yaml") == {name: v for name, v in recipe.items() if v is not None}
    again = parse_arguments([str(tmp_path / "recipe.yaml")])
    assert built(again) == config.to_dict()
    assert resolved(again, config, again.run.mixed_precision or "") == recipe


@pytest.mark.slow
@pytest.mark.parametrize("program", [main, lightning_main], ids=["accelerate", "lightning"])
def test_a_run_is_repeated_from_its_recipe(text_file, tmp_path: Path, program):
    changes = {"optimizer": "rmsprop", "weight_decay": 0, "state_size": None, "factor_shapes": None, "block_type": None}
    assert program(options(text_file, tmp_path / "run", parameter_budget=40_000, **changes)) == 0
    assert program([str(tmp_path / "run" / "recipe.yaml"), f"--output_dir={tmp_path / 'again'}"]) == 0
    assert figures_of(tmp_path / "run") == figures_of(tmp_path / "again")
    same_weights(tmp_path / "run", tmp_path / "again")
    one, other = (RunRecord.read(tmp_path / name) for name in ("run", "again"))
    assert one.options == other.options and one.data == other.data
    entry = entry_of(tmp_path / "run", tmp_path)
    write_runs(tmp_path, [entry])
    assert read_runs(tmp_path) == [entry]


def test_processor_time_is_that_of_the_training_steps(text_file, tmp_path: Path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))  # a second a look: one a step
    folder = tmp_path / "run"
    assert main(options(text_file, folder)) == 0
    run = json.loads((folder / "run.json").read_text())
    figures = json.loads((folder / "all_results.json").read_text())
    assert run["processor_seconds"] == figures["processor_seconds"] == 20
    assert run["wall_seconds"] == figures["train_runtime"] > 0
    state = json.loads((folder / "checkpoint-15" / "trainer_state.json").read_text())
    assert state["processor_seconds"] == 15
    remove_checkpoint(folder / "checkpoint-20")
    assert main(options(text_file, folder, resume_from_checkpoint="last")) == 0
    assert json.loads((folder / "run.json").read_text())["processor_seconds"] == 20


@pytest.mark.slow
def test_evaluation_is_in_the_precision_of_the_run(text_file, tmp_path: Path, capsys):
    from accelerate.state import AcceleratorState

    def score(*words: str) -> float:
        AcceleratorState._reset_state()
        capsys.readouterr()
        assert evaluate([f"--model={tmp_path / 'run'}", "--use_cpu", *words]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["bpc"]

    AcceleratorState._reset_state()
    assert main(options(text_file, tmp_path / "run", mixed_precision="bf16", max_steps=4, save_steps=4)) == 0
    own = json.loads((tmp_path / "run" / "all_results.json").read_text())["test_bpc"]
    assert score() == own
    assert score("--mixed_precision=no") != own
    edit(tmp_path / "run" / "recipe.yaml", mixed_precision="no")
    assert score("--mixed_precision=bf16") == own
    AcceleratorState._reset_state()
