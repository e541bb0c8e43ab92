"""Pictures read pixel by pixel and classified at the last one: sequential and permuted MNIST.

A step is one pixel in [0, 1], row by row or in a fixed permutation of the whole picture (see `training.data.pixels`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..common.files import fingerprint
from ..data.pixels import DIGITS, Pictures, fixed_permutation, load_pictures
from ..options.fields import AT_LEAST_1, Options, option
from .base import Batch
from .sequences import SequenceTask


@dataclass
class PixelOptions(Options):
    """Options of classification pixel by pixel."""

    permuted: bool = option(False, "Whether the pixels are read in the fixed permutation.")
    eval_batch_size: int = option(50, "Pictures in one evaluation call; changes no figure.", allowed=AT_LEAST_1)


class PixelMNIST(SequenceTask):
    """The model of the best validation accuracy is kept, as in the paper."""

    name = "pixel_mnist"
    head = "sequence_classification"
    metric = "accuracy"
    greater_is_better = True
    default_dataset = DIGITS
    Options = PixelOptions

    dataset: Pictures

    def load(self, tokenizer: Any = None) -> None:
        self.dataset = load_pictures(self.data)
        self.steps = self.dataset.pixels["train"].shape[1]  # P
        self.permutation = fixed_permutation(self.steps) if self.options.permuted else np.arange(self.steps)  # (P,)

    def dataset_record(self) -> dict[str, Any]:
        order = {"permutation_sha256": fingerprint(self.permutation.astype(np.int64))} if self.options.permuted else {}
        return {**super().dataset_record(), **order}

    def notes(self, splits: tuple[str, ...]) -> list[str]:
        white = self.dataset.white
        scale = [] if white == 255 or self.dataset.name == DIGITS else [f"the largest value of a pixel is {white}"]
        return [*super().notes(splits), *scale]

    def model_kwargs(self) -> dict[str, Any]:
        classes = int(self.dataset.splits["train"].max()) + 1
        return {
            "vocab_size": 1,
            "input_size": 1,
            "num_labels": classes,
            "problem_type": "single_label_classification",
        }

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        pixels = torch.from_numpy(self.dataset.pixels[split][indices][:, self.permutation].astype(np.float32))  # (B, P)
        labels = torch.from_numpy(self.dataset.splits[split][indices])  # (B,)
        values = (pixels / self.dataset.white)[..., None]  # (B, P, 1)
        return Batch({"input_values": values, "labels": labels}, num_elements=pixels.numel())


TASK = PixelMNIST
