"""How many threads a call of a model takes: a rule of sizes, whatever else the machine does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_model

from kru_hf import KRUForSequenceClassification
from kru_hf.modeling_kru import THREADS_FROM

THREADS = 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def threads_of(model, *args, **kwargs):
    """The threads that the model's layers and its head see."""
    seen = []
    for module in (model.model.layers[0], getattr(model, "lm_head", None) or model.score):
        module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    model(*args, **kwargs)
    return seen


def test_a_step_of_one_stream_waits_for_no_other_thread():
    ids = torch.ones(1, 1, dtype=torch.long)
    model = tiny_model()
    assert threads_of(model, ids) == [1, 1] and torch.get_num_threads() == THREADS
    assert threads_of(tiny_model(), input_ids=ids) == [1, 1]
    with pytest.raises(ValueError, match="input_ids must be in"):
        model(ids + 1000)
    assert torch.get_num_threads() == THREADS


def test_much_work_takes_all_threads():
    model = tiny_model()
    steps = 2 * THREADS_FROM // model._products()  # the body alone counts no head
    assert threads_of(model, torch.ones(1, steps, dtype=torch.long)) == [THREADS, THREADS]
    frames = KRUForSequenceClassification(tiny_config(input_size=3, num_labels=2))
    assert threads_of(frames, input_values=torch.ones(2, 4, 3)) == [1, 1]
    assert torch.get_num_threads() == THREADS


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_of_training_sleep_while_they_wait_unless_told_otherwise(given):
    """The variable is there before torch, which reads it when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    code = "import os, sys, training; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    said = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == (given or "PASSIVE"), said.stderr
