"""The gated recurrences: LSTM and GRU whose recurrent matrices are Kronecker products of real factors, a set a gate.

    LSTM, gates i f g o:  a = W h_{t-1} + u_t + b,  c_t = σ(a_f) c_{t-1} + σ(a_i) tanh(a_g),  h_t = σ(a_o) tanh(c_t)
    GRU, gates r z n:     n = tanh(u_n + b_n + r (W_n h_{t-1} + b'_n)),  h_t = (1 − z) n + z h_{t-1}

Letters: G gates (4 or 3), S planes of the state (2: h and c, or 1: h), M rows of a batch of states.
Engines: "reference" (a loop that autograd differentiates), "torch" (analytic backward, no graph over time) and "cpu"
(the native kernel).
"""

import itertools
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kronecker import apply_order, group_factors, kron_apply_complex
from .scan_gated_cpu import is_available as cpu_is_available
from .scan_gated_cpu import kru_gated_scan_cpu
from .scan_gated_cpu import supports as cpu_supports
from .scan_gated_cpu import unavailable_reason as cpu_unavailable_reason

logger = logging.getLogger(__name__)

# cell: (gates G, rows of the bias, planes S of the state). The GRU's fourth bias is the candidate's recurrent one.
GATED_CELLS = {"lstm": (4, 4, 2), "gru": (3, 4, 1)}
GATED_BACKENDS = ("auto", "reference", "torch", "cpu")
# Steps whose products for the weight gradients are made at once: bounds the memory, amortises the calls.
CHUNK = 16


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
    gates, _, planes = GATED_CELLS[cell]
    batch, length, _, units = inputs.shape
    state = inputs.new_zeros(batch, planes, units) if initial_state is None else initial_state  # (B, S, N)
    states = []
    for t in range(length):
        h = state[:, 0]  # (B, N)
        u = inputs[:, t]  # (B, G, N)
        product = [kron_apply_complex([factor[gate] for factor in factors], h) for gate in range(gates)]  # (B, N) each
        if cell == "lstm":
            a = torch.stack(product) + u.transpose(0, 1) + bias[:, None]  # (4, B, N)
            new = torch.stack(lstm_step(a, state[:, 1]), 1)  # (B, 2, N)
        else:
            r = (product[0] + u[:, 0] + bias[0]).sigmoid()  # (B, N)
            z = (product[1] + u[:, 1] + bias[1]).sigmoid()  # (B, N)
            n = (u[:, 2] + bias[2] + r * (product[2] + bias[3])).tanh()  # (B, N)
            new = ((1 - z) * n + z * h).unsqueeze(1)  # (B, 1, N)
        state = new if mask is None else torch.where(mask[:, t, None, None], new, state)  # (B, S, N)
        states.append(state[:, 0])
    return torch.stack(states, 1), state.clone()


