"""A call of ``kron_scan`` as every engine gets it, what an engine is, and the checks that kernels rely on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import Cell

# Name, tensor, and the shape and dtype that it must have.
Named = tuple[str, Tensor | None, tuple[int, ...], torch.dtype]


class ScanCall(NamedTuple):
    """Arguments of ``kron_scan``, with their shapes there; factors (R, K, P_f, Q_f), the cell an entry of CELLS."""

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

    def state_like(self) -> Tensor:
        """A new tensor (B, S, N), not filled."""
        inputs = self.inputs
        return inputs.new_empty(inputs.shape[0], len(self.cell.states), inputs.shape[3])

    def first_state(self) -> Tensor:
        """The initial state (B, S, N), zeros if none is given."""
        return self.state_like().zero_() if self.initial_state is None else self.initial_state


class Engine(NamedTuple):
    """What an engine's module offers.

    unavailable_reason(cell or None) -> why it cannot run (the cell, if one is given) in this process, or None
    obstacle(inputs, factors, cell) -> why it cannot run these tensors, or None
    saved_shape(inputs.shape, cell) -> shape of ``saved``
    forward(call, save) -> states, final_state, saved: one tensor, what backward needs beside states, empty without
        ``save``
    backward(call, states, saved, d_states, d_final) -> gradients of inputs, factors (a list), bias and initial state;
        one of the last two arguments may be None
    """

    unavailable_reason: Callable[..., str | None]
    obstacle: Callable[..., str | None]
    saved_shape: Callable[..., tuple[int, ...]]
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, list[Tensor], Tensor, Tensor]]


def _check_factors(inputs: Tensor, factors: Sequence[Tensor], planes: int) -> None:
    if not factors:
        raise ValueError(f"factors must hold at least one ({planes}, P, Q) tensor, got none")
    rows = columns = 1
    terms = len(factors[0])
    for index, factor in enumerate(factors):
        shape = factor.shape
        if len(shape) != 4 or shape[1] != planes or 0 in shape:
            given = tuple(shape[1:] if len(shape) == 4 and shape[0] == 1 else shape)  # R = 1 need not be given
            raise ValueError(
                f"factors[{index}] must have the shape ({planes}, P, Q) or (R, {planes}, P, Q), got {given}"
            )
        if shape[0] != terms:
            raise ValueError(f"factors must have the same terms R, got {tuple(factors[0].shape)} and {tuple(shape)}")
        rows, columns = rows * shape[2], columns * shape[3]
        _check_kind("factors[{}]", factor, inputs, inputs.dtype, index)
    units = inputs.shape[3]
    if (rows, columns) != (units, units):
        shapes = " ".join(f"{factor.shape[2]}x{factor.shape[3]}" for factor in factors)
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
