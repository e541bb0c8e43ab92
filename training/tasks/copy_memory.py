"""Copy memory: ten symbols have to be recalled after T blanks (Hochreiter & Schmidhuber 1997).

As Arjovsky et al. 2016 and Jose et al. 2018 set it: tokens 0 … 7 are symbols, 8 is the blank and 9 the delimiter. A
sequence of T + 20 tokens is 10 symbols, T - 1 blanks, the delimiter, 10 blanks; its targets are T + 10 blanks and then
the symbols. The loss is the mean cross-entropy over all T + 20 steps in 9 classes; a model without memory gets
10 · ln 8 / (T + 20) at best. `accuracy` is that of the 10 recalled symbols alone (chance: 1/8).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UserError
from .base import Batch
from .sequences import GeneratedOptions, GeneratedTask, classification_sums

SYMBOLS = 8
RECALLED = 10
BLANK, DELIMITER = 8, 9
VOCABULARY = 10  # symbols, blank and delimiter
CLASSES = 9  # symbols and blank


@dataclass
class CopyMemoryOptions(GeneratedOptions):
    """Options of the copy memory task; its sequences are T + 20 steps long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.train_samples + self.validation_samples + self.test_samples
        if total > SYMBOLS**RECALLED // 100:
            raise UserError(
                f"train_samples + validation_samples + test_samples = {total} is not valid: at most "
                f"{SYMBOLS**RECALLED // 100:,}, for that all differ"
            )


class CopyMemory(GeneratedTask):
    """No sequence occurs twice, within a split or in two of them."""

    name = default_dataset = "copy_memory"
    head = "token_classification"
    Options = CopyMemoryOptions

    symbols: dict[str, np.ndarray]

    def generate(self, sizes: dict[str, int]) -> list[np.ndarray]:
        """The symbols (S, 10) of each split."""
        random = np.random.default_rng(self.options.data_seed)
        codes = random.choice(SYMBOLS**RECALLED, sum(sizes.values()), replace=False)  # (S,)
        digits = (codes[:, None] >> 3 * np.arange(RECALLED)) & 7  # (S, 10): the code in base 8
        parts = np.split(digits.astype(np.uint8), np.cumsum([*sizes.values()])[:-1])
        self.symbols = dict(zip(sizes, parts, strict=True))
        return parts

    def model_kwargs(self) -> dict[str, Any]:
        return {"vocab_size": VOCABULARY, "num_labels": CLASSES, "problem_type": "single_label_classification"}

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        symbols = torch.from_numpy(self.symbols[split][indices]).long()  # (B, 10)
        rows, length = len(symbols), self.options.sequence_length
        tokens = torch.full((rows, length + 2 * RECALLED), BLANK)  # (B, T + 20)
        targets = tokens.clone()  # (B, T + 20)
        tokens[:, :RECALLED] = symbols
        tokens[:, length + RECALLED - 1] = DELIMITER
        targets[:, -RECALLED:] = symbols
        return Batch({"input_ids": tokens, "labels": targets}, num_elements=tokens.numel())

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        labels = batch.inputs["labels"]  # (B, T + 20)
        recalled = classification_sums(logits[:, -RECALLED:], labels[:, -RECALLED:])
        return {
            **classification_sums(logits, labels),
            "right": recalled["right"],
            "recalled": recalled["count"],
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"], "accuracy": sums["right"] / sums["recalled"]}

    def progress(self, loss: float) -> dict[str, str]:
        return {"loss": f"{loss:.5f}", "of memoryless": f"{loss / memoryless_loss(self.options.sequence_length):.3f}"}


def memoryless_loss(length: int) -> float:
    """10 · ln 8 / (T + 20): the best mean cross-entropy without memory, in nats."""
    return RECALLED * math.log(SYMBOLS) / (length + 2 * RECALLED)


TASK = CopyMemory
