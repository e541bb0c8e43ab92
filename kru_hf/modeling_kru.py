"""KRU models for transformers: the two types of block, the body, and the causal language model."""

import copy
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_kru import KRUCache, check_cache, initial_state, read_batch, refuse_bidirectional, refuse_state
from .configuration_kru import KRUConfig
from .maps import (
    KroneckerLinear,
    KRUFeedForward,
    is_bare,
    linear,
    map_dtype,
    normed_linear,
    structured_linear,
    undropped,
)
from .recurrence import KRUBidirectional, KRULinearRecurrence, KRURecurrence, Recurrence
from .scan import can_look_at

# What takes single steps of a language model on the CPU in torch's place while it generates: from a model to a function
# of tokens (B, 1) and cache, or to None. Its result is the logits (B, 1, V), or None where torch has to do it. The
# installed package fills it in, as it does ``scan.COMPILED``.
Step = Callable[[Tensor, Any], Tensor | None]
STEPS: dict[str, Callable[[Any], Step | None]] = {}
_steps: ContextVar[tuple[Any, Step | None]] = ContextVar("steps", default=(None, None))  # of the model that generates
INPUTS = ("input_ids", "inputs_embeds", "input_values")  # of which a call gets one: (B, T), (B, T, ·)
# Multiply-adds of the maps of a call (about 0.02 ns each) below which waking other threads costs more than it saves;
# where another process has their core they are waited for, a time slice at each product.
THREADS_FROM = 10_000_000


def build_recurrence(config: KRUConfig) -> Recurrence | KRUBidirectional:
    """The recurrence of a layer: the cell that ``config.cell_type`` names, or two of them."""
    if config.bidirectional:
        return KRUBidirectional(build_cell(config), build_cell(config))
    return build_cell(config)


def build_cell(config: KRUConfig) -> Recurrence:
    """The cell that ``config.cell_type`` names."""
    if config.linear:
        return KRULinearRecurrence(
            cast(list, config.factor_shapes),
            transition=config.transition,
            heads=config.num_heads,
            decay=config.decay,
            init=config.recurrent_init,
        )
    reads_bias = config.recurrent_cell.complex and config.activation == "modrelu"
    return KRURecurrence(
        config.factor_shapes,
        config.recurrent_cell.name,
        terms=config.recurrent_terms,
        activation=config.activation,
        init=config.recurrent_init,
        bias_init=config.bias_init if reads_bias else None,
        chrono_max_length=config.chrono_max_length,
    )


