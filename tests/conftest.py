"""Shared settings of the tests."""

import os

import pytest
import torch
from finished_run import folder, trained  # noqa: F401  (fixtures)
from paper_data import pictures_folder, timit_folder  # noqa: F401  (fixtures)
from tiny_run import pieces, text_file  # noqa: F401  (fixtures)

from kru_hf import use_backend

torch.set_num_threads(1)


def pytest_configure(config):
    """Test workers run side by side: each has a core of its own.

    Training takes as many threads as it finds cores, here and in the processes that tests start, and threads that share
    a core double the time of tiny steps. What starts the workers keeps all cores: they inherit its own.
    """
    worker = getattr(config, "workerinput", {}).get("workerid", f"gw{os.getpid()}")
    starts_workers = not hasattr(config, "workerinput") and config.getoption("numprocesses", None)
    if hasattr(os, "sched_setaffinity") and not starts_workers:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture
def choose_backend():
    """``use_backend`` for one test."""
    yield use_backend
    use_backend("auto")


def pytest_collection_modifyitems(items):
    """Tests of several processes are slow ones."""
    for item in items:
        if item.get_closest_marker("processes"):
            item.add_marker("slow")
