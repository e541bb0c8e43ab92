"""Polyphonic music: the next frame of a piano roll, scored in nats per frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kru_hf.music import opening
from kru_hf.music.rolls import MAX_GRID, NUM_PITCHES
from kru_hf.piano_roll_head import frame_nats

from ..common.machine import shown_command
from ..common.run_folder import COMPANIONS
from ..data.music_data import CHORALES, load_pieces
from ..models.composing import compose_piece
from ..options.fields import AT_LEAST_1, Options, at_most, option
from .base import Batch, Layout, Task, TaskOutput
from .sequences import by_length

EVAL_WINDOW = 512  # frames of a piece in one evaluation call; no effect on the figure
EVAL_PIECES = 16  # pieces in one evaluation call; no effect on the figure
SAMPLE_FRAMES = 96  # at most, of the piece at the end of a run
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
    onsets: bool = option(
        True,
        "Tell keys that are struck again from held ones where the data do (MIDI files and chorales); with a chain.",
        off=False,
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
        self.with_onsets = self.options.onsets and self.dataset.extra["onsets"]
        splits = self.dataset.splits.items()
        self.frames = {split: [piece.planes(self.with_onsets) for piece in pieces] for split, pieces in splits}

    def model_kwargs(self) -> dict[str, Any]:
        onsets = {"frame_onsets": True} if self.with_onsets else {}
        return {"vocab_size": 1, "input_size": NUM_PITCHES * (1 + self.with_onsets), **onsets}

    # ---- training batches -----------------------------------------------------------------------------------------

    @lru_cache(maxsize=4)  # noqa: B019 (a task lives as long as its run)
    def plan(self, epoch: int, rows: int) -> list[tuple[list[int], int]]:
        """The batches of a pass: (pieces in the rows, first frame of the window)."""
        random = np.random.default_rng([self.seed, epoch])
        lengths = np.array([len(frames) for frames in self.frames["train"]])
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
        train = self.frames["train"]
        own = [group[row] if row < len(group) else None for row in layout.rows(slot)]
        pieces = [None if piece is None else train[piece] for piece in own]
        shifts = [0 if piece is None else self.shift(train[piece], epoch, piece) for piece in own]
        # All slots get windows of one length: the length of the longest piece's window in the global batch.
        length = min(window, max(len(train[piece]) for piece in group) - 1 - first)
        batch = roll_batch(pieces, first, length, shifts, 1 + self.with_onsets)
        total = sum(min(length, max(0, len(train[piece]) - 1 - first)) for piece in group)
        scored = int(batch.inputs["shift_mask"].sum())
        batch.loss_weight = scored * layout.num_slots / total
        return batch

    def shift(self, frames: np.ndarray, epoch: int, piece: int) -> int:
        """By how many semitones a piece is shifted in a pass: at random, as far as its notes stay on the keyboard."""
        limit = self.options.transpose
        keys = np.flatnonzero(frames.any((0, 1)))
        if not limit or not len(keys):
            return 0
        low, high = max(1 - limit, -int(keys[0])), min(limit, NUM_PITCHES - 1 - int(keys[-1]))
        return int(np.random.default_rng([self.seed, epoch, piece]).integers(low, high + 1))

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def eval_batches(self, split: str, slot: int, num_slots: int) -> Iterator[Batch]:
        pieces = sorted(self.frames[split], key=len)[slot::num_slots]
        for start in range(0, len(pieces), EVAL_PIECES):
            group: list[np.ndarray | None] = list(pieces[start : start + EVAL_PIECES])
            targets = max(len(frames) for frames in group if frames is not None) - 1
            for first in range(0, targets, EVAL_WINDOW):
                yield roll_batch(group, first, min(EVAL_WINDOW, targets - first), planes=1 + self.with_onsets)

    def forward(self, model: Any, batch: Batch, state: Any) -> TaskOutput:
        out = model(**batch.inputs, past_key_values=state, use_cache=True)
        return TaskOutput(
            out.loss, frame_sums(out.logits.detach(), batch.inputs), out.past_key_values, out.unitary_loss
        )

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss, onsets = sums["loss"] / sums["count"], sums.get("onsets", 0.0) / sums["count"]
        hits, errors = sums["hits"], sums["false_alarms"] + sums["misses"]
        return {
            "loss": loss,
            "nll_per_frame": loss - onsets,
            **({"onset_nll_per_frame": onsets} if "onsets" in sums else {}),
            "accuracy": hits / (hits + errors) if hits + errors else 0.0,
            "f1": 2 * hits / (2 * hits + errors) if hits + errors else 0.0,
        }

    def progress(self, loss: float) -> dict[str, str]:
        return {"nats/frame": f"{loss:.3f}"}

    @torch.no_grad()
    def sample(self, model: Any, length: int, seed: int, folder: Path) -> str | None:
        """A piece in the run's folder: the opening of the first validation piece, and how the model continues it."""
        frames = min(length, SAMPLE_FRAMES)
        if not frames:
            return None
        piece = self.dataset.splits["validation"][0]
        prime = replace(piece.part(0, opening(piece)), name=f"{piece.name} (validation)")
        words = ["--model", str(folder), *(["--dataset", self.data.dataset] if self.data.dataset else [])]
        words += ["--prime", piece.name, "--num_frames", str(frames), "--seed", str(seed), "--statistics"]
        words += ["--output", str(folder / COMPANIONS[0])]
        path, command = folder / COMPANIONS[0], shown_command(words, "training.compose")
        lines, _ = compose_piece(model, prime, frames, path, command, self.dataset.splits["train"], seed=seed)
        return "\n".join(lines)


