"""The definition of the recurrence: read this file first. A plain loop that autograd differentiates; slow and obvious.

    h_t = cell(W h_{t-1}, U x_t, b, h_{t-1}),     W = Σ_{r<R} W_0^(r) ⊗ … ⊗ W_{F-1}^(r)

| here | paper | shape |
| --- | --- | --- |
| inputs | U x_t | (B, T, K, N): K = 2 planes (real, imaginary) of the complex cell "kru", else K gates |
| factors | W_f | F tensors (R, K, P_f, Q_f), ∏ P_f = ∏ Q_f = N; R = 1 in the paper |
| bias | b of modReLU, or of the gates | (N,), or (rows, N) |
| initial_state | h_0 | (B, S, N): S = 2 planes of a complex h, or h (and c of an LSTM) |
| states | h_t | (B, T, 2, N), or (B, T, N) |
| B, T, N | batch, time, units of the state | |

The paper's cell (Jose, Cissé & Fleuret, ICML 2018) is complex: W acts on a complex h, and σ is modReLU. A gated cell
has one set of real factors per gate. What each cell makes of W h_{t-1} and U x_t, as its paper writes it, is its
function in ``cells.py``: kru_step, lstm_step, gru_step, janet_step, peephole_step.

What is not a number is carried on, and an infinity turns into it: a z_t with a NaN or an infinity, or whose |z_t| is
beyond the numbers of its dtype, gives an h_t of NaN in both planes, and so does a NaN in b; a W h of a gated cell that
is infinite counts as NaN. Which of the two W would make of an infinite h depends on the order of its products, so no
engine could be held to it. Engines of float32 may take numbers below 1.2e-38, which are not normal, for zero.
"""

import torch
from torch import Tensor

from .kronecker import kron_multiply
from .scan_call import ScanCall


def scan_reference(call: ScanCall) -> tuple[Tensor, Tensor]:
    """The oracle of every engine; the contract is that of ``kron_scan``. Returns states and final_state, a copy."""
    inputs, factors, bias, _, mask, starts, cell, activation = call
    length, units = inputs.shape[1], inputs.shape[3]
    u = cell.to_matrices(inputs.permute(2, 1, 0, 3))  # (M, T, B, N)
    terms = [[cell.to_matrices(factor[r]) for factor in factors] for r in range(len(factors[0]))]  # R × F × (M, P, Q)
    b = None if activation == "identity" else bias.view(-1, 1, units)  # (rows, 1, N)
    state, states = cell.to_state(call.first_state()), []
    for t in range(length):
        if starts is not None:  # a new document: nothing is left of the one before
            state = tuple(s.where(~starts[:, t, None], 0) for s in state)
        before, here, own = state, u[:, t], b
        if mask is not None:  # what a held step would compute has no gradient, be it NaN
            taken = mask[:, t, None]  # (B, 1)
            before, here = tuple(s.where(taken, 0) for s in state), here.where(taken, 0)
            own = None if b is None else b.where(taken, 0)  # (rows, B, N)
        of_terms = [[kron_multiply([w[m] for w in term], before[0]) for m in range(cell.matrices)] for term in terms]
        products = torch.stack([torch.stack(each) for each in of_terms]).sum(0)  # (M, B, N) = W h_{t-1}
        if mask is not None:
            products = products.where(taken, 0)
        new = cell.step(products, here, own, before)
        state = new if mask is None else tuple(n.where(taken, s) for n, s in zip(new, state, strict=True))
        states.append(state[0])
    h = torch.stack(states, 1)  # (B, T, N)
    return cell.from_state((h,)) if cell.complex else h, cell.from_state(state)
