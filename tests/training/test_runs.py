"""Runs with accelerate and with Lightning: equal steps and folders, resuming bit by bit after any end, bad runs."""

import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from ranks import HANG, fork
from safetensors.torch import load_file
from tiny_run import (
    PROGRAMS,
    STEPS,
    at_step,
    dying,
    figures_of,
    options,
    results_of,
    same_end,
    same_weights,
    wait_for,
)

from kru_hf import KRUForCausalLM, KRURecurrence, kron_dense
from training.common import saving
from training.common.errors import UserError
from training.common.run_folder import RECORD, STATE, WEIGHTS, checkpoints, remove_checkpoint
from training.evaluate import main as evaluate
from training.loop.driver import Driver
from training.records.run_record import read_options
from training.records.runs import entry_of
from training.tasks.char_lm import CharLM
from training.train import main

PARTS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
LAST = f"checkpoint-{STEPS}"
LONG = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}
SAME_BPC = 2e-3  # of one batch, and of its halves
NORM = 1e-5  # of a product of fp32 factors
both = pytest.mark.parametrize("program", PROGRAMS)


@pytest.fixture(scope="module")
def pair(text_file, tmp_path_factory):
    """The same run by each program: dropout, carried state, every step in the history."""
    folders = {program: tmp_path_factory.mktemp("runs") / program for program in PROGRAMS}
    for program, folder in folders.items():
        assert PROGRAMS[program](options(text_file, folder, logging_steps=1)) == 0
    return folders


@pytest.fixture(scope="module")
def whole(pair):
    return pair["training.train"]


def resumed(text_file, folder, **changes) -> list[str]:
    return options(text_file, folder, logging_steps=1, resume_from_checkpoint="last", **changes)


