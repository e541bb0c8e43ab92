"""The portable engine: neighbouring factors merged into at most three dense groups, and an analytic backward.

No autograd graph over time: forward keeps the states alone (and an LSTM's c_t), backward recomputes the cell's local
derivatives from them, a chunk of time at a time, runs the adjoint recurrence, and gets the weight gradients from a few
large products a chunk. float32 and float64 on any device; every cell, by its functions in ``cells.py``.

Letters as in ``cells``; G = R · M matrices: those of a term, term by term.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .cells import Cell, State
from .kronecker import apply_order, factor_gradients, merge_groups
from .scan_reference import Engine, ScanCall

# Steps whose intermediates are alive at once in the backward pass: bounds its memory, amortises its calls.
CHUNK = 16


def stages(groups: Sequence[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(⊗ groups[g]) x[g] for every g: x (G, B, N) to (G, B, N), and what each stage multiplied (G, B·L·R, Q)."""
    count, rows = x.shape[:2]
    sizes, read = [group.shape[2] for group in groups], []
    for index in apply_order([tuple(group.shape[1:]) for group in groups]):
        left, right = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
        x = x.reshape(count, rows, left, sizes[index], right).mT  # (G, B, L, R, Q)
        x = x.reshape(count, -1, sizes[index])  # (G, B·L·R, Q)
        read.append(x)
        x = torch.bmm(x, groups[index].mT)  # (G, B·L·R, P)
        sizes[index] = groups[index].shape[1]
        x = x.reshape(count, rows, left, right, sizes[index]).mT  # (G, B, L, P, R)
    return x.reshape(count, rows, -1), read


