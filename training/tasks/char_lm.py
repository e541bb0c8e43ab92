"""Character language modelling on contiguous streams of text, scored in bits per character."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kru_hf import build_char_tokenizer

from ..common.errors import UserError
from ..data.corpora import load_corpus
from ..data.splits import IGNORED, SPLITS
from ..options.fields import AT_LEAST_1, Options, option
from .base import Batch, Layout, Task, TaskOutput

EVAL_WINDOW = 256  # characters of a row in one evaluation call where the state is carried; no effect on the figure


@dataclass
class CharOptions(Options):
    """Options of character language modelling."""

    sequence_length: int = option(128, "Characters of a stream in one training window (T).", allowed=AT_LEAST_1)
    carry_state: bool = option(True, "Whether a window starts from the state after the one before, or from zero.")
    eval_streams: int = option(
        8, "Rows that an evaluation split is cut into, each started from a zero state.", allowed=AT_LEAST_1
    )


class CharLM(Task):
    """A text as G contiguous rows; a batch is one window of each row, so the state can be carried from batch to batch.

    Character j of a row is predicted from all before it in the row; the target of a row's last character is the first
    character of the next row, so only the very first character of the text is never predicted.
    """

    name = "char_lm"
    head = "causal_lm"
    unit = "characters"
    metric = "bpc"
    default_dataset = "python_docs"
    Options = CharOptions

    ids: dict[str, Tensor]

    def load(self, tokenizer: Any = None) -> None:
        self.carries_state = self.options.carry_state
        self.dataset = load_corpus(self.data)
        self.unknown_characters = dict.fromkeys(SPLITS, 0)
        if tokenizer is None:
            # A character that only held-out text has is unknown, and scored so.
            alphabet = set(self.dataset.splits["train"])
            if len(alphabet) < 2:
                raise UserError(f"dataset={self.dataset.name!r} holds a single character, {alphabet.pop()!r}, repeated")
            tokenizer = build_char_tokenizer(sorted(alphabet))
        self.tokenizer = tokenizer
        self.ids = {split: self.encode(split) for split in SPLITS}

    def encode(self, split: str) -> Tensor:
        """Ids of a split (L,), one a character."""
        text = self.dataset.splits[split]
        vocabulary = self.tokenizer.get_vocab()
        unknown = self.tokenizer.unk_token_id
        ids = [vocabulary.get(character, unknown) for character in text]
        self.unknown_characters[split] = ids.count(unknown)
        return torch.tensor(ids, dtype=torch.long)  # (L,)

    def check_vocabulary(self) -> None:
        """The vocabulary of a trained model has to hold the new training text."""
        missing = sorted(set(self.dataset.splits["train"]) - set(self.tokenizer.get_vocab()))
        if missing:
            shown = ", ".join(repr(character) for character in missing[:10])
            raise UserError(
                f"vocabulary mismatch: {len(missing)} characters of dataset={self.dataset.name!r} are not in the "
                f"model's vocabulary ({shown}); train a new model or remove them"
            )

    def notes(self, splits: tuple[str, ...]) -> list[str]:
        return super().notes(splits) + [
            f"{count:,} of {len(self.ids[split]):,} characters of the {split} split are not in the vocabulary; "
            "they are read and scored as the unknown character"
            for split, count in self.unknown_characters.items()
            if count and split in splits
        ]

    def model_kwargs(self) -> dict[str, Any]:
        ids = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        return {"vocab_size": len(self.tokenizer), **ids}

    def num_batches(self, layout: Layout) -> int:
        length, rows, window = len(self.ids["train"]), layout.global_batch_size, self.options.sequence_length
        windows = (length - 1) // rows // window
        if windows < 1:
            raise UserError(
                f"the training text has {length} characters: too short for {rows} streams of one window of "
                f"{window} characters; lower per_device_train_batch_size or sequence_length"
            )
        return windows

    def train_batch(self, index: int, slot: int, layout: Layout) -> Batch:
        ids, window = self.ids["train"], self.options.sequence_length
        per_epoch = self.num_batches(layout)
        epoch, position = divmod(index, per_epoch)
        row_length = (len(ids) - 1) // layout.global_batch_size
        # What a row holds beyond whole windows is skipped; a random offset skips another part in every pass.
        spare = (len(ids) - 1) - per_epoch * window - (layout.global_batch_size - 1) * row_length
        offset = int(np.random.default_rng([self.seed, epoch]).integers(spare + 1))
        first = offset + position * window
        starts = torch.tensor([row * row_length + first for row in layout.rows(slot)])  # (B,)
        places = starts[:, None] + torch.arange(window)  # (B, T)
        return language_batch(ids[places], ids[places + 1], reset=position == 0 or not self.carries_state)

    def eval_batches(self, split: str, slot: int, num_slots: int) -> Iterator[Batch]:
        ids = self.ids[split]
        targets = len(ids) - 1
        row_length = math.ceil(targets / min(self.options.eval_streams, targets))
        num_rows = math.ceil(targets / row_length)
        rows = range(num_rows)[slot::num_slots]
        if not rows:
            return
        places = torch.tensor(rows)[:, None] * row_length + torch.arange(row_length)  # (B, S)
        x = ids[places.clamp(max=targets)]  # (B, S)
        y = ids[(places + 1).clamp(max=targets)].masked_fill(places >= targets, IGNORED)  # (B, S); beyond the end
        window = EVAL_WINDOW if self.carries_state else self.options.sequence_length
        for start in range(0, row_length, window):
            part = slice(start, start + window)
            yield language_batch(x[:, part], y[:, part], reset=start == 0 or not self.carries_state)

    def forward(self, model: Any, batch: Batch, state: Any) -> TaskOutput:
        out = model(**batch.inputs, past_key_values=state, use_cache=True)
        targets = batch.inputs["labels"]  # (B, T)
        count = (targets != IGNORED).sum()
        config = getattr(model, "module", model).config
        penalty = out.unitary_loss
        if model.training:  # the loss is at hand; the penalty in it is taken out again
            nats = out.loss.detach().double()
            if penalty is not None:
                nats = nats - config.unitary_loss_coef * penalty.detach().double()
            total = nats * count
        else:
            logits = out.logits.float().flatten(0, 1)  # (B·T, V)
            total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none").double().sum()
        return TaskOutput(out.loss, {"loss": total, "count": count.double()}, out.past_key_values, penalty)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        return {"loss": loss, "bpc": loss / math.log(2)}

    def progress(self, loss: float) -> dict[str, str]:
        return {"loss": f"{loss:.3f}", "BPC": f"{loss / math.log(2):.3f}"}

    @torch.no_grad()
    def sample(self, model: Any, length: int, seed: int, folder: Path) -> str | None:
        """`length` characters after the first 64 of the training text, as a document begins, at temperature 0.8."""
        prompt = self.ids["train"][:64][None].to(model.device)  # (1, ≤64)
        generator = torch.Generator().manual_seed(seed)
        special = [i for i in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id) if i is not None]
        out = model(input_ids=prompt, use_cache=True)
        characters = []
        for _ in range(length):
            logits = out.logits[0, -1].float().cpu() / 0.8  # (V,)
            logits[special] = -math.inf
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (1,)
            characters.append(self.tokenizer.convert_ids_to_tokens(int(token)))
            out = model(input_ids=token[None].to(model.device), past_key_values=out.past_key_values, use_cache=True)
        return "".join(characters)


def language_batch(x: Tensor, y: Tensor, reset: bool) -> Batch:
    """Inputs x (B, T) and targets y (B, T) already aligned with the logits."""
    x, y = x.contiguous(), y.contiguous()  # transformers' loss takes a view of the labels
    return Batch({"input_ids": x, "labels": y, "shift_labels": y}, reset_state=reset, num_elements=y.numel())


TASK = CharLM
