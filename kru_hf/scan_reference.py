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

After it, what an engine is and the checks that kernels rely on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import Cell
from .kronecker import kron_multiply

# Name, tensor, and the shape and dtype that it must have.
Named = tuple[str, Tensor | None, tuple[int, ...], torch.dtype]


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with its numbers in memory in the order of the indices, signs included."""
    return tensor.resolve_neg().contiguous()


class ScanCall(NamedTuple):
    """Arguments of ``kron_scan``, with their shapes there; the cell an entry of CELLS."""

    inputs: Tensor
    factors: Sequence[Tensor]
    bias: Tensor
    initial_state: Tensor | None
    mask: Tensor | None
    starts: Tensor | None
    cell: Cell
    activation: str

    @classmethod
    def of(cls, cell: Cell, activation: str, tensors: Sequence[Any]) -> "ScanCall":
        """The call whose ``tensors()`` these are."""
        inputs, bias, initial_state, mask, starts, *factors = tensors
        return cls(inputs, factors, bias, initial_state, mask, starts, cell, activation)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them in a row: inputs, bias, initial_state, mask, starts, and the factors."""
        return (self.inputs, self.bias, self.initial_state, self.mask, self.starts, *self.factors)

    def terms(self) -> list[Tensor]:
        """The factors, (R, K, P_f, Q_f) each, R = 1 where they have no such axis."""
        return [factor if factor.dim() == 4 else factor.unsqueeze(0) for factor in self.factors]

    def state_like(self) -> Tensor:
        """A new tensor (B, S, N), not filled."""
        inputs = self.inputs
        return inputs.new_empty(inputs.shape[0], len(self.cell.states), inputs.shape[3])

    def saved_shape(self, beside: int = 0) -> tuple[int, ...]:
        """(B, T, ·, N): what of the state ``states`` does not hold, and so many planes beside."""
        batch, length, _, units = self.inputs.shape
        return (batch, length, self.cell.kept + beside, units)

    def first_state(self) -> Tensor:
        """The initial state (B, S, N), zeros if none is given."""
        return self.state_like().zero_() if self.initial_state is None else self.initial_state


def scan_reference(call: ScanCall) -> tuple[Tensor, Tensor]:
    """The oracle of every engine; the contract is that of ``kron_scan``. Returns states and final_state, a copy."""
    inputs, factors, bias, mask, starts = call.inputs, call.terms(), call.bias, call.mask, call.starts
    cell, activation = call.cell, call.activation
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


class Engine(NamedTuple):
    """What an engine's module offers.

    forward(call, save) -> states, final_state, saved: what backward needs beside states, ``call.saved_shape(beside)``,
        empty without ``save``
    backward(call, states, saved, d_states, d_final) -> gradients of inputs, factors (a list), bias and initial state;
        one of the last two arguments may be None
    obstacle(cell, inputs, factors) -> why it cannot run in this process, the cell or the tensors, as far as they are
        given, or None
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, list[Tensor], Tensor, Tensor]]
    obstacle: Callable[..., str | None] = lambda *_: None
    beside: int = 0


def _check_factors(inputs: Tensor, factors: Sequence[Tensor], planes: int) -> None:
    if not factors:
        raise ValueError(f"factors must hold at least one ({planes}, P, Q) tensor, got none")
    rows = columns = terms = 1
    for index, factor in enumerate(factors):
        shape = factor.shape
        if not 3 <= len(shape) <= 4 or shape[-3] != planes or 0 in shape:
            allowed = f"({planes}, P, Q) or (R, {planes}, P, Q)"
            raise ValueError(f"factors[{index}] must have the shape {allowed}, got {tuple(shape)}")
        given = shape[0] if len(shape) == 4 else 1
        terms = given if index == 0 else terms
        if given != terms:
            raise ValueError(f"factors must have the same terms R, got {tuple(factors[0].shape)} and {tuple(shape)}")
        rows, columns = rows * shape[-2], columns * shape[-1]
        _check_kind("factors[{}]", factor, inputs, inputs.dtype, index)
    units = inputs.shape[3]
    if (rows, columns) != (units, units):
        shapes = " ".join(f"{factor.shape[-2]}x{factor.shape[-1]}" for factor in factors)
        raise ValueError(f"factors {shapes} multiply to {rows}x{columns}, but the inputs have N = {units} units")


def _check_kind(name: str, tensor: Tensor, inputs: Tensor, dtype: torch.dtype, index: int = 0) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name.format(index)} must be a dense tensor, got the layout {tensor.layout}")
    if tensor.dtype != dtype or tensor.device != inputs.device:
        found = f"{tensor.dtype} on {tensor.device}"
        raise TypeError(f"{name.format(index)} must be {dtype} on {inputs.device} like the inputs, got {found}")


def check_scan(call: ScanCall, others: Sequence[Named] = ()) -> None:
    """Raise `ValueError` or `TypeError` naming the argument, its value and what is allowed."""
    inputs, cell = call.inputs, call.cell
    if inputs.dim() != 4 or inputs.shape[2] != cell.planes or 0 in inputs.shape:
        allowed = f"(B, T, {cell.planes}, N) with no empty axis"
        raise ValueError(f"inputs of the cell {cell.name!r} must have the shape {allowed}, got {tuple(inputs.shape)}")
    dtype = inputs.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"inputs must be float32 or float64 (the state is never kept in less), got {dtype}")
    _check_kind("inputs", inputs, inputs, dtype)
    _check_factors(inputs, call.factors, cell.planes)
    batch, length, _, units = inputs.shape
    for name, tensor, shape, wanted in (
        ("bias", call.bias, cell.bias_shape(units), dtype),
        ("initial_state", call.initial_state, (batch, len(cell.states), units), dtype),
        ("mask", call.mask, (batch, length), torch.bool),
        ("starts", call.starts, (batch, length), torch.bool),
        *others,
    ):
        if tensor is not None:
            if tensor.shape != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
            _check_kind(name, tensor, inputs, wanted)
