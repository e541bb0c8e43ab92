"""The gated recurrences: cells whose recurrent matrices are Kronecker products of real factors, a set a gate.

    LSTM, gates i f g o:  a = W h_{t-1} + u_t + b,  c_t = σ(a_f) c_{t-1} + σ(a_i) tanh(a_g),  h_t = σ(a_o) tanh(c_t)
    GRU, gates r z n:     n = tanh(u_n + b_n + r (W_n h_{t-1} + b'_n)),  h_t = (1 − z) n + z h_{t-1}
    JANET, gates f g:     a = W h_{t-1} + u_t + b,  h_t = σ(a_f) h_{t-1} + (1 − σ(a_f − 1)) tanh(a_g)

A W h that is infinite counts as NaN, as in ``scan_reference``; an infinite u_t or b closes or opens a gate.

JANET is the LSTM with a forget gate alone (van der Westhuizen & Lasenby, "The unreasonable effectiveness of the forget
gate", 2018) with their β = 1.

Letters: G gates (4, 3 or 2), S planes of the state (2: h and c, or 1: h), M rows of a batch of states.
Engines: "reference" (a loop that autograd differentiates), "torch" (analytic backward, no graph over time) and "cpu"
(the native kernel).
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .kronecker import check_choice, kron_apply_complex
from .scan_checks import GATED_CELLS, check_scan
from .scan_gated_cpu import is_available as cpu_is_available
from .scan_gated_cpu import run_gated_scan
from .scan_gated_cpu import supports as cpu_supports
from .scan_gated_cpu import unavailable_reason as cpu_unavailable_reason
from .scan_gated_torch import kru_gated_scan_torch
from .transforms import is_transformed, transformed_backend

logger = logging.getLogger(__name__)

GATED_BACKENDS = ("auto", "reference", "torch", "cpu")


def lstm_step(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations a (4, B, N) and c_{t-1} (B, N) to h_t and c_t (B, N)."""
    i, f, g, o = a[0].sigmoid(), a[1].sigmoid(), a[2].tanh(), a[3].sigmoid()  # (B, N)
    c = f * c + i * g  # (B, N)
    return o * c.tanh(), c


