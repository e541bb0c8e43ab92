"""The portable engine of the gated cells: merged groups and an analytic backward, no autograd graph over time.

Letters as in ``scan_gated``: G gates (4: LSTM, 3: GRU, 2: JANET), S planes of the state, M rows of a batch of states.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kronecker import apply_order, check_choice, factor_gradients, group_factors
from .scan_checks import GATED_CELLS, check_scan, gated_cell
from .transforms import differentiable_once, is_concrete, refuse_derivative

# Steps whose products for the weight gradients are made at once: bounds the memory, amortises the calls.
CHUNK = 16


def bias_rows(gates: int) -> int:
    """Rows of the bias of a cell with that many gates."""
    return 2 if gates == 2 else 4


def kept_planes(gates: int) -> int:
    """K: what a step keeps for the backward, in multiples of N."""
    return 3 if gates == 2 else 4


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


def _forward(
    inputs: Tensor, groups: Sequence[Tensor], bias: Tensor, initial_state: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """states (B, T, N), final_state (B, S, N), and for the backward the cells (T, B, N) and the gates (T, K, B, N).

    G = 4 is the LSTM, G = 3 the GRU, G = 2 JANET; the last two have no cells.
    """
    batch, length, gates, units = inputs.shape
    lstm = gates == 4
    states = inputs.new_empty(batch, length, units)  # (B, T, N): h_t
    cells = inputs.new_empty(length if lstm else 0, batch, units)  # (T, B, N): c_t
    # (T, K, B, N): i f g o of the LSTM, r z n and W_n h + b'_n of the GRU, f i g of JANET
    kept = inputs.new_empty(length, kept_planes(gates), batch, units)
    h = initial_state[:, 0]  # (B, N)
    c = initial_state[:, -1]  # (B, N): used by the LSTM alone
    for t in range(length):
        hold = None if mask is None else ~mask[:, t, None]  # (B, 1)
        product, _ = gated_stages(groups, h.expand(gates, batch, units))  # (G, B, N)
        product = torch.add(product, product, alpha=0)  # (G, B, N): an infinity becomes NaN
        u, a = inputs[:, t].transpose(0, 1), kept[t]  # (G, B, N), (K, B, N)
        if lstm:
            torch.add(product, u, out=a).add_(bias[:, None])
            a[:2].sigmoid_(), a[2].tanh_(), a[3].sigmoid_()
            new_c = torch.addcmul(a[1] * c, a[0], a[2])  # (B, N)
            new = a[3] * new_c.tanh()  # (B, N)
            c = new_c if hold is None else torch.where(hold, c, new_c)  # (B, N)
            cells[t] = c
        elif gates == 2:
            torch.add(product, u, out=a[::2]).add_(bias[:, None])
            torch.sub(1, a[0], out=a[1]).sigmoid_()
            a[0].sigmoid_(), a[2].tanh_()
            new = torch.addcmul(a[0] * h, a[1], a[2])  # (B, N)
        else:
            torch.add(product[:2], u[:2], out=a[:2]).add_(bias[:2, None]).sigmoid_()
            torch.add(product[2], bias[3], out=a[3])
            torch.addcmul(u[2] + bias[2], a[0], a[3], out=a[2]).tanh_()
            new = torch.lerp(a[2], h, a[1])  # (B, N)
        h = new if hold is None else torch.where(hold, h, new)  # (B, N)
        states[:, t] = h
    return states, torch.stack((h, c) if lstm else (h,), 1), cells, kept


def _backward(
    grad_states: Tensor,
    grad_final: Tensor,
    groups: Sequence[Tensor],
    initial_state: Tensor,
    mask: Tensor | None,
    states: Tensor,
    cells: Tensor,
    kept: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of the inputs (B, T, G, N), the groups (G, P, Q), the bias (4 or 2, N), the initial state (B, S, N)."""
    batch, length, units = states.shape
    gates = groups[0].shape[0]
    lstm = gates == 4
    adjoints = [group.mT for group in groups]
    grad_inputs = states.new_empty(batch, length, gates, units)  # (B, T, G, N)
    grad_bias = states.new_zeros(bias_rows(gates), units)  # (4 or 2, N)
    grad_groups = [torch.zeros_like(group) for group in groups]
    dh = grad_final[:, 0]  # (B, N): of h_t, from the future
    dc = grad_final[:, -1]  # (B, N): used by the LSTM alone
    carried: Tensor | int = 0  # (B, N): what the others pass on beside the products
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
            elif gates == 2:
                f, i, g = kept[t].unbind()  # (B, N)
                da[0] = grad * (previous[:, t - start] * f * (1 - f) - g * i * (1 - i))
                da[1] = grad * i * (1 - g.square())
                carried = grad * f  # (B, N)
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
            own = 2 if gates == 3 else gates  # the GRU's candidate has its own
            grad_inputs[:, t, :own] = da[:own].transpose(0, 1)  # (B, ·, N)
            passed = gated_stages(adjoints, da)[0].sum(0) + carried  # (B, N)
            dh = passed if keep is None else torch.where(keep, passed, grad)  # (B, N)
        if mask is not None:
            previous = previous.where(mask[:, start:end, None], 0)  # (B, C, N): 0 times a NaN would be one
        sums = chunk.sum((1, 2))  # (G, N)
        grad_bias[[0, 1, 3] if gates == 3 else slice(None)] += sums
        flat = previous.transpose(0, 1).reshape(-1, units).expand(gates, -1, -1)  # (G, C·B, N)
        for whole, part in zip(grad_groups, gated_weight_gradients(groups, flat, chunk.flatten(1, 2)), strict=True):
            whole += part  # (G, P, Q)
    grad_initial = torch.stack((dh, dc) if lstm else (dh,), 1)  # (B, S, N)
    return grad_inputs, grad_groups, grad_bias, grad_initial