def frame_sums(logits: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Summed nats, scored frames, and the keys that sound and are predicted above one half, or only one of the two.

    "onsets", where frames have them, is their part of the nats.
    """
    scored = inputs["shift_mask"]  # (B, T)
    targets, logits = inputs["shift_labels"][scored], logits[scored]  # (M, 88), or with onsets (M, 176)
    sounding, predicted = targets[:, :NUM_PITCHES] > 0.5, logits[:, :NUM_PITCHES] > 0  # (M, 88)
    begun = frame_nats(logits[:, NUM_PITCHES:], targets[:, NUM_PITCHES:]).double().sum()
    return {
        "loss": frame_nats(logits, targets).double().sum(),
        **({"onsets": begun} if targets.shape[-1] > NUM_PITCHES else {}),
        "count": scored.sum().double(),
        "hits": (sounding & predicted).sum().double(),
        "false_alarms": (~sounding & predicted).sum().double(),
        "misses": (sounding & ~predicted).sum().double(),
    }


def roll_batch(
    pieces: Sequence[np.ndarray | None],
    first: int,
    length: int,
    shifts: Sequence[int] | None = None,
    planes: int = 1,
) -> Batch:
    """Frames [first, first + length) of each piece and the frames after them; rows whose piece has ended are empty.

    Args:
        pieces: their frames, (T, planes, 88): what sounds, and with two planes what begins.
        shifts: semitones by which each piece is moved on its way into the batch, within the keyboard.
    """
    x = torch.zeros(len(pieces), length + 1, planes, NUM_PITCHES)  # (B, T + 1, planes, 88)
    scored = torch.zeros(len(pieces), length, dtype=torch.bool)  # (B, T)
    for row, (frames, shift) in enumerate(zip(pieces, shifts or [0] * len(pieces), strict=True)):
        if frames is None:
            continue
        part = frames[first : first + length + 1]
        low, high = max(0, shift), NUM_PITCHES + min(0, shift)
        x[row, : len(part), :, low:high] = torch.from_numpy(part[..., low - shift : high - shift])
        scored[row, : max(0, len(part) - 1)] = True
    x = x.flatten(2)  # (B, T + 1, 88 or 176)
    inputs = {"input_values": x[:, :-1], "shift_labels": x[:, 1:], "shift_mask": scored}
    return Batch(inputs, reset_state=first == 0, num_elements=int(scored.sum()))


TASK = PianoRollTask
