"""The two types of block, and the cell in it that a config names."""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_kru import KRUConfig
from .feed_forward import KRUFeedForward
from .kronecker_linear import linear, structured_linear
from .readout import normed_linear, undropped
from .recurrence import KRUBidirectional, KRURecurrence


def build_recurrence(config: KRUConfig) -> KRURecurrence | KRUBidirectional:
    """The recurrence of a layer: the cell that ``config.cell_type`` names, or two of them."""
    if config.bidirectional:
        return KRUBidirectional(build_cell(config), build_cell(config))
    return build_cell(config)


def build_cell(config: KRUConfig) -> KRURecurrence:
    """The cell that ``config.cell_type`` names."""
    reads_bias = config.recurrent_cell.complex and config.activation == "modrelu"
    return KRURecurrence(
        config.factor_shapes,
        config.recurrent_cell.name,
        terms=config.recurrent_terms,
        activation=config.activation,
        init=config.recurrent_init,
        init_scale=config.recurrent_init_scale,
        init_max_phase=config.recurrent_init_max_phase,
        bias_init=config.bias_init if reads_bias else None,
        chrono_max_length=config.chrono_max_length,
        train_factors=config.train_factors,
        backend=config.scan_backend,
    )


class KRUPlainLayer(GradientCheckpointingLayer):
    """The paper's layer: the embedding is U (through ``io_rank`` if given), the output is [Re h; Im h].

    A bidirectional layer has twice as many planes of U x and of the states: those of the reverse direction come second.
    """

    def __init__(self, config: KRUConfig) -> None:
        super().__init__()
        self.recurrence = build_recurrence(config)
        width = self.recurrence.input_planes * config.state_size
        self.in_proj = linear(config.io_rank, width) if config.io_rank else None
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.state_dropout = nn.Dropout(config.state_dropout)

    def forward(
        self, hidden_states: Tensor, state: Tensor | None, mask: Tensor | None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, 2N) or (B, T, r), state (B, 2, N), mask, starts (B, T): (B, T, 2N), final state."""
        cell = self.recurrence
        inputs = hidden_states if self.in_proj is None else self.in_proj(hidden_states)  # (B, T, 2N)
        inputs = self.input_dropout(inputs).unflatten(-1, (cell.input_planes, cell.state_size))  # (B, T, 2, N)
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
        self.in_proj = structured_linear(
            rank, self.recurrence.input_planes * config.state_size, terms, config.input_scale
        )
        self.out_proj = structured_linear(self.recurrence.output_planes * config.state_size, rank, terms)
        self.up = linear(rank, config.hidden_size) if config.io_rank else None
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.state_dropout = nn.Dropout(config.state_dropout)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)
        inner = config.intermediate_size
        self.feed_forward = KRUFeedForward(config.hidden_size, inner, self.epsilon, terms) if inner else None

    def forward(
        self, hidden_states: Tensor, state: Tensor | None, mask: Tensor | None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, D), state (B, 2, N), mask, starts (B, T): (B, T, D) and the final state (B, 2, N)."""
        cell = self.recurrence
        x = self.norm(hidden_states)  # (B, T, D)
        if self.down is not None:
            x = self.down(x)  # (B, T, r)
        inputs = self.input_dropout(self.in_proj(x)).unflatten(-1, (cell.input_planes, cell.state_size))  # (B, T, 2, N)
        states, final = cell(inputs, state, mask, starts)  # (B, T, 2, N), (B, 2, N)
        features = self.state_dropout(states.flatten(-2)).to(x.dtype)  # (B, T, 2N)
        epsilon = self.epsilon if self.readout_norm else None
        scale = undropped(self.state_dropout.p, self.training)
        read = normed_linear(features, self.out_proj, epsilon, scale)  # (B, T, r)
        if self.up is not None:
            read = self.up(read)  # (B, T, D)
        hidden_states = hidden_states + self.hidden_dropout(read)  # (B, T, D)
        if self.feed_forward is not None:
            hidden_states = hidden_states + self.hidden_dropout(self.feed_forward(hidden_states))  # (B, T, D)
        return hidden_states, final