def merge_gated_groups(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors (G, P_f, Q_f) to at most three groups (G, P, Q) with the same product in every gate. Differentiable."""
    matrices = iter(factors)
    groups = []
    for length in group_factors([(factor.shape[1], factor.shape[2]) for factor in factors]):
        group = next(matrices)  # (G, P, Q)
        for matrix in itertools.islice(matrices, length - 1):
            product = torch.einsum("gab,gcd->gacbd", group, matrix)  # (G, P, P', Q, Q')
            group = product.flatten(3).flatten(1, 2)  # (G, P·P', Q·Q')
        groups.append(group)
    return groups


def gated_stages(groups: Sequence[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(⊗ groups[g]) x[g] in every gate g: x (G, M, N) to (G, M, N), and what each stage multiplied (G, M·L·R, Q)."""
    gates, rows = x.shape[:2]
    sizes = [group.shape[2] for group in groups]
    stages = []
    for index in apply_order([tuple(group.shape[1:]) for group in groups]):
        left, right = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
        x = x.reshape(gates, rows, left, sizes[index], right).mT  # (G, M, L, R, Q)
        x = x.reshape(gates, -1, sizes[index])  # (G, M·L·R, Q)
        stages.append(x)
        x = torch.bmm(x, groups[index].mT)  # (G, M·L·R, P)
        sizes[index] = groups[index].shape[1]
        x = x.reshape(gates, rows, left, right, sizes[index]).mT  # (G, M, L, P, R)
    return x.reshape(gates, rows, -1), stages


def gated_weight_gradients(groups: Sequence[Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients (G, P, Q) of the groups for y = (⊗ groups) x, given x (G, M, N) and grad of y (G, M, N)."""
    gates, rows = x.shape[:2]
    shapes = [tuple(group.shape[1:]) for group in groups]
    sizes = [p for p, _ in shapes]
    _, stages = gated_stages(groups, x)
    result: list[Tensor] = [x] * len(groups)
    for index, stage in zip(reversed(apply_order(shapes)), reversed(stages), strict=True):
        left, right = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
        grad = grad.reshape(gates, rows, left, sizes[index], right).mT  # (G, M, L, R, P)
        grad = grad.reshape(gates, -1, sizes[index])  # (G, M·L·R, P)
        result[index] = torch.bmm(grad.mT, stage)  # (G, P, Q)
        sizes[index] = shapes[index][1]
        grad = torch.bmm(grad, groups[index])  # (G, M·L·R, Q)
        grad = grad.reshape(gates, rows, left, right, sizes[index]).mT  # (G, M, L, Q, R)
    return result


class _GatedScan(torch.autograd.Function):
    """(states, final_state) of a gated cell whose recurrent matrices are Kronecker products of ``groups``."""

    @staticmethod
    def forward(ctx, inputs, bias, initial_state, mask, cell, *groups):
        batch, length, gates, units = inputs.shape
        states = inputs.new_empty(batch, length, units)  # (B, T, N): h_t
        cells = inputs.new_empty(length, batch, units) if cell == "lstm" else None  # (T, B, N): c_t
        kept = inputs.new_empty(length, 4, batch, units)  # (T, 4, B, N): i f g o, or r z n and W_n h + b'_n
        h = initial_state[:, 0]  # (B, N)
        c = initial_state[:, 1] if cell == "lstm" else None  # (B, N)
        for t in range(length):
            hold = None if mask is None else ~mask[:, t, None]  # (B, 1)
            product, _ = gated_stages(groups, h.expand(gates, batch, units))  # (G, B, N)
            u, a = inputs[:, t].transpose(0, 1), kept[t]  # (G, B, N), (4, B, N)
            if cell == "lstm":
                torch.add(product, u, out=a).add_(bias[:, None])
                a[:2].sigmoid_(), a[2].tanh_(), a[3].sigmoid_()
                new_c = torch.addcmul(a[1] * c, a[0], a[2])  # (B, N)
                new = a[3] * new_c.tanh()  # (B, N)
                c = new_c if hold is None else torch.where(hold, c, new_c)  # (B, N)
                cells[t] = c
            else:
                torch.add(product[:2], u[:2], out=a[:2]).add_(bias[:2, None]).sigmoid_()
                torch.add(product[2], bias[3], out=a[3])
                torch.addcmul(u[2] + bias[2], a[0], a[3], out=a[2]).tanh_()
                new = torch.lerp(a[2], h, a[1])  # (B, N)
            h = new if hold is None else torch.where(hold, h, new)  # (B, N)
            states[:, t] = h
        ctx.save_for_backward(initial_state, mask, states, cells, kept, *groups)
        ctx.cell = cell
        return states, torch.stack((h, c) if cell == "lstm" else (h,), 1)  # (B, T, N), (B, S, N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_states, grad_final):
        initial_state, mask, states, cells, kept, *groups = ctx.saved_tensors
        batch, length, units = states.shape
        lstm = ctx.cell == "lstm"
        gates = 4 if lstm else 3
        adjoints = [group.mT for group in groups]
        grad_inputs = states.new_empty(batch, length, gates, units)  # (B, T, G, N)
        grad_bias = states.new_zeros(4, units)  # (4, N)
        grad_groups = [torch.zeros_like(group) for group in groups]
        dh = grad_final[:, 0]  # (B, N): of h_t, from the future
        dc = grad_final[:, 1] if lstm else None  # (B, N)
        for end in range(length, 0, -CHUNK):
            start = max(end - CHUNK, 0)
            previous = states[:, max(start - 1, 0) : end - 1]
            if start == 0:
                previous = torch.cat((initial_state[:, :1], previous), 1)  # (B, C, N): h_{t-1} of the chunk
            chunk = states.new_empty(gates, end - start, batch, units)  # (G, C, B, N): of the products W h
            for t in range(end - 1, start - 1, -1):
                keep = None if mask is None else mask[:, t, None]  # (B, 1)
                grad, da = dh + grad_states[:, t], chunk[:, t - start]  # (B, N), (G, B, N)
                if lstm:
                    i, f, g, o = kept[t].unbind()  # (B, N)
                    before = cells[t - 1] if t else initial_state[:, 1]  # (B, N)
                    tanh_c = cells[t].tanh()  # (B, N)
                    total = torch.addcmul(dc, grad * o, 1 - tanh_c.square())  # (B, N): of c_t
                    da[0] = total * g * i * (1 - i)
                    da[1] = total * before * f * (1 - f)
                    da[2] = total * i * (1 - g.square())
                    da[3] = grad * tanh_c * o * (1 - o)
                    dc = total * f if keep is None else torch.where(keep, total * f, dc)  # (B, N)
                    carried = 0
                else:
                    r, z, n, product = kept[t].unbind()  # (B, N)
                    dn = grad * (1 - z) * (1 - n.square())  # (B, N): of the candidate's pre-activation
                    da[0] = dn * product * r * (1 - r)
                    da[1] = grad * (previous[:, t - start] - n) * z * (1 - z)
                    da[2] = dn * r
                    if keep is not None:
                        dn = torch.where(keep, dn, 0)  # (B, N)
                    grad_inputs[:, t, 2] = dn
                    grad_bias[2] += dn.sum(0)  # (N,)
                    carried = grad * z  # (B, N)
                if keep is not None:
                    # Selected, not multiplied: an input that is not a number must not leak out of a held step.
                    da.copy_(torch.where(keep, da, 0))
                own = 4 if lstm else 2
                grad_inputs[:, t, :own] = da[:own].transpose(0, 1)  # (B, ·, N)
                passed = gated_stages(adjoints, da)[0].sum(0) + carried  # (B, N)
                dh = passed if keep is None else torch.where(keep, passed, grad)  # (B, N)
            sums = chunk.sum((1, 2))  # (G, N)
            if lstm:
                grad_bias += sums
            else:
                grad_bias[:2] += sums[:2]
                grad_bias[3] += sums[2]
            flat = previous.transpose(0, 1).reshape(-1, units).expand(gates, -1, -1)  # (G, C·B, N)
            for whole, part in zip(grad_groups, gated_weight_gradients(groups, flat, chunk.flatten(1, 2)), strict=True):
                whole += part  # (G, P, Q)
        grad_initial = torch.stack((dh, dc) if lstm else (dh,), 1)  # (B, S, N)
        return grad_inputs, grad_bias, grad_initial, None, None, *grad_groups


def kru_gated_scan_torch(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cell: str,
) -> tuple[Tensor, Tensor]:
    """The gated recurrence on any device, differentiable once. See :func:`kru_gated_scan` for the contract."""
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], GATED_CELLS[cell][2], inputs.shape[3])  # (B, S, N)
    return _GatedScan.apply(inputs, bias, initial_state, mask, cell, *merge_gated_groups(factors))


_ENGINES = {"reference": kru_gated_scan_reference, "torch": kru_gated_scan_torch, "cpu": kru_gated_scan_cpu}
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


def _check(
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cell: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, its value and what is allowed."""
    if cell not in GATED_CELLS:
        raise ValueError(f"cell must be one of {', '.join(GATED_CELLS)}, got {cell!r}")
    gates, rows, planes = GATED_CELLS[cell]
    if inputs.dim() != 4 or inputs.shape[2] != gates or 0 in inputs.shape:
        raise ValueError(f"inputs must have the shape (B, T, {gates}, N) with no empty axis, got {tuple(inputs.shape)}")
    if inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"inputs must be float32 or float64 (the state is never kept in less), got {inputs.dtype}")
    batch, length, _, units = inputs.shape
    if not factors or any(factor.dim() != 3 or factor.shape[0] != gates for factor in factors):
        raise ValueError(f"factors must be ({gates}, P, Q) tensors, got {[tuple(factor.shape) for factor in factors]}")
    sizes = math.prod([factor.shape[1] for factor in factors]), math.prod([factor.shape[2] for factor in factors])
    if sizes != (units, units):
        raise ValueError(f"factors multiply to {sizes[0]}x{sizes[1]}, but the inputs have N = {units} units")
    expected = [("bias", bias, (rows, units)), ("initial_state", initial_state, (batch, planes, units))]
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if mask is not None and (tuple(mask.shape) != (batch, length) or mask.dtype != torch.bool):
        found = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask must be a bool tensor of the shape {(batch, length)}, got {found}")
    named = [("bias", bias), ("initial_state", initial_state), *((f"factors[{i}]", f) for i, f in enumerate(factors))]
    for name, tensor in named:
        if tensor is not None and (tensor.dtype != inputs.dtype or tensor.device != inputs.device):
            found = f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"{name} must be {inputs.dtype} on {inputs.device} like the inputs, got {found}")


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
    """A KRU-LSTM or KRU-GRU over a whole sequence.

    Args:
        inputs: U x_t (B, T, G, N), float32 or float64; gates in torch's order, i f g o or r z n.
        factors: F real tensors (G, P_f, Q_f) with ∏ P_f = ∏ Q_f = N; factor 0 is the slowest index of the state.
        bias: (4, N): of i f g o, or of r z n and the candidate's recurrent bias, which the reset gate multiplies.
        initial_state: (B, 2, N) = [h; c] for "lstm", (B, 1, N) = [h] for "gru"; zeros if None.
        mask: (B, T) bool; False holds the state at that step, whatever the input.
        cell: "lstm" or "gru".
        backend: "auto", or one of "reference", "torch", "cpu": an engine that cannot run is an error.

    Returns:
        states h_t (B, T, N) and final_state (B, S, N), a copy. Differentiable once in inputs, factors, bias and
        initial_state.

    Raises:
        ValueError: a shape or an option that does not fit. TypeError: a dtype or device that does not.
        RuntimeError: the named backend cannot run here.
    """
    if backend not in GATED_BACKENDS:
        raise ValueError(f"backend of a gated cell must be one of {', '.join(GATED_BACKENDS)}, got {backend!r}")
    _check(inputs, factors, bias, initial_state, mask, cell)
    if backend in ("auto", "cpu"):
        wanted, (backend, reason) = backend, choose_gated_backend(inputs, factors)
        if wanted == "cpu" != backend:
            raise RuntimeError(f"backend 'cpu' of a gated cell cannot run: {reason.partition(': ')[2]}")
        if not torch.compiler.is_compiling() and reason not in _told:
            _told.add(reason)
            logger.info("kru_gated_scan uses the %s engine: %s", backend, reason)
    return _ENGINES[backend](inputs, factors, bias, initial_state, mask, cell=cell)
