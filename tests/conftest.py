"""Shared settings of the tests."""

import torch

# Test workers run side by side: a thread pool in each would make them fight for the cores.
torch.set_num_threads(1)
