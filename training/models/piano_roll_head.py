"""The piano-roll head on torch's RNN, LSTM and GRU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel

from kru_hf.cache_kru import KRUCache
from kru_hf.piano_roll_head import PIANO_KEYS, KRUPianoRollOutput, PianoRollMixin, check_frames, roll_loss

from .baselines import BaselineConfig, BaselineModel, BaselinePreTrainedModel


class BaselineForPianoRoll(PianoRollMixin, BaselinePreTrainedModel):
    """Next-frame prediction with the forward signature and the output of KRUForPianoRoll; `unitary_loss` is None."""

    def __init__(self, config: BaselineConfig) -> None:
        if config.input_size is None:
            config.input_size = PIANO_KEYS
        super().__init__(config)
        self.width = config.input_size
        self.model = BaselineModel(config)
        self.dropout = nn.Dropout(config.state_dropout)
        self.key_head = nn.Linear(config.state_size, self.width)
        self.key_head.starts_silent = True  # type: ignore[assignment]
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        shift_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> KRUPianoRollOutput:
        """See KRUForPianoRoll; `attention_mask` must be all ones, padding at the end is left out by `shift_mask`."""
        check_frames(input_values, self.width)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        frames = input_values.to(self.key_head.weight.dtype)  # (B, T, width)
        out = self.model(
            attention_mask=attention_mask, past_key_values=past_key_values, inputs_embeds=frames, use_cache=use_cache
        )
        logits = self.key_head(self.dropout(out.last_hidden_state))  # (B, T, width)
        loss, shift_labels = None, kwargs.get("shift_labels")
        if return_loss and (shift_labels is not None or input_values.shape[1] > 1):
            loss = roll_loss(logits, *self.scored_frames(input_values, attention_mask, shift_labels, shift_mask))
        return KRUPianoRollOutput(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoModel.register(BaselineConfig, BaselineForPianoRoll, exist_ok=True)