class _GatedScan(torch.autograd.Function):
    """(states, final_state) of a gated cell whose recurrent matrices are Kronecker products of ``groups``."""

    @staticmethod
    def forward(ctx, inputs, bias, initial_state, mask, *groups):
        states, final_state, cells, kept = _forward(inputs, groups, bias, initial_state, mask)
        ctx.save_for_backward(initial_state, mask, states, cells, kept, *groups)
        return states, final_state

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_states, grad_final):
        initial_state, mask, states, cells, kept, *groups = ctx.saved_tensors
        d_inputs, d_groups, d_bias, d_initial = _backward(
            grad_states, grad_final, groups, initial_state, mask, states, cells, kept
        )
        return d_inputs, d_bias, d_initial, None, *d_groups


if __name__.startswith("kru_hf."):
    # What torch.compile sees: see scan_torch.
    @torch.library.custom_op("kru_hf::gated_scan_torch", mutates_args=())
    def _scan_op(
        inputs: Tensor, factors: Sequence[Tensor], bias: Tensor, initial_state: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        check_scan(gated_cell(inputs), inputs, factors, bias, initial_state, mask)
        return _forward(inputs, merge_gated_groups(factors), bias, initial_state, mask)

    @_scan_op.register_fake
    def _(inputs, factors, bias, initial_state, mask):
        check_scan(gated_cell(inputs), inputs, factors, bias, initial_state, mask)
        batch, length, gates, units = inputs.shape
        return (
            inputs.new_empty(batch, length, units),
            initial_state.new_empty(initial_state.shape),
            inputs.new_empty(length if gates == 4 else 0, batch, units),
            inputs.new_empty(length, kept_planes(gates), batch, units),
        )

    @torch.library.custom_op("kru_hf::gated_scan_torch_backward", mutates_args=())
    def _scan_backward_op(
        d_states: Tensor,
        d_final: Tensor,
        factors: Sequence[Tensor],
        initial_state: Tensor,
        mask: Tensor | None,
        states: Tensor,
        cells: Tensor,
        kept: Tensor,
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        groups = merge_gated_groups(factors)
        d_inputs, d_groups, d_bias, d_initial = _backward(
            d_states, d_final, groups, initial_state, mask, states, cells, kept
        )
        return d_inputs, factor_gradients(factors, d_groups), d_bias, d_initial

    @_scan_backward_op.register_fake
    def _(d_states, d_final, factors, initial_state, mask, states, cells, kept):
        batch, length, units = states.shape
        d_factors = [factor.new_empty(factor.shape) for factor in factors]
        gates = factors[0].shape[0]
        d_inputs = states.new_empty(batch, length, gates, units)
        d_bias = states.new_empty(bias_rows(gates), units)
        return d_inputs, d_factors, d_bias, initial_state.new_empty(initial_state.shape)

    def _setup(ctx, inputs, output) -> None:
        _, factors, _, initial_state, mask = inputs
        states, _, cells, kept = output
        ctx.set_materialize_grads(False)  # none for cells and kept, the largest tensors here
        ctx.mark_non_differentiable(cells, kept)
        ctx.save_for_backward(initial_state, mask, states, cells, kept, *factors)

    def _op_gradient(ctx, d_states, d_final, _cells, _kept):
        initial_state, mask, states, cells, kept, *factors = ctx.saved_tensors
        if d_states is None and d_final is None:
            return None, [None] * len(factors), None, None, None
        d_states = torch.zeros_like(states) if d_states is None else d_states  # (B, T, N)
        d_final = torch.zeros_like(initial_state) if d_final is None else d_final  # (B, S, N)
        d_inputs, d_factors, d_bias, d_initial = _scan_backward_op(
            d_states, d_final, factors, initial_state, mask, states, cells, kept
        )
        return d_inputs, d_factors, d_bias, d_initial, None

    _scan_op.register_autograd(_op_gradient, setup_context=_setup)
    _scan_backward_op.register_autograd(refuse_derivative)
    _compiled: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = _scan_op
else:
    _compiled = None


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
    check_choice("cell", cell, list(GATED_CELLS))
    check_scan(cell, inputs, factors, bias, initial_state, mask)
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], 2 if cell == "lstm" else 1, inputs.shape[3])  # (B, S, N)
    if _compiled is not None and (torch.compiler.is_compiling() or not is_concrete([inputs, *factors])):
        return _compiled(inputs, list(factors), bias, initial_state, mask)[:2]
    return _GatedScan.apply(inputs, bias, initial_state, mask, *merge_gated_groups(factors))
