"""Lightning: its own Trainer with `TaskModule`, and what `training.train_lightning` keeps out of its way."""

import os
import pickle
import signal
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from tiny_run import STEPS, figures_of, options
from transformers import AutoModelForCausalLM

from examples.lightning_char_lm import main as example
from training.common.errors import UserError
from training.common.run_folder import checkpoints
from training.loop.arguments import parse_arguments
from training.loop.lightning_module import LightningLoop, TaskModule, build_trainer
from training.train import main as train
from training.train_lightning import main

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def trainer(folder, **settings) -> pl.Trainer:
    return pl.Trainer(**{**QUIET, "default_root_dir": folder, "max_steps": STEPS, **settings})


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.model.state_dict().items()}


@pytest.fixture(scope="module")
def words(text_file, tmp_path_factory):
    return options(text_file, tmp_path_factory.mktemp("run") / "run", state_dropout=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_ones_own_makes_the_steps_of_training(words, tmp_path):
    """Equal figures and weights, and a checkpoint in the middle of a pass resumes exactly."""
    assert train(words) == 0
    run = parse_arguments(words).output_dir
    parts = {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    saved = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    monitor, logger = LearningRateMonitor(logging_interval="step"), CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    module = TaskModule(parse_arguments(words))
    whole = trainer(tmp_path, callbacks=[saved, monitor], **{**parts, "logger": logger, "log_every_n_steps": 1})
    whole.fit(module)
    expected = AutoModelForCausalLM.from_pretrained(run / f"checkpoint-{STEPS}").state_dict()
    for name, value in weights(module).items():
        assert torch.equal(value, expected[name]), name
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "lr-AdamW/pg1" in rows and "train_loss" in rows
    scored = [entry["validation_bpc"] for entry in figures_of(run) if "validation_bpc" in entry]
    assert whole.callback_metrics["validation_bpc"].item() == pytest.approx(scored[-1], abs=1e-6)
    cut = TaskModule(parse_arguments(words))
    trainer(tmp_path, callbacks=[], enable_checkpointing=False, **parts).fit(cut, ckpt_path=tmp_path / "step=7.ckpt")
    assert cut.state == module.state
    for name, value in weights(cut).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore")
def test_epochs_accumulation_and_the_trainers_clipping(words, tmp_path):
    module = TaskModule(parse_arguments([*words, "--per_device_train_batch_size=64", "--weight_decay=0"]))
    settings = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1e-12}
    before, fit = weights(module), trainer(tmp_path, enable_checkpointing=False, **settings)
    fit.fit(module)
    assert fit.global_step == module.state.step == 2 * module.task.num_batches(module.slots.layout)
    assert module.slots.layout.global_batch_size == 128
    moved = max((value - before[name]).abs().max().item() for name, value in weights(module).items())
    assert 0 < moved < 1e-3  # as AdamW moves for gradients below its epsilon


@pytest.mark.filterwarnings("ignore")
def test_the_example(words, tmp_path):
    settings = {"max_steps": 6, "val_check_interval": 3, "default_root_dir": tmp_path, **QUIET}
    done = example([word for word in words if "report_to" not in word], **settings)
    assert 0 < done.callback_metrics["test_bpc"] < 10
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


# ---- the command ----


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


def test_lightnings_own_handler_is_out_of_the_way(text_file, tmp_path, monkeypatch):
    """It would start a broadcast in the middle of another; by itself it is in place when the steps begin."""
    own, seen = LightningLoop.start_clocks, []

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return own(self)

    monkeypatch.setattr(LightningLoop, "start_clocks", interrupted)
    monkeypatch.setattr(_SignalConnector, "_sigterm_notifier_fn", lambda *args: seen.append(args))
    assert main(options(text_file, tmp_path)) == 128 + signal.SIGTERM
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not seen


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