def kru_gated_scan_reference(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """The definition, differentiated by autograd. See :func:`kru_gated_scan` for the contract."""
    check_choice("cell", cell, list(GATED_CELLS))
    check_scan(cell, inputs, factors, bias, initial_state, mask)
    gates, _, planes = GATED_CELLS[cell]
    batch, length, _, units = inputs.shape
    state = inputs.new_zeros(batch, planes, units) if initial_state is None else initial_state  # (B, S, N)
    states = []
    for t in range(length):
        before, u, b = state, inputs[:, t], bias.unsqueeze(0)  # (B, S, N), (B, G, N), (1, ·, N)
        if mask is not None:  # what a held step would compute has no gradient, be it NaN
            read = mask[:, t, None, None]  # (B, 1, 1)
            before, u, b = before.where(read, 0), u.where(read, 0), b.where(read, 0)
        h = before[:, 0]  # (B, N)
        product = [kron_apply_complex([factor[gate] for factor in factors], h) for gate in range(gates)]  # (B, N) each
        product = [p + 0 * p for p in product]  # (B, N) each
        if mask is not None:
            product = [p.where(mask[:, t, None], 0) for p in product]  # (B, N) each
        if cell == "lstm":
            a = torch.stack(product) + (u + b).transpose(0, 1)  # (4, B, N)
            new = torch.stack(lstm_step(a, before[:, 1]), 1)  # (B, 2, N)
        elif cell == "janet":
            a = torch.stack(product) + (u + b).transpose(0, 1)  # (2, B, N)
            opened = (1 - a[0]).sigmoid()  # (B, N): 1 − σ(a_f − 1), without the digits that the difference loses
            new = (a[0].sigmoid() * h + opened * a[1].tanh()).unsqueeze(1)  # (B, 1, N)
        else:
            r = (product[0] + u[:, 0] + b[:, 0]).sigmoid()  # (B, N)
            z = (product[1] + u[:, 1] + b[:, 1]).sigmoid()  # (B, N)
            n = (u[:, 2] + b[:, 2] + r * (product[2] + b[:, 3])).tanh()  # (B, N)
            new = ((1 - z) * n + z * h).unsqueeze(1)  # (B, 1, N)
        state = new if mask is None else torch.where(mask[:, t, None, None], new, state)  # (B, S, N)
        states.append(state[:, 0])
    return torch.stack(states, 1), state.clone()


_ENGINES = {"reference": kru_gated_scan_reference, "torch": kru_gated_scan_torch, "cpu": run_gated_scan}
_told: set[str] = set()


def choose_gated_backend(inputs: Tensor, factors: Sequence[Tensor]) -> tuple[str, str]:
    """The engine that "auto" takes for these tensors, and why: "cpu" if it can, else "torch"."""
    obstacle = cpu_supports(inputs, factors) if cpu_is_available() else cpu_unavailable_reason()
    if obstacle is None:
        return "cpu", f"the cpu engine runs {inputs.dtype} on {inputs.device.type}"
    return "torch", f"the cpu engine cannot run: {obstacle}"


def gated_backend_report() -> str:
    """A line that says which engine gated cells get here, and why not the native one if it is not that."""
    if cpu_is_available():
        return "gated cells: cpu for float32 on the CPU, torch elsewhere"
    return f"gated cells: torch (cpu: not available ({cpu_unavailable_reason()}))"


def kru_gated_scan(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cell: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A KRU-LSTM, KRU-GRU or KRU-JANET over a whole sequence.

    Args:
        inputs: U x_t (B, T, G, N), float32 or float64; gates in torch's order, i f g o or r z n, or f g of "janet".
        factors: F real tensors (G, P_f, Q_f) with ∏ P_f = ∏ Q_f = N; factor 0 is the slowest index of the state.
        bias: (4, N): of i f g o, or of r z n and the candidate's recurrent bias, which the reset gate multiplies;
            (2, N) of f g.
        initial_state: (B, 2, N) = [h; c] for "lstm", else (B, 1, N) = [h]; zeros if None.
        mask: (B, T) bool; False holds the state at that step, whatever the input.
        cell: "lstm", "gru" or "janet".
        backend: "auto", or one of "reference", "torch", "cpu": an engine that cannot run is an error.

    Returns:
        states h_t (B, T, N) and final_state (B, S, N), a copy. Differentiable once in inputs, factors, bias and
        initial_state; more often, by forward mode and by torch.func's transforms with "reference", which "auto" takes
        for the last two.

    Raises:
        ValueError: a shape or an option that does not fit. TypeError: a dtype or device that does not.
        RuntimeError: the named backend cannot run here. NotImplementedError: it cannot be differentiated that way.
    """
    check_choice("backend of a gated cell", backend, GATED_BACKENDS)
    check_choice("cell", cell, list(GATED_CELLS))
    check_scan(cell, inputs, factors, bias, initial_state, mask)
    if is_transformed((inputs, bias, initial_state, mask, *factors)):
        backend = transformed_backend(backend)
    if inputs.is_meta and backend != "reference":
        backend = "torch"  # nothing to compute: the shapes of any engine
    if backend in ("auto", "cpu"):
        wanted, (backend, reason) = backend, choose_gated_backend(inputs, factors)
        if wanted == "cpu" != backend:
            raise RuntimeError(f"backend 'cpu' of a gated cell cannot run: {reason.partition(': ')[2]}")
        if not torch.compiler.is_compiling() and reason not in _told:
            _told.add(reason)
            logger.info("kru_gated_scan uses the %s engine: %s", backend, reason)
    return _ENGINES[backend](inputs, factors, bias, initial_state, mask, cell=cell)
