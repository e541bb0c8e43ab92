"""Several processes: equal figures however rows and pieces fall to them, agreed ends, and what a lost one does."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from ranks import HANG
from safetensors.torch import load_file
from tiny_run import PROGRAMS, ROOT, options, results_of, same_end, wait_for

from training.common.errors import UserError
from training.common.processes import check_launcher
from training.common.run_folder import WEIGHTS, checkpoints, remove_checkpoint
from training.evaluate import main as evaluate
from training.loop.arguments import parse_arguments
from training.loop.checkpoint import TENSORS
from training.models.build import build_model
from training.options.recipe import RECIPES
from training.tasks import get_task
from training.train import main

CONFIGS = ROOT / "training" / "accelerate"
FIGURE = 2e-3  # between the figure of one process and that of two
SAME = 1e-6  # between evaluations of the same weights, cut differently
STEPS = 12
COMMON = ["--use_cpu", "--report_to=none", "--sample_length=5", "--logging_steps=2", "--eval_steps=6", "--save_steps=6"]
COMMON += [f"--max_steps={STEPS}", "--sequence_length=16", "--learning_rate=0.01"]
TEXT = [*COMMON, "--state_size=16", "--factor_shapes=4x4,4x4", "--block_type=plain"]


def two(words: list[str], folder: Path, log: Path, rows: int = 2) -> list[tuple[int | None, str]]:
    """Two processes with their part of the global batch; the second one has a folder of its own, and may not write."""
    words = [*words, f"--per_device_train_batch_size={rows}"]
    folders = [folder, folder.with_name(folder.name + "-elsewhere")]
    done = ranks.finish(ranks.start([[*words, f"--output_dir={one}"] for one in folders], log), log)
    assert not folders[1].exists()
    return done


@pytest.mark.processes
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
        assert abs(results_of(one)[name] - results_of(both)[name]) < FIGURE
    assert done[1][1] == ""  # the second process says nothing
    # What two processes counted together is what one counts alone: every character once.
    capsys.readouterr()
    assert evaluate([f"--model={both}", f"--dataset={text_file}", "--use_cpu"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(alone["bpc"] - results_of(both)["test_bpc"]) < SAME


@pytest.mark.processes
def test_all_processes_end_with_the_best_weights(text_file, tmp_path, capsys):
    """Those of process 0's folder, which the second process does not have, and not each its own last ones."""
    (tmp_path / "short.txt").write_text(text_file.read_text()[:4012])
    text_file = tmp_path / "short.txt"
    words = [*TEXT, f"--dataset={text_file}", "--learning_rate=0.2", "--lr_scheduler_type=constant", "--eval_steps=2"]
    folder = tmp_path / "run"
    done = two([*words, "--warmup_steps=0", "--freeze_factors", "--max_steps=30"], folder, tmp_path / "log")
    assert [code for code, _ in done] == [0, 0], done
    assert results_of(folder)["best_step"] < results_of(folder)["steps"]
    assert evaluate([f"--model={folder}", f"--dataset={text_file}", "--use_cpu"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(alone["bpc"] / results_of(folder)["test_bpc"] - 1) < SAME


@pytest.mark.processes
def test_pieces_that_end_leave_a_process_without_rows(pieces, tmp_path, capsys):
    words = [*COMMON, "--task=piano_roll", f"--dataset={pieces}", "--state_size=16", "--factor_size=4"]
    words.append("--state_dropout=0")  # each process draws its own
    one, both = tmp_path / "one", tmp_path / "two"
    assert main([*words, f"--output_dir={one}", "--per_device_train_batch_size=4"]) == 0
    done = two(words, both, tmp_path / "log")
    assert [code for code, _ in done] == [0, 0], done
    assert abs(results_of(one)["test_nll_per_frame"] - results_of(both)["test_nll_per_frame"]) < FIGURE
    capsys.readouterr()
    assert evaluate([f"--model={both}", f"--dataset={pieces}", "--use_cpu", "--split=validation"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(alone["nll_per_frame"] - results_of(both)["validation_nll_per_frame"]) < SAME


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


@pytest.mark.processes
def test_resume_with_another_number_of_processes(text_file, tmp_path):
    words = [*TEXT, f"--dataset={text_file}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*words, f"--output_dir={whole}", "--per_device_train_batch_size=4"]) == 0
    assert main([*words, f"--output_dir={cut}", "--per_device_train_batch_size=4"]) == 0
    remove_checkpoint(cut / f"checkpoint-{STEPS}")
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
    assert abs(results_of(cut)["test_bpc"] - results_of(whole)["test_bpc"]) < FIGURE
    assert torch.load(cut / f"checkpoint-{STEPS}" / TENSORS)["carried"][0].shape == (4, 2, 16)


@pytest.mark.processes
def test_each_program_trains_and_resumes_exactly_in_two_processes(text_file, tmp_path):
    """Each process with its own random state, which decides its dropout."""
    parts = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}

    def train(program, name, **changes):
        words = options(text_file, tmp_path / program, **parts, **changes)
        done = ranks.finish(ranks.start([words, words], tmp_path / name, program), tmp_path / name)
        assert [code for code, _ in done] == [0, 0], done
        assert done[1][1] == ""  # the second process says nothing

    for program in PROGRAMS:
        train(program, f"log-{program}")
    folders = [tmp_path / program for program in PROGRAMS]
    same_end(*folders)
    last = folders[1] / "checkpoint-20"
    assert torch.load(last / TENSORS)["carried"][0].shape == (8, 2, 24)  # rows of both processes and parts
    remove_checkpoint(last)
    train("training.train_lightning", "again", resume_from_checkpoint="last")
    same_end(*folders)


@pytest.mark.processes
def test_an_error_of_one_process_ends_all_and_is_said_once(text_file, tmp_path):
    words = [*TEXT, f"--output_dir={tmp_path / 'run'}"]
    log = tmp_path / "log"
    own = [[*words, f"--dataset={text_file}"], [*words, f"--dataset={tmp_path / 'nowhere.txt'}"]]
    done = ranks.finish(ranks.start(own, log), log)
    assert [code for code, _ in done] == [1, 1], done
    assert done[0][1].startswith(f"error: rank 1: dataset='{tmp_path / 'nowhere.txt'}' does not exist")
    assert done[1][1] == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(text_file, tmp_path, program):
    folder, log = tmp_path / "run", tmp_path / "log"
    words = [*TEXT, f"--dataset={text_file}", f"--output_dir={folder}", "--max_steps=100000", "--eval_steps=100000"]
    words += ["--save_steps=20"]
    children = ranks.start([words, words], log, program)
    wait_for(lambda: checkpoints(folder))
    os.kill(children[1].pid, signal.SIGTERM)
    done = ranks.finish(children, log)
    assert [code for code, _ in done] == [128 + signal.SIGTERM] * 2, done
    assert f"resume with: torchrun --nproc_per_node 2 -m {program}" in done[0][1]


# ---- the launcher ----


def started(options: list[str], words: list[str]) -> subprocess.Popen:
    """`accelerate launch` of training.train, with both outputs in one pipe."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "training.train", *words]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def process_of(launcher: subprocess.Popen) -> int:
    """The training process that a launcher has started."""
    (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(child)


def ended(launcher: subprocess.Popen) -> str:
    """What a launcher has said at its end; if it hangs the failure shows the stacks of its process."""
    try:
        return launcher.communicate(timeout=HANG)[0]
    except subprocess.TimeoutExpired:
        os.kill(process_of(launcher), signal.SIGABRT)
        pytest.fail(launcher.communicate(timeout=HANG)[0])


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_a_killed_process_ends_those_of_the_other_machine(text_file, tmp_path):
    """Two launchers as on two machines; the process of the second one is killed."""
    words = [*TEXT, f"--dataset={text_file}", "--max_steps=100000", "--eval_steps=100000", "--save_steps=20"]
    options = ["--config_file", str(CONFIGS / "several_machines.yaml"), "--num_processes", "2"]
    options += ["--main_process_port", str(ranks.free_port()), "--machine_rank"]
    folders = [tmp_path / "first", tmp_path / "second"]
    launchers = [started([*options, str(n)], [*words, f"--output_dir={folder}"]) for n, folder in enumerate(folders)]
    wait_for(lambda: checkpoints(folders[0]), *launchers)
    killed = process_of(launchers[1])
    os.kill(killed, signal.SIGKILL)
    said = [ended(launcher) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert f"Signal 9 (SIGKILL) received by PID {killed}" in said[1]
    assert re.search("^error: another process has ended .* by peer", said[0], flags=re.MULTILINE)
    assert "Traceback" not in said[0].split("torch/distributed/elastic")[0]  # the launcher's own comes after
    assert "--resume_from_checkpoint last" in said[0]
    assert "gloo" not in said[0]
    assert not folders[1].exists()
    for path in checkpoints(folders[0]):
        load_file(path / WEIGHTS)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("FSDP is not supported: every process holds the whole model", ["--use_fsdp", "--num_processes", "1"]),
        ("started one process although it was asked for several", ["--cpu", "--num_processes", "2"]),
    ],
)
def test_what_the_launcher_would_do_wrong_is_refused(monkeypatch, message, options):
    """By the environment that it gives the process."""
    given = {}
    monkeypatch.setattr(launch, "multi_gpu_launcher", lambda a: given.update(prepare_multi_gpu_env(a)))
    monkeypatch.setattr(launch, "simple_launcher", lambda a: given.update(prepare_simple_launcher_cmd_env(a)[1]))
    launch.launch_command(launch.launch_command_parser().parse_args([*options, "-m", "training.train"]))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{message}.*training/accelerate/"):
        check_launcher()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert (config.num_machines > 1) == (path.stem == "several_machines")
