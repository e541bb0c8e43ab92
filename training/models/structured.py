"""tanh RNNs whose recurrent matrices are computed from other parameters: orthogonal ones, and ones of low rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import initialization as init

STRUCTURES = ("orthogonal", "low_rank")


class OrthogonalMatrix(nn.Module):
    """W = exp(A - Aᵀ) in SO(H), by torch's orthogonal parametrization: ‖WᵀW − I‖ stays at rounding level.

    torch stores A as a full (H, H) matrix and reads the part below its diagonal: H·(H − 1)/2 of its entries count.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.map = nn.Linear(size, size, bias=False)
        parametrizations.orthogonal(self.map, orthogonal_map="matrix_exp", use_trivialization=False)
        self.reset()

    @property
    def lower(self) -> nn.Parameter:
        """A (H, H), of which the part below the diagonal is read."""
        lists: Any = self.map.parametrizations
        return lists.weight.original

    @property
    def weight(self) -> Tensor:
        """The dense matrix (H, H)."""
        return self.map.weight

    @property
    def num_unread(self) -> int:
        """Stored entries that are no parameters: on and above the diagonal."""
        return self.size * (self.size + 1) // 2

    @torch.no_grad()
    def reset(self) -> None:
        """Rotations of neighbouring pairs of units by angles from U(−π, π) (Henaff et al. 2016, as expRNN starts)."""
        start = torch.zeros(self.size, self.size)  # (H, H)
        angles = (2 * torch.rand(self.size // 2) - 1) * math.pi  # (H/2,)
        even = 2 * torch.arange(self.size // 2)  # (H/2,)
        start[even + 1, even] = angles.to(start.device)
        init.copy_(self.lower, start)


class LowRankMatrix(nn.Module):
    """W = L Rᵀ with L and R (H, r)."""

    num_unread = 0

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(size, rank))
        self.right = nn.Parameter(torch.empty(size, rank))
        self.reset()

    @property
    def weight(self) -> Tensor:
        """The dense matrix (H, H) of rank r."""
        return self.left @ self.right.mT

    @torch.no_grad()
    def reset(self) -> None:
        """W at the energy that torch gives a full matrix from U(−1/√H, 1/√H): a variance of 1/(3H) an entry."""
        size, rank = self.left.shape
        std = (3 * size * rank) ** -0.25
        init.normal_(self.left, std=std)
        init.normal_(self.right, std=std)


class StructuredRNN(nn.Module):
    """h_t = tanh(W h_{t-1} + U x_t + b) with structured W: the call of ``nn.RNN(batch_first=True)``, on its kernels.

    Args:
        structure: "orthogonal" or "low_rank". input_size: width of x. hidden_size: H.
        num_layers: layers. dropout: between them. rank: of W, for "low_rank".
    """

    def __init__(
        self, structure: str, input_size: int, hidden_size: int, num_layers: int, dropout: float, rank: int | None
    ) -> None:
        super().__init__()
        self.hidden_size, self.dropout = hidden_size, dropout
        widths = [input_size, *[hidden_size] * (num_layers - 1)]
        self.input_maps = nn.ModuleList([nn.Linear(width, hidden_size) for width in widths])
        for linear in self.input_maps:
            linear.init_bound = hidden_size**-0.5  # as torch starts an RNN's
        self.matrices = nn.ModuleList(
            [
                OrthogonalMatrix(hidden_size)
                if structure == "orthogonal"
                else LowRankMatrix(hidden_size, int(rank or 1))
                for _ in widths
            ]
        )

    def forward(self, x: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) from the states (L, B, H), zero if None: features (B, T, H) and final states (L, B, H)."""
        layers = len(self.matrices)
        if initial is None:
            initial = x.new_zeros(layers, x.shape[0], self.hidden_size)  # (L, B, H)
        weights: list[Tensor] = []
        for linear, matrix in zip(self.input_maps, self.matrices, strict=True):
            bias: Any = linear.bias  # (H,)
            # torch's kernel wants a second bias: a constant zero.
            weights += [linear.weight, matrix.weight, bias, torch.zeros_like(bias)]  # type: ignore[list-item]
        return torch.rnn_tanh(x, initial, weights, True, layers, self.dropout, self.training, False, True)
