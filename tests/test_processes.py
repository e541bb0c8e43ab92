"""Several processes: equal figures however rows and pieces fall to them, agreed ends, and what a lost one does."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import BLOCKS, tiny_config
from safetensors.torch import load_file

from kru_hf import KRUForCausalLM, KRUForPianoRoll, KRUForSequenceClassification, KRUForTokenClassification
from kru_hf.configuration_kru import CELL_TYPES
from training.common import checkpoint as ckpt
from training.evaluate import main as evaluate
from training.loop.arguments import parse_arguments
from training.models.build import build_model
from training.options.recipe import RECIPES
from training.tasks import get_task
from training.train import main

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "training" / "accelerate"
FIGURE = 2e-3  # between the figure of one process and that of two
SAME = 1e-6  # between evaluations of the same weights, cut differently
MINUTE = 60.0
STEPS = 12
COMMON = ["--use_cpu", "--report_to=none", "--sample_length=5", "--logging_steps=2", "--eval_steps=6", "--save_steps=6"]
COMMON += [f"--max_steps={STEPS}", "--sequence_length=16", "--learning_rate=0.01"]
TEXT = [*COMMON, "--state_size=16", "--factor_shapes=4x4,4x4", "--block_type=plain"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    words = random.Random(0).choices(["the ", "recurrent ", "state, ", "of a unit\n", "is "], k=600)
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("".join(words))
    return path


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def two(words: list[str], folder: Path, log: Path, rows: int = 2) -> list[tuple[int | None, str]]:
    """Two processes with their part of the global batch; the second one has a folder of its own, and may not write."""
    words = [*words, f"--per_device_train_batch_size={rows}"]
    folders = [folder, folder.with_name(folder.name + "-elsewhere")]
    done = ranks.finish(ranks.start([[*words, f"--output_dir={one}"] for one in folders], log), log)
    assert not folders[1].exists()
    return done


@pytest.mark.parametrize(
    "words",
    [
        ["--eval_streams=3", "--freeze_factors"],  # 2 rows against 1; factors without a gradient
        ["--eval_streams=1", "--cell_type=kru_lstm", "--gradient_accumulation_steps=2"],  # a process without any row
    ],
    ids=["frozen-factors", "accumulation"],
)
def test_two_processes_give_the_figures_of_one(text_file, tmp_path, words, capsys):
    words = [*TEXT, *words, f"--dataset={text_file}"]
    one, both = tmp_path / "one", tmp_path / "two"
    assert main([*words, f"--output_dir={one}", "--per_device_train_batch_size=4"]) == 0
    done = two(words, both, tmp_path / "log")
    assert [code for code, _ in done] == [0, 0], done
    for name in ("validation_bpc", "test_bpc"):
        assert abs(results(one)[name] - results(both)[name]) < FIGURE
    assert done[1][1] == ""  # the second process says nothing
    # What two processes counted together is what one counts alone: every character once.
    capsys.readouterr()
    assert evaluate([f"--model={both}", f"--dataset={text_file}", "--use_cpu"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(alone["bpc"] - results(both)["test_bpc"]) < SAME


def test_all_processes_end_with_the_best_weights(text_file, tmp_path, capsys):
    """Those of process 0's folder, which the second process does not have, and not each its own last ones."""
    words = [*TEXT, f"--dataset={text_file}", "--learning_rate=0.2", "--lr_scheduler_type=constant", "--eval_steps=2"]
    folder = tmp_path / "run"
    done = two([*words, "--warmup_steps=0", "--freeze_factors", "--max_steps=30"], folder, tmp_path / "log")
    assert [code for code, _ in done] == [0, 0], done
    assert results(folder)["best_step"] < results(folder)["steps"]
    assert evaluate([f"--model={folder}", f"--dataset={text_file}", "--use_cpu"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(alone["bpc"] / results(folder)["test_bpc"] - 1) < SAME


def test_pieces_that_end_leave_a_process_without_rows(pieces, tmp_path, capsys):
    words = [*COMMON, "--task=piano_roll", f"--dataset={pieces}", "--state_size=16", "--factor_size=4"]
    words.append("--state_dropout=0")  # each process draws its own
    one, both = tmp_path / "one", tmp_path / "two"
    assert main([*words, f"--output_dir={one}", "--per_device_train_batch_size=4"]) == 0
    done = two(words, both, tmp_path / "log")
    assert [code for code, _ in done] == [0, 0], done
    assert abs(results(one)["test_nll_per_frame"] - results(both)["test_nll_per_frame"]) < FIGURE
    capsys.readouterr()
    assert evaluate([f"--model={both}", f"--dataset={pieces}", "--use_cpu", "--split=validation"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(alone["nll_per_frame"] - results(both)["validation_nll_per_frame"]) < SAME


@pytest.mark.parametrize("cell", CELL_TYPES)
def test_every_trained_parameter_gets_a_gradient_in_every_step(cell):
    """So DDP need not look for unused ones, which would cost a walk over the graph a step."""
    ids = torch.randint(1, 11, (2, 5))
    frames = torch.rand(2, 5, 88)
    for block in BLOCKS if cell == "kru" else [{}]:
        for head, inputs in (
            (KRUForCausalLM, {"input_ids": ids, "labels": ids}),
            (KRUForSequenceClassification, {"input_ids": ids, "labels": ids[:, 0] % 2}),
            (KRUForTokenClassification, {"input_ids": ids, "labels": ids % 2}),
            (KRUForPianoRoll, {"input_values": frames, "labels": frames.round()}),
        ):
            options = {"input_size": 88, "vocab_size": 1, "pad_token_id": None} if head is KRUForPianoRoll else {}
            model = head(tiny_config(cell_type=cell, **block, **options)).train()
            model(**inputs).loss.backward()
            missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
            assert not missing, (head.__name__, block)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_models_of_the_recipes_are_too_small_to_shard(recipe):
    """What training/accelerate/README.md says of DDP and FSDP rests on this."""
    arguments = parse_arguments([str(recipe)])
    head = get_task(arguments.run.task).head
    data = {
        "causal_lm": {"vocab_size": 53 if "ptb" in recipe.stem else 105},
        "piano_roll": {"vocab_size": 1, "input_size": 88},
    }
    model = build_model(head, arguments.model, **data.get(head, {"vocab_size": 40, "num_labels": 40}))
    assert model.num_parameters(only_trainable=True) < 500_000


def test_resume_with_another_number_of_processes(text_file, tmp_path):
    words = [*TEXT, f"--dataset={text_file}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*words, f"--output_dir={whole}", "--per_device_train_batch_size=4"]) == 0
    assert main([*words, f"--output_dir={cut}", "--per_device_train_batch_size=4"]) == 0
    ckpt.remove_checkpoint(cut / f"checkpoint-{STEPS}")
    again = [*words, "--resume_from_checkpoint=last", "--per_device_train_batch_size=4", f"--output_dir={cut}"]
    # The same rows a process would be twice the batch: refused, on every process, said once.
    log = tmp_path / "refused"
    done = ranks.finish(ranks.start([again, again], log), log)
    assert [code for code, _ in done] == [1, 1], done
    assert "global_batch_size was 4, now 8" in done[0][1]
    assert "per_device_train_batch_size × processes" in done[0][1]
    assert done[1][1] == ""
    again[-2] = "--per_device_train_batch_size=2"
    log = tmp_path / "done"
    done = ranks.finish(ranks.start([again, again], log), log)
    assert [code for code, _ in done] == [0, 0], done
    assert f"from {cut / 'checkpoint-6'}" in done[0][1]
    assert abs(results(cut)["test_bpc"] - results(whole)["test_bpc"]) < FIGURE
    state = load_file(cut / f"checkpoint-{STEPS}" / ckpt.CARRIED)
    assert state["0"].shape == (4, 2, 16)


def test_an_error_of_one_process_ends_all_and_is_said_once(text_file, tmp_path):
    words = [*TEXT, f"--output_dir={tmp_path / 'run'}"]
    log = tmp_path / "log"
    own = [[*words, f"--dataset={text_file}"], [*words, f"--dataset={tmp_path / 'nowhere.txt'}"]]
    done = ranks.finish(ranks.start(own, log), log)
    assert [code for code, _ in done] == [1, 1], done
    assert done[0][1].startswith(f"error: rank 1: dataset='{tmp_path / 'nowhere.txt'}' does not exist")
    assert done[1][1] == ""
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(text_file, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    words = [*TEXT, f"--dataset={text_file}", f"--output_dir={folder}", "--max_steps=100000", "--eval_steps=100000"]
    words += ["--save_steps=100000"]
    children = ranks.start([words, words], log)
    wait_for(lambda: (folder / "recipe.yaml").exists())
    os.kill(children[1].pid, signal.SIGTERM)
    done = ranks.finish(children, log)
    assert [code for code, _ in done] == [128 + signal.SIGTERM] * 2, done
    assert len(ckpt.checkpoints(folder)) == 1
    assert "go on with: torchrun --nproc_per_node 2 -m training.train" in done[0][1]


# ---- the launcher ----


def wait_for(condition, children=(), timeout=90.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        for child in children:
            assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def launch(options: list[str], words: list[str]) -> subprocess.Popen:
    """`accelerate launch` of training.train, with both outputs in one pipe."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "training.train", *words]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def process_of(launcher: subprocess.Popen) -> int:
    """The training process that a launcher has started."""
    (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(child)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_killed_process_ends_those_of_the_other_machine_within_a_minute(text_file, tmp_path):
    """Two launchers as on two machines; the process of the second one is killed."""
    words = [*TEXT, f"--dataset={text_file}", "--max_steps=100000", "--eval_steps=100000", "--save_steps=20"]
    options = ["--config_file", str(CONFIGS / "several_machines.yaml"), "--num_processes", "2"]
    options += ["--main_process_port", str(ranks.free_port()), "--machine_rank"]
    folders = [tmp_path / "first", tmp_path / "second"]
    launchers = [launch([*options, str(n)], [*words, f"--output_dir={folder}"]) for n, folder in enumerate(folders)]
    wait_for(lambda: ckpt.checkpoints(folders[0]), launchers)
    killed, began = process_of(launchers[1]), time.monotonic()
    os.kill(killed, signal.SIGKILL)
    said = [launcher.communicate(timeout=MINUTE)[0] for launcher in launchers]
    assert time.monotonic() - began < MINUTE
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert f"Signal 9 (SIGKILL) received by PID {killed}" in said[1]
    assert re.search("^error: another process has ended .* by peer", said[0], flags=re.MULTILINE)
    assert "Traceback" not in said[0].split("torch/distributed/elastic")[0]  # the launcher's own comes after
    assert "--resume_from_checkpoint last" in said[0]
    assert "gloo" not in said[0]
    assert not folders[1].exists()
    for path in ckpt.checkpoints(folders[0]):
        load_file(path / ckpt.WEIGHTS)


def test_what_the_launcher_would_do_wrong_is_refused(text_file, tmp_path):
    words = [*TEXT, f"--dataset={text_file}", f"--output_dir={tmp_path / 'run'}"]
    cases = {
        "FSDP is not supported: every process holds the whole model": ["--use_fsdp", "--num_processes", "1"],
        "started one process although it was asked for several": ["--cpu", "--num_processes", "2"],
    }
    children = {message: launch(options, words) for message, options in cases.items()}
    for message, child in children.items():
        said = child.communicate(timeout=MINUTE)[0]
        assert child.returncode == 1
        assert f"{message}" in said
        assert "training/accelerate/" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert (config.num_machines > 1) == (path.stem == "several_machines")
