"""What the tasks on finite sets of labelled sequences share: shuffled batches, evaluation in parts, sums of figures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.errors import UserError
from ..options.data import DataOptions
from .base import Batch, Layout, Task, TaskOutput

# What can still be drawn and ordered in memory.
MOST = {"sequence_length": 10**6, "train_samples": 10**8, "validation_samples": 10**8, "test_samples": 10**8}
IGNORED = -100  # label that is not scored


def check_at_least(options: Any, **lowest: int) -> None:
    """Raise `UserError` for an option below its lowest value."""
    for name, low in lowest.items():
        if getattr(options, name) < low:
            raise UserError(f"{name}={getattr(options, name)} is not valid: it must be {low} or more")


@dataclass
class GeneratedOptions:
    """Options of tasks whose data are generated: the paper's sizes are 100,000 and 10,000."""

    sequence_length: int = field(default=100, metadata={"help": "The task's T."})
    train_samples: int = field(default=100_000, metadata={"help": "Training sequences."})
    validation_samples: int = field(default=1_000, metadata={"help": "Validation sequences."})
    test_samples: int = field(default=10_000, metadata={"help": "Test sequences."})
    data_seed: int = field(
        default=0, metadata={"help": "Seed of the generated data; --seed moves the weights and the order alone."}
    )
    eval_batch_size: int = field(default=50, metadata={"help": "Sequences in one evaluation call; changes no figure."})

    def __post_init__(self) -> None:
        check_at_least(
            self,
            sequence_length=2,
            train_samples=1,
            validation_samples=1,
            test_samples=1,
            data_seed=0,
            eval_batch_size=1,
        )
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name}={getattr(self, name)} is not valid: it must be at most {most}")

    def samples(self, split: str) -> int:
        """Sequences of a split."""
        return getattr(self, f"{split}_samples")


class SequenceTask(Task):
    """Sequences that are independent of each other, drawn without replacement in every pass, each from a zero state."""

    @abstractmethod
    def samples(self, split: str) -> int:
        """Sequences of a split."""

    @abstractmethod
    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """The sequences of those numbers (B,) of a split."""

    def order(self, epoch: int) -> np.ndarray:
        """The order of the training sequences (S,) in a pass; the last one asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.samples("train"))
        return self._order[1]

    _order: tuple[int, np.ndarray] | None = None

    def num_batches(self, layout: Layout) -> int:
        batches = self.samples("train") // layout.global_batch_size
        if batches < 1:
            raise UserError(
                f"the training data have {self.samples('train')} sequences: too few for a batch of "
                f"{layout.global_batch_size}; lower per_device_train_batch_size"
            )
        return batches

    def train_batch(self, index: int, slot: int, layout: Layout) -> Batch:
        return self.batch("train", self.train_indices(index, layout)[np.array(layout.rows(slot))])

    def train_indices(self, index: int, layout: Layout) -> np.ndarray:
        """Numbers (G,) of the training sequences of a global batch."""
        epoch, position = divmod(index, self.num_batches(layout))
        first = position * layout.global_batch_size
        return self.order(epoch)[first : first + layout.global_batch_size]

    def eval_order(self, split: str) -> np.ndarray:
        """The order in which a split is evaluated."""
        return np.arange(self.samples(split))

    def eval_batches(self, split: str, slot: int, num_slots: int) -> Iterator[Batch]:
        own, size = self.eval_order(split)[slot::num_slots], self.options.eval_batch_size
        for first in range(0, len(own), size):
            yield self.batch(split, own[first : first + size])

    def forward(self, model: Any, batch: Batch, state: Any) -> TaskOutput:
        out = model(**batch.inputs, use_cache=False)
        with torch.no_grad():
            sums = self.sums(out.logits, batch)
        return TaskOutput(out.loss, sums, None, out.unitary_loss)

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What adds up over batches: of (…, K) logits and (…) labels, summed nats, scored labels, and right ones."""
        return classification_sums(logits, batch.inputs["labels"])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"], "accuracy": sums["right"] / sums["count"]}


def classification_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Summed nats, number of scored labels and of right ones; logits (…, K), labels (…), -100 is not scored."""
    flat, targets = logits.float().flatten(0, -2), labels.flatten()  # (M, K), (M,)
    nats = F.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="none")  # (M,)
    return {
        "loss": nats.double().sum(),
        "count": (targets != IGNORED).sum().double(),
        "right": (flat.argmax(-1) == targets).sum().double(),
    }


def check_generated(name: str, data: DataOptions) -> None:
    """Generated data have one name; another one, or an option of a data set of the Hub, is an error."""
    if data.dataset not in (None, name):
        raise UserError(f"dataset={data.dataset!r} is not valid: the data of this task are generated; leave it out")
    data.refuse_hub_options()
