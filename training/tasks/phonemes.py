"""Framewise phonemes: the phone that is spoken, at every 10 ms of an utterance (TIMIT, or speech made by espeak-ng)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import UserError
from ..common.files import fingerprint
from ..data.espeak import load_espeak
from ..data.speech import FEATURES, WINDOW, Utterance, features, frame_labels, load_timit, phone_classes
from ..data.splits import IGNORED, SPLITS, DataSet, Parts
from ..options.fields import AT_LEAST_1, Options, one_of, option
from .base import Batch, Layout, TaskOutput
from .sequences import SequenceTask, by_length

ESPEAK = "espeak"
LENGTH_NOISE = 0.1  # spread of the log lengths by which utterances are put together: other company in every pass


@dataclass
class PhonemeOptions(Options):
    """Options of framewise phoneme classification."""

    phone_set: int | None = option(
        None, "Classes of TIMIT: 61 (default), or 39 with its standard folding.", allowed=one_of(61, 39)
    )
    test_split: str | None = option(
        None, "TIMIT's test speakers: core (24, the default) or complete (168).", allowed=one_of("core", "complete")
    )
    eval_batch_size: int = option(8, "Utterances in one evaluation call; changes no figure.", allowed=AT_LEAST_1)


class Phonemes(SequenceTask):
    """Whole utterances, of similar length in a batch; features are standardised by the training frames' statistics."""

    name = "phonemes"
    head = "token_classification"
    unit = "frames"
    metric = "accuracy"
    greater_is_better = True
    default_dataset = ESPEAK
    Options = PhonemeOptions

    def load(self, tokenizer: Any = None) -> None:
        source = self.data.dataset or ESPEAK
        self.data.refuse_hub_options()
        extra: dict[str, Any]
        if source == ESPEAK:
            for name in ("phone_set", "test_split"):
                if getattr(self.options, name) is not None:
                    raise UserError(f"{name}={getattr(self.options, name)!r} is for TIMIT: leave it out with {source}")
            found, version = load_espeak()
            parts, extra = Parts(ESPEAK, found), {"espeak_ng": version}
            self.classes = sorted({s.phone for split in SPLITS for u in found[split] for s in u.segments})
            classes: dict[str, int | None] = {name: index for index, name in enumerate(self.classes)}
        elif Path(source).is_dir():
            extra = {"phone_set": self.options.phone_set or 61, "test_split": self.options.test_split or "core"}
            parts = load_timit(Path(source), extra["test_split"])
            parts.name = Path(source).resolve().name
            self.classes, classes = phone_classes(extra["phone_set"])
        else:
            raise UserError(f"dataset={source!r} is not a folder; pass a folder with TIMIT's layout, or {ESPEAK}")
        splits = {split: labelled(parts.found[split], classes) for split in SPLITS}
        for split, utterances in splits.items():
            if not any((labels != IGNORED).any() for _, labels in utterances):
                raise UserError(f"dataset={source!r}: the {split} part has no frame with a phone")
        audio = [u.samples for split in SPLITS for u in parts.found[split]]
        digest = fingerprint(*audio, *(labels for split in SPLITS for _, labels in splits[split]))
        self.dataset = DataSet(parts.name, standardised(splits), "utterances", digest, parts.notes, extra)

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "vocab_size": 1,
            "input_size": FEATURES,
            "num_labels": len(self.classes),
            "problem_type": "single_label_classification",
        }

    def train_indices(self, index: int, layout: Layout) -> np.ndarray:
        """Utterances (G,) of similar length: sorted by noisy lengths, cut into batches, the batches shuffled."""
        epoch, position = divmod(index, self.num_batches(layout))
        random = np.random.default_rng([self.seed, epoch])
        order = by_length(np.array([len(x) for x, _ in self.dataset.splits["train"]]), LENGTH_NOISE, random)  # (S,)
        batches, rows = self.num_batches(layout), layout.global_batch_size
        spare = int(random.integers(len(order) - batches * rows + 1))
        return order[spare:][: batches * rows].reshape(batches, rows)[random.permutation(batches)[position]]

    def train_batch(self, index: int, slot: int, layout: Layout) -> Batch:
        group = self.train_indices(index, layout)  # (G,)
        batch = self.batch("train", group[np.array(layout.rows(slot))])
        scored = sum(int((self.dataset.splits["train"][i][1] != IGNORED).sum()) for i in group)
        own = int((batch.inputs["labels"] != IGNORED).sum())
        batch.loss_weight = own * layout.num_slots / max(1, scored)
        return batch

    def eval_order(self, split: str) -> np.ndarray:
        """By length, so that little is padded."""
        return np.argsort([len(x) for x, _ in self.dataset.splits[split]], kind="stable")

    def batch(self, split: str, indices: np.ndarray) -> Batch:
        parts = [self.dataset.splits[split][i] for i in indices]
        length = max(len(x) for x, _ in parts)
        frames = torch.zeros(len(parts), length, FEATURES)  # (B, T, 26)
        labels = torch.full((len(parts), length), IGNORED)  # (B, T): padding is not scored
        real = torch.zeros(len(parts), length, dtype=torch.long)  # (B, T)
        for row, (x, y) in enumerate(parts):
            frames[row, : len(x)], labels[row, : len(y)] = torch.from_numpy(x), torch.from_numpy(y)
            real[row, : len(x)] = 1
        inputs = {"input_values": frames, "labels": labels}
        return Batch(inputs, num_elements=sum(len(x) for x, _ in parts), extra={"attention_mask": real})

    def forward(self, model: Any, batch: Batch, state: Any) -> TaskOutput:
        if getattr(getattr(model, "module", model).config, "bidirectional", False):
            # The direction that begins at the end would read the padding of short utterances.
            batch = dataclasses.replace(batch, inputs={**batch.inputs, **batch.extra})
        return super().forward(model, batch, state)


def labelled(utterances: list[Utterance], classes: dict[str, int | None]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features (T, 26) and labels (T,) of each utterance; what is shorter than a window is left out."""
    long = [(u, features(u.samples)) for u in utterances if len(u.samples) >= WINDOW]
    return [(x, frame_labels(u.segments, len(x), classes, u.name)) for u, x in long]


def standardised(splits: dict[str, Any]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """The features with zero mean and unit variance over the training frames."""
    training = np.concatenate([x for x, _ in splits["train"]])  # (S, 26)
    mean, scale = training.mean(0), training.std(0) + 1e-6  # (26,)
    return {split: [((x - mean) / scale, y) for x, y in listed] for split, listed in splits.items()}


TASK = Phonemes
