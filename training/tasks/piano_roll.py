"""Polyphonic music: the next frame of a piano roll, scored in nats per frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kru_hf.music.rolls import MAX_GRID, NUM_PITCHES, roll_to_frames
from kru_hf.piano_roll_head import frame_nats

from ..data.music_data import CHORALES, load_pieces
from ..options.fields import AT_LEAST_1, Options, at_most, option
from .base import Batch, Layout, Task, TaskOutput
from .sequences import by_length

EVAL_WINDOW = 512  # frames of a piece in one evaluation call; no effect on the figure
EVAL_PIECES = 16  # pieces in one evaluation call; no effect on the figure
LENGTH_NOISE = 0.2  # spread of the log lengths by which pieces are put together: other company in every pass


@dataclass
class PianoRollOptions(Options):
    """Options of music modelling."""

    sequence_length: int = option(
        128, "Frames of a piece in one training window (T); longer pieces carry their state.", allowed=AT_LEAST_1
    )
    frames_per_quarter: int = option(
        4, "Grid of MIDI files and chorales; tables of notes bring their own.", allowed=at_most(MAX_GRID)
    )
    transpose: int = option(
        0,
        "Training pieces are shifted by -(n - 1) to n semitones, drawn anew in each pass; 6: all keys alike; 0: never.",
        off=0,
        allowed=at_most(NUM_PITCHES, 0),
    )


class PianoRollTask(Task):
    """A global batch is a group of pieces of similar length, each from a zero state, cut into windows in step.

    Where a piece has ended its row is empty: neither scored nor mixed with another piece. Whatever the grouping, every
    frame but a piece's first is a target once in a pass.
    """

    name = "piano_roll"
    head = "piano_roll"
    unit = "frames"
    metric = "nll_per_frame"
    default_dataset = CHORALES
    default_recipe = "bach_chorales"
    Options = PianoRollOptions

    carries_state = True

    def load(self, tokenizer: Any = None) -> None:
        self.dataset = load_pieces(self.data, self.options.frames_per_quarter)

    def model_kwargs(self) -> dict[str, Any]:
        return {"vocab_size": 1, "input_size": NUM_PITCHES}

    # ---- training batches -----------------------------------------------------------------------------------------

    @lru_cache(maxsize=4)  # noqa: B019 (a task lives as long as its run)
    def plan(self, epoch: int, rows: int) -> list[tuple[list[int], int]]:
        """The batches of a pass: (pieces in the rows, first frame of the window)."""
        random = np.random.default_rng([self.seed, epoch])
        lengths = np.array([len(roll) for roll in self.dataset.splits["train"]])
        order = by_length(lengths, LENGTH_NOISE, random)
        groups = [order[start : start + rows].tolist() for start in range(0, len(order), rows)]
        random.shuffle(groups)
        window = self.options.sequence_length
        return [(group, first) for group in groups for first in range(0, max(lengths[group]) - 1, window)]

    @cache  # noqa: B019
    def first_batch(self, epoch: int, rows: int) -> int:
        """The index of the first batch of a pass: the grouping, and so the number of batches, differs a little."""
        return self.first_batch(epoch - 1, rows) + len(self.plan(epoch - 1, rows)) if epoch else 0

    def num_batches(self, layout: Layout) -> int:
        return len(self.plan(0, layout.global_batch_size))

    def locate(self, index: int, rows: int) -> tuple[int, int]:
        """Pass of batch `index`, and its position in it."""
        epoch = 0
        while self.first_batch(epoch + 1, rows) <= index:
            epoch += 1
        return epoch, index - self.first_batch(epoch, rows)

    def train_batch(self, index: int, slot: int, layout: Layout) -> Batch:
        rows = layout.global_batch_size
        epoch, position = self.locate(index, rows)
        group, first = self.plan(epoch, rows)[position]
        window = self.options.sequence_length
        train = self.dataset.splits["train"]
        own = [group[row] if row < len(group) else None for row in layout.rows(slot)]
        rolls = [None if piece is None else train[piece] for piece in own]
        shifts = [0 if piece is None else self.shift(train[piece], epoch, piece) for piece in own]
        # All slots get windows of one length: the length of the longest piece's window in the global batch.
        length = min(window, max(len(train[piece]) for piece in group) - 1 - first)
        batch = roll_batch(rolls, first, length, shifts)
        total = sum(min(length, max(0, len(train[piece]) - 1 - first)) for piece in group)
        scored = int(batch.inputs["shift_mask"].sum())
        batch.loss_weight = scored * layout.num_slots / total
        return batch

    def shift(self, roll: np.ndarray, epoch: int, piece: int) -> int:
        """By how many semitones a piece is shifted in a pass: at random, as far as its notes stay on the keyboard."""
        limit = self.options.transpose
        keys = np.flatnonzero(roll.any(0))
        if not limit or not len(keys):
            return 0
        low, high = max(1 - limit, -int(keys[0])), min(limit, NUM_PITCHES - 1 - int(keys[-1]))
        return int(np.random.default_rng([self.seed, epoch, piece]).integers(low, high + 1))

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def eval_batches(self, split: str, slot: int, num_slots: int) -> Iterator[Batch]:
        rolls = sorted(self.dataset.splits[split], key=len)[slot::num_slots]
        for start in range(0, len(rolls), EVAL_PIECES):
            group: list[np.ndarray | None] = list(rolls[start : start + EVAL_PIECES])
            targets = max(len(roll) for roll in group if roll is not None) - 1
            for first in range(0, targets, EVAL_WINDOW):
                yield roll_batch(group, first, min(EVAL_WINDOW, targets - first))

    def forward(self, model: Any, batch: Batch, state: Any) -> TaskOutput:
        out = model(**batch.inputs, past_key_values=state, use_cache=True)
        return TaskOutput(
            out.loss, frame_sums(out.logits.detach(), batch.inputs), out.past_key_values, out.unitary_loss
        )

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        hits, errors = sums["hits"], sums["false_alarms"] + sums["misses"]
        return {
            "loss": loss,
            "nll_per_frame": loss,
            "accuracy": hits / (hits + errors) if hits + errors else 0.0,
            "f1": 2 * hits / (2 * hits + errors) if hits + errors else 0.0,
        }

    def progress(self, loss: float) -> dict[str, str]:
        return {"nats/frame": f"{loss:.3f}"}

    @torch.no_grad()
    def sample(self, model: Any, length: int, seed: int) -> str | None:
        """The first frames of a continuation of a validation piece, as MIDI pitches; `training.compose` makes music."""
        prime = torch.from_numpy(self.dataset.splits["validation"][0][:16]).float()  # (≤16, 88)
        roll = model.generate_piano_roll(prime, num_frames=max(1, min(16, length)), seed=seed)[0].numpy()
        return " | ".join(" ".join(map(str, frame)) or "-" for frame in roll_to_frames(roll))


def frame_sums(logits: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Summed nats, scored frames, and the keys that sound and are predicted above one half, or only one of the two."""
    targets, scored = inputs["shift_labels"], inputs["shift_mask"]  # (B, T, 88), (B, T)
    nats = frame_nats(logits, targets)  # (B, T)
    sounding, predicted = targets[scored] > 0.5, logits[scored] > 0  # (M, 88)
    return {
        "loss": nats[scored].double().sum(),
        "count": scored.sum().double(),
        "hits": (sounding & predicted).sum().double(),
        "false_alarms": (~sounding & predicted).sum().double(),
        "misses": (sounding & ~predicted).sum().double(),
    }


def roll_batch(
    rolls: Sequence[np.ndarray | None], first: int, length: int, shifts: Sequence[int] | None = None
) -> Batch:
    """Frames [first, first + length) of each piece and the frames after them; rows whose piece has ended are empty.

    Args:
        shifts: semitones by which each piece is moved on its way into the batch, within the keyboard.
    """
    x = torch.zeros(len(rolls), length + 1, NUM_PITCHES)  # (B, T + 1, 88)
    scored = torch.zeros(len(rolls), length, dtype=torch.bool)  # (B, T)
    for row, (roll, shift) in enumerate(zip(rolls, shifts or [0] * len(rolls), strict=True)):
        if roll is None:
            continue
        part = roll[first : first + length + 1]
        low, high = max(0, shift), NUM_PITCHES + min(0, shift)
        x[row, : len(part), low:high] = torch.from_numpy(part[:, low - shift : high - shift])
        scored[row, : max(0, len(part) - 1)] = True
    inputs = {"input_values": x[:, :-1], "shift_labels": x[:, 1:], "shift_mask": scored}
    return Batch(inputs, reset_state=first == 0, num_elements=int(scored.sum()))


TASK = PianoRollTask
