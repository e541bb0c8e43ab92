"""Parametrizations of the recurrent matrix W (H, H) of torch's tanh RNN: orthogonal ones, and ones of low rank.

Each starts at random, whatever matrix it is put in place of.
"""

import math

import torch
from torch import Tensor, nn


class Orthogonal(nn.Module):
    """W = exp(A − Aᵀ) in SO(H): ‖WᵀW − I‖ stays at rounding level. A is stored as its entries below the diagonal."""

    def forward(self, entries: Tensor) -> Tensor:
        """The entries (H·(H − 1)/2,) to W (H, H)."""
        size = (1 + math.isqrt(1 + 8 * len(entries))) // 2
        rows, columns = torch.tril_indices(size, size, -1, device=entries.device)
        lower = entries.new_zeros(size, size).index_put((rows, columns), entries)  # (H, H)
        return torch.matrix_exp(lower - lower.mT)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Rotations of neighbouring pairs of units by angles from U(−π, π) (Henaff et al. 2016, as expRNN starts)."""
        size = len(weight)
        start = torch.zeros_like(weight)  # (H, H)
        even = 2 * torch.arange(size // 2)  # (H/2,)
        start[even + 1, even] = (2 * torch.rand(size // 2) - 1) * math.pi
        rows, columns = torch.tril_indices(size, size, -1)
        return start[rows, columns]


class LowRank(nn.Module):
    """W = L Rᵀ with L and R (H, r)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """L and R (H, r) to W (H, H) of rank r."""
        return left @ right.mT

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W at the energy that torch gives a full matrix from U(−1/√H, 1/√H): a variance of 1/(3H) an entry."""
        size = len(weight)
        std = (3 * size * self.rank) ** -0.25
        return torch.randn(size, self.rank) * std, torch.randn(size, self.rank) * std
