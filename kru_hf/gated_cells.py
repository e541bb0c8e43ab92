"""KRU-LSTM, KRU-GRU and KRU-JANET as modules: the factors and the biases, on top of ``kru_gated_scan``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .cells import FactorList, check_scale, own_bias, warn_rectangular
from .gate_bias import check_chrono, gate_bias
from .kronecker import check_choice, random_orthogonal
from .scan_gated import GATED_BACKENDS, GATED_CELLS, kru_gated_scan


class KRUGatedRecurrence(nn.Module):
    """A gated cell: real factors (G, P_f, Q_f), a set a gate, and biases (4, N), of JANET (2, N).

    It has the interface of ``KRURecurrence``.
    ``init_scale`` is the spectral norm of each gate's matrix at the start, ``chrono_max_length`` the longest memory, in
    steps, that the gates start with: see ``gate_bias``.
    """

    cell: str
    input_planes: int
    output_planes = 1
    state_planes: int
    bias: Tensor

    def __init__(
        self,
        factor_shapes: Sequence[Sequence[int]],
        *,
        init_scale: float = 0.7,
        chrono_max_length: int | None = None,
        bias: bool = True,
        train_factors: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        warn_rectangular(factor_shapes)
        check_choice("backend", backend, GATED_BACKENDS)
        check_scale(init_scale)
        self.factor_shapes = [(p, q) for p, q in factor_shapes]
        self.state_size = math.prod(p for p, _ in self.factor_shapes)
        self.init_scale = init_scale
        if chrono_max_length is not None:
            check_chrono("chrono_max_length", chrono_max_length)
            if not bias:
                raise ValueError(f"chrono_max_length must be None without a bias, got {chrono_max_length}")
        self.chrono_max_length = chrono_max_length
        self.backend = backend
        self.factors = FactorList(
            [
                nn.Parameter(torch.empty(self.input_planes, p, q), requires_grad=train_factors)
                for p, q in self.factor_shapes
            ]
        )
        self.has_bias = bias
        own_bias(self, torch.empty(GATED_CELLS[self.cell][1], self.state_size), bias)  # (4, N), JANET (2, N)
        self.reset_parameters()

    def initial_factors(self) -> list[Tensor]:
        """Random orthogonal factors (G, P_f, Q_f), each scaled by the F-th root of the spectral norm wanted."""
        scale = self.init_scale ** (1 / len(self.factor_shapes))
        return [
            scale * torch.stack([random_orthogonal(p, q) for _ in range(self.input_planes)])
            for p, q in self.factor_shapes
        ]

    def initial_bias(self) -> Tensor:
        """Biases (4, N), of JANET (2, N): see ``gate_bias``. All zero, and not trained, for ``bias=False``."""
        if not self.has_bias:
            return torch.zeros(self.bias.shape)  # (·, N)
        return gate_bias(self.cell, self.bias.shape[0], self.state_size, self.chrono_max_length)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start. Parameters on the meta device are left for the loader to fill."""
        if self.bias.is_meta:
            return
        for factor, start in zip(self.factors, self.initial_factors(), strict=True):
            factor.copy_(start)  # (G, P, Q)
        self.bias.copy_(self.initial_bias())  # (·, N)

    def forward(
        self, inputs: Tensor, initial_state: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs (B, T, G, N), initial_state (B, S, N), mask (B, T): states (B, T, 1, N), final state (B, S, N).

        Computed in fp32 (fp64 for fp64 inputs) whatever the dtype of the inputs; that is also the dtype returned.
        """
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        states, final = kru_gated_scan(
            inputs.to(dtype),
            [factor.to(dtype) for factor in self.factors(inputs)],
            self.bias.to(dtype),
            None if initial_state is None else initial_state.to(dtype),
            mask,
            cell=self.cell,
            backend=self.backend,
        )
        return states.unsqueeze(2), final  # (B, T, 1, N), (B, S, N)

    def extra_repr(self) -> str:
        shapes = " ".join(f"{p}x{q}" for p, q in self.factor_shapes)
        return f"state_size={self.state_size}, factors={shapes}, gates={self.input_planes}"


class KRULSTMRecurrence(KRUGatedRecurrence):
    """LSTM with gates i f g o; state (B, 2, N) = [h; c]."""

    cell = "lstm"
    input_planes = 4
    state_planes = 2


class KRUGRURecurrence(KRUGatedRecurrence):
    """GRU with gates r z n; state (B, 1, N) = [h]."""

    cell = "gru"
    input_planes = 3
    state_planes = 1


class KRUJANETRecurrence(KRUGatedRecurrence):
    """JANET, the LSTM with a forget gate alone, gates f g; state (B, 1, N) = [h]."""

    cell = "janet"
    input_planes = 2
    state_planes = 1


GATED_RECURRENCES = {"kru_lstm": KRULSTMRecurrence, "kru_gru": KRUGRURecurrence, "kru_janet": KRUJANETRecurrence}
