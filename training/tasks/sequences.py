"""What the tasks on finite sets of labelled sequences share: shuffled batches, evaluation in parts, sums of figures."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.errors import UserError
from ..common.files import fingerprint
from ..data.splits import IGNORED, SPLITS, DataSet
from ..options.fields import AT_LEAST_0, AT_LEAST_1, Options, at_most, option
from .base import Batch, Layout, Task, TaskOutput


@dataclass
class GeneratedOptions(Options):
    """Options of tasks whose data are generated: the paper's sizes are 100,000 and 10,000.

    At most as many as can be drawn and ordered in memory.
    """

    sequence_length: int = option(100, "The task's T.", allowed=at_most(10**6, 2))
    train_samples: int = option(100_000, "Training sequences.", allowed=at_most(10**8))
    validation_samples: int = option(1_000, "Validation sequences.", allowed=at_most(10**8))
    test_samples: int = option(10_000, "Test sequences.", allowed=at_most(10**8))
    data_seed: int = option(0, "Seed of the generated data; --seed moves weights and order alone.", allowed=AT_LEAST_0)
    eval_batch_size: int = option(50, "Sequences in one evaluation call; changes no figure.", allowed=AT_LEAST_1)


class SequenceTask(Task):
    """Sequences that are independent of each other, drawn without replacement in every pass, each from a zero state."""

    def samples(self, split: str) -> int:
        """Sequences of a split."""
        return len(self.dataset.splits[split])

    @abstractmethod
    def batch(self, split: str, indices: np.ndarray) -> Batch:
        """The sequences of those numbers (B,) of a split."""

    @lru_cache(maxsize=1)  # noqa: B019 (a task lives as long as its run)
    def order(self, epoch: int) -> np.ndarray:
        """The order of the training sequences (S,) in a pass."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.samples("train"))

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


class GeneratedTask(SequenceTask):
    """Sequences that are made from `data_seed` alone."""

    Options: ClassVar[type] = GeneratedOptions

    def load(self, tokenizer: Any = None) -> None:
        if self.data.dataset not in (None, self.name):
            raise UserError(
                f"dataset={self.data.dataset!r} is not valid: the data of this task are generated; leave it out"
            )
        self.data.refuse_hub_options()
        sizes = {split: getattr(self.options, f"{split}_samples") for split in SPLITS}
        digest = fingerprint(self.options.sequence_length, *self.generate(sizes))
        self.dataset = DataSet(self.name, {split: range(size) for split, size in sizes.items()}, "samples", digest)

    @abstractmethod
    def generate(self, sizes: dict[str, int]) -> Iterable[Any]:
        """Make the sequences of each split, as many as `sizes` says; returns what identifies them."""


def classification_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Summed nats, number of scored labels and of right ones; logits (…, K), labels (…), -100 is not scored."""
    flat, targets = logits.float().flatten(0, -2), labels.flatten()  # (M, K), (M,)
    nats = F.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="none")  # (M,)
    return {
        "loss": nats.double().sum(),
        "count": (targets != IGNORED).sum().double(),
        "right": (flat.argmax(-1) == targets).sum().double(),
    }


def by_length(lengths: np.ndarray, noise: float, random: np.random.Generator) -> np.ndarray:
    """The order of sequences of these lengths (S,) by length, with noise on its logarithm: other company each pass."""
    return np.argsort(np.log(lengths) + noise * random.standard_normal(len(lengths)))
