"""The definition of the recurrence: a plain loop that autograd differentiates. Slow and obvious.

    z_t = (W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t          h_t = σ(z_t)

| here | paper | shape |
| --- | --- | --- |
| inputs | U x_t | (B, T, 2, N) |
| factors | W_f | F tensors (2, P_f, Q_f) |
| bias | b of σ (modReLU) | (N,) |
| states | h_t | (B, T, 2, N) |

Axis of size 2: real and imaginary plane.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kronecker import kron_apply

ACTIVATIONS = ("modrelu", "identity")


def modrelu(z: Tensor, bias: Tensor) -> Tensor:
    """σ(z) = z · max(|z| + b, 0) / |z|, σ(0) = 0; gradient 0 at z = 0 and where |z| + b ≤ 0.

    z (…, 2, N), bias (N,); returns (…, 2, N). Non-expansive for b ≤ 0. Arjovsky et al. 2016, eq. 8.
    """
    squared = z.square().sum(-2)  # (…, N)
    modulus = squared.where(squared > 0, 1).sqrt()  # (…, N)
    active = (squared > 0) & (modulus + bias > 0)  # (…, N)
    # The inner wheres keep 1/|z| and its gradient finite near z = 0, where the outer one selects the zero. z multiplies
    # the scale even where that is zero, so that a NaN stays a NaN.
    scale = torch.where(active, 1 + bias / modulus.where(active, 1), 0)  # (…, N)
    return z * scale.unsqueeze(-2)  # (…, 2, N)


def kru_scan_reference(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: str = "modrelu",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over time; the oracle of every other engine. See :func:`kru_hf.kru_scan` for the contract.

    Returns states (B, T, 2, N) and final_state (B, 2, N), a copy.
    """
    batch, _, _, units = inputs.shape
    state = inputs.new_zeros(batch, 2, units) if initial_state is None else initial_state  # (B, 2, N)
    if mask is not None:
        inputs = inputs.where(mask[:, :, None, None], 0)  # (B, T, 2, N): a NaN that is not read has no gradient
    states = []
    for t in range(inputs.shape[1]):
        z = kron_apply(factors, state) + inputs[:, t]  # (B, 2, N)
        new = modrelu(z, bias) if activation == "modrelu" else z  # (B, 2, N)
        state = new if mask is None else torch.where(mask[:, t, None, None], new, state)  # (B, 2, N)
        states.append(state)
    return torch.stack(states, 1), state.clone()
