"""The loop: resuming bit by bit after any end, signals, several processes, bad runs."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CRASH, ROOT, STEPS, figures_of, options, same_end, spawn, wait_for

from kru_hf import KRUForCausalLM, KRURecurrence, kron_dense
from training.common import checkpoint as ckpt
from training.records.run_record import read_options
from training.records.runs import entry_of
from training.train import main
from training.train_lightning import main as lightning_main

TWO_PROCESS_BPC = 2e-3
NORM = 1e-5  # of a product of fp32 factors


@pytest.fixture(scope="module")
def uninterrupted(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert main(options(text_file, folder)) == 0
    return folder


def test_folder_of_a_run(uninterrupted, text_file):
    results = json.loads((uninterrupted / "all_results.json").read_text())
    for name in ("bpc", "loss"):
        assert 0 < results[f"test_{name}"] < 10
        assert 0 < results[f"validation_{name}"] < 10
    for name in ("num_parameters", "num_recurrent_parameters", "train_tokens_per_second", "train_runtime"):
        assert results[name] > 0
    assert results["num_recurrent_parameters"] == 2 * (16 + 36)
    expected = {"config.json", "tokenizer.json", "README.md", "learning_curve.png", *ckpt.RECORD}
    assert expected <= {path.name for path in uninterrupted.iterdir()}
    assert [p.name for p in ckpt.checkpoints(uninterrupted)] == ["checkpoint-15", "checkpoint-20"]
    for path in [*uninterrupted.rglob("*.json"), uninterrupted / "README.md"]:
        assert str(text_file.parent) not in path.read_text(), path
    best = min(e["validation_bpc"] for e in figures_of(uninterrupted) if "validation_bpc" in e)
    assert results["validation_bpc"] == best


@pytest.mark.parametrize("at", random.Random(1).sample(range(30, 280), 4))
def test_kill_while_saving_then_resume(text_file, tmp_path, uninterrupted, at):
    """The process dies at the `at`-th sync, rename or removal of a file."""
    child = spawn(["-c", CRASH.format(at=at, program="training.train")], options(text_file, tmp_path))
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    for path in ckpt.checkpoints(tmp_path):
        assert (path / ckpt.STATE).exists()
        load_file(path / ckpt.WEIGHTS)
    assert main(options(text_file, tmp_path, resume_from_checkpoint="last")) == 0
    same_end(uninterrupted, tmp_path)


def test_kill_at_a_random_moment_then_resume(text_file, tmp_path, uninterrupted):
    child = spawn(["-m", "training.train"], options(text_file, tmp_path))
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    time.sleep(random.uniform(0, 0.5))
    child.kill()
    child.communicate()
    assert main(options(text_file, tmp_path, resume_from_checkpoint="last")) == 0
    same_end(uninterrupted, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(text_file, tmp_path, number):
    words = options(text_file, tmp_path, max_steps=100_000, save_steps=100_000, eval_steps=100_000)
    child = spawn(["-m", "training.train"], [*words, "--overwrite_output_dir"])
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    time.sleep(0.5)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number, errors.decode()
    assert len(ckpt.checkpoints(tmp_path)) == 1
    said = errors.decode()
    assert "go on with: python -m training.train" in said
    assert "--resume_from_checkpoint last" in said
    assert "--overwrite_output_dir" not in said


def test_training_ends_when_its_launcher_is_killed(text_file, tmp_path):
    words = options(text_file, tmp_path, max_steps=100_000, save_steps=100_000, eval_steps=100_000)
    child = spawn(["-m", "accelerate.commands.launch", "--cpu", "-m", "training.train"], words)
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    time.sleep(0.5)
    child.kill()
    end = time.monotonic() + 30
    while not ckpt.checkpoints(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_stopped_and_resumed_equals_uninterrupted(text_file, tmp_path, uninterrupted, monkeypatch):
    """A stop request in the middle, between evaluations and saves."""
    from training.common.stopping import StopRequest

    calls = iter(range(1000))
    monkeypatch.setattr(StopRequest, "pending", lambda self: signal.SIGTERM * (next(calls) == 6))
    assert main(options(text_file, tmp_path)) == 128 + signal.SIGTERM
    assert [p.name for p in ckpt.checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-7"]
    assert main(options(text_file, tmp_path, resume_from_checkpoint="last")) == 0
    same_end(uninterrupted, tmp_path)


def test_every_machine_that_trained_is_recorded(text_file, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    record = json.loads((folder / "run.json").read_text())
    other = {**record["machines"][0], "device": "Another GPU"}
    (folder / "run.json").write_text(json.dumps({**record, "machines": [other]}))
    again = options(text_file, folder, resume_from_checkpoint="last")
    assert main(again) == 0  # scores a finished run
    assert entry_of(folder, tmp_path).machine == "Another GPU"
    ckpt.remove_checkpoint(folder / f"checkpoint-{STEPS}")
    assert main(again) == 0
    machines = json.loads((folder / "run.json").read_text())["machines"]
    assert machines[0] == other and machines[1]["device"] == "cpu" and len(machines) == 2
    assert entry_of(folder, tmp_path).machine.startswith("Another GPU, then ")


@pytest.mark.parametrize("architecture", ["rnn", "lstm", "gru"])
def test_baselines_resume_and_evaluate(text_file, tmp_path, architecture, capsys):
    from training.evaluate import main as evaluate

    changes = {"architecture": architecture, "factor_shapes": None, "block_type": None, "num_hidden_layers": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(options(text_file, whole, **changes)) == 0
    assert main(options(text_file, cut, **changes)) == 0
    ckpt.remove_checkpoint(cut / f"checkpoint-{STEPS}")
    assert main(options(text_file, cut, **changes, resume_from_checkpoint="last")) == 0
    same_end(whole, cut)
    assert evaluate(["--model", str(cut), "--dataset", str(text_file), "--use_cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["bpc"] == json.loads((cut / "all_results.json").read_text())["test_bpc"]


def test_accumulation_and_reset_state_and_plateau(text_file, tmp_path):
    """Two halves of a batch give what the whole batch gives."""
    figures = []
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        changes = {"state_dropout": 0, "carry_state": "false", "lr_scheduler_type": "plateau"}
        rows = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        assert main(options(text_file, folder, **changes, **rows)) == 0
        figures.append(json.loads((folder / "all_results.json").read_text())["test_bpc"])
    assert abs(figures[0] - figures[1]) < TWO_PROCESS_BPC


def test_two_processes_train_as_one(text_file, tmp_path):
    common = {"state_dropout": 0, "max_steps": 30, "eval_steps": 10}
    assert main(options(text_file, tmp_path / "one", **common)) == 0
    config = ROOT / "training" / "accelerate" / "two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "training.train"]
    words = options(text_file, tmp_path / "two", per_device_train_batch_size=2, **common)
    child = spawn(launcher, words)
    _, errors = child.communicate(timeout=180)
    assert child.returncode == 0, errors.decode()
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    for name in ("test_bpc", "validation_bpc"):
        assert abs(results[0][name] - results[1][name]) < TWO_PROCESS_BPC
    # The checkpoint holds the rows of both: one process goes on from it.
    state = load_file(tmp_path / "two" / "checkpoint-30" / ckpt.CARRIED)
    assert state["0"].shape == (4, 2, 24)
    ckpt.remove_checkpoint(tmp_path / "two" / "checkpoint-30")
    assert main(options(text_file, tmp_path / "two", **common, resume_from_checkpoint="last")) == 0
    again = json.loads((tmp_path / "two" / "all_results.json").read_text())
    assert abs(again["test_bpc"] - results[0]["test_bpc"]) < TWO_PROCESS_BPC


# ---- bad runs ----


def test_not_a_number_stops_and_keeps_the_last_good_checkpoint(text_file, tmp_path, capsys, monkeypatch):
    from training.loop.accelerate_loop import TrainingLoop

    whole = TrainingLoop.forward_backward

    def poisoned(self, batch, part):
        out = whole(self, batch, part)
        if self.state.step == 6:
            out.loss = out.loss * float("nan")
        return out

    monkeypatch.setattr(TrainingLoop, "forward_backward", poisoned)
    assert main(options(text_file, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "loss nan" in said
    assert "at step 7" in said
    assert "checkpoint-5" in said
    assert [p.name for p in ckpt.checkpoints(tmp_path)] == ["checkpoint-5"]


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
    assert "training stopped: loss" in said
    assert f"; lower --learning_rate or --max_grad_norm{advice}\n" in said


def test_output_folder_of_another_run(text_file, tmp_path, capsys):
    assert main(options(text_file, tmp_path)) == 0
    (tmp_path / "notes.md").write_text("mine")
    before = (tmp_path / ckpt.WEIGHTS).read_bytes()
    assert main(options(text_file, tmp_path, seed=1)) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(options(text_file, tmp_path, seed=1, resume_from_checkpoint="last")) == 1
    error = capsys.readouterr().err
    assert "another configuration: seed was 0, now 1" in error and "start from its weights: --model" in error
    assert (tmp_path / ckpt.WEIGHTS).read_bytes() == before
    assert main(options(text_file, tmp_path, seed=1, factor_shapes="5x5", overwrite_output_dir="true")) == 1
    assert "multiply to 5x5" in capsys.readouterr().err
    assert (tmp_path / ckpt.WEIGHTS).read_bytes() == before  # bad options delete nothing
    (tmp_path / "composition.mid").write_text("")  # of the run that goes
    assert main(options(text_file, tmp_path, seed=1, overwrite_output_dir="true")) == 0
    assert not (tmp_path / "composition.mid").exists()
    assert (tmp_path / ckpt.WEIGHTS).read_bytes() != before
    assert (tmp_path / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_output_folder_below_a_file(text_file, tmp_path, capsys, overwrite):
    (tmp_path / "taken").write_text("mine")
    assert main(options(text_file, tmp_path / "taken" / "run", overwrite_output_dir=overwrite)) == 1
    expected = f"output_dir='{tmp_path}/taken/run' cannot be a folder: '{tmp_path}/taken' is a file"
    assert expected in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_model_goes_on_as_its_record_says(text_file, tmp_path):
    assert main(options(text_file, tmp_path / "first", max_recurrent_norm=0.9)) == 0
    words = ["--model", str(tmp_path / "first"), "--dataset", str(text_file), "--max_steps", "2", "--report_to", "none"]
    assert main([*words, "--output_dir", str(tmp_path / "second")]) == 0
    record = read_options(tmp_path / "second" / "recipe.yaml")
    assert (record["max_recurrent_norm"], record["architecture"]) == (0.9, "kru")


def test_damaged_checkpoint(text_file, tmp_path, capsys):
    assert main(options(text_file, tmp_path)) == 0
    for name in (ckpt.WEIGHTS, ckpt.OPTIMIZER, ckpt.STATE):
        path = tmp_path / f"checkpoint-{STEPS}" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert main(options(text_file, tmp_path, resume_from_checkpoint="last")) == 1
        assert "damaged" in capsys.readouterr().err
        path.write_bytes(content)
    assert main(options(text_file, tmp_path, resume_from_checkpoint=str(tmp_path / "nowhere"))) == 1
    assert f"must be last or a checkpoint's folder; output_dir={str(tmp_path)!r} holds: " in capsys.readouterr().err


def test_checkpoint_of_another_folder(uninterrupted, text_file, tmp_path, capsys):
    """Its best weights are not here: whatever lies at the top of this folder would pass for them."""
    checkpoint = uninterrupted / f"checkpoint-{STEPS}"
    assert main(options(text_file, tmp_path / "other", resume_from_checkpoint=str(checkpoint))) == 1
    assert f"pass --output_dir {str(uninterrupted)!r}" in capsys.readouterr().err
    assert not (tmp_path / "other" / "model.safetensors").exists()


def test_tracker_that_is_not_installed(text_file, tmp_path, capsys):
    assert main(options(text_file, tmp_path, report_to="swanlab")) == 1
    assert "report_to='swanlab' is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("driver", [main, lightning_main], ids=["accelerate", "lightning"])
def test_norm_of_the_recurrent_matrix_is_held(text_file, tmp_path, driver):
    words = options(text_file, tmp_path, learning_rate=0.1, factor_learning_rate_scale=1, unitary_loss_coef=0)
    norms = []
    for folder, limit in (("free", 0), ("held", 0.9)):
        assert driver([*words, f"--max_recurrent_norm={limit}", f"--output_dir={tmp_path / folder}"]) == 0
        model = KRUForCausalLM.from_pretrained(tmp_path / folder / f"checkpoint-{STEPS}")
        factors = next(m for m in model.modules() if isinstance(m, KRURecurrence)).factors
        norms.append(torch.linalg.matrix_norm(torch.complex(*kron_dense(list(factors))), 2).item())
    assert norms[0] > 1 and norms[1] == pytest.approx(0.9, abs=NORM)


@pytest.mark.parametrize("other", ["--architecture=lstm", "--cell_type=kru_gru", "--freeze_factors"])
def test_no_norm_to_hold(text_file, tmp_path, other, capsys):
    kind = {"factor_shapes": None, "block_type": None} if "lstm" in other else {}
    assert main([*options(text_file, tmp_path, max_recurrent_norm=1, **kind), other]) == 1
    assert "max_recurrent_norm" in capsys.readouterr().err


FULL = """
import resource, sys
from training.train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
sys.exit(main(sys.argv[1:]))
"""


def test_disk_full_leaves_nothing_half_written(text_file, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    child = spawn(["-c", FULL], options(text_file, tmp_path, state_size=24 * 8, factor_shapes="4x4,6x6,8x8"))
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors.decode()
    assert "could not save" in errors.decode()
    assert "Is the disk full?" in errors.decode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "run.json"]


def test_failed_save_leaves_no_trace(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    ckpt.write_json(tmp_path / "old.json", {"kept": True})
    with pytest.raises(ckpt.UserError, match="No space left on device"):
        ckpt.write_folder(tmp_path / "checkpoint-1", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["old.json"]


def test_early_stopping(text_file, tmp_path, monkeypatch):
    from training.tasks.char_lm import CharLM

    figures = iter([3.0, 2.0, 2.5, 2.2, 9.0, 9.0])
    whole = CharLM.metrics
    monkeypatch.setattr(CharLM, "metrics", lambda self, sums: {**whole(self, sums), "bpc": next(figures)})
    assert main(options(text_file, tmp_path, early_stopping_patience=2)) == 0
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert (results["steps"], results["best_step"]) == (16, 8)


def test_a_folder_with_the_users_own_files_is_refused(text_file, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    for extra in ({}, {"overwrite_output_dir": "true"}):
        assert main(options(text_file, tmp_path, **extra)) == 1
        assert "holds README.md" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path != text_file] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["dataset_config", "dataset_revision", "text_column"])
def test_hub_options_are_refused_for_local_data(text_file, tmp_path, capsys, name):
    assert main(options(text_file, tmp_path / "run", **{name: "x"})) == 1
    assert f"{name}='x' is for a data set of the Hub" in capsys.readouterr().err


def test_a_signal_outside_the_loop_ends_the_run_at_once(text_file, tmp_path, uninterrupted):
    child = spawn(["-m", "training.train"], options(text_file, tmp_path, sample_length=1_000_000))
    wait_for(lambda: (tmp_path / "all_results.json").exists(), child)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGINT, errors.decode()
    assert "go on with: python -m training.train" in errors.decode()
    assert main(options(text_file, tmp_path, resume_from_checkpoint="last")) == 0
    same_end(uninterrupted, tmp_path)