class KRUPlainLayer(GradientCheckpointingLayer):
    """The paper's layer: the embedding is U, the output is [Re h; Im h].

    A bidirectional layer has twice as many planes of U x and of the states: those of the reverse direction come second.
    """

    def __init__(self, config: KRUConfig) -> None:
        super().__init__()
        self.recurrence = build_recurrence(config)
        self.state_dropout = nn.Dropout(config.state_dropout)

    def forward(
        self, hidden_states: Tensor, state: Tensor | None, mask: Tensor | None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, 2N), state (B, 2, N), mask, starts (B, T): (B, T, 2N), final state."""
        cell = self.recurrence
        inputs = hidden_states.unflatten(-1, cell.input_shape)  # (B, T, 2, N)
        states, final = cell(inputs, state, mask, starts)  # (B, T, 2, N), (B, 2, N)
        return self.state_dropout(states.flatten(-2)), final


class KRUResidualLayer(GradientCheckpointingLayer):
    """Pre-norm residual block D → 2N → scan → D; the maps may have ``io_rank`` or ``kronecker_terms``.

    D → 4N → two scans → D if bidirectional. A gated feed-forward block follows with ``intermediate_size``.
    """

    def __init__(self, config: KRUConfig) -> None:
        super().__init__()
        self.recurrence = build_recurrence(config)
        self.readout_norm = config.readout_norm
        self.epsilon = config.layer_norm_epsilon
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        rank = config.io_rank or config.hidden_size
        self.down = linear(config.hidden_size, rank) if config.io_rank else None
        terms = config.kronecker_terms
        self.in_proj = structured_linear(rank, math.prod(self.recurrence.input_shape), terms, config.start.input_scale)
        self.out_proj = structured_linear(self.recurrence.output_planes * config.state_size, rank, terms)
        self.up = linear(rank, config.hidden_size) if config.io_rank else None
        self.state_dropout = nn.Dropout(config.state_dropout)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)
        inner = config.intermediate_size
        self.feed_forward = KRUFeedForward(config.hidden_size, inner, self.epsilon, terms) if inner else None

    def read_maps(self) -> list[nn.Module]:
        """What stands between the features and U x, in order."""
        return [module for module in (self.norm, self.down, self.in_proj) if module is not None]

    def read(self, features: Tensor) -> Tensor:
        """features (…, D) to U x (…, 2N)."""
        for module in self.read_maps():
            features = module(features)
        return features

    def forward(
        self,
        hidden_states: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        starts: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, D), state (B, 2, N), mask, starts (B, T): (B, T, D) and the final state (B, 2, N).

        inputs: U x (B, T, 2N) where it is known already.
        """
        cell = self.recurrence
        inputs = self.read(hidden_states) if inputs is None else inputs  # (B, T, 2N)
        states, final = cell(inputs.unflatten(-1, cell.input_shape), state, mask, starts)  # (B, T, 2, N), (B, 2, N)
        features = self.state_dropout(states.flatten(-2)).to(hidden_states.dtype)  # (B, T, 2N)
        epsilon = self.epsilon if self.readout_norm else None
        scale = undropped(self.state_dropout.p, self.training)
        read = normed_linear(features, self.out_proj, epsilon, scale)  # (B, T, r)
        if self.up is not None:
            read = self.up(read)  # (B, T, D)
        hidden_states = hidden_states + self.hidden_dropout(read)  # (B, T, D)
        if self.feed_forward is not None:
            hidden_states = hidden_states + self.hidden_dropout(self.feed_forward(hidden_states))  # (B, T, D)
        return hidden_states, final


@dataclass
class KRUModelOutput(ModelOutput):
    """Output of :class:`KRUModel`.

    last_hidden_state: (B, T, D); of a plain block the states [Re h; Im h] (B, T, 2N) as they are: the heads normalise
        them while they read.
    past_key_values: the state after the last step. hidden_states: embeddings and each layer's output.
    unitary_loss: Σ over layers and factors of ‖W_f^H W_f − I‖², without λ; in training mode only. At any time
        ``model.unitary_loss()`` gives it.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: KRUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    unitary_loss: Tensor | None = None


@dataclass
class KRUCausalLMOutput(ModelOutput):
    """loss (with λ · unitary_loss in training mode only), logits (B, T, V), the state, hidden states.

    unitary_loss: the penalty without λ, in training mode and beside a loss; else None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KRUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    unitary_loss: Tensor | None = None


