"""`training.train_lightning` against `training.train`: equal steps, folders, checkpoints and orderly ends."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from accelerate.state import AcceleratorState
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import CRASH, STEPS, figures_of, options, same_end, spawn, wait_for

from training.common import checkpoint as ckpt
from training.common.errors import UserError
from training.evaluate import main as evaluate
from training.loop.lightning_module import LightningLoop, TaskData, build_trainer
from training.tasks.char_lm import CharLM
from training.train import main as train
from training.train_lightning import main

PROGRAM = "training.train_lightning"
TWO = {"state_dropout": 0, "per_device_train_batch_size": 2, "logging_steps": 1}
PARTS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


def history(folder: Path) -> list[dict]:
    return figures_of(folder)


@pytest.fixture(scope="module")
def pair(text_file, tmp_path_factory):
    """The same run with accelerate and with Lightning; dropout, carried state, every step in the history."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("accelerate", "lightning")]
    for program, folder in zip((train, main), folders, strict=True):
        assert program(options(text_file, folder, logging_steps=1)) == 0
    return folders


@pytest.fixture
def precision():
    """A process keeps that of its first run, unless accelerate forgets it."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


# ---- equal to the other driver ----


def test_every_step_is_that_of_the_other_driver(pair):
    losses, rates = ([entry[name] for entry in history(pair[0])] for name in ("train_loss", "learning_rate"))
    assert len(set(losses)) == STEPS
    assert len(set(rates)) == STEPS - 1  # the warm-up ends where the cosine begins
    same_end(*pair)


@pytest.mark.parametrize(
    "changes",
    [
        PARTS,
        {
            "lr_scheduler_type": "plateau",
            "optimizer": "rmsprop",
            "weight_decay": 0,
            "carry_state": "false",
            "cell_type": "kru_gru",
        },
        {"mixed_precision": "bf16"},
        {"task": "piano_roll", "block_type": None, **PARTS},  # parts of different weight
    ],
    ids=["accumulation", "plateau", "bf16", "pieces"],
)
def test_options_mean_the_same_to_both(text_file, pieces, tmp_path, precision, changes):
    data = pieces if "task" in changes else text_file
    for program, name in ((train, "accelerate"), (main, "lightning")):
        assert program(options(data, tmp_path / name, logging_steps=1, **changes)) == 0
    same_end(tmp_path / "accelerate", tmp_path / "lightning")


def test_two_processes_equal_those_of_the_other_driver(text_file, tmp_path):
    for program in ("training.train", PROGRAM):
        folder, log = tmp_path / program, tmp_path / f"log-{program}"
        words = options(text_file, folder, gradient_accumulation_steps=2, **TWO)
        done = ranks.finish(ranks.start([words, words], log, program), log)
        assert [code for code, _ in done] == [0, 0], done
        assert done[1][1] == ""  # the second process says nothing
    same_end(tmp_path / "training.train", tmp_path / PROGRAM)
    state = load_file(tmp_path / PROGRAM / f"checkpoint-{STEPS}" / ckpt.CARRIED)
    assert state["0"].shape == (8, 2, 24)  # rows of both processes and parts


def test_folder_is_that_of_the_other_driver(pair, text_file, capsys):
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in pair]
    assert names[0] == names[1]
    kept = ("train_runtime", "train_tokens_per_second", "processor_seconds")
    results = [json.loads((folder / "all_results.json").read_text()) for folder in pair]
    assert [{k: v for k, v in r.items() if k not in kept} for r in results][0].items() <= results[1].items()
    record = json.loads((pair[1] / "run.json").read_text())
    assert "lightning" in record["versions"]
    assert record["command"].startswith(f"python -m {PROGRAM} ")
    capsys.readouterr()
    assert evaluate(["--model", str(pair[1]), "--dataset", str(text_file), "--use_cpu"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bpc"] == results[1]["test_bpc"]


# ---- going on ----


@pytest.mark.parametrize("first", [0, 1], ids=["accelerate-lightning", "lightning-accelerate"])
def test_each_goes_on_from_the_others_checkpoint(pair, text_file, tmp_path, first):
    folder = shutil.copytree(pair[first], tmp_path / "run")
    ckpt.remove_checkpoint(folder / f"checkpoint-{STEPS}")
    other = (main, train)[first]
    assert other(options(text_file, folder, logging_steps=1, resume_from_checkpoint="last")) == 0
    same_end(pair[0], folder)


def test_kill_while_saving_then_resume(text_file, tmp_path, pair):
    words = options(text_file, tmp_path, logging_steps=1)
    child = spawn(["-c", CRASH.format(at=random.Random(0).randrange(30, 280), program=PROGRAM)], words)
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert main([*words, "--resume_from_checkpoint=last"]) == 0
    same_end(pair[1], tmp_path)


def test_going_on_from_the_end_trains_no_further(pair, text_file, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "run")
    assert main(options(text_file, folder, logging_steps=1, resume_from_checkpoint="last")) == 0
    same_end(pair[1], folder)


def test_checkpoints_of_lightning_itself_are_not_unpickled(text_file, tmp_path, monkeypatch, capsys):
    """On a SLURM cluster it looks for them in the folder of the run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    torch.save({"state_dict": Bomb()}, tmp_path / "hpc_ckpt_1.ckpt", pickle_module=pickle)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert main(options(text_file, tmp_path)) == 1
    assert "hpc_ckpt_1.ckpt' is not read: --resume_from_checkpoint takes" in capsys.readouterr().err
    assert not (tmp_path / "unpickled").exists()


