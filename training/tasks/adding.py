"""Adding: the sum of two marked numbers among T (Hochreiter & Schmidhuber 1997).

As Arjovsky et al. 2016 and Jose et al. 2018 set it: a step has two inputs, a number from U[0, 1) and a mark. One step
of the first half is marked 1 and one of the second, all others 0; the target, read at the last step, is the sum of the
two marked numbers. Always answering 1 has a mean squared error of 1/6.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.splits import SPLITS
from .base import Batch
from .sequences import GeneratedTask

FRAME = 2  # number and mark


class Adding(GeneratedTask):
    """Sequences are made when they are asked for: number i of a split comes from its own random stream."""

    name = default_dataset = "adding"
    head = "sequence_classification"
    metric = "mse"

    def generate(self, sizes: dict[str, int]) -> list[Any]:
        """The first and the last sequence of each split stand for all: each is made from its number alone."""
        ends = [self.frames(split, np.array([0, size - 1]))[0].numpy() for split, size in sizes.items()]
        return [{f"{split}_samples": size for split, size in sizes.items()}, *ends]

    def model_kwargs(self) -> dict[str, Any]:
        return {"vocab_size": 1, "input_size": FRAME, "num_labels": 1, "problem_type": "regression"}

    def frames(self, split: str, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Sequences (B, T, 2) of those numbers and their sums (B,)."""
        length, half = self.options.sequence_length, self.options.sequence_length // 2
        frames = np.zeros((len(indices), length, FRAME), dtype=np.float32)  # (B, T, 2)
        marks = np.empty((len(indices), 2), dtype=np.int64)  # (B, 2)
        for row, index in enumerate(indices):
            random = np.random.default_rng([self.options.data_seed, SPLITS.index(split), int(index)])
            frames[row, :, 0] = random.random(length, dtype=np.float32)  # (T,)
            marks[row] = random.integers(half), half + random.integers(length - half)
        rows = np.arange(len(indices))[:, None]  # (B, 1)
        frames[rows, marks, 1] = 1
        return torch.from_numpy(frames), torch.from_numpy(frames[rows, marks, 0].sum(1))

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        frames, sums = self.frames(split, indices)  # (B, T, 2), (B,)
        return Batch({"input_values": frames, "labels": sums}, num_elements=frames.shape[0] * frames.shape[1])

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Summed squared errors of logits (B, 1)."""
        errors = (logits[:, 0].float() - batch.inputs["labels"]).double()  # (B,)
        return {"loss": errors.square().sum(), "count": torch.tensor(len(errors), dtype=torch.float64).to(errors)}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        mse = sums["loss"] / sums["count"]
        return {"loss": mse, "mse": mse}

    def progress(self, loss: float) -> dict[str, str]:
        return {"mse": f"{loss:.5f}"}


TASK = Adding
