"""Shared settings of the tests."""

import pytest
import torch
from paper_data import pictures_folder, timit_folder  # noqa: F401  (fixtures)
from tiny_run import pieces, text_file  # noqa: F401  (fixtures)

from kru_hf import use_backend

# Test workers run side by side: a thread pool in each would make them fight for the cores.
torch.set_num_threads(1)


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
