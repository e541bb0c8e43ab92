"""How runs end and what they say then: signals, launchers, a closed terminal, trackers that fail."""

import os
import shlex
import signal
import subprocess
import sys
import threading

import pytest
from tiny_run import ENVIRONMENT, ROOT, figures_of, options, spawn, wait_for

from training.common import checkpoint as ckpt
from training.common import processes
from training.common.stopping import SIGNALS, StopRequest
from training.loop.driver import Driver
from training.train import main
from training.train_lightning import main as lightning_main

DRIVERS = {"training.train": main, "training.train_lightning": lightning_main}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20


def at_step(monkeypatch, step, act):
    """Have the run do `act(driver)` within this step."""
    whole = Driver.forward

    def forward(self, model, batch, part):
        if self.state.step == step - 1:
            act(self)
        return whole(self, model, batch, part)

    monkeypatch.setattr(Driver, "forward", forward)


@pytest.fixture
def handlers():
    """What the signals did before is what they do after."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) == handler
        signal.signal(number, handler)


@pytest.mark.parametrize("program", DRIVERS)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_saves_and_says_how_to_go_on(text_file, tmp_path, monkeypatch, capsys, handlers, number, program):
    at_step(monkeypatch, 3, lambda run: os.kill(os.getpid(), number))
    words = options(text_file, tmp_path, max_steps=10)
    assert DRIVERS[program]([*words, "--overwrite_output_dir=true"]) == 128 + number
    assert [path.name for path in ckpt.checkpoints(tmp_path)] == ["checkpoint-3"]
    *_, reason, advice = capsys.readouterr().err.splitlines()
    assert reason == "error: stopped at step 3; the checkpoint is written"
    assert advice == f"go on with: python -m {program} {shlex.join(words)} --resume_from_checkpoint last"


def test_the_way_on_is_from_the_newest_checkpoint():
    """And not again from the one that this run began with."""
    words = ["char_lm", "--resume-from-checkpoint", "run/checkpoint-5", "--seed=1"]
    assert processes.how_to_go_on(words, "training.train") == (
        "python -m training.train char_lm --seed=1 --resume_from_checkpoint last"
    )


def test_nohup_keeps_its_word(text_file, tmp_path, monkeypatch, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 3, lambda run: os.kill(os.getpid(), signal.SIGHUP))
    assert main(options(text_file, tmp_path, max_steps=6)) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_signal_at_the_loops_end_is_not_forgotten():
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt) as stopped, stop.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)  # after the last look
    assert stopped.value.args == (signal.SIGUSR1,)


def test_a_signal_while_the_reason_is_said_changes_nothing(text_file, tmp_path, monkeypatch, capsys, handlers):
    """Launchers send theirs after that of the terminal."""
    at_step(monkeypatch, 2, lambda run: os.kill(os.getpid(), signal.SIGINT))
    whole = processes.say
    monkeypatch.setattr(processes, "say", lambda *words: (os.kill(os.getpid(), signal.SIGTERM), whole(*words)))
    assert main(options(text_file, tmp_path, max_steps=6)) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1].startswith("go on with: ")


def test_a_closed_terminal_costs_no_step(text_file, tmp_path):
    """With it goes the reader of what the run says, before the signal comes."""
    words = options(text_file, tmp_path, max_steps=100_000, save_steps=100_000, eval_steps=100_000)
    child = spawn(["-m", "training.train"], words)
    wait_for(lambda: (tmp_path / "recipe.yaml").exists(), child)
    for pipe in (child.stdout, child.stderr):
        pipe.close()
    child.send_signal(signal.SIGHUP)
    assert child.wait(60) == 128 + signal.SIGHUP
    assert len(ckpt.checkpoints(tmp_path)) == 1


# ---- launchers ----


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
        last = child.communicate(timeout=120)[0].splitlines()[-1]
        assert child.returncode == 1
        assert (
            last == f"error: output_dir='{tmp_path}/text.txt/run' cannot be a folder: '{tmp_path}/text.txt' is a file"
        )


@pytest.mark.parametrize("program", DRIVERS)
def test_srun_without_a_launcher_is_refused(text_file, tmp_path, monkeypatch, capsys, program):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert DRIVERS[program](options(text_file, tmp_path / "run")) == 1
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
def test_what_slurm_starts_rightly_goes_on(monkeypatch, variables):
    for name, value in {**SLURM, **variables}.items():
        monkeypatch.setenv(name, value)
    processes.check_launcher()


# ---- trackers ----


@pytest.mark.parametrize("program", DRIVERS)
def test_a_tracker_that_fails_ends_alone(text_file, tmp_path, monkeypatch, capsys, program):
    """Its thread meets a full disk in the middle of the run."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(28, "No space left on device")

    at_step(monkeypatch, 5, lambda run: monkeypatch.setattr(RecordWriter, "write", full))
    hook = threading.excepthook
    assert DRIVERS[program](options(text_file, tmp_path, report_to="tensorboard")) == 0
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
