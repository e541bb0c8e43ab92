"""Where the gate biases of LSTM, GRU and JANET cells start."""

import torch
from torch import Tensor


def check_chrono(name: str, max_length: int) -> None:
    """Raise `ValueError` unless [1, T_max − 1] is an interval."""
    if max_length < 3:
        raise ValueError(f"{name} must be None or at least 3 steps, got {max_length}")


def gate_bias(cell: str, rows: int, size: int, max_length: int | None, forget_bias: float = 1.0) -> Tensor:
    """Biases (rows, N) of the gates i f g o of an "lstm", r z n of a "gru", f g of a "janet".

    The bias of the gate that keeps the state, f or z, is log u with u ~ U[1, T_max − 1], so that σ(log u) = u / (1 + u)
    keeps what a unit holds for about 1 + u steps, and an LSTM's input gate starts at −log u: the chrono initialisation
    of Tallec & Ollivier, "Can recurrent neural networks warp time?" (ICLR 2018), equation 16. Without ``max_length``,
    T_max in steps, a forget gate f starts at ``forget_bias``. All others are zero.
    """
    bias = torch.zeros(rows, size)
    keeps = 0 if cell == "janet" else 1
    if max_length is not None:
        bias[keeps] = torch.empty(size).uniform_(1, max_length - 1).log()  # (N,)
        if cell == "lstm":
            bias[0] = -bias[1]  # (N,)
    elif cell != "gru":
        bias[keeps] = forget_bias
    return bias