class KRUPreTrainedModel(PreTrainedModel):
    """Weights, their start and their loading."""

    config: KRUConfig
    config_class = KRUConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KRUPlainLayer", "KRUResidualLayer"]
    _is_stateful = True
    # The recurrence stays in fp32 whatever the model's dtype: its state loses digits for thousands of steps otherwise.
    _keep_in_fp32_modules_strict = ["recurrence"]
    _can_record_outputs = {"hidden_states": [KRUPlainLayer, KRUResidualLayer]}

    _counted: int | None = None  # what _products has found

    def __init__(self, config: KRUConfig, *args: Any, **kwargs: Any) -> None:
        config.validate_kru_options()  # a field may have been assigned since it was made
        super().__init__(config, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module. A call that computes little, as a step of one stream, takes one thread of the CPU."""
        if torch.compiler.is_compiling() or (threads := torch.get_num_threads()) == 1:
            return super().__call__(*args, **kwargs)
        given = next((x for x in (*args, *map(kwargs.get, INPUTS)) if isinstance(x, Tensor)), None)
        steps = math.inf if given is None or given.device.type != "cpu" else math.prod(given.shape[:2])
        if steps * self._products() >= THREADS_FROM:
            return super().__call__(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    def _products(self) -> int:
        """Multiply-adds of the maps for a step; counted once, for what is put in a map's place changes little."""
        if self._counted is None:
            maps = [m for m in self.modules() if isinstance(m, (nn.Linear, KroneckerLinear))]
            self._counted = sum(module.in_features * module.out_features for module in maps)
        return self._counted

    def make_body(self, config: KRUConfig) -> "KRUModel":
        """What a head reads: here a :class:`KRUModel`; a head on another network gives another body."""
        return KRUModel(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (KRURecurrence, KRULinearRecurrence)):
            for parameter, start in module.initial_values():
                init.copy_(parameter, start)
        elif isinstance(module, KroneckerLinear):
            init.normal_(module.mixing, std=module.mixing_std)  # (n, n, n)
            init.normal_(module.blocks, std=module.blocks_std)  # (n, out/n, in/n)
        elif (std := getattr(module, "init_std", None)) is not None:
            init.normal_(cast(Tensor, module.weight), std=std)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; a ValueError for a config with ``input_size``, whose model has no tokens."""
        if self.config.input_size is not None:
            raise ValueError(f"there is no embedding to resize: input_size must be None, got {self.config.input_size}")
        return super().resize_token_embeddings(*args, **kwargs)

    def recurrent_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The Kronecker factors W_f with their names: the recurrent parameters that the paper counts."""
        return [(name, parameter) for name, parameter in self.named_parameters() if ".factors." in f".{name}"]

    def num_recurrent_parameters(self) -> int:
        """Real parameters of the recurrent matrices: Σ_f 2·P_f·Q_f a layer (G·P_f·Q_f with G gates)."""
        return sum(parameter.numel() for _, parameter in self.recurrent_parameters())

    def unitary_loss(self) -> Tensor:
        """Soft unitary penalty of all layers, without λ: a scalar; zero for gated cells, which have none."""
        if self.config.gated:
            return torch.zeros((), device=None if self.device.type == "meta" else self.device)
        penalties = [module.penalty() for module in self.modules() if isinstance(module, Recurrence)]
        return torch.stack(penalties).sum()

    def with_penalty(
        self, loss: Tensor | None, outputs: KRUModelOutput, share: Tensor | float = 1.0
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, to which training mode adds λ · ``share`` · penalty, and the penalty to return beside it.

        Without a loss an inference call returns none: pipelines cut all tensors of an output along the batch.
        """
        penalty = outputs.unitary_loss
        if loss is None:
            return loss, penalty
        penalty = self.unitary_loss() if penalty is None else penalty  # ()
        if self.training and self.config.unitary_loss_coef:
            loss = loss + self.config.unitary_loss_coef * share * penalty.to(loss.device)
        return loss, penalty

    def body_inputs(
        self, attention_mask: Tensor | None, kwargs: dict[str, Any], **inputs: Any
    ) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
        """What the body reads of a head's arguments, and mask and starts of documents (B, T), see ``read_batch``.

        Args:
            kwargs: of the head's forward, with the marks of documents. inputs: named arguments of the body, which says
                what is wrong with them.
        """
        given = [inputs[name] for name in INPUTS if inputs.get(name) is not None]
        mask, starts = attention_mask, None
        if len(given) == 1 and given[0].ndim > 1 and given[0].shape[1] > 0:
            batch, length = given[0].shape[:2]
            mask, starts = read_batch(attention_mask, kwargs, batch, length, given[0].device)
        asked = {name: value for name, value in kwargs.items() if name.startswith("output_")}
        return {"attention_mask": mask, "document_starts": starts, **inputs, **asked}, mask, starts

    def read(self, features: Tensor, head: nn.Linear) -> Tensor:
        """``head`` on what :class:`KRUModel` returns, normalising states that come as they are: (B, T, out)."""
        config = self.config
        raw = config.block_type == "plain" and config.readout_norm
        scale = undropped(config.state_dropout, self.training)
        return normed_linear(features, head, config.layer_norm_epsilon if raw else None, scale)


class KRUModel(KRUPreTrainedModel):
    """Embedding and recurrent layers: token ids (B, T) or embeddings to features (B, T, D)."""

    def __init__(self, config: KRUConfig) -> None:
        super().__init__(config)
        plain = config.block_type == "plain"
        # With plain blocks the embedding is the input map U, and |U x| has to reach past modReLU's bias.
        scale = config.start.input_scale if plain else 1.0
        self.embed_tokens = self.input_map = None
        if config.input_size is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
            self.embed_tokens.init_std = scale  # type: ignore[assignment]
        else:
            self.input_map = linear(config.input_size, config.embedding_size, scale * config.input_size**0.5)
        layer_class = KRUPlainLayer if plain else KRUResidualLayer
        self.layers = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])
        self.norm = None if plain else nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        # No attribute gradient_checkpointing, which its layers have: transformers would turn use_cache off for it.
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = cast(nn.Embedding, value)

    def _embed_frames(self, input_values: Tensor) -> Tensor:
        """Continuous frames (B, T, input_size) to embeddings (B, T, E); a shape that does not fit is a ValueError."""
        if self.input_map is None:
            raise ValueError("input_values needs a model with the option input_size; this one has none")
        width = self.config.input_size
        if input_values.ndim != 3 or input_values.shape[-1] != width or input_values.shape[1] == 0:
            raise ValueError(f"input_values must have the shape (B, T, {width}), got {tuple(input_values.shape)}")
        dtype = map_dtype(self.input_map, input_values)
        # Under autocast the map rounds to 16 bits; what the blocks add to stays as exact as embeddings of tokens are.
        return self.input_map(input_values.to(dtype)).to(dtype)  # (B, T, E)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, input_values: Tensor | None) -> Tensor:
        """Exactly one of ids (B, T), embeddings (B, T, E), frames to embeddings; bad ids are a ValueError (CPU)."""
        if sum(x is not None for x in (input_ids, inputs_embeds, input_values)) != 1:
            raise ValueError("give exactly one of input_ids, inputs_embeds and input_values")
        if input_values is not None:
            return self._embed_frames(input_values)
        if inputs_embeds is not None:
            width, shape = self.config.embedding_size, tuple(inputs_embeds.shape)
            if len(shape) != 3 or shape[-1] != width or shape[1] == 0:
                raise ValueError(f"inputs_embeds must have the shape (B, T, {width}), got {shape}")
            return inputs_embeds
        if self.embed_tokens is None:
            raise ValueError(f"a model with input_size = {self.config.input_size} takes input_values, not input_ids")
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            shape = tuple(input_ids.shape)
            raise ValueError(f"input_ids must have the shape (B, T) with at least one token, got {shape}")
        if input_ids.device.type == "cpu" and can_look_at(input_ids):
            low, high = (int(n) for n in input_ids.aminmax())
            # Adapters in the embedding's place have its weight; that of a quantized one may be packed, or a method.
            weight = getattr(self.embed_tokens, "weight", None)
            whole = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
            vocabulary = weight.shape[0] if whole else self.config.vocab_size
            if low < 0 or high >= vocabulary:
                raise ValueError(f"input_ids must be in [0, {vocabulary}), got {low if low < 0 else high}")
        return self.embed_tokens(input_ids)  # (B, T, E)

    def _first_inputs(self, input_ids: Tensor | None) -> Tensor | None:
        """U x of the first layer (B, T, ·) from what it is for each token of the vocabulary, where those are fewer.

        None where the maps have to see every step: something watches or changes a call, the layer reads the embeddings
        as they are, or there are no tokens.
        """
        first, table = self.layers[0], self.embed_tokens
        if not isinstance(first, KRUResidualLayer) or input_ids is None or not can_look_at(input_ids):
            return None
        maps = [table, *first.read_maps()]
        if not all(map(is_bare, maps)) or table.max_norm is not None or table.num_embeddings >= input_ids.numel():
            return None
        tokens = torch.arange(table.num_embeddings, device=input_ids.device)
        return nn.functional.embedding(input_ids, first.read(table(tokens)))  # (V, ·) to (B, T, ·)

    @merge_with_config_defaults
    @capture_outputs
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
        """Run the recurrence over T steps from the state in ``past_key_values`` (zero if None).

        Args:
            input_ids: (B, T). attention_mask: (B, ≥T), of which the last T count; 0 holds the state, 1, 2, … may number
                the documents of a row.
            past_key_values: the state to start from; it receives the final state (assigned, never written in place).
            inputs_embeds: (B, T, E) instead of ids. use_cache: return the final state.
            input_values: continuous frames (B, T, input_size) instead of ids, for a config with ``input_size``.
            kwargs: ``position_ids``, ``seq_idx`` or ``cu_seq_lens_q`` of packed batches say where documents begin (see
                ``read_batch``): each starts from a zero state, and the final state is that of the last.

        Raises:
            ValueError: inputs that do not fit; ``past_key_values`` or ``use_cache=True`` for a bidirectional model.
        """
        if self.config.bidirectional:
            # What the config says is a default, not a demand: then there is just no state.
            refuse_state(past_key_values, use_cache and not self.config.use_cache)
            use_cache = False
        hidden = self._embed(input_ids, inputs_embeds, input_values)  # (B, T, E)
        batch, length = hidden.shape[:2]
        mask, starts = read_batch(attention_mask, kwargs, batch, length, hidden.device)  # (B, T) each
        check_cache(past_key_values, len(self.layers))
        if past_key_values is None and use_cache:
            past_key_values = KRUCache(len(self.layers))
        first = self._first_inputs(input_ids)
        for index, layer in enumerate(self.layers):
            cell = cast(Recurrence, layer.recurrence)
            state = initial_state(past_key_values, index, (batch, cell.state_planes, cell.state_size))
            known = {} if first is None or index else {"inputs": first}
            hidden, final = layer(hidden, state, mask, starts, **known)  # (B, T, D), (B, 2, N)
            if past_key_values is not None:
                past_key_values.layers[index].store(final, length)
        if self.norm is not None:
            hidden = self.norm(hidden)  # (B, T, D)
        return KRUModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            unitary_loss=self.unitary_loss() if self.training else None,
        )


def step_targets(scored: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """What a summed loss is divided by: the targets of the optimizer step, or else those that are ``scored`` (bool).

    At least 1: the loss of a call without any target is 0, not 0 / 0.
    """
    count = scored.sum() if num_items_in_batch is None else num_items_in_batch
    return torch.as_tensor(count, device=scored.device).clamp(min=1)  # ()


def target_share(scored: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This call's share of the optimizer step's targets, so that the penalty counts once a step under accumulation."""
    return 1.0 if num_items_in_batch is None else scored.sum() / step_targets(scored, num_items_in_batch)


class StopStrings(StopStringCriteria):
    """transformers' criterion for any alphabet: to see what a token stands for it puts "abcdef" before each."""

    @staticmethod
    def clean_tokenizer_vocab(
        tokenizer: Any, static_prefix: str = "abcdef", stop_string_matching_mode: str | None = None
    ) -> Any:
        for prefix in (static_prefix, *tokenizer.get_vocab()):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(prefix, add_special_tokens=False)["input_ids"])
            if prefix not in tokenizer.all_special_tokens and tokenizer.convert_tokens_to_string(tokens) == prefix:
                static_prefix = prefix
                break
        return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix, stop_string_matching_mode)