def group_gradients(groups: Sequence[Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients (G, P, Q) of the groups for y = (⊗ groups) x, given x (G, B, N) and grad of y (G, B, N)."""
    count, rows = x.shape[:2]
    shapes = [tuple(group.shape[1:]) for group in groups]
    sizes = [p for p, _ in shapes]
    _, read = stages(groups, x)
    result: list[Tensor] = [x] * len(groups)
    for index, stage in zip(reversed(apply_order(shapes)), reversed(read), strict=True):
        left, right = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
        grad = grad.reshape(count, rows, left, sizes[index], right).mT  # (G, B, L, R, P)
        grad = grad.reshape(count, -1, sizes[index])  # (G, B·L·R, P)
        # Conjugates are written out: a lazy one is a bit of the tensor, which compiled code can fail to see.
        result[index] = torch.bmm(grad.mT, stage.conj_physical())  # (G, P, Q)
        sizes[index] = shapes[index][1]
        grad = torch.bmm(grad, groups[index].conj_physical())  # (G, B·L·R, Q)
        grad = grad.reshape(count, rows, left, right, sizes[index]).mT  # (G, B, L, Q, R)
    return result


def _matrices(factors: Sequence[Tensor], cell: Cell) -> list[Tensor]:
    """Factors (R, K, P, Q) to (G, P, Q)."""
    return [cell.to_matrices(factor.transpose(0, 1)).transpose(0, 1).flatten(0, 1) for factor in factors]


def _products(groups: Sequence[Tensor], h: Tensor, matrices: int) -> Tensor:
    """W h for every matrix of the cell: h (B, N) to (M, B, N), the terms summed."""
    count = len(groups[0])
    y, _ = stages(groups, h.expand(count, *h.shape))  # (G, B, N)
    return y if count == matrices else y.view(-1, matrices, *h.shape).sum(0)


def _over_terms(x: Tensor, count: int) -> Tensor:
    """(M, B, N) to (G, B, N): the same for every term."""
    return x if count == len(x) else x.repeat(count // len(x), 1, 1)


def _read_times(times: Tensor | None) -> Tensor | None:
    """mask or starts (B, T) to (T, B, 1), which stands beside (B, N) at a step and beside (…, C, B, N) in a chunk."""
    return None if times is None else times.mT.unsqueeze(-1)


def _select(times: Tensor | None, at: int | slice, taken: State, other: State | None = None) -> State:
    """``taken`` where ``times`` holds at the step, or the chunk of steps, else ``other`` or 0, so that no NaN leaks."""
    if times is None:
        return taken
    if other is None:
        return tuple(torch.where(times[at], a, False) for a in taken)  # the 0 of every dtype
    return tuple(torch.where(times[at], a, b) for a, b in zip(taken, other, strict=True))


def _read_bias(call: ScanCall, steps: int) -> Tensor | None:
    """The bias as it stands beside (M, B, N), with ``steps`` = 1, or (M, C, B, N); None where none is read."""
    return None if call.activation == "identity" else call.bias.reshape(-1, *[1] * steps, call.bias.shape[-1])


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """states, final_state and, with ``save``, what of the state ``states`` lacks. The contract is ``kron_scan``'s."""
    inputs, cell = call.inputs, call.cell
    groups, b = merge_groups(_matrices(call.terms(), cell)), _read_bias(call, 1)
    mask, starts = _read_times(call.mask), _read_times(call.starts)
    goes_on = None if starts is None else ~starts
    states = inputs.new_empty(cell.states_shape(inputs.shape))
    saved = inputs.new_empty(call.saved_shape() if save else (0,))
    state = cell.to_state(call.first_state())
    for t in range(inputs.shape[1]):
        state = _select(goes_on, t, state)
        products = _products(groups, state[0], cell.matrices)  # (M, B, N)
        new = cell.step(products, cell.to_matrices(inputs[:, t].transpose(0, 1)), b, state)
        state = _select(mask, t, new, state)
        if cell.complex:
            states[:, t, 0], states[:, t, 1] = state[0].real, state[0].imag
        else:
            states[:, t] = state[0]
        if save:
            for index, kept in enumerate(state[1:]):
                saved[:, t, index] = kept
    return states, cell.from_state(state), saved


def _before(states: Tensor, saved: Tensor, first: State, start: int, end: int, cell: Cell) -> State:
    """The states (C, B, N) that the steps start … end − 1 began with, before what ``starts`` clears."""
    here = slice(max(start - 1, 0), end - 1)
    h = states[:, here].movedim(1, 0)  # (C, B, N) or (C, B, 2, N)
    rest = [saved[:, here, index].movedim(1, 0) for index in range(cell.kept)]
    before = (*(cell.to_state(h) if cell.complex else (h,)), *rest)
    if start == 0:
        before = tuple(torch.cat((a.unsqueeze(0), b)) for a, b in zip(first, before, strict=True))
    return before


def backward(
    call: ScanCall, states: Tensor, saved: Tensor, d_states: Tensor | None, d_final: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of inputs (B, T, K, N), factors, bias and initial state (B, S, N)."""
    inputs, bias, cell = call.inputs, call.bias, call.cell
    batch, length, _, units = inputs.shape
    factors = call.terms()
    matrices = _matrices(factors, cell)
    groups, b = merge_groups(matrices), _read_bias(call, 2)
    terms, count = len(factors[0]), len(groups[0])
    adjoints = [group.mT.conj_physical() for group in groups]  # (G, Q, P)
    mask, starts, first = _read_times(call.mask), _read_times(call.starts), cell.to_state(call.first_state())
    goes_on = None if starts is None else ~starts
    d_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    d_bias, d_groups = torch.zeros_like(bias), [torch.zeros_like(group) for group in groups]
    d = tuple(torch.zeros_like(s) for s in first) if d_final is None else cell.to_state(d_final)
    for end in range(length, 0, -CHUNK):
        start = max(end - CHUNK, 0)
        chunk = slice(start, end)
        before = _select(goes_on, chunk, _before(states, saved, first, start, end, cell))  # (C, B, N) each
        before = _select(mask, chunk, before)  # 0 times a NaN would spoil the weights' gradient
        kept = [saved[:, chunk, index].movedim(1, 0) for index in range(cell.kept)]
        after = (before[0].new_empty(0), *kept)  # h_t is not asked for
        flat = before[0].flatten(0, 1)  # (C·B, N)
        products = _products(groups, flat, cell.matrices).unflatten(1, (-1, batch))  # (M, C, B, N)
        u = cell.to_matrices(inputs[:, chunk].permute(2, 1, 0, 3))  # (M, C, B, N)
        local = _select(mask, chunk, cell.derivatives(products, u, b, before, after))  # (…, C, B, N) each
        del products, u, before, after, kept  # as large as a chunk of the inputs each
        by_u: list[Tensor] = []  # of the steps, last first
        by_products: list[Tensor] = []
        by_h: list[Tensor] = []
        for t in range(end - 1, start - 1, -1):
            if d_states is not None:
                d_h = cell.to_state(d_states[:, t])[0] if cell.complex else d_states[:, t]
                d = (d[0] + d_h, *d[1:])
            taken = _select(mask, t, d)
            d_u, d_products, direct = cell.step_backward(tuple(x[..., t - start, :, :] for x in local), taken)
            passed = stages(adjoints, _over_terms(d_products, count))[0].sum(0)  # (B, N)
            passed = passed if direct[0] is None else passed + direct[0]
            rest = tuple(x for x in direct[1:] if x is not None)
            d = _select(goes_on, t, _select(mask, t, (passed, *rest), d))
            for steps, value in zip((by_u, by_products, by_h), (d_u, d_products, taken[0]), strict=True):
                steps.append(value)
        one = by_u[0] is by_products[0]
        d_u = torch.stack(by_u[::-1], 1)  # (M, C, B, N)
        d_products = d_u if one else torch.stack(by_products[::-1], 1)  # (M, C, B, N)
        d_u, d_products = _select(mask, chunk, (d_u, d_products))  # whatever held steps would compute
        d_inputs[:, chunk] = cell.to_planes(d_u).permute(2, 1, 0, 3)
        d_bias += cell.bias_gradient(local, torch.stack(by_h[::-1]), d_u, d_products).view(bias.shape)
        read, grad = flat.expand(count, *flat.shape), _over_terms(d_products.flatten(1, 2), count)
        for total, part in zip(d_groups, group_gradients(groups, read, grad), strict=True):
            total += part  # (G, P, Q)
    by_factor = [grad.unflatten(0, (terms, -1)) for grad in factor_gradients(matrices, d_groups)]  # (R, M, P, Q)
    d_factors = [cell.to_planes(grad.transpose(0, 1)).transpose(0, 1).contiguous() for grad in by_factor]
    d_factors = [grad.view(factor.shape) for grad, factor in zip(d_factors, call.factors, strict=True)]
    return d_inputs, d_factors, d_bias, cell.from_state(d)


ENGINE = Engine(forward, backward)
