"""Baselines with the interface of the KRU models: RNN, LSTM, GRU, orthogonal and low-rank RNN for transformers."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig
from transformers import initialization as init

from kru_hf import KRUCache, kroneckerize
from kru_hf.cache_kru import check_cache, initial_state, read_batch
from kru_hf.cells import CELLS as KRONECKER_CELLS
from kru_hf.cells import check_chrono, gate_bias
from kru_hf.configuration_kru import LIMITS
from kru_hf.frame_heads import CHAIN_CHANNELS, CHAIN_SIZE, check_frame_head
from kru_hf.layers.kroneckerize import own_rnn_class
from kru_hf.modeling_kru import KRUModelOutput, KRUPreTrainedModel

from .heads import register_heads
from .structured import LowRank, Orthogonal

TORCH_CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
STRUCTURED = ("orthogonal", "low_rank")
CELLS = (*TORCH_CELLS, *STRUCTURED)


@strict
class BaselineConfig(PreTrainedConfig):
    """Options of a baseline. Names are those of KRUConfig where they mean the same.

    Args:
        cell: "rnn" (tanh), "lstm", "gru", or a tanh RNN whose recurrent matrix is "orthogonal" or of "low_rank".
        state_size: H, hidden units of each layer.
        hidden_size: D, width of the embedding; None takes state_size.
        recurrent_rank: rank of the recurrent matrix of "low_rank"; None takes an eighth of state_size.
        recurrent_factor_shapes: [[P_0, Q_0], …] with products H: the recurrent matrices of each gate are Kronecker
            products of real factors, see ``kru_hf.kroneckerize``; for "rnn", "lstm" and "gru".
        hidden_dropout, state_dropout: between layers, and before the readout.
        forget_bias: start of the LSTM's forget-gate bias.
        frame_head, frame_onsets, frame_head_size, frame_head_channels, frame_head_dropout: as in KRUConfig.
        chrono_max_length: as in KRUConfig, for "lstm" and "gru": the bias of the gate that keeps is drawn instead.
    """

    model_type = "kru_baseline"
    keys_to_ignore_at_inference = ["past_key_values", "frame_context"]

    vocab_size: int = 256
    cell: str = "lstm"
    state_size: int = 256
    hidden_size: int | None = None
    num_hidden_layers: int = 1
    input_size: int | None = None
    recurrent_rank: int | None = None
    recurrent_factor_shapes: list | None = None
    state_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    forget_bias: float | int = 1.0
    chrono_max_length: int | None = None
    initializer_range: float | int = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    frame_head: str = "independent"
    frame_onsets: bool = False
    frame_head_size: int = CHAIN_SIZE
    frame_head_channels: int = CHAIN_CHANNELS
    frame_head_dropout: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, most in LIMITS.items():
            if (getattr(self, name, None) or 0) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name):,}")
        if self.hidden_size is None:
            self.hidden_size = self.state_size
        if self.cell == "low_rank" and self.recurrent_rank is None:
            self.recurrent_rank = max(1, self.state_size // 8)
        kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each layer: the KRU models' own."""
        return ["kru"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """The stock check knows attention layers only."""

    # What the heads of kru_hf ask of a config beside the fields.
    bidirectional = False

    @property
    def feature_size(self) -> int:
        """Width of what a head reads."""
        return self.state_size

    def validate_kru_options(self) -> None:
        """Every field within its range; the models of kru_hf ask again when they are made."""
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        for name in ("vocab_size", "state_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        only = {
            "recurrent_rank": ["low_rank"],
            "recurrent_factor_shapes": TORCH_CELLS,
            "chrono_max_length": ["lstm", "gru"],
        }
        for name, cells in only.items():
            if getattr(self, name) is not None and self.cell not in cells:
                raise ValueError(f"{name} is for {', '.join(cells)} only, got {getattr(self, name)} with {self.cell!r}")
        rank, most = self.recurrent_rank, self.state_size
        if rank is not None and not 1 <= rank <= most:
            raise ValueError(f"recurrent_rank must be in [1, state_size = {most}], got {rank}")
        if self.chrono_max_length is not None:
            check_chrono("chrono_max_length", self.chrono_max_length)
        check_frame_head(self)
        for name in ("state_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False, got True: the head has weights of its own")


class Baseline(KRUPreTrainedModel):
    """Its body is a recurrent network of torch; `unitary_loss` is None."""

    config: BaselineConfig  # type: ignore[assignment]
    config_class = BaselineConfig  # type: ignore[assignment]
    supports_gradient_checkpointing = False

    def make_body(self, config: Any) -> Any:
        return BaselineModel(config)

    @staticmethod
    def score_size(config: Any) -> int:
        """Width of what a classifier's linear map reads: H."""
        return config.state_size

    def with_penalty(
        self, loss: Tensor | None, outputs: Any, share: Tensor | float = 1.0
    ) -> tuple[Tensor | None, None]:
        return loss, None

    def read(self, features: Tensor, head: nn.Linear) -> Tensor:
        return head(nn.functional.dropout(features, self.config.state_dropout, self.training))  # (B, T, out)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RNNBase):
            bound = module.hidden_size**-0.5
            for name, parameter in module.named_parameters():
                if name.startswith("parametrizations"):
                    continue  # they have drawn their start
                if "bias" not in name:
                    init.uniform_(parameter, -bound, bound)
                    continue
                init.zeros_(parameter)
                if "bias_ih" in name and not isinstance(module, nn.RNN):
                    config, size = self.config, module.hidden_size
                    rows = parameter.numel() // size  # gates in torch's order: i f g o, and r z n
                    keep_bias = config.forget_bias if config.cell == "lstm" else None
                    start = gate_bias(KRONECKER_CELLS[config.cell], size, config.chrono_max_length, keep_bias, rows)
                    init.copy_(parameter, start.flatten())  # (rows·H,)

    def recurrent_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The stored parameters of the hidden-to-hidden matrices with their names."""
        return [(name, parameter) for name, parameter in self.named_parameters() if ".weight_hh_" in f".{name}"]


def build_recurrent(config: BaselineConfig) -> Any:
    """The recurrent layers that ``config.cell`` names: a module called like ``nn.RNN(batch_first=True)``."""
    width = int(config.hidden_size if config.input_size is None else config.input_size)
    dropout = float(config.hidden_dropout) if config.num_hidden_layers > 1 else 0.0
    layers, kind = config.num_hidden_layers, TORCH_CELLS.get(config.cell, nn.RNN)
    if config.cell in TORCH_CELLS and config.recurrent_factor_shapes is None:
        return kind(width, config.state_size, layers, batch_first=True, dropout=dropout)
    with torch.device("cpu"):  # parametrizations start from real values, also while transformers loads weights
        module = kind(width, config.state_size, layers, batch_first=True, dropout=dropout)
        if config.cell in TORCH_CELLS:
            return kroneckerize(module, config.recurrent_factor_shapes, init="fresh")[0]
        for layer in range(layers):
            matrix = Orthogonal() if config.cell == "orthogonal" else LowRank(config.recurrent_rank)
            parametrize.register_parametrization(module, f"weight_hh_l{layer}", matrix, unsafe=True)
        own_rnn_class(module)
        return module


class BaselineModel(Baseline):
    """Embedding (none for continuous frames, which are read as they are) and recurrent layers."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.embed_tokens: Any = None
        if config.input_size is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            # As torch starts it: transformers' 0.02 costs an LSTM 0.16 bits in 1,500 steps.
            self.embed_tokens.init_std = 1.0
        self.recurrent = build_recurrent(config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def initial(self, cache: KRUCache | None, batch: int) -> Any:
        """The state that torch's module starts from: None, (L, B, H), or a pair of those for the LSTM."""
        planes = 2 if self.config.cell == "lstm" else 1
        shape = (batch, planes, self.config.state_size)
        check_cache(cache, self.config.num_hidden_layers)
        states = [initial_state(cache, layer, shape) for layer in range(self.config.num_hidden_layers)]
        given = [state for state in states if state is not None]
        if not given:
            return None
        parts = tuple(part.contiguous() for part in torch.stack(given).unbind(2))  # planes × (L, B, H)
        return parts if planes == 2 else parts[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: KRUCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        input_values: Tensor | None = None,
        **kwargs: Any,
    ) -> KRUModelOutput:
        """As KRUModel: ids (B, T), or embeddings or frames (B, T, D), to features (B, T, H).

        Raises:
            ValueError: not exactly one of them is given, frames of another shape, or padded or packed batches.
        """
        given = [x for x in (input_ids, inputs_embeds, input_values) if x is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of input_ids, inputs_embeds and input_values")
        batch, length = given[0].shape[:2]
        if read_batch(attention_mask, kwargs, batch, length, given[0].device) != (None, None):
            raise ValueError("the baselines do not take padded or packed batches: attention_mask must be all ones")
        width = self.config.input_size
        if input_values is not None and (input_values.ndim != 3 or input_values.shape[-1] != width):
            raise ValueError(f"input_values must have the shape (B, T, {width}), got {tuple(input_values.shape)}")
        x = given[0].to(self.dtype) if input_ids is None else self.embed_tokens(input_ids)  # (B, T, D)
        features, final = self.recurrent(x, self.initial(past_key_values, batch))  # (B, T, H)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache: Any = past_key_values
        if cache is None and use_cache:
            cache = KRUCache(self.config.num_hidden_layers)
        if cache is not None:
            parts = final if isinstance(final, tuple) else (final,)
            for layer, state in zip(cache.layers, torch.stack(parts, 2).unbind(0), strict=True):  # (B, planes, H)
                layer.store(state, length)
        return KRUModelOutput(last_hidden_state=features, past_key_values=cache if use_cache else None)


globals().update(register_heads(Baseline, BaselineConfig))
