"""Baselines with the interface of the KRU models: torch's RNN, LSTM and GRU as transformers language models."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin

from kru_hf.cache_kru import KRUCache, initial_state
from kru_hf.modeling_kru import KRUCausalLMOutput, KRUModelOutput

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@strict
class BaselineConfig(PreTrainedConfig):
    """Options of a baseline. Names are those of KRUConfig where they mean the same.

    Args:
        cell: "rnn" (tanh), "lstm" or "gru".
        state_size: H, hidden units of each layer.
        hidden_size: D, width of the embedding; None takes state_size.
        input_dropout, hidden_dropout, state_dropout: on the embedding, between layers, and before the readout.
        forget_bias: start of the LSTM's forget-gate bias.
    """

    model_type = "kru_baseline"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 256
    cell: str = "lstm"
    state_size: int = 256
    hidden_size: int | None = None
    num_hidden_layers: int = 1
    input_size: int | None = None
    input_dropout: float | int = 0.0
    state_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    forget_bias: float | int = 1.0
    initializer_range: float | int = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size is None:
            self.hidden_size = self.state_size
        kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each layer: the KRU models' own."""
        return ["kru"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """The stock check knows attention layers only."""

    def validate_baseline_options(self) -> None:
        """Every field within its range."""
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        for name in ("vocab_size", "state_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("input_dropout", "state_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.tie_word_embeddings and self.hidden_size != self.state_size:
            raise ValueError(
                f"tie_word_embeddings needs hidden_size = state_size, got {self.hidden_size} and {self.state_size}"
            )


class BaselinePreTrainedModel(PreTrainedModel):
    """Weights and their start."""

    config: BaselineConfig
    config_class = BaselineConfig
    base_model_prefix = "model"
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RNNBase):
            bound = module.hidden_size**-0.5
            for name, parameter in module.named_parameters():
                if "bias" not in name:
                    init.uniform_(parameter, -bound, bound)
                    continue
                init.zeros_(parameter)
                if isinstance(module, nn.LSTM) and "bias_ih" in name:  # gates in torch's order: i, f, g, o
                    start = torch.zeros_like(parameter)  # (4H,)
                    start[module.hidden_size : 2 * module.hidden_size] = self.config.forget_bias
                    init.copy_(parameter, start)

    def recurrent_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The hidden-to-hidden matrices with their names."""
        return [(name, parameter) for name, parameter in self.named_parameters() if ".weight_hh_" in f".{name}"]

    def num_recurrent_parameters(self) -> int:
        """Real parameters of the recurrent matrices."""
        return sum(parameter.numel() for _, parameter in self.recurrent_parameters())


class BaselineModel(BaselinePreTrainedModel):
    """Embedding (or a linear map of continuous frames) and recurrent layers."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        width = int(config.hidden_size or config.state_size)
        self.embed_tokens: Any = nn.Embedding(config.vocab_size, width) if config.input_size is None else None
        self.dropout = nn.Dropout(config.input_dropout)
        self.recurrent = CELLS[config.cell](
            width if config.input_size is None else config.input_size,
            config.state_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.hidden_dropout if config.num_hidden_layers > 1 else 0.0,
        )
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def initial(self, cache: KRUCache | None, batch: int) -> Any:
        """The state that torch's module starts from: None, (L, B, H), or a pair of those for the LSTM."""
        planes = 2 if self.config.cell == "lstm" else 1
        shape = (batch, planes, self.config.state_size)
        states = [initial_state(cache, layer, shape) for layer in range(self.config.num_hidden_layers)]
        given = [state for state in states if state is not None]
        if not given:
            return None
        stacked = torch.stack(given).unbind(2)  # planes × (L, B, H)
        parts = tuple(part.contiguous() for part in stacked)
        return parts if planes == 2 else parts[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> KRUModelOutput:
        """input_ids (B, T) or inputs_embeds (B, T, D) from the state in `past_key_values` to features (B, T, H)."""
        if attention_mask is not None and not bool(attention_mask[:, -self._length(input_ids, inputs_embeds) :].all()):
            raise ValueError("the baselines do not take padded batches: attention_mask must be all ones")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        features, final = self.recurrent(self.dropout(x), self.initial(past_key_values, x.shape[0]))  # (B, T, H)
        if past_key_values is not None or use_cache:
            cache: Any = past_key_values if past_key_values is not None else KRUCache(self.config.num_hidden_layers)
            parts = final if isinstance(final, tuple) else (final,)
            for layer, state in zip(cache.layers, torch.stack(parts, 2).unbind(0), strict=True):  # (B, planes, H)
                layer.store(state, x.shape[1])
        returned: Any = cache if use_cache else None
        return KRUModelOutput(last_hidden_state=features, past_key_values=returned)

    @staticmethod
    def _length(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
        tensor = input_ids if input_ids is not None else inputs_embeds
        if tensor is None:
            raise ValueError("give input_ids or inputs_embeds")
        return tensor.shape[1]


class BaselineForCausalLM(BaselinePreTrainedModel, GenerationMixin):
    """Language model with the forward signature and the output of KRUForCausalLM; `unitary_loss` is None."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = BaselineModel(config)
        self.dropout = nn.Dropout(config.state_dropout)
        self.lm_head = nn.Linear(config.state_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> KRUCausalLMOutput:
        """See KRUForCausalLM: labels (B, T) are shifted inside, `shift_labels` (B, T) are aligned with the logits."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.dropout(out.last_hidden_state)[:, keep])  # (B, T, V)
        loss: Any = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return KRUCausalLMOutput(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoConfig.register("kru_baseline", BaselineConfig, exist_ok=True)
AutoModelForCausalLM.register(BaselineConfig, BaselineForCausalLM, exist_ok=True)
