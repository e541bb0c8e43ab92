"""tanh RNNs whose recurrent matrices are computed from other parameters: orthogonal ones, and ones of low rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init


class OrthogonalMatrix(nn.Module):
    """W = exp(A − Aᵀ) in SO(H): ‖WᵀW − I‖ stays at rounding level. A is stored as its entries below the diagonal."""

    def __init__(self, size: int, rank: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.generator = nn.Parameter(torch.empty(size * (size - 1) // 2))
        self.reset()

    @property
    def weight(self) -> Tensor:
        """The dense matrix (H, H)."""
        rows, columns = torch.tril_indices(self.size, self.size, -1, device=self.generator.device)
        lower = self.generator.new_zeros(self.size, self.size).index_put((rows, columns), self.generator)  # (H, H)
        return torch.matrix_exp(lower - lower.mT)

    @torch.no_grad()
    def reset(self) -> None:
        """Rotations of neighbouring pairs of units by angles from U(−π, π) (Henaff et al. 2016, as expRNN starts)."""
        start = torch.zeros(self.size, self.size)  # (H, H)
        angles = (2 * torch.rand(self.size // 2) - 1) * math.pi  # (H/2,)
        even = 2 * torch.arange(self.size // 2)  # (H/2,)
        start[even + 1, even] = angles.to(start.device)
        rows, columns = torch.tril_indices(self.size, self.size, -1)
        init.copy_(self.generator, start[rows, columns])


class LowRankMatrix(nn.Module):
    """W = L Rᵀ with L and R (H, r)."""

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


MATRICES = {"orthogonal": OrthogonalMatrix, "low_rank": LowRankMatrix}


class StructuredRNN(nn.Module):
    """h_t = tanh(W h_{t-1} + U x_t + b) with structured W: the call of ``nn.RNN(batch_first=True)``, on its kernels.

    Args:
        matrix: a key of MATRICES. input_size: width of x. hidden_size: H. num_layers: layers. dropout: between them.
        rank: of W, for "low_rank".
    """

    def __init__(
        self, matrix: str, input_size: int, hidden_size: int, num_layers: int, dropout: float, rank: int | None
    ) -> None:
        super().__init__()
        self.hidden_size, self.dropout = hidden_size, dropout
        widths = [input_size, *[hidden_size] * (num_layers - 1)]
        self.input_maps = nn.ModuleList([nn.Linear(width, hidden_size) for width in widths])
        self.matrices = nn.ModuleList([MATRICES[matrix](hidden_size, rank) for _ in widths])

    def forward(self, x: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) from the states (L, B, H), zero if None: features (B, T, H) and final states (L, B, H)."""
        layers = len(self.matrices)
        if initial is None:
            initial = x.new_zeros(layers, x.shape[0], self.hidden_size)  # (L, B, H)
        weights: list[Tensor] = []
        for linear, matrix in zip(self.input_maps, self.matrices, strict=True):
            # torch's kernel wants a second bias: a constant zero.
            weights += [linear.weight, matrix.weight, linear.bias, torch.zeros_like(linear.bias)]  # type: ignore[list-item, arg-type]
        return torch.rnn_tanh(x, initial, weights, True, layers, self.dropout, self.training, False, True)
