"""Word problem of a group: the product of all elements read so far, at every step.

Following a group that is not abelian is what diagonal recurrences cannot do with any number of layers that does not
grow with the length (Merrill et al. 2024). Token i is element i of the group (or its i-th generator), label t is the
element g_t ⋯ g_1. `accuracy_<L>` of sequences of length L is the share of the positions beyond L / 2 that are right.
"""

import itertools
import math
import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UserError
from ..data.splits import IGNORED, SPLITS
from ..options.fields import AT_LEAST_0, AT_LEAST_1, Options, at_most, option
from .base import Batch, Layout
from .sequences import GeneratedTask, classification_sums

MOST_ELEMENTS = 5040
TOKENS_PER_CALL = 2**15  # of an evaluation; changes no figure
LENGTH = at_most(10**6, 2)


@dataclass
class TrackingOptions(Options):
    """Options of tasks in which a state is to be followed for longer than in training."""

    sequence_length: int = option(64, "Length of the longest training sequences.", allowed=LENGTH)
    start_length: int = option(8, "Length of the first training sequences.", allowed=LENGTH)
    curriculum_batches: int = option(
        1000, "Batches over which training sequences grow to sequence_length; 0: none.", allowed=AT_LEAST_0
    )
    validation_length: int = option(256, "Length of validation sequences.", allowed=LENGTH)
    test_lengths: str = option("64,128,256,512,2048,10000", "Lengths of test sequences, numbers with commas.")
    train_samples: int = option(100_000, "Training sequences of a pass, all of them new.", allowed=at_most(10**8))
    validation_samples: int = option(100, "Validation sequences.", allowed=at_most(10**6))
    test_samples: int = option(40, "Test sequences of each length.", allowed=at_most(10**6))
    data_seed: int = option(0, "Seed of the generated data.", allowed=AT_LEAST_0)
    eval_batch_size: int = option(50, "Most sequences in one evaluation call; changes no figure.", allowed=AT_LEAST_1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_length > self.sequence_length:
            raise UserError(f"start_length={self.start_length} must be at most sequence_length={self.sequence_length}")
        self.lengths()

    def lengths(self) -> list[int]:
        """The test lengths as numbers."""
        parts = self.test_lengths.split(",")
        if not all(part.strip().isdecimal() and LENGTH[1](int(part)) for part in parts):
            raise UserError(f"test_lengths={self.test_lengths!r} must hold numbers, each {LENGTH[0]}")
        return sorted({int(part) for part in parts})


@dataclass
class WordProblemOptions(TrackingOptions):
    """Options of the word problem."""

    group: str = option("A5", "The group: Z60, S3, A4, S4, A5, S5, A5xS3, Z60xS3 and their like.")
    elements: str = option(
        "all",
        "What is read: all elements of the group, or its generators.",
        allowed=("all or generators", ("all", "generators").__contains__),
    )


class TrackingTask(GeneratedTask):
    """Sequences of any length from a random stream; every position has a label, or -100."""

    head = "token_classification"
    tokens: int
    classes: int

    @abstractmethod
    def draw(self, random: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels (B, T)."""

    @property
    def eval_lengths(self) -> dict[str, list[int]]:
        """Lengths of the sequences of each evaluation split."""
        return {"validation": [self.options.validation_length], "test": self.options.lengths()}

    def model_kwargs(self) -> dict[str, Any]:
        kind = "single_label_classification"
        return {"vocab_size": self.tokens, "num_labels": self.classes, "problem_type": kind}

    def generate(self, sizes: dict[str, int]) -> list[Any]:
        random = np.random.default_rng(self.options.data_seed)
        return [self.options.test_lengths, sizes, *self.draw(random, 4, 64)]

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        raise NotImplementedError("batches are drawn by their number")

    def length(self, index: int) -> int:
        """Length of the sequences of training batch ``index``: it grows by the same factor in every batch."""
        options = self.options
        done = min(1.0, index / options.curriculum_batches) if options.curriculum_batches else 1.0
        return round(options.start_length * (options.sequence_length / options.start_length) ** done)

    def train_batch(self, index: int, slot: int, layout: Layout) -> Batch:
        random = np.random.default_rng([self.options.data_seed, self.seed, SPLITS.index("train"), index])
        tokens, labels = self.draw(random, layout.global_batch_size, self.length(index))  # (G, T)
        own = np.array(layout.rows(slot))
        batch = self.as_batch(tokens[own], labels[own])
        scored = (labels != IGNORED).sum()
        batch.loss_weight = float((labels[own] != IGNORED).sum() * layout.num_slots / max(1, scored))
        return batch

    def as_batch(self, tokens: np.ndarray, labels: np.ndarray) -> Batch:
        """Tokens and labels (B, T) for the model."""
        inputs = {"input_ids": torch.from_numpy(tokens).long(), "labels": torch.from_numpy(labels).long()}
        return Batch(inputs, num_elements=tokens.size)

    def eval_batches(self, split: str, slot: int, num_slots: int) -> Iterator[Batch]:
        for length in self.eval_lengths[split]:
            random = np.random.default_rng([self.options.data_seed, SPLITS.index(split), length])
            tokens, labels = self.draw(random, self.samples(split), length)  # (S, L)
            tokens, labels = tokens[slot::num_slots], labels[slot::num_slots]
            rows = max(1, min(self.options.eval_batch_size, TOKENS_PER_CALL // length))
            for first in range(0, len(tokens), rows):
                yield self.as_batch(tokens[first : first + rows], labels[first : first + rows])

    def sums(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        labels = batch.inputs["labels"]  # (B, L)
        late = slice(labels.shape[1] // 2, None)
        found = classification_sums(logits[:, late], labels[:, late])
        by_length = {f"{name}_{labels.shape[1]}": found[name] for name in ("right", "count")}
        return {**classification_sums(logits, labels), **by_length}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        lengths = sorted(int(name.removeprefix("right_")) for name in sums if name.startswith("right_"))
        by_length = {f"accuracy_{n}": sums[f"right_{n}"] / max(1, sums[f"count_{n}"]) for n in lengths}
        return {**super().metrics(sums), **by_length}


class WordProblem(TrackingTask):
    """Random elements of a group, each as likely as any other."""

    name = default_dataset = "word_problem"
    Options = WordProblemOptions

    def load(self, tokenizer: Any = None) -> None:
        self.table, generators = group_table(self.options.group)
        self.classes = len(self.table)
        self.read = np.arange(self.classes) if self.options.elements == "all" else generators
        self.tokens = len(self.read)
        super().load(tokenizer)

    def draw(self, random: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = random.integers(self.tokens, size=(rows, length))  # (B, T)
        labels, product = np.empty_like(tokens), np.zeros(rows, dtype=tokens.dtype)  # element 0 is the identity
        for t in range(length):
            product = self.table[self.read[tokens[:, t]], product]
            labels[:, t] = product
        return tokens, labels


def group_table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The table (n, n) of a group, whose entry (a, b) is a·b, and numbers of generators; element 0 is the identity.

    Raises:
        UserError: a name that is not a product of Z<n>, S<n> and A<n>, or of too many elements.
    """
    parts = [re.fullmatch(r"([ZSA])([1-9]\d*)", part) for part in name.split("x")]
    if not all(parts):
        raise UserError(f"group={name!r} is not known; allowed: Z<n>, S<n>, A<n> and products such as A5xS3")
    orders = [_order(part[1], int(part[2])) for part in parts if part]
    if not 1 < math.prod(orders) <= MOST_ELEMENTS:
        raise UserError(f"group={name!r} has {math.prod(orders):,} elements; allowed: 2 to {MOST_ELEMENTS:,}")
    return reduce(_product, (_simple_group(part[1], int(part[2])) for part in parts if part))


def _order(kind: str, n: int) -> int:
    """How many elements Z_n, S_n or A_n has."""
    permutations = math.factorial(min(n, 20))  # enough to see that there are too many
    return n if kind == "Z" else permutations if kind == "S" else max(1, permutations // 2)


def _simple_group(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The table and generators of Z_n, S_n or A_n."""
    if kind == "Z":
        numbers = np.arange(n)
        return (numbers[:, None] + numbers) % n, np.array([1 % n])
    even = {p: _is_even(p) for p in itertools.permutations(range(n))}
    elements = [p for p in even if kind == "S" or even[p]]  # in order: the identity first
    index = {p: i for i, p in enumerate(elements)}
    table = np.array([[index[tuple(a[i] for i in b)] for b in elements] for a in elements])
    rest = tuple(range(n))
    if kind == "S":
        swap, cycle = (1, 0, *rest[2:])[:n], (*rest[1:], 0)
        return table, np.unique([index[swap], index[cycle]]) if n > 1 else np.array([0])
    cycles = [(1, i, *[0 if j == i else rest[j] for j in range(2, n)]) for i in range(2, n)]  # 0 → 1 → i → 0
    return table, np.array([index[c] for c in cycles] or [0])


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def _product(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The direct product of two groups: element (a, b) has the number a·n + b."""
    (one, ones), (other, others) = first, second
    n = len(other)
    table = one[:, None, :, None] * n + other[None, :, None, :]  # (m, n, m, n)
    return table.reshape(len(one) * n, -1), np.concatenate((ones * n, others))


TASK = WordProblem
