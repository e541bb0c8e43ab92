"""How runs end and what they say then: signals, launchers, a closed terminal, trackers that fail."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from ranks import HANG
from tiny_run import ENVIRONMENT, PROGRAMS, ROOT, at_step, figures_of, options, spawn, wait_for

from training.common import processes
from training.common.run_folder import checkpoints
from training.common.stopping import SIGNALS, StopRequest
from training.train import main

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}
LONG = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20


@pytest.fixture
def handlers():
    """What the signals did before is what they do after."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) == handler
        signal.signal(number, handler)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_saves_and_says_how_to_resume(text_file, tmp_path, monkeypatch, capsys, handlers, number, program):
    at_step(monkeypatch, 3, lambda run, figures: os.kill(os.getpid(), number))
    words = options(text_file, tmp_path, max_steps=10)
    assert PROGRAMS[program]([*words, "--overwrite_output_dir=true"]) == 128 + number
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    *_, reason, advice = capsys.readouterr().err.splitlines()
    assert reason == "error: stopped at step 3; the checkpoint is written"
    assert advice == f"resume with: python -m {program} {shlex.join(words)} --resume_from_checkpoint last"


def test_the_way_to_resume_is_from_the_newest_checkpoint():
    """And not again from the one that this run began with, nor over what there is."""
    resume = ["char_lm", "--resume-from-checkpoint", "run/checkpoint-5"]
    for words in (resume, ["char_lm", "--overwrite-output-dir"], ["char_lm", "--overwrite_output_dir=true"]):
        expected = "python -m training.train char_lm --seed=1 --resume_from_checkpoint last"
        assert processes.how_to_resume([*words, "--seed=1"], "training.train") == expected


def test_nohup_keeps_its_word(text_file, tmp_path, monkeypatch, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 3, lambda run, figures: os.kill(os.getpid(), signal.SIGHUP))
    assert main(options(text_file, tmp_path, max_steps=6)) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_signal_at_the_loops_end_is_not_forgotten():
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt) as stopped, stop.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)  # after the last look
    assert stopped.value.args == (signal.SIGUSR1,)


def test_a_signal_while_the_reason_is_said_changes_nothing(text_file, tmp_path, monkeypatch, capsys, handlers):
    """Launchers send theirs after that of the terminal."""
    at_step(monkeypatch, 2, lambda run, figures: os.kill(os.getpid(), signal.SIGINT))
    whole = processes.say
    monkeypatch.setattr(processes, "say", lambda *words: (os.kill(os.getpid(), signal.SIGTERM), whole(*words)))
    assert main(options(text_file, tmp_path, max_steps=6)) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1].startswith("resume with: ")


@pytest.mark.slow
@pytest.mark.parametrize(("program", "number"), [*zip(PROGRAMS, (signal.SIGTERM, signal.SIGINT), strict=True)])
def test_a_signal_from_outside_saves(text_file, tmp_path, program, number):
    child = spawn(["-m", program], options(text_file, tmp_path, **LONG))
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    time.sleep(0.5)
    child.send_signal(number)
    said = child.communicate(timeout=HANG)[1].decode()
    assert child.returncode == 128 + number, said
    assert len(checkpoints(tmp_path)) == 1
    assert said.splitlines()[-1].startswith(f"resume with: python -m {program} ")
    assert "characters/s" in said and "Traceback" not in said and "Warning" not in said


@pytest.mark.slow
def test_a_signal_outside_the_loop_ends_the_run_at_once(text_file, tmp_path):
    child = spawn(["-m", "training.train"], options(text_file, tmp_path, sample_length=1_000_000))
    wait_for(lambda: (tmp_path / "all_results.json").exists(), child)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=HANG)[1].decode()
    assert child.returncode == 128 + signal.SIGINT, said
    assert "resume with: python -m training.train" in said
    assert main(options(text_file, tmp_path, resume_from_checkpoint="last")) == 0


@pytest.mark.slow
def test_a_closed_terminal_costs_no_step(text_file, tmp_path):
    """With it goes the reader of what the run says, before the signal comes."""
    child = spawn(["-m", "training.train"], options(text_file, tmp_path, **LONG))
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    for pipe in (child.stdout, child.stderr):
        pipe.close()
    child.send_signal(signal.SIGHUP)
    assert child.wait(HANG) == 128 + signal.SIGHUP
    assert len(checkpoints(tmp_path)) == 1


# ---- launchers ----


@pytest.mark.slow
def test_training_ends_when_its_launcher_is_killed(text_file, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "-m", "training.train"]
    child = spawn(launcher, options(text_file, tmp_path, **LONG))
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    time.sleep(0.5)
    child.kill()
    wait_for(lambda: checkpoints(tmp_path))


@pytest.mark.slow
def test_the_reason_is_the_last_word_under_a_launcher(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = options(tmp_path / "text.txt", tmp_path / "text.txt" / "run")
    two = ["--config_file", str(ROOT / "training" / "accelerate" / "two_cpu_processes.yaml")]
    children = []
    for launcher in (["--cpu"], two):
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "training.train", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        children.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes))
    for child in children:
        last = child.communicate(timeout=HANG)[0].splitlines()[-1]
        assert child.returncode == 1
        assert (
            last == f"error: output_dir='{tmp_path}/text.txt/run' cannot be a folder: '{tmp_path}/text.txt' is a file"
        )


@pytest.mark.parametrize("program", PROGRAMS)
def test_srun_without_a_launcher_is_refused(text_file, tmp_path, monkeypatch, capsys, program):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert PROGRAMS[program](options(text_file, tmp_path / "run")) == 1
    assert capsys.readouterr().err.startswith("error: srun started 2 processes that know nothing of each other; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},  # one task of a larger allocation
        {"WORLD_SIZE": "2"},  # a launcher did
        {"ENVIRONMENT": "BATCH"},  # the script of sbatch, which runs once
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_what_slurm_starts_rightly_is_accepted(monkeypatch, variables):
    for name, value in {**SLURM, **variables}.items():
        monkeypatch.setenv(name, value)
    processes.check_launcher()


# ---- trackers ----


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_tracker_that_fails_ends_alone(text_file, tmp_path, monkeypatch, capsys, program):
    """Its thread meets a full disk in the middle of the run."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    at_step(monkeypatch, 5, lambda run, figures: monkeypatch.setattr(RecordWriter, "write", full))
    hook = threading.excepthook
    assert PROGRAMS[program](options(text_file, tmp_path, report_to="tensorboard")) == 0
    assert threading.excepthook is hook
    said = capsys.readouterr().err
    note = "note: the tracker has failed and gets no more figures ([Errno 28] No space left on device)"
    assert said.count(note) == 1
    assert "Traceback" not in said
    assert len(figures_of(tmp_path)) == 10


def test_a_tracker_that_cannot_start(text_file, tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("mine")
    assert main(options(text_file, tmp_path, report_to="tensorboard")) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: report_to='tensorboard' cannot be started: ")
    assert main(options(text_file, tmp_path, resume_from_checkpoint="last", max_steps=2)) == 0
