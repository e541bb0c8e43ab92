"""Classification heads: one label a sequence, and one a step, on token ids or on continuous frames."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, can_return_tuple

from .cache_kru import KRUCache, per_document
from .configuration_kru import KRUConfig
from .modeling_kru import KRUPreTrainedModel, step_targets, target_share

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class KRUClassifierOutput(ModelOutput):
    """Output of the classification heads.

    loss: with λ · unitary_loss in training mode only. logits: (B, K) for a sequence, (B, T, K) for its steps, with K
    labels. past_key_values: the state after the last step. unitary_loss: the penalty without λ, in training mode and
    beside a loss; else None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KRUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    unitary_loss: Tensor | None = None


def last_attended(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Index (B,) of the last step that counts: T − 1 without a mask (B, T) bool, 0 where no step counts."""
    if mask is None:
        return torch.full((batch,), length - 1, device=device)
    steps = torch.arange(length, device=device)  # (T,)
    return (mask.to(device) * steps).amax(1)  # (B,)


def first_attended(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Index (B,) of the first step that counts: 0 without a mask (B, T) bool, and where no step counts."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return mask.to(device).int().argmax(1)  # (B,)


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: str | None,
    num_items_in_batch: Tensor | int | None = None,
    scored: Tensor | None = None,
) -> Tensor:
    """The mean loss over what is scored, in nats (regression: squared error).

    Args:
        logits: (…, K). labels: (…) class indices; for the other two types (…, K), or (…) with one label. -100 is not
            scored.
        problem_type: one of ``PROBLEM_TYPES``; None: regression for K = 1, a single label for integer labels, else
            several labels.
        num_items_in_batch: labels of the whole optimizer step, to divide by instead of those of this call.
        scored: (…) bool, False leaves a position out; None: all count.

    Raises:
        ValueError: an unknown problem type, or labels whose shape does not fit.
    """
    if problem_type is None:
        single = not labels.is_floating_point()
        problem_type = PROBLEM_TYPES[0 if logits.shape[-1] == 1 else 1 if single else 2]
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}")
    labels = labels.to(logits.device)
    wide = logits.float()  # (…, K)
    if problem_type == "single_label_classification":
        expected = logits.shape[:-1]
    else:
        expected = logits.shape
        labels = labels.unsqueeze(-1) if logits.shape[-1] == 1 and labels.dim() == logits.dim() - 1 else labels
    if labels.shape != expected:
        raise ValueError(f"labels must have the shape {tuple(expected)} for {problem_type}, got {tuple(labels.shape)}")
    if problem_type == "single_label_classification":
        counts = labels != -100  # (…)
        counts = counts if scored is None else counts & scored  # (…)
        targets = labels.long().masked_fill(~counts, -100)  # (…)
        total = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")
    else:
        entropy = problem_type == "multi_label_classification"
        each = F.binary_cross_entropy_with_logits if entropy else F.mse_loss
        errors = each(wide, labels.float(), reduction="none")  # (…, K)
        counts = labels != -100  # (…, K)
        counts = counts if scored is None else counts & scored.unsqueeze(-1)  # (…, K)
        total = errors.masked_fill(~counts, 0).sum()
    return total / step_targets(counts, num_items_in_batch)


class _Classifier(KRUPreTrainedModel):
    """The body and a linear map to K = ``config.num_labels`` logits."""

    @staticmethod
    def score_size(config: KRUConfig) -> int:
        """Width of what the linear map reads."""
        return config.feature_size

    def __init__(self, config: KRUConfig) -> None:
        super().__init__(config)
        if config.input_size is not None:
            self.main_input_name = "input_values"
        self.model = self.make_body(config)
        self.score = nn.Linear(self.score_size(config), config.num_labels)
        self.post_init()

    def classify(self, features: Tensor, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features (B, T, D) to logits, and which of them are scored (None: all); mask and starts are (B, T)."""
        raise NotImplementedError("each head says what its features become")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        input_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> KRUClassifierOutput:
        """As :class:`KRUModel`, with labels for the logits: of the classes (K = 1: values), or K wide.

        In training mode the loss has the penalty, which counts once an optimizer step.
        """
        given, mask, starts = self.body_inputs(
            attention_mask,
            kwargs,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        outputs = self.model(**given)
        logits, scored = self.classify(outputs.last_hidden_state, mask, starts)
        loss: Tensor | None = None
        share: Tensor | float = 1.0
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch, scored)
            share = target_share(labels != -100, num_items_in_batch)
        loss, penalty = self.with_penalty(loss, outputs, share)
        return KRUClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            unitary_loss=penalty,
        )


class KRUForSequenceClassification(_Classifier):
    """One set of K logits a sequence, for packed rows one for each document, read at its last attended step.

    Labels are (B,) or (B, K). Padding is told by ``attention_mask`` alone, on either side: without one the last step is
    read. A bidirectional model is read where each direction has seen the whole sequence: the forward one at the last
    attended step, the reverse one at the first. In a plain block that is one half of the states at either step,
    together D wide. Residual blocks mix the directions: the features of the two steps are joined, last step first, and
    ``score`` reads twice as many.
    The loss follows ``config.problem_type``: regression, single_label_classification or multi_label_classification.
    """

    @staticmethod
    def score_size(config: KRUConfig) -> int:
        return config.feature_size * (2 if config.bidirectional and config.block_type != "plain" else 1)

    def pool(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Features (B, T, D) to what ``score`` reads of a sequence: (B, D), or (B, 2·D) of both ends."""
        batch, length, width = features.shape
        rows = torch.arange(batch, device=features.device)  # (B,)
        last = features[rows, last_attended(mask, batch, length, features.device)]  # (B, D)
        if not self.config.bidirectional:
            return last
        first = features[rows, first_attended(mask, batch, length, features.device)]  # (B, D)
        if self.score_size(self.config) == width:  # the directions lie side by side
            last, first = last[:, : width // 2], first[:, width // 2 :]  # (B, D/2) each
        return torch.cat((last, first), 1)  # (B, D) or (B, 2·D)

    def classify(self, features: Tensor, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        pooled = self.pool(*per_document(features, mask, starts))  # (B, D)
        return self.read(pooled, self.score), None  # (B, K)


class KRUForTokenClassification(_Classifier):
    """K logits a step, each from the steps up to it, or from all steps if bidirectional.

    Labels are (B, T) or (B, T, K); padded steps and -100 are not scored. The loss follows ``config.problem_type``.
    """

    def classify(self, features: Tensor, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = self.read(features, self.score)  # (B, T, K)
        return logits, None if mask is None else mask.to(logits.device)  # (B, T)
