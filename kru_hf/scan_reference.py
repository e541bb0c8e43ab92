"""The definition of the recurrence: a plain loop that autograd differentiates. Slow and obvious.

    z_t = (W_0 ⊗ … ⊗ W_{F-1}) h_{t-1} + U x_t          h_t = σ(z_t)

| here | paper | shape |
| --- | --- | --- |
| inputs | U x_t | (B, T, 2, N) |
| factors | W_f | F tensors (2, P_f, Q_f) |
| bias | b of σ (modReLU) | (N,) |
| states | h_t | (B, T, 2, N) |

Axis of size 2: real and imaginary plane.

What is not a number is carried on, and an infinity turns into it: a z_t with a NaN or an infinity, or whose |z_t| is
beyond the numbers of its dtype, gives an h_t of NaN in both planes, and so does a NaN in b. Which of the two W would
make of an infinite h depends on the order of its products, so no engine could be held to it. Engines of float32 may
take numbers below 1.2e-38, which are not normal, for zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kronecker import kron_apply
from .scan_checks import check_scan

ACTIVATIONS = ("modrelu", "identity")


def modrelu(z: Tensor, bias: Tensor) -> Tensor:
    """σ(z) = z · max(|z| + b, 0) / |z|, σ(0) = 0; gradient 0 at z = 0 and where |z| + b ≤ 0. NaN: see above.

    z (…, 2, N), bias (N,); returns (…, 2, N). Non-expansive for b ≤ 0. Arjovsky et al. 2016, eq. 8.
    """
    zero = (z == 0).all(-2)  # (…, N)
    real, imag = z.unbind(-2)  # (…, N)
    modulus = torch.hypot(real.where(~zero, 1), imag)  # (…, N): right where |z|² is beyond the dtype, on either side
    # False for a NaN, also of the bias where z = 0.
    idle = torch.where(zero, bias < math.inf, modulus + bias <= 0)  # (…, N)
    # The inner wheres keep the gradients finite where the outer one selects the zero. z/|z| is NaN for an infinite |z|.
    unit = z / modulus.where(~idle, 1).unsqueeze(-2) + 0 * modulus.unsqueeze(-2)  # (…, 2, N)
    return torch.where(idle.unsqueeze(-2), 0, z + bias.where(~idle, 0).unsqueeze(-2) * unit)  # (…, 2, N)


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
    check_scan("kru", inputs, factors, bias, initial_state, mask)
    batch, _, _, units = inputs.shape
    state = inputs.new_zeros(batch, 2, units) if initial_state is None else initial_state  # (B, 2, N)
    states = []
    for t in range(inputs.shape[1]):
        if mask is None:
            z = kron_apply(factors, state) + inputs[:, t]  # (B, 2, N)
        else:  # what a held step would compute has no gradient, be it NaN
            read = mask[:, t, None, None]  # (B, 1, 1)
            z = (kron_apply(factors, state.where(read, 0)) + inputs[:, t]).where(read, 0)  # (B, 2, N)
        new = modrelu(z, bias) if activation == "modrelu" else z + (0 * z).sum(1, keepdim=True)  # (B, 2, N)
        state = new if mask is None else torch.where(mask[:, t, None, None], new, state)  # (B, 2, N)
        states.append(state)
    return torch.stack(states, 1), state.clone()