class KRUForCausalLM(KRUPreTrainedModel, GenerationMixin):
    """Language model: KRUModel and a linear readout V h + c over the vocabulary.

    Raises:
        ValueError: the config has ``input_size`` or is ``bidirectional``.
    """

    def __init__(self, config: KRUConfig) -> None:
        super().__init__(config)
        refuse_bidirectional(config, "a language model")
        if config.input_size is not None:
            raise ValueError(
                f"a language model reads token ids: input_size must be None, got {config.input_size} (a config of "
                f"{', '.join(config.architectures or ['none'])})"
            )
        self.model = self.make_body(config)
        self.lm_head = nn.Linear(config.feature_size, config.vocab_size)
        self.post_init()

    def _prepare_static_cache(self, cache_implementation: str, *args: Any, **kwargs: Any) -> KRUCache:
        raise ValueError(
            f"cache_implementation must be unset or 'dynamic', got {cache_implementation!r}: the state of a KRU has a "
            "fixed size in any case"
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                "generate() continues one text per row: attention_mask must hold 0 and 1 alone, got "
                f"{float(mask.min()):.4g} to {float(mask.max()):.4g}"
            )
        given, base = model_kwargs.get("past_key_values"), cast(Any, super())
        base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        # What generate() returns has the states then. An offloaded cache stays transformers': it moves its layers.
        if given is None and made is not None and generation_config.cache_implementation != "offloaded":
            model_kwargs["past_key_values"] = KRUCache(len(made.layers))

    def _get_stopping_criteria(
        self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None, **kwargs: Any
    ) -> StoppingCriteriaList:
        if generation_config.stop_strings is not None and tokenizer is not None:
            given = StopStrings(tokenizer, generation_config.stop_strings)
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), given])
            generation_config = copy.copy(generation_config)
            generation_config.stop_strings = None
        return cast(Any, super())._get_stopping_criteria(generation_config, stopping_criteria, tokenizer, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Small models on the CPU take their steps in the C runtime, where there is one.

        Logits are then equal to 1e-5. Hooks, adapters, other types of weights, autocast, ``use_backend`` and all that
        torch alone can do are honoured: it does the steps.
        """
        make = STEPS.get(self.device.type)
        token = _steps.set((self, make and make(self)))
        try:
            return cast(Any, super()).generate(*args, **kwargs)
        finally:
            _steps.reset(token)

    def _step(self, input_ids: Any, mask: Tensor | None, cache: Any, asked: dict[str, Any]) -> Tensor | None:
        """Logits (B, 1, V) of a step of ``generate()`` that needs no torch, or None."""
        config, step = self.config, _steps.get()[1]
        if step is None or input_ids is None or cache is None or any(value is not None for value in asked.values()):
            return None
        if config.output_hidden_states or config.output_attentions:
            return None
        if mask is not None and not bool(mask[:, -1].all()):  # ones and zeros, as generate() has seen
            return None
        return step(input_ids, cache)

    def prepare_inputs_for_generation(  # type: ignore[override]  # generate() looks for the name inputs_embeds
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                f"generate() reads what comes after the tokens that past_key_values has seen, all of the text if there "
                f"is no state: there must be 1 or more, got {next_sequence_length}; for new text alone give it "
                "KRUCache.from_states(past_key_values.states)"
            )
        prepare = cast(Any, super()).prepare_inputs_for_generation
        return prepare(input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs)

    @can_return_tuple
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
        """As :class:`KRUModel`, with labels (B, T): the mean cross-entropy in nats of token t+1 given tokens ≤ t.

        Labels are shifted inside; -100 is not scored, nor is the first token of a packed document. ``shift_labels``
        (B, T) in kwargs gives targets that are already aligned with the logits, for contiguous windows; all of them but
        -100 are scored. In training mode λ · unitary_loss is added to the loss.
        """
        if not torch.compiler.is_compiling() and _steps.get()[0] is self and inputs_embeds is None and labels is None:
            logits = self._step(input_ids, attention_mask, past_key_values, kwargs)
            if logits is not None:
                return KRUCausalLMOutput(logits=logits, past_key_values=past_key_values)
        given, _, starts = self.body_inputs(
            attention_mask,
            kwargs,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        outputs = self.model(**given)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.read(outputs.last_hidden_state[:, keep], self.lm_head)  # (B, T, V)
        loss: Tensor | None = None
        share: Tensor | float = 1.0
        if labels is not None:
            if starts is not None:
                labels = labels.masked_fill(starts.to(labels.device), -100)  # (B, T): no document predicts the next
            if kwargs.get("shift_labels") is not None:
                # transformers takes a view of it, which a window cut from a longer stream does not allow
                kwargs["shift_labels"] = kwargs["shift_labels"].contiguous()
            targets = labels[:, 1:] if kwargs.get("shift_labels") is None else kwargs["shift_labels"]  # (B, T − 1 or T)
            scored, items = targets != -100, kwargs.get("num_items_in_batch")
            share, kwargs["num_items_in_batch"] = target_share(scored, items), step_targets(scored, items)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        loss, penalty = self.with_penalty(loss, outputs, share)
        return KRUCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            unitary_loss=penalty,
        )