@pytest.fixture
def precision():
    """A process keeps that of its first run, unless accelerate forgets it."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


# ---- what a run leaves ----


def test_folder_of_a_run(whole, text_file):
    results = results_of(whole)
    for name in ("test_bpc", "test_loss", "validation_bpc", "validation_loss"):
        assert 0 < results[name] < 10
    for name in ("num_parameters", "num_recurrent_parameters", "train_tokens_per_second", "train_runtime"):
        assert results[name] > 0
    assert results["num_recurrent_parameters"] == 2 * (16 + 36)
    expected = {"config.json", "tokenizer.json", "README.md", "learning_curve.png", *RECORD}
    assert expected <= {path.name for path in whole.iterdir()}
    assert [p.name for p in checkpoints(whole)] == ["checkpoint-15", LAST]
    assert not list(whole.rglob("*.py"))  # code comes to a model when it is published
    for path in [*whole.rglob("*.json"), whole / "README.md"]:
        assert str(text_file.parent) not in path.read_text(), path
    assert results["validation_bpc"] == min(e["validation_bpc"] for e in figures_of(whole) if "validation_bpc" in e)


def test_every_step_and_the_folder_are_those_of_the_other_program(pair, text_file, capsys):
    whole, other = pair.values()
    losses, rates = ([entry[name] for entry in figures_of(whole)] for name in ("train_loss", "learning_rate"))
    assert len(set(losses)) == STEPS
    assert len(set(rates)) == STEPS - 1  # the warm-up ends where the cosine begins
    same_end(whole, other)
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (whole, other)]
    assert names[0] == names[1]
    timed = ("train_runtime", "train_tokens_per_second", "processor_seconds")
    figures = [{k: v for k, v in results_of(folder).items() if k not in timed} for folder in (whole, other)]
    assert figures[0] == figures[1]
    record = json.loads((other / "run.json").read_text())
    assert "lightning" in record["versions"]
    assert record["command"].startswith("python -m training.train_lightning ")
    capsys.readouterr()
    assert evaluate(["--model", str(other), "--dataset", str(text_file), "--use_cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bpc"] == figures[1]["test_bpc"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        PARTS,
        {"lr_scheduler_type": "plateau", "optimizer": "rmsprop", "weight_decay": 0, "carry_state": "false",
         "cell_type": "kru_gru"},
        {"mixed_precision": "bf16"},
        {"task": "piano_roll", "block_type": None, **PARTS},  # parts of different weight
    ],
    ids=["accumulation", "plateau", "bf16", "pieces"],
)  # fmt: skip
def test_options_mean_the_same_to_both(text_file, pieces, tmp_path, precision, changes):
    data = pieces if "task" in changes else text_file
    for program, run in PROGRAMS.items():
        assert run(options(data, tmp_path / program, logging_steps=1, **changes)) == 0
    same_end(*(tmp_path / program for program in PROGRAMS))


@pytest.mark.slow
def test_two_halves_of_a_batch_give_what_the_whole_batch_gives(text_file, tmp_path):
    figures = []
    for parts in (1, 2):
        changes = {"state_dropout": 0, "carry_state": "false", "lr_scheduler_type": "plateau"}
        rows = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        assert main(options(text_file, tmp_path / str(parts), **changes, **rows)) == 0
        figures.append(results_of(tmp_path / str(parts))["test_bpc"])
    assert abs(figures[0] - figures[1]) < SAME_BPC


@both
def test_early_stopping(text_file, tmp_path, monkeypatch, program):
    figures = iter([3.0, 2.0, 2.5, 2.2, 9.0, 9.0])
    own = CharLM.metrics
    monkeypatch.setattr(CharLM, "metrics", lambda self, sums: {**own(self, sums), "bpc": next(figures)})
    assert PROGRAMS[program](options(text_file, tmp_path, early_stopping_patience=2)) == 0
    assert (results_of(tmp_path)["steps"], results_of(tmp_path)["best_step"]) == (16, 8)


@both
def test_a_run_ends_when_its_time_is_over_and_goes_on_exactly(whole, text_file, tmp_path, monkeypatch, program):
    """Steps of 6 seconds and a little: a minute is over after the tenth."""
    start = Driver.start_clocks

    def earlier(run):
        start(run)
        run.started -= 6

    monkeypatch.setattr(Driver, "start_clocks", earlier)
    assert PROGRAMS[program](options(text_file, tmp_path, max_time=1)) == 0
    assert results_of(tmp_path)["steps"] == 10 and results_of(tmp_path)["train_runtime"] >= 60
    assert "validation_bpc" in figures_of(tmp_path)[-1] and (tmp_path / "checkpoint-10").is_dir()
    last = options(text_file, tmp_path, resume_from_checkpoint="last")
    assert PROGRAMS[program]([*last, "--max_time=1"]) == 0
    assert results_of(tmp_path)["steps"] == 10
    assert PROGRAMS[program](last) == 0
    same_weights(whole / LAST, tmp_path / LAST)


@pytest.mark.slow
@both
def test_norm_of_the_recurrent_matrix_is_held(text_file, tmp_path, program):
    words = options(text_file, tmp_path, learning_rate=0.1, factor_learning_rate_scale=1, unitary_loss_coef=0)
    norms = []
    for folder, limit in (("free", 0), ("held", 0.9)):
        assert PROGRAMS[program]([*words, f"--max_recurrent_norm={limit}", f"--output_dir={tmp_path / folder}"]) == 0
        model = KRUForCausalLM.from_pretrained(tmp_path / folder / LAST)
        factors = next(m for m in model.modules() if isinstance(m, KRURecurrence)).factors
        norms.append(torch.linalg.matrix_norm(torch.complex(*kron_dense(list(factors))), 2).item())
    assert norms[0] > 1 and norms[1] == pytest.approx(0.9, abs=NORM)


@pytest.mark.parametrize("other", ["--architecture=lstm", "--cell_type=kru_gru", "--freeze_factors"])
def test_no_norm_to_hold(text_file, tmp_path, other, capsys):
    kind = {"factor_shapes": None, "block_type": None} if "lstm" in other else {}
    assert main([*options(text_file, tmp_path, max_recurrent_norm=1, **kind), other]) == 1
    assert "max_recurrent_norm" in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_run_is_trained_as_the_record_of_its_model_says(text_file, tmp_path):
    assert main(options(text_file, tmp_path / "first", max_recurrent_norm=0.9)) == 0
    words = ["--model", str(tmp_path / "first"), "--dataset", str(text_file), "--max_steps", "2", "--report_to", "none"]
    assert main([*words, "--output_dir", str(tmp_path / "second")]) == 0
    record = read_options(tmp_path / "second" / "recipe.yaml")
    assert (record["max_recurrent_norm"], record["architecture"]) == (0.9, "kru")


# ---- resuming ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "at"),
    [
        *(("training.train", at) for at in random.Random(1).sample(range(20, 90), 4)),
        ("training.train_lightning", random.Random(0).randrange(20, 90)),
    ],
)
def test_kill_while_saving_then_resume(text_file, tmp_path, whole, program, at):
    """The process dies at the `at`-th sync, rename or removal of a file."""
    child = fork(dying, at, program, options(text_file, tmp_path, logging_steps=1))
    child.join(HANG)
    assert child.exitcode == -signal.SIGKILL
    for path in checkpoints(tmp_path):
        assert (path / STATE).exists()
        load_file(path / WEIGHTS)
    assert PROGRAMS[program](resumed(text_file, tmp_path)) == 0
    same_end(whole, tmp_path)


@pytest.mark.slow
def test_kill_at_a_random_moment_then_resume(text_file, tmp_path, whole):
    child = fork(main, options(text_file, tmp_path, logging_steps=1))
    wait_for(lambda: (tmp_path / "recipe.yaml").exists())
    time.sleep(random.uniform(0, 0.5))
    child.kill()
    child.join()
    assert main(resumed(text_file, tmp_path)) == 0
    same_end(whole, tmp_path)


@both
def test_stopped_and_resumed_equals_uninterrupted(text_file, tmp_path, whole, monkeypatch, program):
    """A stop request in the middle, between evaluations and saves."""
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda run, figures: run.stop.handle(signal.SIGTERM, None))
        assert PROGRAMS[program](options(text_file, tmp_path, logging_steps=1)) == 128 + signal.SIGTERM
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-7"]
    assert PROGRAMS[program](resumed(text_file, tmp_path)) == 0
    same_end(whole, tmp_path)


@both
def test_the_moving_average_is_what_is_saved_and_it_resumes(text_file, tmp_path, program):
    steps = {"max_steps": 6, "eval_steps": 6, "save_steps": 1, "save_total_limit": 0, "ema_decay": 0.2}
    assert PROGRAMS[program](options(text_file, tmp_path, logging_steps=1, **steps)) == 0
    weights = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path)]
    saved = load_file(tmp_path / "model.safetensors")
    for name, value in saved.items():
        expected = weights[0][name].double()
        for count, after in enumerate(weights[1:], 1):
            decay = min(0.2, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * after[name]
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=0)
        assert not torch.equal(value, weights[-1][name])
    for path in checkpoints(tmp_path)[3:]:
        remove_checkpoint(path)
    assert PROGRAMS[program](resumed(text_file, tmp_path, **steps)) == 0
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in saved.items())


@both
def test_each_program_resumes_from_the_others_checkpoint(pair, text_file, tmp_path, program):
    other = next(folder for name, folder in pair.items() if name != program)
    folder = shutil.copytree(other, tmp_path / "run")
    remove_checkpoint(folder / LAST)
    assert PROGRAMS[program](resumed(text_file, folder)) == 0
    same_end(other, folder)
    assert PROGRAMS[program](resumed(text_file, folder)) == 0  # nothing is left to train
    same_end(other, folder)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["rnn", "lstm", "gru", "unitary", "orthogonal", "low_rank"])
def test_baselines_resume_and_evaluate(text_file, tmp_path, architecture, capsys):
    changes = {"architecture": architecture, "factor_shapes": None, "block_type": None, "num_hidden_layers": 2}
    whole = tmp_path / "whole"
    assert main(options(text_file, whole, **changes)) == 0
    cut = shutil.copytree(whole, tmp_path / "cut")
    remove_checkpoint(cut / LAST)
    assert main(options(text_file, cut, **changes, resume_from_checkpoint="last")) == 0
    same_end(whole, cut)
    assert evaluate(["--model", str(cut), "--dataset", str(text_file), "--use_cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["bpc"] == results_of(cut)["test_bpc"]


def test_every_machine_that_trained_is_recorded(text_file, tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    other = {**record["machines"][0], "device": "Another GPU"}
    (folder / "run.json").write_text(json.dumps({**record, "machines": [other]}))
    assert main(resumed(text_file, folder)) == 0  # scores a finished run
    assert entry_of(folder, tmp_path).machine == "Another GPU"
    remove_checkpoint(folder / LAST)
    assert main(resumed(text_file, folder)) == 0
    machines = json.loads((folder / "run.json").read_text())["machines"]
    assert machines[0] == other and machines[1]["device"] == "cpu" and len(machines) == 2
    assert entry_of(folder, tmp_path).machine.startswith("Another GPU, then ")


# ---- bad runs ----


@both
def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    text_file, tmp_path, capsys, monkeypatch, program
):
    at_step(monkeypatch, 7, lambda run, figures: figures.mul_(float("nan")))
    assert PROGRAMS[program](options(text_file, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "training diverged: loss nan" in said and "at step 7; the last good checkpoint is " in said
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ({"architecture": "rnn", "factor_shapes": None, "block_type": None}, ""),
        ({"cell_type": "kru_janet"}, ", or --factor_learning_rate_scale"),
        ({}, ", or --factor_learning_rate_scale, or raise --unitary_loss_coef"),
    ],
)
def test_huge_learning_rate_ends_with_a_message(text_file, tmp_path, capsys, model, advice):
    changes = {"learning_rate": 1e30, "max_grad_norm": 0, **model}
    assert main(options(text_file, tmp_path, warmup_steps=0, **changes)) == 1
    said = capsys.readouterr().err
    assert "training diverged: loss" in said
    assert f"; lower --learning_rate or --max_grad_norm{advice}\n" in said


@pytest.mark.slow
def test_output_folder_of_another_run(text_file, tmp_path, capsys):
    assert main(options(text_file, tmp_path)) == 0
    (tmp_path / "notes.md").write_text("mine")
    before = (tmp_path / WEIGHTS).read_bytes()
    assert main(options(text_file, tmp_path, seed=1)) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(options(text_file, tmp_path, seed=1, resume_from_checkpoint="last")) == 1
    error = capsys.readouterr().err
    assert "another configuration: seed was 0, now 1" in error and "start from its weights: --model" in error
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert main(options(text_file, tmp_path, seed=1, factor_shapes="5x5", overwrite_output_dir="true")) == 1
    assert "multiply to 5x5" in capsys.readouterr().err
    assert (tmp_path / WEIGHTS).read_bytes() == before  # bad options delete nothing
    (tmp_path / "composition.mid").write_text("")  # of the run that goes
    assert main(options(text_file, tmp_path, seed=1, overwrite_output_dir="true")) == 0
    assert not (tmp_path / "composition.mid").exists()
    assert (tmp_path / WEIGHTS).read_bytes() != before
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_folder_with_the_users_own_files_is_refused(text_file, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    for extra in ({}, {"overwrite_output_dir": "true"}):
        assert main(options(text_file, tmp_path, **extra)) == 1
        assert "holds README.md" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "swanlab"}, "report_to='swanlab' is not installed"),
        ({"resume_from_checkpoint": "/nowhere"}, "must be last or a checkpoint's folder; output_dir="),
        ({"text_column": "x"}, "text_column='x' is for a data set of the Hub"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_done_is_said_first(text_file, tmp_path, capsys, changes, message):
    assert main(options(text_file, tmp_path / "run", **changes)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_disk_full_leaves_nothing_half_written(text_file, tmp_path, capsys):
    """A limit on the size of files stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    try:
        assert main(options(text_file, tmp_path, state_size=24 * 8, factor_shapes="4x4,6x6,8x8")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "could not save" in said and "Is the disk full?" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "run.json"]


def test_failed_save_leaves_no_trace(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    saving.write_json(tmp_path / "old.json", {"kept": True})
    with pytest.raises(UserError, match="No space left on device"):
        saving.write_folder(tmp_path / "checkpoint-1", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["old.json"]