# ---- orderly ends ----


def test_ctrl_c_saves_and_says_how_to_go_on(text_file, tmp_path):
    words = options(text_file, tmp_path, max_steps=100_000, save_steps=100_000, eval_steps=100_000)
    child = spawn(["-m", PROGRAM], words)
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    errors = child.communicate(timeout=60)[1].decode()
    assert child.returncode == 128 + signal.SIGINT, errors
    assert len(ckpt.checkpoints(tmp_path)) == 1
    assert f"go on with: python -m {PROGRAM}" in errors
    assert "--resume_from_checkpoint last" in errors
    assert "Traceback" not in errors
    assert "Warning" not in errors
    assert "characters/s" in errors


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(text_file, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    words = options(text_file, folder, max_steps=100_000, save_steps=20, eval_steps=100_000, **TWO)
    children = ranks.start([words, words], log, PROGRAM)
    end = time.monotonic() + ranks.TIMEOUT
    while not ckpt.checkpoints(folder):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(children[1].pid, signal.SIGTERM)
    done = ranks.finish(children, log)
    assert [code for code, _ in done] == [128 + signal.SIGTERM] * 2, done
    assert f"go on with: torchrun --nproc_per_node 2 -m {PROGRAM}" in done[0][1]


def test_lightnings_own_handler_is_out_of_the_way(text_file, tmp_path, monkeypatch):
    """It would start a broadcast in the middle of another; by itself it is in place when the data are asked for."""
    whole, seen = TaskData.train_dataloader, []

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self)

    monkeypatch.setattr(TaskData, "train_dataloader", interrupted)
    monkeypatch.setattr(_SignalConnector, "_sigterm_notifier_fn", lambda *args: seen.append(args))
    assert main(options(text_file, tmp_path)) == 128 + signal.SIGTERM
    assert [p.name for p in ckpt.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not seen


def test_not_a_number_stops_and_keeps_the_last_good_checkpoint(text_file, tmp_path, capsys, monkeypatch):
    whole = LightningLoop.forward

    def poisoned(self, model, batch, part):
        out = whole(self, model, batch, part)
        if self.state.step == 6:
            out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(LightningLoop, "forward", poisoned)
    assert main(options(text_file, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "training stopped: loss nan" in said
    assert "at step 7" in said
    assert "checkpoint-5" in said
    assert [p.name for p in ckpt.checkpoints(tmp_path)] == ["checkpoint-5"]


def test_early_stopping(text_file, tmp_path, monkeypatch):
    figures = iter([3.0, 2.0, 2.5, 2.2, 9.0, 9.0])
    whole = CharLM.metrics
    monkeypatch.setattr(CharLM, "metrics", lambda self, sums: {**whole(self, sums), "bpc": next(figures)})
    assert main(options(text_file, tmp_path, early_stopping_patience=2)) == 0
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert (results["steps"], results["best_step"]) == (16, 8)


# ---- callbacks of Lightning, and what it lacks ----


def test_learning_rates_reach_the_tracker(text_file, tmp_path):
    """Every group's from Lightning's monitor, beside the figures of every run."""
    words = options(text_file, tmp_path, report_to="tensorboard", logging_steps=2, max_steps=6)
    assert main(words) == 0
    (file,) = (tmp_path / "tensorboard" / "kru").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    groups = sorted(tag for tag in events.Tags()["scalars"] if tag.startswith("lr-AdamW"))
    assert len(groups) == 3
    usual, monitored = ([(e.step, e.value) for e in events.Scalars(tag)] for tag in ("learning_rate", groups[0]))
    assert usual == monitored
    assert [step for step, _ in usual] == [2, 4, 6]
    assert "train_loss" in events.Tags()["scalars"]


def test_what_lightning_does_not_know_is_an_error(text_file, tmp_path, capsys):
    assert main([*options(text_file, tmp_path), "--max_epochs=3"]) == 1
    assert "unknown option '--max_epochs=3'" in capsys.readouterr().err
    for device, precision, message in (
        ("cpu", "fp8", "mixed_precision='fp8' has no meaning under Lightning"),
        ("xpu", "no", "Lightning has no device 'xpu'"),
    ):
        accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision, num_processes=1)
        with pytest.raises(UserError, match=message):
            build_trainer(SimpleNamespace(accelerator=accelerator))


def test_without_lightning_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "training.loop.lightning_module")
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert main([]) == 1
    assert capsys.readouterr().err == 'error: Lightning is not installed: pip install -e ".[lightning]"\n'
