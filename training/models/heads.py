"""Classification heads on the baselines: one label a sequence, and one a step, with the interface of the KRU heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from kru_hf.cache_kru import KRUCache
from kru_hf.heads_kru import KRUClassifierOutput, classification_loss

from .baselines import BaselineConfig, BaselineModel, BaselinePreTrainedModel


class _BaselineClassifier(BaselinePreTrainedModel):
    """The backbone that the config names and a linear map of its features (B, T, H) to K = `num_labels` logits."""

    per_step: bool

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        if config.input_size is not None:
            self.main_input_name = "input_values"
        self.model = BaselineModel(config)
        self.dropout = nn.Dropout(config.state_dropout)
        self.score = nn.Linear(config.state_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        input_values: Tensor | None = None,
        **kwargs: Any,
    ) -> KRUClassifierOutput:
        """input_ids (B, T), or frames input_values (B, T, input_size) that the backbone reads as they are.

        `attention_mask` must be all ones: padding stands at the end and is left out by labels of -100.
        """
        frames = input_values if input_values is not None else inputs_embeds
        if input_values is not None and (input_values.ndim != 3 or input_values.shape[-1] != self.config.input_size):
            raise ValueError(
                f"input_values must have the shape (B, T, {self.config.input_size}), got {tuple(input_values.shape)}"
            )
        if frames is not None:
            frames = frames.to(self.score.weight.dtype)  # (B, T, D)
        out = self.model(input_ids, attention_mask, past_key_values, frames, use_cache)
        features = out.last_hidden_state if self.per_step else out.last_hidden_state[:, -1]  # (B, T, H) or (B, H)
        logits = self.score(self.dropout(features))  # (B, T, K) or (B, K)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return KRUClassifierOutput(loss=loss, logits=logits, past_key_values=out.past_key_values)


class BaselineForSequenceClassification(_BaselineClassifier):
    """K logits a sequence, read at its last step: labels (B,) or (B, K). See KRUForSequenceClassification."""

    per_step = False


class BaselineForTokenClassification(_BaselineClassifier):
    """K logits a step: labels (B, T), -100 is not scored. See KRUForTokenClassification."""

    per_step = True


AutoModelForSequenceClassification.register(BaselineConfig, BaselineForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(BaselineConfig, BaselineForTokenClassification, exist_ok=True)
