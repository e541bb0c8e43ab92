"""Tiny runs of a training program for several test files: their options, their processes, and how two are compared."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ranks import HANG
from safetensors.torch import load_file

from training.common import saving
from training.common.run_folder import WEIGHTS
from training.loop.driver import Driver
from training.records.run_record import read_history
from training.train import main as train
from training.train_lightning import main as train_lightning

ROOT = Path(__file__).parent.parent
STEPS = 20
PROGRAMS = {"training.train": train, "training.train_lightning": train_lightning}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    words = random.Random(0).choices(["the ", "recurrent ", "state, ", "of a unit\n", "is "], k=1500)
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("".join(words))
    return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """7 pieces of very different lengths to train on: batches of 4 leave the second of two processes without any."""
    folder = tmp_path_factory.mktemp("data") / "pieces"
    folder.mkdir()
    chance = random.Random(0)
    for split, lengths in {"train": [5, 9, 40, 12, 33, 7, 70], "validation": [20, 9, 31], "test": [8]}.items():
        notes = [[sorted(chance.sample(range(40, 80), 3)) for _ in range(length)] for length in lengths]
        Dataset.from_dict({"notes": notes}).to_parquet(folder / f"{split}.parquet")
    return folder


def options(text_file, folder, **changes) -> list[str]:
    """Command line of a tiny run with dropout, so that the random state matters."""
    values = {
        "dataset": text_file, "output_dir": folder, "state_size": 24, "factor_shapes": "4x4,6x6", "block_type": "plain",
        "state_dropout": 0.1, "max_steps": STEPS, "eval_steps": 4, "save_steps": 5, "logging_steps": 3,
        "per_device_train_batch_size": 4, "sequence_length": 16, "learning_rate": 0.01,
        "report_to": "none", "sample_length": 10, "use_cpu": "true", **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def spawn(code_or_module: list[str], words: list[str], **kwargs) -> subprocess.Popen:
    command = [sys.executable, *code_or_module, *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def figures_of(folder: Path) -> list[dict]:
    """The history of a run, without the seconds."""
    rows = read_history(folder / "history.csv")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same_end(one: Path, other: Path) -> None:
    """Best weights, last weights and every figure of two runs are equal."""
    same_weights(one, other)
    same_weights(one / f"checkpoint-{STEPS}", other / f"checkpoint-{STEPS}")
    histories = [figures_of(folder) for folder in (one, other)]
    assert histories[0] == histories[1]
    assert not list(other.glob(".*"))


def at_step(monkeypatch, step: int, change) -> None:
    """Have a run in this process do `change(driver, figures)` at the end of this step, before it is counted."""
    whole = Driver.finish_step

    def finish_step(self, figures, norm, num_elements):
        if self.state.step == step - 1:
            change(self, figures)
        whole(self, figures, norm, num_elements)

    monkeypatch.setattr(Driver, "finish_step", finish_step)


def dying(at: int, program: str, words: list[str]) -> None:
    """Body of a process that trains and dies at the `at`-th sync, rename or removal of a file."""
    calls = itertools.count(1)

    def counted(function):
        def wrapped(*args, **kwargs):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    saving.sync, os.replace, shutil.rmtree = map(counted, (saving.sync, os.replace, shutil.rmtree))
    PROGRAMS[program](words)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def wait_for(condition, *children, timeout=HANG) -> None:
    end = time.monotonic() + timeout
    while not condition():
        for child in children:
            assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
